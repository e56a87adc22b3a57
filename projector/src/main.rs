//! The projector as a process of its own. `daybook up` runs the same code beside all the others.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use api_contract::{Access, Seal};
use clap::Parser;
use event_feed::{FeedSettings, Log};
use projector::{Progress, Queries, Settings};
use runtime::http::Limits;
use tokio::net::TcpListener;

/// Folds Daybook's log into views and answers queries.
#[derive(Parser)]
#[command(name = "projector", version)]
struct Options {
    /// The ledger's database; its schemas must be up to date.
    #[arg(long, env = "DAYBOOK_DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// Without it the log is followed in Postgres alone.
    #[arg(long, env = "DAYBOOK_NATS_URL", hide_env_values = true)]
    nats_url: Option<String>,
    /// Where queries, /healthz and /readyz are served.
    #[arg(long, env = "DAYBOOK_QUERIES_LISTEN", default_value = "127.0.0.1:8082")]
    listen: SocketAddr,
    /// A file of 32 random bytes: the key under which secrets are sealed, the same for all services. Older keys may follow
    /// it, 32 bytes each.
    #[arg(long, env = "DAYBOOK_SECRETS_KEY_FILE")]
    secrets_key_file: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    runtime::telemetry::init("projector");
    let served = serve(options).await;
    if let Err(error) = &served {
        tracing::error!(error = %format_args!("{error:#}"), "stopped by a failure");
    }
    runtime::telemetry::flush();
    served
}

async fn serve(options: Options) -> anyhow::Result<()> {
    let Options { database_url, nats_url, listen, secrets_key_file } = options;
    let seal = Seal::from_key_file(&secrets_key_file)?;
    let access = Access::connect(&database_url, seal.clone()).await.context("connecting to the schema access")?;
    let progress = Progress::default();
    let queries =
        Queries::connect(&database_url, access, &seal, progress.clone()).await.context("connecting to the views")?;
    let pool = event_store::connect(&database_url, "daybook_projector", 1).await.context("connecting to the log")?;
    let feed = FeedSettings::of(&Log::new(pool), nats_url).await.context("reading the ledger's id")?;
    let listener = TcpListener::bind(listen).await.context("listening")?;
    tracing::info!(address = %listener.local_addr()?, "answering queries");
    let routes = api_contract::layer(projector::routes(queries.clone()));
    let router = routes.merge(projector::health(&queries).router());
    let shutdown = runtime::shutdown::signal();
    let served = runtime::http::serve(listener, router, Limits::default(), shutdown.clone());
    let projected = projector::follow(Settings { database_url, feed }, progress, shutdown.clone());
    // A projector that cannot go on takes its queries with it: answers that only grow older help nobody.
    let projected = async {
        let ended = projected.await;
        shutdown.trigger();
        ended
    };
    let (served, projected) = tokio::join!(served, projected);
    served.context("serving")?;
    projected.context("projecting")
}
