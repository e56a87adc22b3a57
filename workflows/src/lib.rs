//! The processes that need the outside: one file each. Today the top-up (`top_up.rs`).
//!
//! Last room on the road: it follows the log, calls the bank, hears the bank's word at `/v1/callbacks/bank`,
//! and turns it into a command over HTTP, as a client of its own. Its schema `workflows` holds what it is
//! about to call and what it was told.
//!
//! Left out: deciding anything about money (ledger-core does), reading any view, retries without a bound.

mod bank;
mod call;
mod callbacks;
mod commands;
mod follow;
#[cfg(any(test, fuzzing))]
pub mod laws;
mod metrics;
mod pause;
mod top_up;

use std::str::FromStr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::routing::post;
use event_feed::{FeedSettings, Log, Obstacle};
use runtime::health::Health;
use runtime::shutdown::Shutdown;
use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;
use utoipa::OpenApi;

use crate::callbacks::Callbacks;
use crate::metrics::METRICS;
use crate::top_up::{Lane, TopUps};

/// For what `/metrics` asks the database.
const SAMPLE_TIME: Duration = Duration::from_secs(10);

/// Where everything is, and how long to wait for it.
#[derive(Clone)]
pub struct Settings {
    pub database_url: String,
    pub feed: FeedSettings,
    /// The base of command-api.
    pub command_url: String,
    /// A client of our own, with the scope `workflow`.
    pub client_id: String,
    pub client_secret: String,
    /// The base of the bank's interface, from server to server.
    pub bank_url: String,
    pub bank_api_key: String,
    /// With which the bank signs its callbacks.
    pub callback_secret: String,
    /// Where the bank reaches our `/v1/callbacks/bank`.
    pub callback_url: String,
    pub times: Times,
}

#[derive(Clone, Debug)]
pub struct Times {
    /// Without a word of the bank it is asked after this long, then after ever longer pauses.
    pub ask_after: Duration,
    /// A payment that nobody has decided this long after the request is cancelled.
    pub expire_after: Duration,
    /// What the ledger or the bank refuses is tried again after this long, then after ever longer pauses, at most sixty times this.
    pub blocked_after: Duration,
    /// The time limit of a single call.
    pub call_time: Duration,
}

/// What tasks and routes share; cheap to clone.
#[derive(Clone)]
pub struct State {
    callbacks: Callbacks,
    feed: FeedSettings,
    /// What keeps the log from being followed.
    obstacle: Obstacle,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            ask_after: Duration::from_secs(30),
            expire_after: Duration::from_secs(15 * 60),
            blocked_after: Duration::from_secs(60),
            call_time: Duration::from_secs(10),
        }
    }
}

impl Times {
    /// A whole attempt: a command may need two tokens and two calls, of which only the slow one counts.
    fn attempt(&self) -> Duration {
        self.call_time * 2
    }

    /// Longer than any attempt, so that an outcome is recorded before the row falls due again.
    fn lease(&self) -> Duration {
        self.attempt() + self.call_time
    }
}

impl State {
    /// Connects when it is first needed, so a start does not depend on Postgres.
    pub fn new(settings: &Settings) -> anyhow::Result<Self> {
        let top_ups = TopUps::new(settings, pool(&settings.database_url)?).context("a client for HTTP")?;
        let callbacks = Callbacks { top_ups: Arc::new(top_ups), secret: settings.callback_secret.as_str().into() };
        Ok(Self { callbacks, feed: settings.feed.clone(), obstacle: Obstacle::default() })
    }

    /// Follows the log and takes every step that falls due, until a stop is requested. Outages of Postgres, NATS, the bank
    /// and command-api are waited for. Several of these, in one process or many, do no harm to each other.
    pub async fn run(&self, shutdown: Shutdown) {
        let top_ups = &self.callbacks.top_ups;
        tokio::join!(
            follow::run(&self.feed, top_ups, &self.obstacle, &shutdown),
            top_ups.take_steps(Lane::Bank, &shutdown),
            top_ups.take_steps(Lane::Ledger, &shutdown),
            top_ups.look_at_quarantine(&shutdown),
        );
    }

    /// What keeps the log from being followed, if anything does that will not pass.
    pub fn obstacle(&self) -> &Obstacle {
        &self.obstacle
    }

    /// Adds what `/metrics` asks the database: how far behind the workflows are, and how much is under way.
    #[must_use]
    pub fn sampled(&self, health: Health) -> Health {
        LazyLock::force(&METRICS);
        let top_ups = self.callbacks.top_ups.clone();
        health.sample("workflows", SAMPLE_TIME, move || {
            let top_ups = top_ups.clone();
            async move {
                let checkpoint = follow::checkpoint(top_ups.pool()).await?;
                event_feed::show_lag(top_ups.log(), "workflows", checkpoint).await?;
                metrics::show_open(top_ups.pool()).await?;
                anyhow::Ok(())
            }
        })
    }

    /// The log as the workflows read it, for health checks.
    pub fn log(&self) -> &Log {
        self.callbacks.top_ups.log()
    }
}

/// [`State::run`] on a state of its own. An error means that the settings are unusable.
pub async fn run(settings: Settings, shutdown: Shutdown) -> anyhow::Result<()> {
    State::new(&settings)?.run(shutdown).await;
    Ok(())
}

/// `POST /v1/callbacks/bank`. The caller puts `api_contract::layer` around all its routes.
pub fn routes(state: State) -> Router {
    Router::new().route("/v1/callbacks/bank", post(callbacks::bank)).with_state(state.callbacks)
}

/// The routes above, for the one OpenAPI document.
pub fn openapi() -> utoipa::openapi::OpenApi {
    #[derive(OpenApi)]
    #[openapi(paths(callbacks::bank), tags((name = "callbacks", description = "What the outside tells us")))]
    struct Doors;
    Doors::openapi()
}

fn pool(database_url: &str) -> anyhow::Result<PgPool> {
    // Every connection acts as the role that may touch `workflows` and read the log: a slip across schemas is a permission error.
    let role = "daybook_workflows";
    let options = PgConnectOptions::from_str(database_url).context("the database's address")?;
    // The server ends what takes longer than any statement here should; it is tried again.
    let options =
        options.application_name(role).options([("role", role), ("jit", "off"), ("statement_timeout", "30s")]);
    Ok(event_feed::pool_options(8).connect_lazy_with(options))
}
