//! The system that a demo plays against: the one that runs on the data directory, or one of its own.
//!
//! One of its own cannot outlive us: a shell holds a pipe whose other end is ours, and when that closes, however we came
//! to our end, it asks the system to stop.

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use super::say;
use crate::connection::Connection;
use crate::terminal::Lines;

pub(crate) struct System {
    pub(crate) connection: Connection,
    own: Option<Own>,
}

struct Own {
    shell: Child,
    _directory: TempDir,
}

/// The first start on a machine may have to download its servers.
const START_TIME: Duration = Duration::from_secs(300);
const STOP_TIME: Duration = Duration::from_secs(30);
const ANSWER_TIME: Duration = Duration::from_secs(5);

const SHELL: &str = r#"exec 3<&0
"$@" 3<&- </dev/null & system=$!
(cat <&3 >/dev/null; kill -TERM $system 2>/dev/null) &
exec 3<&-
trap : INT TERM
wait $system; status=$?
while kill -0 $system 2>/dev/null; do wait $system; status=$?; done
exit $status"#;

impl System {
    pub(crate) async fn find_or_start(data_dir: &Path, fresh: bool, lines: &mut Lines) -> anyhow::Result<Self> {
        if !fresh {
            // Of a system that was killed the file is left.
            if let Some(connection) = Connection::read(data_dir)?
                && answers(&connection).await
            {
                return Ok(Self { connection, own: None });
            }
            let place = data_dir.display();
            say(lines, &format!("demo: no daybook runs on {place}; starting one on a temporary directory"))?;
        }
        Self::start().await
    }

    pub(crate) fn base_url(&self) -> &str {
        &self.connection.base_url
    }

    async fn start() -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("daybook-demo-").tempdir()?;
        // When we are root, the servers' unprivileged user passes through.
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o711))?;
        let log = directory.path().join("daybook.log");
        let output = File::create(&log)?;
        let mut shell = Command::new("/bin/sh")
            .args(["-c", SHELL, "daybook-demo"])
            .arg(std::env::current_exe().context("this program's own path")?)
            .args(["up", "--listen", "127.0.0.1:0", "--no-demo", "--allow-local-webhooks", "--data-dir"])
            .arg(directory.path())
            // Ours are private: nobody's own servers are meant by accident.
            .env_remove("DAYBOOK_DATABASE_URL")
            .env_remove("DAYBOOK_NATS_URL")
            .stdin(Stdio::piped())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0) // Ctrl-C is ours to pass on, once everything is said
            .spawn()
            .context("starting a daybook of its own")?;
        let began = Instant::now();
        loop {
            if let Some(connection) = Connection::read(directory.path()).ok().flatten() {
                return Ok(Self { connection, own: Some(Own { shell, _directory: directory }) });
            }
            let ended = shell.try_wait()?;
            if ended.is_some() || START_TIME < began.elapsed() {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                let last: Vec<_> = said.lines().rev().take(10).collect();
                let last: Vec<_> = last.into_iter().rev().collect();
                bail!("the daybook of its own is not ready after {:?}:\n{}", began.elapsed(), last.join("\n"));
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Stops the one of its own; another one goes on.
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        let Some(mut own) = self.own else { return Ok(()) };
        drop(own.shell.stdin.take());
        let status = timeout(STOP_TIME, own.shell.wait()).await.context("the daybook of its own does not stop")??;
        if !status.success() {
            bail!("the daybook of its own ended with {status}");
        }
        Ok(())
    }
}

async fn answers(connection: &Connection) -> bool {
    let Ok(client) = reqwest::Client::builder().no_proxy().timeout(ANSWER_TIME).build() else { return false };
    let asked = client.get(format!("{}/readyz", connection.base_url)).send().await;
    asked.is_ok_and(|answer| answer.status().is_success())
}
