//! `daybook up`: everything, on a private Postgres and NATS, behind one port.
//!
//! The services are the same code that their own binaries run, each with its own connections and its own role in
//! Postgres, and they speak to each other over HTTP as they do when they are apart. The relay publishes as it does then, and hands commits
//! to the followers of this process.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use api_contract::{Access, Scopes, Seal};
use axum::Router;
use clap::Args;
use command_api::Commands;
use event_feed::{FeedSettings, Log, relay};
use ledger_core::{Action, Caller, Command, CommandId, Currency, Key, WalletId};
use ledger_engine::Ledger;
use local_stack::Stack;
use projector::Queries;
use runtime::health::Health;
use runtime::http::Limits;
use runtime::metrics::Start;
use runtime::shutdown::Shutdown;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;
use webhook_dispatcher::{Dispatcher, Schedule};

use crate::connection::{Connection, ConnectionFile};
use crate::installation::Installation;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Where the servers' data, the installation's secrets and connection.json are.
    #[arg(long, env = "DAYBOOK_DATA_DIR", default_value = "data")]
    data_dir: PathBuf,
    /// Where the product listens. Port 0 picks a free one.
    #[arg(long, env = "DAYBOOK_LISTEN", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Do not register a demo partner.
    #[arg(long)]
    no_demo: bool,
    /// Let webhooks go to http, to this machine and to private networks. For trying things out.
    #[arg(long)]
    allow_local_webhooks: bool,
    /// When a failed webhook is tried again, such as 1s,5s,1m; the default is 1m,5m,15m,1h,6h.
    #[arg(long, default_value = None)]
    webhook_schedule: Option<Schedule>,
    /// When the bank is asked about a top-up of which it has said nothing.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "30s")]
    top_up_ask_after: Duration,
    /// When a top-up that nobody has paid expires.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "15m")]
    top_up_expire_after: Duration,
}

/// The currencies of the demo partner.
const DEMO_CURRENCIES: [&str; 9] = ["EUR", "GBP", "GHS", "JPY", "KES", "KWD", "NGN", "USD", "ZAR"];

/// For all tasks to end after a stop was requested; what takes longer is cut off, and the log has what was acknowledged.
const STOP_TIME: Duration = Duration::from_secs(8);

/// For the engine, which has nobody left who asks, to finish what it has taken on.
const LEDGER_STOP_TIME: Duration = Duration::from_secs(2);

/// For all of this, and for a start that is stopped before its end. The servers' own end takes nine seconds at most, so
/// it stays within the 20 s that API.md promises.
const ORDERLY_END_TIME: Duration = Duration::from_secs(10);

pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    runtime::telemetry::init("daybook");
    let shutdown = runtime::shutdown::signal();
    std::fs::create_dir_all(&options.data_dir)
        .with_context(|| format!("creating the data directory {}", options.data_dir.display()))?;
    let announce: local_stack::Announce = say;
    let stack_options = local_stack::Options { announce, ..local_stack::Options::from_env() };
    let mut start = Start::begin();
    let stack = tokio::select! {
        stack = Stack::start(&options.data_dir, stack_options) => stack?,
        () = shutdown.requested() => return Ok(ExitCode::SUCCESS), // what was half started ends with this process
    };
    start.done("servers");
    let served = tokio::select! {
        served = serve(&options, &stack, &shutdown, |connection, _| greet(&options, connection)) => served,
        never = stack.supervise() => match never {}, // services wait for a server that died, and it comes back
        () = interrupted(&shutdown) => Ok(()), // a stop during a start that does not come to its end
    };
    // Beside the servers' end: a collector that does not answer must not make that later.
    let flushed = tokio::task::spawn_blocking(runtime::telemetry::flush);
    stack.stop().await.context("stopping the servers")?;
    flushed.await.ok(); // it bounds itself
    served?;
    say("stopped");
    Ok(ExitCode::SUCCESS)
}

/// Starts every service and runs until a stop is requested or one of them ends; `ready` is called in between.
pub(crate) async fn serve(
    options: &Options,
    stack: &Stack,
    shutdown: &Shutdown,
    ready: impl FnOnce(&Connection, &Ledger),
) -> anyhow::Result<()> {
    ConnectionFile::remove_stale(&options.data_dir)?; // the stack holds the directory's lock
    let (database_url, nats_url) = (stack.database_url(), stack.nats_url());
    let mut start = Start::begin();
    migrations::run(database_url).await?;
    start.done("migrations");
    let mut installation = Installation::open(&options.data_dir)?;
    let seal = installation.seal()?;
    let access = Access::connect(database_url, seal.clone()).await.context("connecting to the schema access")?;
    access.ensure_client(installation.admin.client(None, Scopes::ADMIN)).await?;
    access.ensure_client(installation.workflow.client(None, Scopes::WORKFLOW)).await?;

    start.done("credentials");

    let listener = TcpListener::bind(options.listen).await.with_context(|| {
        format!("listening at {} (another daybook? choose another address with --listen)", options.listen)
    })?;
    let base_url = url_of(listener.local_addr()?);
    let bank_listener = listen_for_bank(&mut installation, &options.data_dir).await?;
    let bank_url = url_of(bank_listener.local_addr()?);

    let engine = ledger_engine::Settings {
        traces: runtime::trace::is_on(),
        keep_recent: true,
        ..ledger_engine::Settings::default()
    };
    let ledger = Ledger::start(database_url, engine).await.context("reading the log")?;
    if !options.no_demo {
        register_demo_partner(&ledger, &access, &installation).await.context("registering the demo partner")?;
    }

    start.done("ledger");

    let log = Log::new(event_store::connect(database_url, "daybook_reader", 4).await?);
    let feed = FeedSettings::of(&log, Some(nats_url.to_owned())).await?.in_one_process();
    let log = log.with_recent(ledger.recent().cloned());
    let services = Services { database_url, base_url: &base_url, bank_url: &bank_url, feed, seal: &seal };
    let mut tasks = Tasks::new(shutdown);
    tasks.spawn("relay", relay::run(log, services.feed.clone(), shutdown.clone()));
    tasks.spawn("bank", bank(bank_listener, &installation, &options.data_dir, shutdown));
    let router = services.start(options, &installation, &ledger, &access, &mut tasks, shutdown).await?;
    let limits = Limits { always: command_api::ALWAYS, drain_time: Duration::from_secs(5), ..Limits::default() };
    let server = runtime::http::serve(listener, router, limits, shutdown.clone());
    tasks.spawn("http", async move { Ok(server.await?) });
    start.done("services");

    let mut ended = pin!(tasks.run());
    tokio::select! {
        ready = until_ready(&base_url) => ready?,
        ended = &mut ended => {
            ledger.stop(LEDGER_STOP_TIME).await;
            return ended; // a stop during the start, or a service that could not start and says why
        }
    }
    start.done("ready");
    let connection = Connection {
        pid: std::process::id(),
        base_url: base_url.clone(),
        bank_url,
        database_url: database_url.to_owned(),
        nats_url: nats_url.to_owned(),
        admin: installation.admin.credentials(),
        demo_partner: (!options.no_demo).then(|| installation.demo_partner.credentials()),
    };
    let connection_file = ConnectionFile::write(&options.data_dir, &connection)?;
    ready(&connection, &ledger);

    let ended = ended.await;
    ledger.stop(LEDGER_STOP_TIME).await;
    drop(connection_file);
    ended
}

fn greet(options: &Options, connection: &Connection) {
    let base_url = &connection.base_url;
    say(&format!("Daybook is ready at {base_url}"));
    say(&format!("  the API explained   {base_url}/docs"));
    say(&format!("  credentials         {}", options.data_dir.join("connection.json").display()));
}

/// What all services are told.
struct Services<'a> {
    database_url: &'a str,
    base_url: &'a str,
    bank_url: &'a str,
    feed: FeedSettings,
    seal: &'a Seal,
}

impl Services<'_> {
    /// Starts the services' tasks and joins their routes to one router.
    async fn start(
        &self,
        options: &Options,
        installation: &Installation,
        ledger: &Ledger,
        access: &Access,
        tasks: &mut Tasks,
        shutdown: &Shutdown,
    ) -> anyhow::Result<Router> {
        let progress = projector::Progress::default();
        let queries = Queries::connect(self.database_url, access.clone(), self.seal, progress.clone()).await?;
        let projector = projector::Settings { database_url: self.database_url.to_owned(), feed: self.feed.clone() };
        let (level, head, mut start) = (progress.clone(), ledger.log().head().await?.position, Start::begin());
        tokio::spawn(async move {
            level.reaches(head).await;
            start.done("views");
        });
        tasks.spawn("projector", projector::follow(projector, progress, shutdown.clone()));

        let commands = command_api::Settings { bank_url: self.bank_url.to_owned() };
        let commands = Commands::new(ledger.clone(), access.clone(), commands);

        let dispatcher = webhook_dispatcher::Settings {
            feed: self.feed.clone(),
            allow_local_webhooks: options.allow_local_webhooks,
            schedule: options.webhook_schedule.clone().unwrap_or_default(),
        };
        let webhooks_log = webhook_dispatcher::log(self.database_url)?;
        let dispatcher = Dispatcher::new(webhooks_log, access.clone(), self.seal, dispatcher)?;
        let dispatching = webhook_dispatcher::run(dispatcher.clone(), shutdown.clone());
        tasks.spawn("webhook-dispatcher", async move {
            dispatching.await;
            Ok(())
        });

        let workflow = installation.workflow.credentials();
        let workflows = workflows::Settings {
            database_url: self.database_url.to_owned(),
            feed: self.feed.clone(),
            command_url: self.base_url.to_owned(),
            client_id: workflow.client_id,
            client_secret: workflow.client_secret,
            bank_url: self.bank_url.to_owned(),
            bank_api_key: installation.bank_api_key.clone(),
            callback_secret: installation.bank_callback_secret.clone(),
            callback_url: format!("{}/v1/callbacks/bank", self.base_url),
            times: workflows::Times {
                ask_after: options.top_up_ask_after,
                expire_after: options.top_up_expire_after,
                ..workflows::Times::default()
            },
        };
        let workflows = workflows::State::new(&workflows)?;
        let (working, stop) = (workflows.clone(), shutdown.clone());
        tasks.spawn("workflows", async move {
            working.run(stop).await;
            Ok(())
        });

        let relayed = ledger.log().clone();
        let health = Health::new().sample("relay", Duration::from_secs(10), move || {
            let log = relayed.clone();
            async move { event_feed::show_relay_lag(&log).await }
        });
        let health = workflows.sampled(dispatcher.sampled(queries.sampled(health)));
        let limit = Duration::from_secs(1);
        let (making, working) = (dispatcher.obstacle().clone(), workflows.obstacle().clone());
        let health = health.check("webhooks-log", limit, move || std::future::ready(making.check())).check(
            "workflows-log",
            limit,
            move || std::future::ready(working.check()),
        );
        let mut document = command_api::openapi();
        for more in [projector::openapi(), webhook_dispatcher::openapi(), workflows::openapi()] {
            document.merge(more);
        }
        let router = command_api::routes(commands.clone())
            .merge(projector::routes(queries))
            .merge(webhook_dispatcher::routes(dispatcher))
            .merge(workflows::routes(workflows))
            .merge(command_api::docs(command_api::complete(document)))
            .merge(api_contract::problem_pages())
            .merge(commands.health(health).router());
        Ok(api_contract::layer(router))
    }
}

/// The services' tasks. When one ends, all are told to.
struct Tasks {
    set: JoinSet<(&'static str, anyhow::Result<()>)>,
    shutdown: Shutdown,
}

impl Tasks {
    fn new(shutdown: &Shutdown) -> Self {
        Self { set: JoinSet::new(), shutdown: shutdown.clone() }
    }

    fn spawn(&mut self, name: &'static str, task: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        self.set.spawn(async move { (name, task.await) });
    }

    /// Until all have ended. An end that nobody asked for is a failure of the whole.
    async fn run(mut self) -> anyhow::Result<()> {
        let mut failure = None;
        let mut deadline = None;
        let mut next = self.set.join_next().await;
        while let Some(ended) = next {
            let asked = self.shutdown.is_requested();
            let told = match ended {
                Ok((_, Ok(()))) if asked => None,
                Ok((name, Ok(()))) => Some(anyhow::anyhow!("{name} ended by itself")),
                Ok((name, Err(error))) => Some(error.context(name)),
                Err(panic) => Some(anyhow::Error::from(panic).context("a service panicked")),
            };
            failure = failure.or(told);
            self.shutdown.trigger();
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + STOP_TIME); // one for all, not one for each
            next = match timeout_at(deadline, self.set.join_next()).await {
                Ok(next) => next,
                Err(_) => {
                    tracing::warn!(tasks = self.set.len(), "not everything ended in time; the rest is cut off");
                    None
                }
            };
        }
        failure.map_or(Ok(()), Err)
    }
}

/// The bank keeps its address if it can: payment pages that were handed out point there.
async fn listen_for_bank(installation: &mut Installation, data_dir: &Path) -> anyhow::Result<TcpListener> {
    let at = |port| TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let listener = match at(installation.bank_port).await {
        Ok(listener) => listener,
        Err(_) => at(0).await.context("listening for the bank")?,
    };
    let port = listener.local_addr()?.port();
    if port != installation.bank_port {
        installation.bank_port = port;
        installation.save(data_dir)?;
    }
    Ok(listener)
}

fn bank(
    listener: TcpListener,
    installation: &Installation,
    data_dir: &Path,
    shutdown: &Shutdown,
) -> impl Future<Output = anyhow::Result<()>> + use<> {
    let config = bank_simulator::Config {
        callback_secret: installation.bank_callback_secret.clone(),
        api_key: installation.bank_api_key.clone(),
        journal: Some(data_dir.join("bank.jsonl")),
    };
    bank_simulator::run(listener, config, shutdown.clone())
}

/// Once: a command with a key of its own is repeated at every start.
async fn register_demo_partner(ledger: &Ledger, access: &Access, installation: &Installation) -> anyhow::Result<()> {
    let partner = installation.demo_partner_id;
    let currencies = DEMO_CURRENCIES.map(|code| -> anyhow::Result<_> {
        let currency: Currency = code.parse()?;
        Ok((currency, WalletId::from_uuid(Uuid::now_v7())))
    });
    let key = Key {
        hash: api_contract::key_hash(installation.admin.id(), "daybook up: demo partner"),
        request: Sha256::digest(partner.uuid()).into(),
    };
    let action = Action::RegisterPartner {
        partner,
        name: "Demo partner".to_owned(),
        currencies: currencies.into_iter().collect::<anyhow::Result<_>>()?,
        client: installation.demo_partner.id(),
    };
    let command = Command {
        id: CommandId::from_uuid(Uuid::now_v7()),
        key: Some(key),
        caller: Caller::Admin,
        action,
        metadata: format!(r#"{{"clientId":"{}"}}"#, installation.admin.id()).into(),
    };
    access.ensure_client(installation.demo_partner.client(Some(partner), Scopes::PARTNER)).await?;
    ledger.execute(command).await?;
    Ok(())
}

/// Until the product answers that it is ready, as any client would find it.
async fn until_ready(base_url: &str) -> anyhow::Result<()> {
    let client = reqwest::Client::builder().no_proxy().build()?;
    let asking = async {
        loop {
            let answer = client.get(format!("{base_url}/readyz")).timeout(Duration::from_secs(5)).send().await;
            if answer.is_ok_and(|answer| answer.status().is_success()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if timeout(Duration::from_secs(60), asking).await.is_err() {
        bail!("not ready within a minute; the log above says why");
    }
    Ok(())
}

/// A stop was requested, and the orderly end has not come in the time that it may take.
async fn interrupted(shutdown: &Shutdown) {
    shutdown.requested().await;
    tokio::time::sleep(ORDERLY_END_TIME).await;
}

/// A line for whoever started us, if they still read: a closed pipe must not end a ledger.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// How to reach a listener from this machine.
fn url_of(address: SocketAddr) -> String {
    if address.ip().is_unspecified() {
        format!("http://127.0.0.1:{}", address.port())
    } else {
        format!("http://{address}")
    }
}
