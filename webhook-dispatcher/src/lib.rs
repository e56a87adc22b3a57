//! The way out: tells partners over signed webhooks what has happened.
//!
//! Last room on one branch of the road: it follows the log (event-feed), makes deliveries with its checkpoint
//! (`fan_out.rs`), sends each until it is taken or given up (`dispatch.rs`, `send.rs`), and serves
//! `/v1/webhooks*` and `/v1/deliveries*` (`endpoints.rs`, `deliveries.rs`). What it knows of its own is in the
//! schema `webhooks`; what it says of wallets and transactions is folded from the log alone.
//!
//! # What a partner can rely on
//! Every event since an endpoint's registration is delivered at least once, or becomes a dead letter that can be
//! redelivered. Order is not promised; `sequence` has no gaps, so a receiver can find it. Repeats carry the same
//! `webhook-id` and the same bytes.
//!
//! Left out: asking the ledger to do anything. Nothing flows back from here.

mod deliveries;
mod dispatch;
mod endpoints;
mod fan_out;
mod metrics;
mod notice;
mod schedule;
mod send;
mod signature;
mod target;

use std::fmt::Display;
use std::str::FromStr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use api_contract::{Access, Act, Client, CursorKey, Freshness, Problem, Seal};
use axum::Router;
use axum::extract::FromRef;
use axum::routing::{get, post};
use event_feed::{FeedSettings, Log, Obstacle, pool_options};
use runtime::health::Health;
use runtime::shutdown::Shutdown;
use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;
use time::OffsetDateTime;
use tokio::sync::{Notify, watch};
use utoipa::OpenApi;

pub use schedule::{InvalidSchedule, Schedule};

use metrics::METRICS;
use send::Sender;
use target::Reach;

/// What can be set from outside.
#[derive(Clone, Debug)]
pub struct Settings {
    pub feed: FeedSettings,
    /// Whether http, this machine and private networks may be targets: on a developer's machine only.
    pub allow_local_webhooks: bool,
    pub schedule: Schedule,
}

/// The service: state of its routes and of its tasks. Cheap to clone.
#[derive(Clone)]
pub struct Dispatcher {
    log: Log,
    /// The log for fan-out, on a connection of its own: it reads while it holds the checkpoint, and who waits for the
    /// checkpoint may hold all the others.
    reading: Log,
    feed: FeedSettings,
    access: Access,
    seal: Seal,
    cursors: CursorKey,
    reach: Reach,
    schedule: Schedule,
    sender: Sender,
    /// There is something new to send.
    wake: Arc<Notify>,
    /// How far the log has been turned into deliveries, as this process knows it.
    position: watch::Sender<i64>,
    /// What keeps fan-out from going on.
    obstacle: Obstacle,
}

/// The role that this service acts as in Postgres.
const ROLE: &str = "daybook_webhooks";

const CONNECTIONS: u32 = 12;

/// The server ends what takes longer, such as waiting for a lock whose holder is stuck; it is tried again or answered 503.
const STATEMENT_TIME: &str = "30s";

/// For what `/metrics` asks the database.
const SAMPLE_TIME: Duration = Duration::from_secs(10);

/// More than this apart from Postgres, and receivers will find our timestamps wrong.
const CLOCK_SKEW_MAX: time::Duration = time::Duration::seconds(2);

/// The log, as the role of this service reads it. Connects when it is first used.
pub fn log(database_url: &str) -> Result<Log, sqlx::Error> {
    let options = [("role", ROLE), ("jit", "off"), ("statement_timeout", STATEMENT_TIME)];
    let options = PgConnectOptions::from_str(database_url)?.application_name(ROLE).options(options);
    Ok(Log::new(pool_options(CONNECTIONS).connect_lazy_with(options)))
}

impl Dispatcher {
    /// From the [`log`] of this service. Connects to nothing yet.
    pub fn new(log: Log, access: Access, seal: &Seal, settings: Settings) -> Result<Self, reqwest::Error> {
        let Settings { feed, allow_local_webhooks, schedule } = settings;
        let reach = if allow_local_webhooks { Reach::Local } else { Reach::Public };
        let reading = Log::new(pool_options(1).connect_lazy_with(log.pool().connect_options().as_ref().clone()));
        Ok(Self {
            log,
            reading,
            feed,
            access,
            seal: seal.clone(),
            cursors: CursorKey::new(seal),
            reach,
            schedule,
            sender: Sender::new(reach)?,
            wake: Arc::new(Notify::new()),
            position: watch::Sender::new(0),
            obstacle: Obstacle::default(),
        })
    }

    /// What keeps deliveries from being made, if anything does that will not pass.
    pub fn obstacle(&self) -> &Obstacle {
        &self.obstacle
    }

    /// Adds what `/metrics` asks the database: how far behind the deliveries are, and how many wait.
    #[must_use]
    pub fn sampled(&self, health: Health) -> Health {
        LazyLock::force(&METRICS);
        let dispatcher = self.clone();
        health.sample("webhooks", SAMPLE_TIME, move || {
            let dispatcher = dispatcher.clone();
            async move { metrics::show_backlog(&dispatcher).await }
        })
    }

    fn pool(&self) -> &PgPool {
        self.log.pool()
    }

    fn reached(&self, position: i64) {
        self.position.send_replace(position);
    }

    /// Writes down what an operator does to a partner's endpoints: it is no event of the log. Before the commit, so that
    /// nothing is done which nobody knows of.
    async fn privileged(&self, act: &'static str, client: &Client, on: &impl Display) -> Result<(), Problem> {
        if !client.is_admin() {
            return Ok(());
        }
        let act = Act::new(act).by(client.id).origin(&client.origin()).with("on", on);
        self.access.record(act).await.map_err(|error| Problem::storage(&error))
    }

    /// Waits until deliveries are made up to where the caller wants them.
    async fn wait(&self, freshness: Freshness) -> Result<(), Problem> {
        let head = || async { Ok(self.log.head().await.map_err(|error| Problem::storage(&error))?.position) };
        freshness.wait(&mut self.position.subscribe(), head).await
    }
}

impl FromRef<Dispatcher> for Access {
    fn from_ref(dispatcher: &Dispatcher) -> Self {
        dispatcher.access.clone()
    }
}

/// Makes and sends deliveries until a stop is wanted, through outages of Postgres and NATS.
pub async fn run(dispatcher: Dispatcher, shutdown: Shutdown) {
    tokio::join!(
        fan_out::run(&dispatcher, &shutdown),
        dispatch::run(&dispatcher, &shutdown),
        dispatch::clear(&dispatcher, &shutdown),
    );
}

/// `/v1/webhooks*` and `/v1/deliveries*`, without [`api_contract::layer`].
pub fn routes(dispatcher: Dispatcher) -> Router {
    Router::new()
        .route("/v1/webhooks", get(endpoints::list).post(endpoints::register))
        .route("/v1/webhooks/{id}", get(endpoints::show).patch(endpoints::change).delete(endpoints::delete))
        .route("/v1/webhooks/{id}/deliveries", get(deliveries::list))
        .route("/v1/deliveries/{id}", get(deliveries::show))
        .route("/v1/deliveries/{id}/redeliver", post(deliveries::redeliver))
        .with_state(dispatcher)
}

/// What must hold for deliveries to be made, and sent with a right timestamp.
pub fn health(dispatcher: &Dispatcher) -> Health {
    let limit = Duration::from_secs(2);
    let pool = dispatcher.pool().clone();
    let obstacle = dispatcher.obstacle().clone();
    let health =
        dispatcher.sampled(Health::new()).check("webhooks-log", limit, move || std::future::ready(obstacle.check()));
    health.check("webhooks-database-and-clock", limit, move || {
        let pool = pool.clone();
        async move {
            let theirs: OffsetDateTime = sqlx::query_scalar("select clock_timestamp()")
                .fetch_one(&pool)
                .await
                .map_err(|error| error.to_string())?;
            let skew = (OffsetDateTime::now_utc() - theirs).abs();
            if skew <= CLOCK_SKEW_MAX { Ok(()) } else { Err(format!("our clock is {skew} off the database's")) }
        }
    })
}

/// For those who write a receiver.
const ABOUT: &str = "How partners are told what has happened.\n\n\
    Each event is a POST of `{eventId, eventType, createdAt, sequence, ledgerPosition, data}` to the registered URL, where \
    `data` is the transaction or wallet as of that event and `sequence` has no gaps per endpoint. Answer 2xx within 15 s; \
    anything else is tried again after 1 m, 5 m, 15 m, 1 h and 6 h, then it is a dead letter that can be redelivered. \
    410 disables the endpoint; 429 with `Retry-After` pauses it, for six hours at most.\n\n\
    Headers: `X-Daybook-Event`, `X-Daybook-Delivery`, `X-Daybook-Attempt` (from 1), `X-Daybook-Signature: sha256=<hex>` \
    (HMAC-SHA256 of the raw body, keyed with the secret as shown), and those of Standard Webhooks: `webhook-id` (the \
    `eventId`, the same on each attempt), `webhook-timestamp`, `webhook-signature: v1,<base64>` (HMAC-SHA256 of \
    `{id}.{timestamp}.{body}`, keyed with what the Base64 after `whsec_` stands for). `X-Daybook-Possible-Duplicate: true` \
    says that an earlier attempt may have arrived. `traceparent` (W3C Trace Context) belongs to the trace of the request \
    that led to the event, if that had one. Order is not promised, and an event may come more than once.";

/// This service's part of the OpenAPI document.
pub fn openapi() -> utoipa::openapi::OpenApi {
    #[derive(OpenApi)]
    #[openapi(paths(
        endpoints::register,
        endpoints::list,
        endpoints::show,
        endpoints::change,
        endpoints::delete,
        deliveries::list,
        deliveries::show,
        deliveries::redeliver,
    ), tags((name = "webhooks", description = ABOUT)))]
    struct Document;
    Document::openapi()
}
