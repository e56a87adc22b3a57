//! The webhook dispatcher as a process of its own. `daybook up` runs the same code beside all the others.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use api_contract::{Access, Seal};
use clap::Parser;
use event_feed::FeedSettings;
use runtime::http::Limits;
use tokio::net::TcpListener;
use webhook_dispatcher::{Dispatcher, Schedule, Settings};

/// Tells partners over signed webhooks what has happened.
#[derive(Parser)]
#[command(name = "webhook-dispatcher", version)]
struct Options {
    /// The ledger's database; its schemas must be up to date.
    #[arg(long, env = "DAYBOOK_DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// Without it the log is followed in Postgres alone.
    #[arg(long, env = "DAYBOOK_NATS_URL", hide_env_values = true)]
    nats_url: Option<String>,
    /// Where /v1/webhooks, /v1/deliveries, /healthz and /readyz are served.
    #[arg(long, env = "DAYBOOK_WEBHOOKS_LISTEN", default_value = "127.0.0.1:8083")]
    listen: SocketAddr,
    /// A file of 32 random bytes: the key under which secrets are sealed, the same for all services. Older keys may follow
    /// it, 32 bytes each.
    #[arg(long, env = "DAYBOOK_SECRETS_KEY_FILE")]
    secrets_key_file: PathBuf,
    /// Allow http, this machine and private networks as targets. Never in production.
    #[arg(long, env = "DAYBOOK_ALLOW_LOCAL_WEBHOOKS")]
    allow_local_webhooks: bool,
    /// Waits between attempts, kept exactly, such as 1s,5s [default: 1m,5m,15m,1h,6h, each with up to a tenth more]
    #[arg(long, env = "DAYBOOK_WEBHOOK_SCHEDULE")]
    webhook_schedule: Option<Schedule>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    runtime::telemetry::init("webhook-dispatcher");
    let served = serve(options).await;
    if let Err(error) = &served {
        tracing::error!(error = %format_args!("{error:#}"), "stopped by a failure");
    }
    runtime::telemetry::flush();
    served
}

async fn serve(options: Options) -> anyhow::Result<()> {
    let seal = Seal::from_key_file(&options.secrets_key_file)?;
    let access =
        Access::connect(&options.database_url, seal.clone()).await.context("connecting to the schema access")?;
    let log = webhook_dispatcher::log(&options.database_url).context("reading the database's address")?;
    let settings = Settings {
        feed: FeedSettings::of(&log, options.nats_url).await.context("reading the ledger's id")?,
        allow_local_webhooks: options.allow_local_webhooks,
        schedule: options.webhook_schedule.unwrap_or_default(),
    };
    let dispatcher = Dispatcher::new(log, access, &seal, settings).context("making the client for webhooks")?;
    let listener = TcpListener::bind(options.listen).await.context("listening")?;
    tracing::info!(address = %listener.local_addr()?, "telling partners");
    let routes = api_contract::layer(webhook_dispatcher::routes(dispatcher.clone()));
    let router = routes.merge(webhook_dispatcher::health(&dispatcher).router());
    let shutdown = runtime::shutdown::signal();
    let served = runtime::http::serve(listener, router, Limits::default(), shutdown.clone());
    let (served, ()) = tokio::join!(served, webhook_dispatcher::run(dispatcher, shutdown));
    served.context("serving")
}
