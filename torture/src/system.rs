//! The system under torture: servers of its own that keep what they acknowledged, and `daybook up` as a process in front
//! of whose servers our wires stand.
//!
//! Left out: when what happens to it (`script.rs`, `act.rs`).

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use local_stack::Stack;
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::time::sleep;
use url::Url;

use crate::wire::{Protocol, Wire};

/// What a start may take on a busy machine. It restarts from a log that grows.
const START_TIME: Duration = Duration::from_secs(90);

/// Short, for a run is short: a receiver that fails sometimes must never exhaust it.
const WEBHOOK_SCHEDULE: &str = "1s,1s,1s,1s,2s,2s,2s,2s,4s,4s,4s,4s,8s,8s,8s,8s,8s,8s,8s,8s";

/// The bank is asked soon: a callback that went to a dead process comes again, but not at once.
const ASK_AFTER: &str = "3s";

pub(crate) struct System {
    program: PathBuf,
    directory: PathBuf,
    /// Where Daybook listens, after each start: its clients and the bank know it by this.
    port: u16,
    pub(crate) stack: Stack,
    pub(crate) postgres: Wire,
    pub(crate) nats: Wire,
    child: Mutex<Option<Child>>,
    /// How often it was found to have ended without having been killed.
    gave_up: AtomicU32,
}

/// What a start leaves for its clients.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Connection {
    pid: u32,
    pub(crate) base_url: String,
    pub(crate) bank_url: String,
    pub(crate) admin: Credentials,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Credentials {
    pub(crate) client_id: String,
    pub(crate) client_secret: String,
}

impl System {
    /// Servers and wires; Daybook is not started yet.
    pub(crate) async fn prepare(program: PathBuf, directory: &Path) -> anyhow::Result<Self> {
        let servers = directory.join("servers-of-the-run");
        // With what a deployment has: what was acknowledged survives that a server is killed.
        let stack = Stack::start(&servers, local_stack::Options::default()).await.context("starting the servers")?;
        let postgres = Wire::to(address_of(stack.database_url())?, Protocol::Postgres).await?;
        let nats = Wire::to(address_of(stack.nats_url())?, Protocol::Nats).await?;
        Ok(Self {
            program,
            directory: directory.to_owned(),
            port: free_port()?,
            stack,
            postgres,
            nats,
            child: Mutex::new(None),
            gave_up: AtomicU32::new(0),
        })
    }

    /// Starts the process; whether it is ready nobody knows yet.
    pub(crate) async fn spawn(&self) -> anyhow::Result<()> {
        let log = std::fs::File::options().create(true).append(true).open(self.directory.join("daybook.log"));
        let log = log.context("opening the log of the process")?;
        let child = Command::new(&self.program)
            .args(["up", "--no-demo", "--allow-local-webhooks", "--webhook-schedule", WEBHOOK_SCHEDULE])
            .args(["--top-up-ask-after", ASK_AFTER, "--listen", &format!("127.0.0.1:{}", self.port), "--data-dir"])
            .arg(self.data_directory())
            .env("DAYBOOK_DATABASE_URL", through(self.stack.database_url(), &self.postgres)?)
            .env("DAYBOOK_NATS_URL", through(self.stack.nats_url(), &self.nats)?)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("sharing the log of the process")?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        *self.child.lock().await = Some(child);
        Ok(())
    }

    /// Waits until the running process says that it is ready. One that gives up meanwhile is counted and started again.
    pub(crate) async fn ready(&self) -> anyhow::Result<Connection> {
        let begin = Instant::now();
        loop {
            let connection = std::fs::read_to_string(self.data_directory().join("connection.json")).ok();
            let connection: Option<Connection> = connection.and_then(|text| serde_json::from_str(&text).ok());
            let id = self.child.lock().await.as_ref().and_then(Child::id);
            if let Some(connection) = connection.filter(|connection| Some(connection.pid) == id) {
                return Ok(connection);
            }
            self.revive().await?;
            if START_TIME < begin.elapsed() {
                bail!("daybook is not ready {START_TIME:?} after its start; see {}", self.directory.display());
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Starts the process again if it has ended by itself, as a service manager would, and counts that: nothing that is
    /// done to it here is a reason to end.
    pub(crate) async fn revive(&self) -> anyhow::Result<()> {
        let ended = match self.child.lock().await.as_mut() {
            Some(child) => child.try_wait().context("looking after the process")?,
            None => None,
        };
        if let Some(status) = ended {
            tracing::warn!(%status, "daybook has ended by itself");
            self.gave_up.fetch_add(1, Ordering::Relaxed);
            sleep(Duration::from_millis(200)).await;
            self.spawn().await?;
        }
        Ok(())
    }

    pub(crate) fn times_it_gave_up(&self) -> u32 {
        self.gave_up.load(Ordering::Relaxed)
    }

    /// SIGKILL; returns when it is gone.
    pub(crate) async fn kill(&self) -> anyhow::Result<()> {
        if let Some(mut child) = self.child.lock().await.take() {
            child.kill().await.context("killing daybook")?;
        }
        Ok(())
    }

    pub(crate) async fn pause(&self) -> anyhow::Result<()> {
        self.signal(Signal::STOP).await
    }

    pub(crate) async fn go_on(&self) -> anyhow::Result<()> {
        self.signal(Signal::CONT).await
    }

    /// Kills the bus, takes everything it has stored, and starts it empty.
    pub(crate) async fn wipe_nats(&self) -> anyhow::Result<()> {
        self.stack.kill_nats().await?;
        let stored = self.directory.join("servers-of-the-run/servers/nats/jetstream");
        anyhow::ensure!(stored.exists(), "{} is not where the bus keeps its data", stored.display());
        std::fs::remove_dir_all(&stored).with_context(|| format!("removing {}", stored.display()))?;
        Ok(self.stack.start_nats().await?)
    }

    /// A command of the program on the servers themselves, past the wires: its output if it succeeds.
    pub(crate) async fn command(&self, arguments: &[&str]) -> anyhow::Result<Result<String, String>> {
        let output = Command::new(&self.program)
            .args(arguments)
            .env("DAYBOOK_DATABASE_URL", self.stack.database_url())
            .stdin(Stdio::null())
            .output()
            .await
            .with_context(|| format!("running {arguments:?}"))?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        Ok(if output.status.success() { Ok(said) } else { Err(said) })
    }

    pub(crate) async fn end(self) -> anyhow::Result<()> {
        self.kill().await?;
        self.stack.stop().await.context("stopping the servers")
    }

    async fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let id = self.child.lock().await.as_ref().and_then(Child::id).context("daybook does not run")?;
        let id = i32::try_from(id).ok().and_then(Pid::from_raw).context("a process has an id")?;
        kill_process(id, signal).with_context(|| format!("sending {signal:?}"))
    }

    fn data_directory(&self) -> PathBuf {
        self.directory.join("daybook")
    }
}

fn address_of(url: &str) -> anyhow::Result<SocketAddr> {
    let url = Url::parse(url).context("reading a server's address")?;
    let port = url.port().context("a private server has a port")?;
    Ok(SocketAddr::from(([127, 0, 0, 1], port)))
}

fn through(url: &str, wire: &Wire) -> anyhow::Result<String> {
    let mut url = Url::parse(url).context("reading a server's address")?;
    url.set_port(Some(wire.port)).ok().context("a server's address has a port")?;
    Ok(url.into())
}

/// Below the ports that the kernel gives to whoever connects: while Daybook is dead nobody takes its port by chance.
fn free_port() -> anyhow::Result<u16> {
    let offset = u16::try_from(std::process::id() % 10_000).expect("less than 10,000");
    let mut ports = (0..10_000).map(|step| 20_000 + (offset + step) % 10_000);
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).context("no port is free")
}
