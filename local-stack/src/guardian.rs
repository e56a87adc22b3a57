//! The guardian: a small shell between us and each server, so that no server outlives us.
//!
//! It starts the server, hands on the signals we write to its standard input, ends with the server's status, and
//! takes the end of that input as our death: then it ends the server itself. A pipe closes however its holder dies,
//! `kill -9` included, and whichever thread started the child, which is what `PR_SET_PDEATHSIG` cannot promise.
//! Every write end is close-on-exec, so no other child keeps it open.
//!
//! Guardian and server have a process group of their own: Ctrl-C reaches only us, and we stop them in order.
//! It knows nothing of Postgres or NATS.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Write},
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use crate::data_directory::User;

/// Descriptors 8 and 9 are only held, by server and guardian: whoever has the other end, or the lock, learns from
/// their closing that all of them are gone. The watcher waits ten seconds at most before it uses SIGKILL.
/// SIGHUP is ignored because the kernel sends it to the whole group when we die while one of them is stopped: Postgres
/// takes it as a word about its settings, and would live on without a guardian.
const SCRIPT: &str = r#"
trap '' HUP
log=$1; last_signal=$2; shift 2
exec 3<&0 8>&1 9>&2 </dev/null >>"$log" 2>&1
"$@" 3<&- &
server=$!
(
    while read -r signal <&3; do kill -s "$signal" "$server"; done
    kill -s "$last_signal" "$server"
    tries=0
    while kill -0 "$server" && [ "$tries" -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
    kill -s KILL "$server"
) >/dev/null 2>&1 &
watcher=$!
wait "$server"; status=$?
kill "$watcher"; wait "$watcher"
exit "$status"
"#;

const POLL: Duration = Duration::from_millis(10);

/// How to run a server, again and again.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<OsString>,
    /// Where a downloaded program finds its libraries; empty for one of the machine's own.
    pub(crate) libraries: Vec<PathBuf>,
    pub(crate) working_directory: PathBuf,
    pub(crate) log: PathBuf,
    /// Sent to the server when we are gone.
    pub(crate) last_signal: &'static str,
    /// Whose rights the guardian and the server have; ours if `None`.
    pub(crate) user: Option<User>,
}

/// What a server and its guardian hold open for as long as they live.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) lock: File,
    pub(crate) temporary: Option<OwnedFd>,
}

impl Held {
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let temporary = self.temporary.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok(Self { lock: self.lock.try_clone()?, temporary })
    }
}

/// A running server with its guardian. Dropping it ends both, as our death would.
#[derive(Debug)]
pub(crate) struct Guardian {
    shell: Child,
    signals: ChildStdin,
}

impl Guardian {
    pub(crate) fn spawn(launch: &Launch, held: &Held) -> io::Result<Self> {
        keep_previous(&launch.log)?;
        let Held { lock, temporary } = held.try_clone()?;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", SCRIPT, "daybook-guardian"]).arg(&launch.log).arg(launch.last_signal);
        if !launch.libraries.is_empty() {
            // Set by `env` for the server alone: the shell and its commands stay on the machine's libraries.
            let mut assignment = OsString::from("LD_LIBRARY_PATH=");
            assignment.push(library_path(&launch.libraries));
            command.arg("env").arg(assignment);
        }
        command
            .arg(&launch.program)
            .args(&launch.arguments)
            .current_dir(&launch.working_directory)
            // A clean environment: the caller's PGPORT, PGOPTIONS or LC_ALL must not reach a private server.
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(temporary.map_or_else(Stdio::null, Stdio::from))
            .stderr(Stdio::from(lock))
            .process_group(0);
        if let Some(user) = &launch.user {
            command.uid(user.uid).gid(user.gid); // also gives up our supplementary groups
        }
        let mut shell = command.spawn()?;
        let signals = shell.stdin.take().expect("standard input was asked to be a pipe");
        Ok(Self { shell, signals })
    }

    /// Sends a signal, named without SIG, to the server. A server that has ended is left alone.
    pub(crate) fn signal(&mut self, name: &str) {
        // The only failure is a closed pipe, which means that the guardian, and so the server, has ended.
        self.signals.write_all(format!("{name}\n").as_bytes()).ok();
    }

    /// The server's status if it has ended.
    pub(crate) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.shell.try_wait()
    }

    /// Waits for the server's end, `bound` at most; `None` if it still runs then.
    pub(crate) async fn wait(&mut self, bound: Duration) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + bound;
        loop {
            let ended = self.ended()?;
            if ended.is_some() || deadline <= Instant::now() {
                return Ok(ended);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Sends each signal in turn, and the next when its time is over. The last should be KILL.
    pub(crate) async fn end(mut self, escalation: &[(&str, Duration)]) -> io::Result<()> {
        for (signal, bound) in escalation {
            self.signal(signal);
            if self.wait(*bound).await?.is_some() {
                return Ok(());
            }
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "the process survived SIGKILL"))
    }
}

/// The status of a server that has ended, which is then no longer there. One that was asked to end is not.
pub(crate) fn take_dead(running: &mut Option<Guardian>) -> Option<ExitStatus> {
    // A status that cannot be had is no reason to start a second server beside the first.
    let status = running.as_mut()?.ended().ok()??;
    *running = None;
    Some(status)
}

/// The end of a server's log, for the error that says it did not start.
pub(crate) fn log_tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

pub(crate) fn library_path(libraries: &[PathBuf]) -> OsString {
    std::env::join_paths(libraries).expect("the download refuses a cache path with a colon")
}

/// A log holds one run; that of the run before stays beside it. So logs are bounded by what two runs say.
fn keep_previous(log: &Path) -> io::Result<()> {
    let mut previous = log.as_os_str().to_owned();
    previous.push(".previous");
    match std::fs::rename(log, previous) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
