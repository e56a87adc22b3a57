//! The workflows as a process of their own: `daybook` runs the same ones inside. Secrets come from the environment only.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Parser;
use event_feed::FeedSettings;
use runtime::health::Health;
use runtime::http::Limits;
use tokio::net::TcpListener;
use workflows::{Settings, State, Times};

/// Runs Daybook's business processes that need the outside.
///
/// DAYBOOK_WORKFLOWS_CLIENT_SECRET, DAYBOOK_BANK_API_KEY and DAYBOOK_BANK_CALLBACK_SECRET must be set.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Where /v1/callbacks/bank, /healthz and /readyz are served.
    #[arg(long, env = "DAYBOOK_WORKFLOWS_LISTEN", default_value = "127.0.0.1:8084")]
    listen: SocketAddr,
    #[arg(long, env = "DAYBOOK_DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// Without it the log is followed in Postgres alone.
    #[arg(long, env = "DAYBOOK_NATS_URL", hide_env_values = true)]
    nats_url: Option<String>,
    /// The base of command-api.
    #[arg(long, env = "DAYBOOK_COMMAND_URL")]
    command_url: String,
    /// The client as which commands are issued; it has the scope `workflow`.
    #[arg(long, env = "DAYBOOK_WORKFLOWS_CLIENT_ID")]
    client_id: String,
    /// The base of the bank's interface, from server to server.
    #[arg(long, env = "DAYBOOK_BANK_URL")]
    bank_url: String,
    /// Where the bank reaches our /v1/callbacks/bank.
    #[arg(long, env = "DAYBOOK_BANK_CALLBACK_URL")]
    callback_url: String,
    /// Seconds without a word until the bank is asked.
    #[arg(long, env = "DAYBOOK_TOP_UP_ASK_AFTER", default_value_t = Times::default().ask_after.as_secs())]
    ask_after: u64,
    /// Seconds after which a payment that nobody decided is cancelled.
    #[arg(long, env = "DAYBOOK_TOP_UP_EXPIRE_AFTER", default_value_t = Times::default().expire_after.as_secs())]
    expire_after: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    runtime::telemetry::init("workflows");
    let _ = rustls::crypto::ring::default_provider().install_default(); // an error says that there is one already
    let shutdown = runtime::shutdown::signal();
    let listener = TcpListener::bind(options.listen).await.context("binding")?;
    let state = State::new(&options.settings().await?)?;
    let routes = api_contract::layer(workflows::routes(state.clone()));
    let router = routes.merge(health(&state).router());
    tracing::info!(address = %listener.local_addr()?, "workflows");
    let served = runtime::http::serve(listener, router, Limits::default(), shutdown.clone());
    let (served, ()) = tokio::join!(served, state.run(shutdown.clone()));
    runtime::telemetry::flush();
    served.context("serving")
}

impl Options {
    async fn settings(self) -> anyhow::Result<Settings> {
        let mut settings = Settings {
            database_url: self.database_url,
            feed: FeedSettings { nats_url: None, stream: String::new(), beside: None },
            command_url: self.command_url,
            client_id: self.client_id,
            client_secret: secret("DAYBOOK_WORKFLOWS_CLIENT_SECRET")?,
            bank_url: self.bank_url,
            bank_api_key: secret("DAYBOOK_BANK_API_KEY")?,
            callback_secret: secret("DAYBOOK_BANK_CALLBACK_SECRET")?,
            callback_url: self.callback_url,
            times: Times {
                ask_after: Duration::from_secs(self.ask_after),
                expire_after: Duration::from_secs(self.expire_after),
                ..Times::default()
            },
        };
        let state = State::new(&settings)?;
        settings.feed = FeedSettings::of(state.log(), self.nats_url).await.context("reading the ledger's id")?;
        Ok(settings)
    }
}

fn secret(name: &str) -> anyhow::Result<String> {
    let value = std::env::var(name).unwrap_or_default();
    ensure!(!value.is_empty(), "{name} is not set");
    Ok(value)
}

fn health(state: &State) -> Health {
    let (log, obstacle) = (state.log().clone(), state.obstacle().clone());
    let limit = Duration::from_secs(2);
    let health = state.sampled(Health::new()).check("following", limit, move || std::future::ready(obstacle.check()));
    health.check("log", limit, move || {
        let log = log.clone();
        async move { log.head().await.map(|_| ()) }
    })
}
