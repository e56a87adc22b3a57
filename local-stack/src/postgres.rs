//! The private Postgres: a cluster made once, run as a child, reached over TCP on 127.0.0.1 with a password.
//!
//! ```text
//! servers/postgres/      the cluster (UTF8, C locale, checksums, scram-sha-256)
//! servers/postgres.new/  a cluster being made; renamed when complete, thrown away if a start finds it
//! servers/postgres.log   what this run said; `.previous` is the run before
//! ```
//! It has no unix socket: nobody of ours uses one, and its path would have to fit into 108 bytes.
//! Roles and schemas are `migrations`' work.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};

use sqlx::{Connection, PgConnection};
use tokio::sync::Mutex;

use crate::{
    Announce, Options, StackError,
    data_directory::{DataDirectory, User, free_port, make_private, write_private},
    guardian::{Guardian, Held, Launch, library_path, log_tail, take_dead},
    programs::{self, PostgresPrograms},
    without_password,
};

/// The releases Daybook's SQL is written for.
pub(crate) const MAJOR_VERSIONS: std::ops::RangeInclusive<u32> = 15..=18;

const USER_AND_DATABASE: &str = "daybook";
/// Longer than starting takes (0.1 s), because a start after a crash replays up to `max_wal_size` first.
const START_BOUND: Duration = Duration::from_secs(300);
const CONNECT_BOUND: Duration = Duration::from_secs(5);

/// For a ledger: many small durable commits, short indexed queries, on a machine that others use too.
const SETTINGS: &[&str] = &[
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",
    "max_connections=200",
    "shared_buffers=256MB",
    "max_wal_size=8GB", // checkpoints by time rather than by volume: each one makes pages be logged in full again
    "checkpoint_timeout=15min",
    "wal_init_zero=off", // filling each new segment of 16 MiB with zeros first holds up all commits for some 50 ms
    "bgwriter_delay=50ms", // who appends need not write old pages out as well
    "bgwriter_lru_maxpages=1000",
    "backend_flush_after=512kB", // who writes pages starts their way to the disk, as checkpoints do: what the kernel gathers holds up the WAL
    "random_page_cost=1.1",      // disks that seek are rare now
    "jit=off",                   // our queries are shorter than their compilation
    "log_line_prefix=%m [%p] ",
];

/// With them off, nobody waits for the disk and there may be many databases, of which each would be looked at.
const SETTINGS_IF_DURABLE: &[&str] = &["autovacuum_naptime=5s"]; // so that vacuum meets the log's new pages in memory

/// Data that nobody will miss: commits do not wait for the disk. Not to be used where durability is what is tested.
const SETTINGS_IF_NOT_DURABLE: &[&str] = &["fsync=off", "synchronous_commit=off", "full_page_writes=off"];

#[derive(Debug)]
pub(crate) struct PrivatePostgres {
    url: String,
    programs: PostgresPrograms,
    launch: Launch,
    held: Held,
    guardian: Mutex<Option<Guardian>>,
}

impl PrivatePostgres {
    pub(crate) async fn start(directory: &DataDirectory, held: &Held, options: &Options) -> Result<Self, StackError> {
        let (servers, user) = directory.place_servers(options.announce)?;
        let cluster = servers.join("postgres");
        let programs = programs::postgres(version_of(&cluster)?, user, options).await?;
        let held = held.try_clone().map_err(|source| StackError::io("sharing the lock", source))?;
        let mut access = directory.access()?;
        if !cluster.exists() {
            let password = &access.postgres_password;
            create_cluster(&servers, &programs, password, user, options, &held).await?;
        }
        // Another process can take the port between our look and Postgres' own; then the next port is tried.
        for attempts_left in [2, 1, 0] {
            let port = free_port(access.postgres_port)?;
            access.postgres_port = Some(port);
            directory.keep(&access)?;
            (options.announce)(&format!("Starting Postgres {} on 127.0.0.1:{port}", programs.version));
            let postgres = Self {
                url: format!(
                    "postgres://{USER_AND_DATABASE}:{}@127.0.0.1:{port}/{USER_AND_DATABASE}",
                    access.postgres_password
                ),
                launch: server_launch(&servers, &programs, port, user, options.durable),
                programs: programs.clone(),
                held: held.try_clone().map_err(|source| StackError::io("sharing the lock", source))?,
                guardian: Mutex::new(None),
            };
            match postgres.start_again().await {
                Ok(()) => return Ok(postgres),
                Err(_) if attempts_left != 0 && free_port(Some(port))? != port => {}
                Err(error) => return Err(error),
            }
        }
        unreachable!("the last attempt returns")
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn command(&self, program: &str) -> Option<Command> {
        let path = self.programs.directory.join(program);
        let mut command = Command::new(&path);
        if !self.programs.libraries.is_empty() {
            command.env("LD_LIBRARY_PATH", library_path(&self.programs.libraries));
        }
        path.exists().then_some(command)
    }

    /// Starts the server, if it does not run, and waits until it answers on the database `daybook`.
    pub(crate) async fn start_again(&self) -> Result<(), StackError> {
        let mut running = self.guardian.lock().await;
        if running.is_some() {
            return Ok(());
        }
        // Kept from the first moment: whoever gives up waiting here can still stop it.
        let guardian = running.insert(
            Guardian::spawn(&self.launch, &self.held).map_err(|source| StackError::io("starting Postgres", source))?,
        );
        let ready = until_ready(guardian, &self.url, &self.launch.log).await;
        if ready.is_err() {
            *running = None;
        }
        ready
    }

    /// How the server ended, if it has ended by itself. Then it can be started again.
    pub(crate) async fn death(&self) -> Option<ExitStatus> {
        take_dead(&mut *self.guardian.lock().await)
    }

    /// A fast shutdown: connections are ended, a checkpoint is written. A disk that is too slow for the checkpoint does
    /// not keep whoever stops us: the next start recovers then, from what every commit has put on the disk.
    pub(crate) async fn stop(&self) -> Result<(), StackError> {
        self.end(&[("INT", Duration::from_secs(5)), ("QUIT", Duration::from_secs(2)), ("KILL", Duration::from_secs(2))])
            .await
    }

    /// An immediate shutdown, after which Postgres recovers as after a crash. SIGKILL would do the same to the log
    /// but let connections live on for a moment, and then "it is gone" would not be true.
    pub(crate) async fn kill(&self) -> Result<(), StackError> {
        self.end(&[("QUIT", Duration::from_secs(10)), ("KILL", Duration::from_secs(5))]).await
    }

    async fn end(&self, escalation: &[(&str, Duration)]) -> Result<(), StackError> {
        match self.guardian.lock().await.take() {
            Some(guardian) => {
                guardian.end(escalation).await.map_err(|source| StackError::io("stopping Postgres", source))
            }
            None => Ok(()),
        }
    }
}

async fn until_ready(guardian: &mut Guardian, url: &str, log: &Path) -> Result<(), StackError> {
    let deadline = Instant::now() + START_BOUND;
    let did_not_start = |reason| StackError::DidNotStart { server: "Postgres", reason, log: log_tail(log) };
    loop {
        if let Some(status) = guardian.ended().map_err(|source| StackError::io("watching Postgres", source))? {
            return Err(did_not_start(format!("it ended with {status}")));
        }
        match create_database(url).await {
            Ok(()) => return Ok(()),
            Err(error) if deadline <= Instant::now() => return Err(did_not_start(error.to_string())),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Says what is wrong with a Postgres that was given by its address.
pub(crate) async fn check_given(url: &str) -> Result<(), StackError> {
    let shown = without_password(url);
    let unusable = |reason: String| StackError::Given(format!("the given Postgres, {shown}, cannot be used: {reason}"));
    let version = async {
        let mut connection = PgConnection::connect(url).await?;
        let version: String = sqlx::query_scalar("show server_version_num").fetch_one(&mut connection).await?;
        connection.close().await?;
        Ok::<_, sqlx::Error>(version)
    };
    let version = tokio::time::timeout(CONNECT_BOUND, version)
        .await
        .map_err(|_| unusable(format!("no answer within {} s", CONNECT_BOUND.as_secs())))?
        .map_err(|error| unusable(error.to_string()))?;
    let major = version.parse::<u32>().map_err(|_| unusable(format!("its version is {version}")))? / 10_000;
    if MAJOR_VERSIONS.contains(&major) {
        Ok(())
    } else {
        Err(unusable(format!(
            "it is Postgres {major}, and Daybook needs {} to {}",
            MAJOR_VERSIONS.start(),
            MAJOR_VERSIONS.end()
        )))
    }
}

/// Connects within a bound: a server that accepts and then stays silent must not hold us.
pub(crate) async fn connect(url: &str) -> Result<PgConnection, sqlx::Error> {
    tokio::time::timeout(CONNECT_BOUND, PgConnection::connect(url))
        .await
        .unwrap_or_else(|_| Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())))
}

/// The same server's address with another database.
pub(crate) fn with_database(url: &str, database: &str) -> String {
    let mut url = url::Url::parse(url).expect("an address of ours, or one that was connected to, is a URL");
    url.set_path(database);
    url.to_string()
}

/// Makes the database `daybook` unless it is there. Also the proof that the server answers.
async fn create_database(url: &str) -> Result<(), sqlx::Error> {
    let missing =
        |error: &sqlx::Error| error.as_database_error().and_then(|error| error.code()).as_deref() == Some("3D000");
    match connect(url).await {
        Ok(connection) => connection.close().await,
        Err(error) if missing(&error) => {
            let mut connection = connect(&with_database(url, "postgres")).await?;
            sqlx::query("create database daybook").execute(&mut connection).await?;
            // Of the database and not of the server, which would not start with it where Postgres was built without lz4.
            // The other method, pglz, takes three times what an event costs, of each page's first change after a checkpoint.
            let lz4 = "select 'lz4' = any(enumvals) from pg_settings where name = 'wal_compression'";
            if sqlx::query_scalar(lz4).fetch_one(&mut connection).await? {
                sqlx::query("alter database daybook set wal_compression = 'lz4'").execute(&mut connection).await?;
            }
            connection.close().await
        }
        Err(error) => Err(error),
    }
}

/// The major version that made the cluster; no other can read it.
fn version_of(cluster: &Path) -> Result<Option<u32>, StackError> {
    if !cluster.exists() {
        return Ok(None);
    }
    let file = cluster.join("PG_VERSION");
    let text =
        fs::read_to_string(&file).map_err(|source| StackError::io(format!("reading {}", file.display()), source))?;
    text.trim().parse().map(Some).map_err(|_| StackError::Data(format!("{} holds no version", file.display())))
}

async fn create_cluster(
    servers: &Path,
    programs: &PostgresPrograms,
    password: &str,
    user: Option<User>,
    options: &Options,
    held: &Held,
) -> Result<(), StackError> {
    let announce: Announce = options.announce;
    announce(&format!("Creating a Postgres {} cluster in {}", programs.version, servers.join("postgres").display()));
    let unfinished = servers.join("postgres.new");
    let failed = |source| StackError::io(format!("making {}", unfinished.display()), source);
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(failed)?;
    }
    make_private(&unfinished, user)?;
    let password_file = servers.join("postgres.password");
    write_private(&password_file, password.as_bytes(), user)?;
    let mut arguments = vec![
        "-D".into(),
        unfinished.clone().into_os_string(),
        format!("--username={USER_AND_DATABASE}").into(),
        "--pwfile".into(),
        password_file.clone().into_os_string(),
    ];
    arguments.extend(["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--data-checksums"].map(Into::into));
    if !options.durable {
        arguments.push("--no-sync".into());
    }
    let launch = Launch {
        program: programs.directory.join("initdb"),
        arguments,
        libraries: programs.libraries.clone(),
        working_directory: servers.to_owned(),
        log: servers.join("initdb.log"),
        last_signal: "TERM",
        user,
    };
    let mut initdb = Guardian::spawn(&launch, held).map_err(failed)?;
    let status = initdb.wait(START_BOUND).await.map_err(failed)?;
    fs::remove_file(&password_file).map_err(failed)?;
    match status {
        Some(status) if status.success() => fs::rename(&unfinished, servers.join("postgres")).map_err(failed),
        status => Err(StackError::DidNotStart {
            server: "initdb",
            reason: status.map_or_else(|| "it took too long".to_owned(), |status| status.to_string()),
            log: log_tail(&launch.log),
        }),
    }
}

fn server_launch(servers: &Path, programs: &PostgresPrograms, port: u16, user: Option<User>, durable: bool) -> Launch {
    let rest = if durable { SETTINGS_IF_DURABLE } else { SETTINGS_IF_NOT_DURABLE };
    let mut arguments =
        vec!["-D".into(), servers.join("postgres").into_os_string(), "-p".into(), port.to_string().into()];
    for setting in SETTINGS.iter().chain(rest) {
        arguments.extend(["-c".into(), setting.into()]);
    }
    Launch {
        program: programs.directory.join("postgres"),
        arguments,
        libraries: programs.libraries.clone(),
        working_directory: PathBuf::from(servers),
        log: servers.join("postgres.log"),
        last_signal: "QUIT",
        user,
    }
}
