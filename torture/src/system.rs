//! The system under torture: servers of its own that keep what they acknowledged, `daybook up` as a process in front of
//! whose servers our wires stand, and beside it second services on the same log.
//!
//! Left out: what happens to it, and when (`script.rs`, `act.rs`).

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use local_stack::Stack;
use serde::Deserialize;
use tokio::process::Command;
use tokio::time::sleep;
use url::Url;

use crate::process::Process;
use crate::wire::{Protocol, Wire};

/// What a start may take on a busy machine. It restarts from a log that grows.
const START_TIME: Duration = Duration::from_secs(90);

/// Short, for a run is short; and long enough that a receiver which fails sometimes never exhausts it.
const WEBHOOK_SCHEDULE: &str = "1s,1s,1s,1s,2s,2s,2s,2s,4s,4s,4s,4s,8s,8s,8s,8s,8s,8s,8s,8s";

/// The bank is asked soon: a callback that went to a dead process comes again, but not at once.
const ASK_AFTER: &str = "3s";

pub(crate) struct System {
    program: PathBuf,
    directory: PathBuf,
    pub(crate) stack: Stack,
    /// In front of the servers that `daybook up` knows.
    pub(crate) postgres: Wire,
    pub(crate) nats: Wire,
    pub(crate) daybook: Process,
    /// In front of the same servers: what happens to the first one's connections does not happen to the second ones'.
    second_postgres: Wire,
    second_nats: Wire,
    seconds: Vec<Second>,
}

/// What runs a second time, beside the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    Engine,
    Relay,
    Projector,
    Dispatcher,
}

struct Second {
    service: Service,
    url: String,
    process: Process,
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

impl Service {
    pub(crate) const ALL: [Self; 4] = [Self::Engine, Self::Relay, Self::Projector, Self::Dispatcher];

    pub(crate) const fn program(self) -> &'static str {
        match self {
            Self::Engine => "command-api",
            Self::Relay => "relay",
            Self::Projector => "projector",
            Self::Dispatcher => "webhook-dispatcher",
        }
    }
}

impl System {
    /// Servers and wires; Daybook is not started yet.
    pub(crate) async fn prepare(program: PathBuf, directory: &Path) -> anyhow::Result<Self> {
        // With what a deployment has: what was acknowledged survives that a server is killed.
        let options = local_stack::Options::default();
        let stack = Stack::start(&directory.join(SERVERS), options).await.context("starting the servers")?;
        let (at_postgres, at_nats) = (address_of(stack.database_url())?, address_of(stack.nats_url())?);
        let postgres = Wire::to(at_postgres, Protocol::Postgres).await?;
        let nats = Wire::to(at_nats, Protocol::Nats).await?;
        // The same address after each start: its clients and the bank know it by this.
        let listen = format!("127.0.0.1:{}", free_port()?);
        let arguments = ["up", "--no-demo", "--allow-local-webhooks", "--webhook-schedule", WEBHOOK_SCHEDULE];
        let mut arguments = arguments.map(str::to_owned).to_vec();
        arguments.extend(["--top-up-ask-after", ASK_AFTER, "--listen", &listen, "--data-dir"].map(str::to_owned));
        arguments.push(directory.join(DATA).display().to_string());
        let environment = environment(&stack, &postgres, &nats)?;
        let daybook = Process::new(program.clone(), arguments, environment, directory.join("daybook.log"));
        Ok(Self {
            program,
            directory: directory.to_owned(),
            second_postgres: Wire::to(at_postgres, Protocol::Postgres).await?,
            second_nats: Wire::to(at_nats, Protocol::Nats).await?,
            stack,
            postgres,
            nats,
            daybook,
            seconds: Vec::new(),
        })
    }

    /// Waits until the running process says that it is ready. One that gives up meanwhile is counted and started again.
    pub(crate) async fn ready(&self) -> anyhow::Result<Connection> {
        let begin = Instant::now();
        loop {
            let connection = std::fs::read_to_string(self.directory.join(DATA).join("connection.json")).ok();
            let connection: Option<Connection> = connection.and_then(|text| serde_json::from_str(&text).ok());
            let id = self.daybook.id().await;
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

    /// Starts a second engine, relay, projector and dispatcher on the same log. The first process is ready, so the
    /// schemas and the installation's key are there.
    pub(crate) async fn start_seconds(&mut self, programs: &Path, bank_url: &str) -> anyhow::Result<()> {
        let installation = std::fs::read(self.directory.join(DATA).join("installation.json"));
        let installation: serde_json::Value = serde_json::from_slice(&installation.context("the installation")?)?;
        let key = installation["sealingKey"].as_str().context("an installation has a key")?;
        let key_file = self.directory.join("secrets.key");
        std::fs::write(&key_file, STANDARD.decode(key).context("a key in base64")?)?;
        let key_file = key_file.display().to_string();
        for service in Service::ALL {
            let listen = format!("127.0.0.1:{}", free_port()?);
            let more: &[&str] = match service {
                Service::Engine => &["--secrets-key-file", &key_file, "--bank-url", bank_url],
                Service::Projector => &["--secrets-key-file", &key_file],
                Service::Dispatcher => {
                    let all = &["--secrets-key-file", &key_file, "--allow-local-webhooks", "--webhook-schedule"];
                    &[&all[..], &[WEBHOOK_SCHEDULE]].concat()
                }
                Service::Relay => &[],
            };
            let arguments = [&["--listen", &listen], more].concat().into_iter().map(str::to_owned).collect();
            let environment = environment(&self.stack, &self.second_postgres, &self.second_nats)?;
            let log = self.directory.join(format!("{}.log", service.program()));
            let process = Process::new(programs.join(service.program()), arguments, environment, log);
            process.spawn().await?;
            self.seconds.push(Second { service, url: format!("http://{listen}"), process });
            self.until_second_listens(service).await?;
        }
        Ok(())
    }

    pub(crate) fn second(&self, service: Service) -> anyhow::Result<&Process> {
        Ok(&self.found(service)?.process)
    }

    pub(crate) fn url_of_second(&self, service: Service) -> Option<String> {
        Some(self.found(service).ok()?.url.clone())
    }

    pub(crate) async fn until_second_listens(&self, service: Service) -> anyhow::Result<()> {
        let address = address_of(&self.found(service)?.url)?;
        let begin = Instant::now();
        while tokio::net::TcpStream::connect(address).await.is_err() {
            self.revive().await?;
            if START_TIME < begin.elapsed() {
                bail!("the second {} does not listen {START_TIME:?} after its start", service.program());
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Looks after everything that should run.
    pub(crate) async fn revive(&self) -> anyhow::Result<()> {
        for process in self.processes() {
            process.revive().await?;
        }
        Ok(())
    }

    pub(crate) fn times_it_gave_up(&self) -> u32 {
        self.processes().map(Process::times_it_gave_up).sum()
    }

    /// Kills the bus, takes everything it has stored, and starts it empty.
    pub(crate) async fn wipe_nats(&self) -> anyhow::Result<()> {
        self.stack.kill_nats().await?;
        let stored = self.directory.join(SERVERS).join("servers/nats/jetstream");
        anyhow::ensure!(stored.exists(), "{} is not where the bus keeps its data", stored.display());
        std::fs::remove_dir_all(&stored).with_context(|| format!("removing {}", stored.display()))?;
        Ok(self.stack.start_nats().await?)
    }

    /// A command of the program on the servers themselves, past the wires: what it says, as an error if it fails.
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
        for process in self.processes() {
            process.kill().await?;
        }
        self.stack.stop().await.context("stopping the servers")
    }

    fn processes(&self) -> impl Iterator<Item = &Process> {
        std::iter::once(&self.daybook).chain(self.seconds.iter().map(|second| &second.process))
    }

    fn found(&self, service: Service) -> anyhow::Result<&Second> {
        let found = self.seconds.iter().find(|second| second.service == service);
        found.with_context(|| format!("there is no second {}", service.program()))
    }
}

/// Inside the run's directory: the servers' data directory, and Daybook's.
const SERVERS: &str = "stack";
const DATA: &str = "daybook";

/// The servers' addresses, through these wires.
fn environment(stack: &Stack, postgres: &Wire, nats: &Wire) -> anyhow::Result<Vec<(&'static str, String)>> {
    let through = |url: &str, wire: &Wire| -> anyhow::Result<String> {
        let mut url = Url::parse(url).context("reading a server's address")?;
        url.set_port(Some(wire.port)).ok().context("a server's address has a port")?;
        Ok(url.into())
    };
    Ok(vec![
        ("DAYBOOK_DATABASE_URL", through(stack.database_url(), postgres)?),
        ("DAYBOOK_NATS_URL", through(stack.nats_url(), nats)?),
    ])
}

fn address_of(url: &str) -> anyhow::Result<SocketAddr> {
    let url = Url::parse(url).context("reading an address")?;
    let port = url.port().context("a private address has a port")?;
    Ok(SocketAddr::from(([127, 0, 0, 1], port)))
}

/// Below the ports that the kernel gives to whoever connects: while a process is dead nobody takes its port by chance.
fn free_port() -> anyhow::Result<u16> {
    let offset = u16::try_from(std::process::id() % 10_000).expect("less than 10,000");
    let mut ports = (0..10_000).map(|step| 20_000 + (offset + step) % 10_000);
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).context("no port is free")
}
