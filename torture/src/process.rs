//! A process that things are done to.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::time::sleep;

pub(crate) struct Process {
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(&'static str, String)>,
    log: PathBuf,
    child: Mutex<Option<Child>>,
    /// How often it was found to have ended without having been killed.
    gave_up: AtomicU32,
}

impl Process {
    /// Not started yet.
    pub(crate) fn new(
        program: PathBuf,
        arguments: Vec<String>,
        environment: Vec<(&'static str, String)>,
        log: PathBuf,
    ) -> Self {
        Self { program, arguments, environment, log, child: Mutex::new(None), gave_up: AtomicU32::new(0) }
    }

    pub(crate) async fn spawn(&self) -> anyhow::Result<()> {
        let log = std::fs::File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("opening {}", self.log.display()))?;
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("sharing the log of the process")?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        *self.child.lock().await = Some(child);
        Ok(())
    }

    pub(crate) async fn id(&self) -> Option<u32> {
        self.child.lock().await.as_ref().and_then(Child::id)
    }

    /// Starts it again if it has ended by itself, as a service manager would, and counts that: nothing that is done to
    /// it here is a reason to end.
    pub(crate) async fn revive(&self) -> anyhow::Result<()> {
        let ended = match self.child.lock().await.as_mut() {
            Some(child) => child.try_wait().context("looking after the process")?,
            None => None,
        };
        if let Some(status) = ended {
            tracing::warn!(program = %self.program.display(), %status, "it has ended by itself");
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
            child.kill().await.context("killing a process")?;
        }
        Ok(())
    }

    pub(crate) async fn pause(&self) -> anyhow::Result<()> {
        self.signal(Signal::STOP).await
    }

    pub(crate) async fn go_on(&self) -> anyhow::Result<()> {
        self.signal(Signal::CONT).await
    }

    async fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let id = self.id().await.context("the process does not run")?;
        let id = i32::try_from(id).ok().and_then(Pid::from_raw).context("a process has an id")?;
        kill_process(id, signal).with_context(|| format!("sending {signal:?}"))
    }
}
