//! The servers under test: real ones, durable, on a temporary directory; and the wallets to move money between.
//!
//! *Everything on* is `daybook up` as anyone starts it. *Engine alone* is the commands' service in a process of its
//! own on a Postgres of ours: no feed, no views, no webhooks. The directory is the same for both, so a log that one has
//! made can be continued by the other, after a clean end or after a kill.

use std::fmt::Display;
use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use api_contract::{Access, Scopes};
use clap::Args;
use command_api::Commands;
use ledger_core::ClientId;
use ledger_engine::Ledger;
use local_stack::Stack;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;

use super::figures::Parts;
use super::load::{Answer, Extent, Load, Pace};
use super::progress::Steps;
use super::random::Random;
use crate::installation::Installation;

/// A running product, and a partner whose wallets have money.
pub(crate) struct Server {
    running: Running,
    pub(crate) address: SocketAddr,
    pub(crate) database_url: String,
    /// The operator's token.
    admin: String,
    pub(crate) partner: Partner,
    /// Of the engine alone; `daybook up` has its own.
    pub(crate) stack: Option<Stack>,
    directory: Directory,
}

pub(crate) struct Partner {
    token: String,
    pub(crate) client: ClientId,
    wallets: Vec<String>,
}

/// A directory that vanishes with its owner.
pub(crate) struct Directory(TempDir);

/// `daybook bench-commands`: the commands' service alone, for a benchmark that starts it.
#[derive(Debug, Args)]
pub(crate) struct CommandsOptions {
    #[arg(long, hide_env_values = true, env = "DAYBOOK_DATABASE_URL")]
    database_url: String,
    /// Where the installation's secrets are.
    #[arg(long)]
    data_dir: PathBuf,
}

/// Until it answers: the first start may have to download its servers.
const START_TIME: Duration = Duration::from_secs(180);

const STOP_TIME: Duration = Duration::from_secs(30);

/// Enough for any run: a wallet pays 1.00 at a time.
const FUNDS: &str = "1000000000.00";

const CURRENCY: &str = "USD";

/// How a log is made fast: transfers in a request, and connections.
const FILLING: (usize, usize) = (1000, 3);

impl Directory {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("daybook-bench-").tempdir()?;
        // When we are root, the servers' unprivileged user passes through.
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o711))?;
        Ok(Self(directory))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

/// What `daybook` is told, to be everything on a directory.
pub(crate) fn up_arguments(directory: &Path) -> Vec<std::ffi::OsString> {
    let mut arguments: Vec<_> =
        ["up", "--no-demo", "--allow-local-webhooks", "--listen", "127.0.0.1:0", "--data-dir"].map(Into::into).into();
    arguments.push(directory.into());
    arguments
}

impl Server {
    pub(crate) async fn start(parts: Parts, wallets: u64, steps: &Steps) -> anyhow::Result<Self> {
        steps.say(format!("starting the server, {parts}"));
        let directory = Directory::new()?;
        let (started, stack) = Started::on(&directory, parts, None).await?;
        let mut server = Self {
            running: started.running,
            address: started.address,
            database_url: started.database_url,
            admin: started.admin,
            partner: Partner { token: String::new(), client: started.client, wallets: Vec::new() },
            stack,
            directory,
        };
        server.partner = server.register_partner("bench", wallets, steps)?;
        Ok(server)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.running.0.id()
    }

    /// Once it has ended: on the same directory, perhaps with other parts. How long it took to be ready, from the
    /// beginning of its process.
    pub(crate) async fn start_again(&mut self, parts: Parts) -> anyhow::Result<Duration> {
        let (started, stack) = Started::on(&self.directory, parts, self.stack.take()).await?;
        self.stack = stack;
        self.running = started.running;
        self.address = started.address;
        self.database_url = started.database_url;
        Ok(started.took)
    }

    /// Ends its process as an operator does. Our own servers for it go on.
    pub(crate) async fn end(&mut self) -> anyhow::Result<()> {
        self.running.signal(Signal::TERM);
        let deadline = Instant::now() + STOP_TIME;
        while self.running.0.try_wait()?.is_none() {
            if deadline < Instant::now() {
                bail!("the server under test did not stop within {} s", STOP_TIME.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Ends its process at once, whatever it is doing.
    pub(crate) fn kill(&mut self) -> anyhow::Result<()> {
        self.running.0.kill()?;
        self.running.0.wait()?;
        Ok(())
    }

    /// Stops everything as an operator does.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        self.end().await?;
        if let Some(stack) = self.stack.take() {
            stack.stop().await?;
        }
        Ok(())
    }

    /// A transfer of 1.00 between two wallets by chance, under a key of its own.
    pub(crate) fn transfer(&self, partner: &Partner, key: impl Display, random: &mut Random, out: &mut Vec<u8>) {
        self.post(&partner.token, "/v1/transactions/transfer", key, &partner.instruction(random), out);
    }

    /// So many such transfers in one request, each for itself.
    pub(crate) fn batch(
        &self,
        partner: &Partner,
        size: usize,
        key: impl Display,
        random: &mut Random,
        out: &mut Vec<u8>,
    ) {
        let mut body = String::from(r#"{"atomic":false,"transactions":["#);
        for number in 0..size {
            body.push_str(if number == 0 { "" } else { "," });
            body.push_str(&partner.instruction(random));
        }
        body.push_str("]}");
        self.post(&partner.token, "/v1/transactions/batch", key, &body, out);
    }

    /// Transfers in batches until the log has so many events, or a few more. Where it then ends.
    pub(crate) async fn fill(&self, events: i64, seed: u64) -> anyhow::Result<i64> {
        let head = super::check::head(&self.database_url).await?;
        let (size, connections) = FILLING;
        let batches = u64::try_from(events - head).unwrap_or(0).div_ceil(u64::try_from(size)?);
        let mut random = Random::new(seed);
        let load = Load { address: self.address, connections, pace: Pace::Closed, extent: Extent::Count(batches) };
        let mut failure = None;
        let write = |number, out: &mut Vec<u8>| {
            self.batch(&self.partner, size, format_args!("fill-{head}-{number}"), &mut random, out);
        };
        let take = |answer: Answer<'_>| {
            if answer.status != Some(201) {
                failure = Some(said("making a log", &answer));
            }
        };
        tokio::task::block_in_place(|| load.run(write, take))?;
        if let Some(failure) = failure {
            bail!(failure);
        }
        super::check::head(&self.database_url).await
    }

    /// Registers a webhook endpoint for everything that happens to a partner.
    pub(crate) fn register_webhook(&self, partner: &Partner, url: &str, key: &str) -> anyhow::Result<()> {
        self.ask(&partner.token, "/v1/webhooks", key, &json!({ "url": url, "events": ["*"] })).map(drop)
    }

    fn post(&self, token: &str, path: &str, key: impl Display, body: &str, out: &mut Vec<u8>) {
        write!(
            out,
            "POST {path} HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\nIdempotency-Key: {key}\r\n\r\n{body}",
            self.address,
            body.len(),
        )
        .expect("a Vec takes everything");
    }

    /// A partner with wallets that have money, made over HTTP like any other. `name` is in the keys.
    pub(crate) fn register_partner(&self, name: &str, wallets: u64, steps: &Steps) -> anyhow::Result<Partner> {
        let registration = json!({ "name": name, "currencies": [CURRENCY] });
        let partner = self.ask(&self.admin, "/v1/partners", &format!("{name}-partner"), &registration)?;
        let login = json!({ "clientId": partner["clientId"], "clientSecret": partner["clientSecret"] });
        let client = partner["clientId"].as_str().context("a partner without a client")?.parse()?;
        let token = login_at(self.address, &login)?;

        steps.say(format!("opening {wallets} wallets"));
        let bodies = |number: u64| json!({ "userId": format!("user-{number}"), "currency": CURRENCY }).to_string();
        let opened = self.all(wallets, "/v1/wallets", &token, &format!("{name}-open"), bodies)?;
        let id = |body: &Value| Ok(body["id"].as_str().context("a wallet without an id")?.to_owned());
        let wallets_opened = opened.iter().map(id).collect::<anyhow::Result<Vec<_>>>()?;
        steps.say(format!("funding {wallets} wallets"));
        let fund = |number: u64| {
            let wallet = usize::try_from(number).ok().and_then(|at| wallets_opened.get(at));
            json!({ "walletId": wallet, "direction": "CREDIT", "amount": FUNDS, "currency": CURRENCY, "reason": "bench" })
                .to_string()
        };
        self.all(wallets, "/v1/transactions/adjustment", &self.admin, &format!("{name}-fund"), fund)?;
        Ok(Partner { token, client, wallets: wallets_opened })
    }

    /// Many requests of one kind, all of which must be granted.
    fn all(
        &self,
        count: u64,
        path: &str,
        token: &str,
        key: &str,
        body: impl Fn(u64) -> String,
    ) -> anyhow::Result<Vec<Value>> {
        let load = Load { address: self.address, connections: 64, pace: Pace::Closed, extent: Extent::Count(count) };
        let mut bodies = vec![Value::Null; usize::try_from(count)?];
        let mut failure = None;
        let write =
            |number, out: &mut Vec<u8>| self.post(token, path, format_args!("{key}-{number}"), &body(number), out);
        let take = |answer: Answer<'_>| match (answer.status, serde_json::from_slice(answer.body)) {
            (Some(200..=299), Ok(value)) => bodies[usize::try_from(answer.number).expect("counted")] = value,
            _ => failure = Some(said(path, &answer)),
        };
        tokio::task::block_in_place(|| load.run(write, take))?;
        failure.map_or(Ok(bodies), |failure| Err(anyhow::anyhow!(failure)))
    }

    fn ask(&self, token: &str, path: &str, key: &str, body: &Value) -> anyhow::Result<Value> {
        let bodies = self.all(1, path, token, key, |_| body.to_string())?;
        bodies.into_iter().next().context("one request has one answer")
    }
}

impl Partner {
    fn instruction(&self, random: &mut Random) -> String {
        let (from, to) = random.two_of(self.wallets.len());
        format!(
            r#"{{"fromWalletId":"{}","toWalletId":"{}","amount":"1.00","currency":"{CURRENCY}"}}"#,
            self.wallets[from], self.wallets[to]
        )
    }
}

/// The status of a GET on a connection of its own.
pub(crate) fn status_of(address: SocketAddr, path: &str) -> anyhow::Result<u16> {
    let patience = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&address, patience)?;
    stream.set_read_timeout(Some(patience))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let status = answer.get(9..12).and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
    status.context("no status")
}

fn said(path: &str, answer: &Answer<'_>) -> String {
    let body: String = String::from_utf8_lossy(answer.body).chars().take(500).collect();
    format!("{path} answered {:?}: {body}", answer.status)
}

/// The process under test. Whatever happens to us, it goes with us.
struct Running(Child);

impl Running {
    fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, signal); // it may have ended
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// A process that says that it is ready.
struct Started {
    running: Running,
    address: SocketAddr,
    database_url: String,
    admin: String,
    client: ClientId,
    took: Duration,
}

impl Started {
    /// On the servers that run there already, if they are for these parts.
    async fn on(directory: &Directory, parts: Parts, stack: Option<Stack>) -> anyhow::Result<(Self, Option<Stack>)> {
        if parts == Parts::EverythingOn {
            if let Some(stack) = stack {
                stack.stop().await?;
            }
            return Ok((everything(directory).await?, None));
        }
        let stack = match stack {
            Some(stack) => stack,
            None => Stack::start(directory.path(), local_stack::Options::default()).await?,
        };
        migrations::run(stack.database_url()).await?;
        Ok((commands_alone(directory, stack.database_url()).await?, Some(stack)))
    }
}

/// The file into which the process under test logs, to be shown when it does not start.
fn log_in(directory: &Directory) -> PathBuf {
    directory.path().join("bench.log")
}

async fn everything(directory: &Directory) -> anyhow::Result<Started> {
    let connection_file = directory.path().join("connection.json");
    let _ = std::fs::remove_file(&connection_file); // of one that was killed
    let begun = Instant::now();
    let child = Command::new(std::env::current_exe()?)
        .args(up_arguments(directory.path()))
        .env_remove("DAYBOOK_DATABASE_URL")
        .env_remove("DAYBOOK_NATS_URL")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(log_in(directory))?)
        .spawn()
        .context("starting daybook up")?;
    let mut running = Running(child);
    let connection = loop {
        // It writes the file when `/readyz` has said yes.
        let file = std::fs::read(&connection_file).ok();
        if let Some(connection) = file.and_then(|text| serde_json::from_slice::<Value>(&text).ok()) {
            break connection;
        }
        if running.0.try_wait()?.is_some() || START_TIME < begun.elapsed() {
            bail!(
                "daybook up did not become ready:\n{}",
                std::fs::read_to_string(log_in(directory)).unwrap_or_default()
            );
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let took = begun.elapsed();
    let text = |name: &str| connection[name].as_str().unwrap_or_default().to_owned();
    let address = text("baseUrl").trim_start_matches("http://").parse()?;
    let admin = login_at(address, &connection["admin"])?;
    let client = connection["admin"]["clientId"].as_str().unwrap_or_default().parse()?;
    Ok(Started { running, address, database_url: text("databaseUrl"), admin, client, took })
}

async fn commands_alone(directory: &Directory, database_url: &str) -> anyhow::Result<Started> {
    let installation = Installation::open(directory.path())?;
    let begun = Instant::now();
    let mut child = Command::new(std::env::current_exe()?)
        .args(["bench-commands", "--data-dir"])
        .arg(directory.path())
        .env("DAYBOOK_DATABASE_URL", database_url)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(log_in(directory))?)
        .spawn()
        .context("starting the commands' service")?;
    let stdout = child.stdout.take().expect("standard output was asked to be a pipe");
    let running = Running(child);
    let mut line = String::new();
    tokio::task::block_in_place(|| BufReader::new(stdout).read_line(&mut line))?;
    let Ok(address) = line.trim().parse() else {
        bail!(
            "the commands' service did not start:\n{}",
            std::fs::read_to_string(log_in(directory)).unwrap_or_default()
        );
    };
    while !status_of(address, "/readyz").is_ok_and(|status| status == 200) {
        if START_TIME < begun.elapsed() {
            bail!("the commands' service did not become ready");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let took = begun.elapsed();
    let admin = login_at(address, &serde_json::to_value(installation.admin.credentials())?)?;
    let (database_url, client) = (database_url.to_owned(), installation.admin.id());
    Ok(Started { running, address, database_url, admin, client, took })
}

/// Serves commands until SIGTERM; says on standard output where.
pub(crate) async fn serve_commands(options: CommandsOptions) -> anyhow::Result<ExitCode> {
    runtime::telemetry::init("command-api");
    let shutdown = runtime::shutdown::signal();
    let installation = Installation::open(&options.data_dir)?;
    let access = Access::connect(&options.database_url, installation.seal()?).await?;
    access.ensure_client(installation.admin.client(None, Scopes::ADMIN)).await?;
    let ledger = Ledger::start(&options.database_url, ledger_engine::Settings::default()).await?;
    let settings = command_api::Settings { bank_url: "http://127.0.0.1".to_owned() };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    println!("{}", listener.local_addr()?);
    command_api::run(listener, Commands::new(ledger, access, settings), shutdown).await?;
    runtime::telemetry::flush();
    Ok(ExitCode::SUCCESS)
}

/// An access token.
fn login_at(address: SocketAddr, credentials: &Value) -> anyhow::Result<String> {
    let load = Load { address, connections: 1, pace: Pace::Closed, extent: Extent::Count(1) };
    let body = credentials.to_string();
    let mut token = Err(anyhow::anyhow!("no answer to a login"));
    load.run(
        |_, out| {
            let head = format!(
                "POST /v1/auth/token HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            out.extend_from_slice(head.as_bytes());
            out.extend_from_slice(body.as_bytes());
        },
        |answer| {
            let value = serde_json::from_slice::<Value>(answer.body).unwrap_or_default();
            let found = value["accessToken"].as_str().map(str::to_owned);
            token = found.with_context(|| said("/v1/auth/token", &answer));
        },
    )?;
    token
}
