//! The servers under test: real ones, durable, on a temporary directory; and the wallets to move money between.
//!
//! *Everything on* is `daybook up` as anyone starts it. *Engine alone* is the commands' service in a process of its
//! own on a Postgres of its own: no feed, no views, no webhooks.

use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
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
use super::random::Random;
use crate::installation::Installation;
use crate::progress::Progress;

/// A running product, and a partner whose wallets have money.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) database_url: String,
    token: String,
    pub(crate) client: ClientId,
    wallets: Vec<String>,
    /// Of the engine alone; `daybook up` has its own.
    stack: Option<Stack>,
    _directory: Directory,
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

const STOP_TIME: Duration = Duration::from_secs(20);

/// Enough for any run: a wallet pays 1.00 at a time.
const FUNDS: &str = "1000000000.00";

const CURRENCY: &str = "USD";

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

impl Server {
    pub(crate) async fn start(parts: Parts, wallets: u64) -> anyhow::Result<Self> {
        let directory = Directory::new()?;
        let mut server = match parts {
            Parts::EverythingOn => everything(directory).await?,
            Parts::EngineAlone | Parts::Postgres => commands_alone(directory).await?,
        };
        server.populate(wallets)?;
        Ok(server)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A transfer of 1.00 between two wallets by chance, under a key of its own.
    pub(crate) fn transfer(&self, key: &str, random: &mut Random, out: &mut Vec<u8>) {
        self.post(&self.token, "/v1/transactions/transfer", key, &self.instruction(random), out);
    }

    /// So many such transfers in one request, each for itself.
    pub(crate) fn batch(&self, size: usize, key: &str, random: &mut Random, out: &mut Vec<u8>) {
        let mut body = String::from(r#"{"atomic":false,"transactions":["#);
        for number in 0..size {
            body.push_str(if number == 0 { "" } else { "," });
            body.push_str(&self.instruction(random));
        }
        body.push_str("]}");
        self.post(&self.token, "/v1/transactions/batch", key, &body, out);
    }

    fn instruction(&self, random: &mut Random) -> String {
        let (from, to) = random.two_of(self.wallets.len());
        format!(
            r#"{{"fromWalletId":"{}","toWalletId":"{}","amount":"1.00","currency":"{CURRENCY}"}}"#,
            self.wallets[from], self.wallets[to]
        )
    }

    /// Stops it as an operator does.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        self.signal(Signal::TERM);
        let deadline = Instant::now() + STOP_TIME;
        while self.child.try_wait()?.is_none() {
            if deadline < Instant::now() {
                bail!("the server under test did not stop within {} s", STOP_TIME.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if let Some(stack) = self.stack.take() {
            stack.stop().await?;
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, signal); // it may have ended
        }
    }

    fn post(&self, token: &str, path: &str, key: &str, body: &str, out: &mut Vec<u8>) {
        use std::io::Write;
        write!(
            out,
            "POST {path} HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\nIdempotency-Key: {key}\r\n\r\n{body}",
            self.address,
            body.len(),
        )
        .expect("a Vec takes everything");
    }

    /// A partner with wallets that have money, made over HTTP like any other.
    fn populate(&mut self, wallets: u64) -> anyhow::Result<()> {
        let admin = std::mem::take(&mut self.token);
        let partner =
            self.ask(&admin, "/v1/partners", "bench: partner", &json!({ "name": "Bench", "currencies": [CURRENCY] }))?;
        let login = json!({ "clientId": partner["clientId"], "clientSecret": partner["clientSecret"] });
        self.client = partner["clientId"].as_str().context("a partner without a client")?.parse()?;
        self.token = login_at(self.address, &login)?;

        let progress = Progress::new("opening wallets");
        let total = i64::try_from(wallets)?;
        let bodies = |number: u64| json!({ "userId": format!("user-{number}"), "currency": CURRENCY }).to_string();
        let opened = self.all(wallets, "/v1/wallets", &self.token, "open", bodies, |done| progress.at(done, total))?;
        self.wallets = opened
            .iter()
            .map(|body| Ok(body["id"].as_str().context("a wallet without an id")?.to_owned()))
            .collect::<anyhow::Result<_>>()?;
        drop(progress);
        let progress = Progress::new("funding wallets");
        let fund = |number: u64| {
            let wallet = usize::try_from(number).ok().and_then(|at| self.wallets.get(at));
            json!({ "walletId": wallet, "direction": "CREDIT", "amount": FUNDS, "currency": CURRENCY, "reason": "bench" })
                .to_string()
        };
        self.all(wallets, "/v1/transactions/adjustment", &admin, "fund", fund, |done| progress.at(done, total))?;
        Ok(())
    }

    /// Many requests of one kind, all of which must be granted.
    fn all(
        &self,
        count: u64,
        path: &str,
        token: &str,
        key: &str,
        body: impl Fn(u64) -> String,
        mut progress: impl FnMut(i64),
    ) -> anyhow::Result<Vec<Value>> {
        let load = Load { address: self.address, connections: 64, pace: Pace::Closed, extent: Extent::Count(count) };
        let mut bodies = vec![Value::Null; usize::try_from(count)?];
        let mut done = 0;
        let mut failure = None;
        load.run(
            |number, out| self.post(token, path, &format!("{key}-{number}"), &body(number), out),
            |answer| {
                done += 1;
                progress(done);
                match (answer.status, serde_json::from_slice(answer.body)) {
                    (Some(200..=299), Ok(value)) => bodies[usize::try_from(answer.number).expect("counted")] = value,
                    _ => failure = Some(said(path, &answer)),
                }
            },
        )?;
        failure.map_or(Ok(bodies), |failure| Err(anyhow::anyhow!(failure)))
    }

    fn ask(&self, token: &str, path: &str, key: &str, body: &Value) -> anyhow::Result<Value> {
        let key = key.replace(' ', "-");
        let bodies = self.all(1, path, token, &key, |_| body.to_string(), |_| ())?;
        bodies.into_iter().next().context("one request has one answer")
    }
}

/// Whatever happens to us, the server under test goes with us.
impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn said(path: &str, answer: &Answer<'_>) -> String {
    format!("{path} answered {:?}: {}", answer.status, String::from_utf8_lossy(answer.body))
}

async fn everything(directory: Directory) -> anyhow::Result<Server> {
    let log = File::create(directory.path().join("bench.log"))?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(["up", "--no-demo", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(directory.path())
        .env_remove("DAYBOOK_DATABASE_URL")
        .env_remove("DAYBOOK_NATS_URL")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .context("starting daybook up")?;
    let deadline = Instant::now() + START_TIME;
    let connection = loop {
        let file = std::fs::read(directory.path().join("connection.json")).ok();
        if let Some(connection) = file.and_then(|text| serde_json::from_slice::<Value>(&text).ok()) {
            break connection;
        }
        if child.try_wait()?.is_some() || deadline < Instant::now() {
            let log = std::fs::read_to_string(directory.path().join("bench.log")).unwrap_or_default();
            let _ = child.kill();
            bail!("daybook up did not become ready:\n{log}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let text = |name: &str| connection[name].as_str().unwrap_or_default().to_owned();
    let address = text("baseUrl").trim_start_matches("http://").parse()?;
    let token = login_at(address, &connection["admin"])?;
    Ok(Server {
        child,
        address,
        database_url: text("databaseUrl"),
        token,
        client: connection["admin"]["clientId"].as_str().unwrap_or_default().parse()?,
        wallets: Vec::new(),
        stack: None,
        _directory: directory,
    })
}

async fn commands_alone(directory: Directory) -> anyhow::Result<Server> {
    let stack = Stack::start(directory.path(), local_stack::Options::default()).await?;
    migrations::run(stack.database_url()).await?;
    let installation = Installation::open(directory.path())?;
    let log = File::create(directory.path().join("bench.log"))?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(["bench-commands", "--data-dir"])
        .arg(directory.path())
        .env("DAYBOOK_DATABASE_URL", stack.database_url())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("starting the commands' service")?;
    let mut line = String::new();
    let stdout = child.stdout.take().expect("standard output was asked to be a pipe");
    BufReader::new(stdout).read_line(&mut line)?;
    let Ok(address) = line.trim().parse() else {
        let log = std::fs::read_to_string(directory.path().join("bench.log")).unwrap_or_default();
        let _ = child.kill();
        bail!("the commands' service did not start:\n{log}");
    };
    let credentials = serde_json::to_value(installation.admin.credentials())?;
    let token = login_at(address, &credentials)?;
    Ok(Server {
        child,
        address,
        database_url: stack.database_url().to_owned(),
        token,
        client: installation.admin.id(),
        wallets: Vec::new(),
        stack: Some(stack),
        _directory: directory,
    })
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
