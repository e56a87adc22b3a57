//! local-stack: a private Postgres and nats-server, for `daybook up` and for every test.
//!
//! It finds the servers' programs or downloads them (`programs.rs`, `download.rs`), and runs both on a locked data
//! directory (`data_directory.rs`) as children that cannot outlive us (`guardian.rs`) and come back when they die
//! ([`Stack::supervise`]). Servers whose addresses are given are used as they are, never started or stopped.
//!
//! It knows no service, schema or subject of ours, and it is not how Daybook is deployed: there the servers are
//! somebody's care, and their addresses are given.

mod data_directory;
mod download;
mod guardian;
mod nats;
mod postgres;
mod programs;
pub mod testing;

use std::{
    convert::Infallible,
    io,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};

use data_directory::DataDirectory;
use guardian::Held;
use nats::PrivateNats;
use postgres::PrivatePostgres;
use tokio::time::sleep;
use url::Url;

/// Receives one line for the user per step.
pub type Announce = fn(&str);

/// What the caller wants different from "find what is here and keep my data safe".
#[derive(Clone, Debug)]
pub struct Options {
    /// A Postgres to use instead of a private one. The role must be allowed to create roles and schemas.
    pub database_url: Option<String>,
    /// A NATS server with JetStream to use instead of a private one.
    pub nats_url: Option<String>,
    pub announce: Announce,
    /// Whether a commit survives the machine's crash. Only servers whose data nobody will miss may say no.
    pub durable: bool,
    /// Whether programs that the machine already has may be used; if not, they are downloaded.
    pub use_machine_programs: bool,
    /// Where downloaded programs are kept; by default below the user's cache directory.
    pub cache: Option<PathBuf>,
}

/// Both servers, running.
#[derive(Debug)]
pub struct Stack {
    database_url: String,
    nats_url: String,
    postgres: Option<PrivatePostgres>,
    nats: Option<PrivateNats>,
    /// Held until the stack is gone; the servers hold it too, so it is free only when they are gone as well.
    _held: Held,
}

#[derive(Debug, thiserror::Error)]
pub enum StackError {
    #[error("{} is in use by {}", directory.display(), pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}")))]
    Locked { directory: PathBuf, pid: Option<i32> },
    /// A server's programs are neither here nor to be had; says what the user can do.
    #[error("{0}")]
    Missing(String),
    /// A server that was given by its address cannot be used.
    #[error("{0}")]
    Given(String),
    #[error("{server} did not start: {reason}\n{log}")]
    DidNotStart { server: &'static str, reason: String, log: String },
    /// The data directory is not as it must be.
    #[error("{0}")]
    Data(String),
    #[error("{doing}: {source}")]
    Io { doing: String, source: io::Error },
    #[error("{doing}: {source}")]
    Database { doing: &'static str, source: sqlx::Error },
}

impl Default for Options {
    fn default() -> Self {
        Self {
            database_url: None,
            nats_url: None,
            announce: |step| tracing::info!("{step}"),
            durable: true,
            use_machine_programs: true,
            cache: None,
        }
    }
}

impl Options {
    /// The defaults, with the servers that `DAYBOOK_DATABASE_URL` and `DAYBOOK_NATS_URL` name.
    pub fn from_env() -> Self {
        let given = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self { database_url: given("DAYBOOK_DATABASE_URL"), nats_url: given("DAYBOOK_NATS_URL"), ..Self::default() }
    }
}

impl Stack {
    /// Finds or downloads the servers and runs them as private children on `data_dir`, which it locks.
    ///
    /// A second start on the same directory continues: same data, same passwords, and the same ports if still free.
    pub async fn start(data_dir: &Path, options: Options) -> Result<Self, StackError> {
        Self::start_held(data_dir, options, None).await
    }

    async fn start_held(
        data_dir: &Path,
        options: Options,
        temporary: Option<std::os::fd::OwnedFd>,
    ) -> Result<Self, StackError> {
        let directory = DataDirectory::open(data_dir).await?;
        let lock = directory.lock.try_clone().map_err(|source| StackError::io("sharing the lock", source))?;
        let held = Held { lock, temporary };
        // Given servers are looked at before anything is started for nothing.
        if let Some(url) = &options.database_url {
            postgres::check_given(url).await?;
        }
        if let Some(url) = &options.nats_url {
            nats::check_given(url).await?;
        }
        let postgres = match &options.database_url {
            Some(_) => None,
            None => Some(PrivatePostgres::start(&directory, &held, &options).await?),
        };
        let nats = match &options.nats_url {
            Some(_) => Ok(None),
            None => PrivateNats::start(&directory, &held, &options).await.map(Some),
        };
        let nats = match (nats, &postgres) {
            (Ok(nats), _) => nats,
            (Err(error), None) => return Err(error),
            (Err(error), Some(postgres)) => {
                postgres.stop().await.ok(); // the first failure is the one to tell; the guardian ends what did not stop
                return Err(error);
            }
        };
        let database_url = given_or_private(options.database_url, postgres.as_ref().map(PrivatePostgres::url));
        let nats_url = given_or_private(options.nats_url, nats.as_ref().map(PrivateNats::url));
        Ok(Self { database_url, nats_url, postgres, nats, _held: held })
    }

    /// The superuser's address of the database `daybook`; what was given, if it was given. It holds a password.
    pub fn database_url(&self) -> &str {
        &self.database_url
    }

    /// The administrator's address of the NATS server; what was given, if it was given. It holds a password.
    pub fn nats_url(&self) -> &str {
        &self.nats_url
    }

    /// Stops the private servers, within nine seconds. Given ones keep running.
    pub async fn stop(self) -> Result<(), StackError> {
        let postgres = async {
            match &self.postgres {
                Some(postgres) => postgres.stop().await,
                None => Ok(()),
            }
        };
        let nats = async {
            match &self.nats {
                Some(nats) => nats.stop().await,
                None => Ok(()),
            }
        };
        let (postgres, nats) = tokio::join!(postgres, nats);
        postgres.and(nats)
    }

    /// Watches over the private servers for as long as it is polled: one that dies is started again, on the same data and
    /// the same port, as often as it takes. Servers that were stopped or killed through this stack are left alone.
    pub async fn supervise(&self) -> Infallible {
        let postgres = async {
            if let Some(postgres) = &self.postgres {
                supervise("Postgres", async || postgres.death().await, async || postgres.start_again().await).await;
            }
        };
        let nats = async {
            if let Some(nats) = &self.nats {
                supervise("nats-server", async || nats.death().await, async || nats.start_again().await).await;
            }
        };
        tokio::join!(postgres, nats);
        std::future::pending().await // nothing here is ours to watch over
    }

    /// Ends the private Postgres as a crash would: no checkpoint, connections cut. Returns when it is gone.
    pub async fn kill_postgres(&self) -> Result<(), StackError> {
        self.private_postgres()?.kill().await
    }

    /// Starts the private Postgres again, on the same port; it recovers first.
    pub async fn start_postgres(&self) -> Result<(), StackError> {
        self.private_postgres()?.start_again().await
    }

    /// Ends the private nats-server with SIGKILL. Returns when it is gone.
    pub async fn kill_nats(&self) -> Result<(), StackError> {
        self.private_nats()?.kill().await
    }

    /// Starts the private nats-server again, on the same port.
    pub async fn start_nats(&self) -> Result<(), StackError> {
        self.private_nats()?.start_again().await
    }

    /// A client program of the private Postgres (`psql`, `pgbench`, `pg_dump`), ready to be given arguments.
    /// `None` if Postgres was given or has no such program beside it.
    pub fn postgres_command(&self, program: &str) -> Option<Command> {
        self.postgres.as_ref()?.command(program)
    }

    fn private_postgres(&self) -> Result<&PrivatePostgres, StackError> {
        self.postgres
            .as_ref()
            .ok_or_else(|| StackError::Given("the given Postgres is not ours to stop or start".to_owned()))
    }

    fn private_nats(&self) -> Result<&PrivateNats, StackError> {
        self.nats
            .as_ref()
            .ok_or_else(|| StackError::Given("the given NATS server is not ours to stop or start".to_owned()))
    }
}

impl StackError {
    fn io(doing: impl Into<String>, source: io::Error) -> Self {
        Self::Io { doing: doing.into(), source }
    }
}

/// How often a server is looked at.
const WATCH: Duration = Duration::from_millis(100);

/// Pauses before a dead server is started again, and after each attempt that failed. A killed Postgres cannot start
/// before the last of its processes is gone.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// One that has run for so long was well: its next death is the first one again.
const WELL: Duration = Duration::from_secs(60);

async fn supervise(
    server: &'static str,
    death: impl AsyncFn() -> Option<ExitStatus>,
    start: impl AsyncFn() -> Result<(), StackError>,
) -> Infallible {
    let mut pause = PAUSE_MIN;
    let mut started = Instant::now();
    loop {
        sleep(WATCH).await;
        let Some(status) = death().await else { continue };
        tracing::error!(server, %status, "a server died; it is started again");
        if WELL <= started.elapsed() {
            pause = PAUSE_MIN;
        }
        let mut told = false; // of this outage
        loop {
            sleep(pause).await;
            pause = PAUSE_MAX.min(pause * 2);
            match start().await {
                Ok(()) => break,
                Err(error) if !std::mem::replace(&mut told, true) => {
                    tracing::error!(server, %error, "a server that died did not start; it is tried again until it does");
                }
                Err(_) => {}
            }
        }
        started = Instant::now();
        tracing::warn!(server, "a server that had died is back");
    }
}

fn given_or_private(given: Option<String>, private: Option<&str>) -> String {
    given.or_else(|| private.map(str::to_owned)).expect("a server that is not given is private")
}

/// An address as it may be shown: without its password.
fn without_password(address: &str) -> String {
    match Url::parse(address) {
        Ok(mut url) => {
            if url.password().is_some() {
                url.set_password(Some("…")).ok(); // fails only where there can be no password
            }
            url.to_string()
        }
        Err(_) => "(an address that cannot be read)".to_owned(),
    }
}
