//! The relay as a process of its own: `daybook` runs the same one inside.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use event_feed::relay::Relay;
use event_feed::{FeedSettings, Log};
use runtime::health::Health;
use runtime::http::Limits;
use tokio::net::TcpListener;

/// Carries Daybook's log to NATS JetStream.
#[derive(Parser)]
struct Options {
    /// The database that holds the log.
    #[arg(long, env = "DAYBOOK_DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// The NATS server, with JetStream.
    #[arg(long, env = "DAYBOOK_NATS_URL", hide_env_values = true)]
    nats_url: String,
    /// Where /healthz and /readyz are served.
    #[arg(long, env = "DAYBOOK_RELAY_LISTEN", default_value = "127.0.0.1:8081")]
    listen: SocketAddr,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    runtime::telemetry::init("relay");
    let shutdown = runtime::shutdown::signal();
    let pool =
        event_store::connect(&options.database_url, "daybook_reader", 2).await.context("connecting to the log")?;
    let log = Log::new(pool);
    let settings = FeedSettings::of(&log, Some(options.nats_url)).await.context("reading the ledger's id")?;
    let relay = Relay::new(log.clone(), settings);
    let listener = TcpListener::bind(options.listen).await.context("binding")?;
    let served =
        runtime::http::serve(listener, health(log, relay.clone()).router(), Limits::default(), shutdown.clone());
    let (served, relayed) = tokio::join!(served, relay.run(shutdown.clone()));
    runtime::telemetry::flush();
    served.context("serving")?;
    relayed
}

fn health(log: Log, relay: Relay) -> Health {
    let head = log.clone();
    Health::new()
        .sample("relay", Duration::from_secs(10), move || {
            let log = head.clone();
            async move { event_feed::show_relay_lag(&log).await }
        })
        .check("log", Duration::from_secs(2), move || {
            let log = log.clone();
            async move { log.head().await.map(|_| ()) }
        })
        .check("bus", Duration::from_secs(1), move || {
            let check = relay.check();
            async move { check }
        })
}
