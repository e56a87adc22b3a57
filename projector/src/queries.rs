//! What all queries share: their connections, waiting until a view is fresh enough, and who may see what.
//!
//! Every answer carries the position that it reflects, read in the same statement as its rows.

use std::str::FromStr;
use std::sync::LazyLock;
use std::time::Duration;

use api_contract::{Access, Client, CursorKey, Freshness, Page, Problem, Scope, Seal};
use axum::Router;
use axum::extract::FromRef;
use axum::routing::get;
use event_feed::{Head, Log, StoreError};
use ledger_core::{Balance, Currency, PartnerId, Timestamp};
use runtime::health::Health;
use rust_decimal::Decimal;
use serde::Deserialize;
use sqlx::PgPool;
use time::OffsetDateTime;
use tokio::time::{Instant, sleep, timeout_at};
use utoipa::OpenApi;

use crate::metrics::METRICS;
use crate::{Progress, balances, entries, events, metrics, options, partners, transactions, wallets};

/// The state of the routes. Cheap to clone.
#[derive(Clone)]
pub struct Queries {
    log: Log,
    access: Access,
    cursors: CursorKey,
    progress: Progress,
}

/// Something that was looked for, and the position of the view it was looked for in.
pub(crate) struct Found<T> {
    pub(crate) position: i64,
    pub(crate) item: T,
}

/// For what `/metrics` asks the database.
const SAMPLE_TIME: Duration = Duration::from_secs(10);

/// Queries at one time; more wait.
const CONNECTIONS: u32 = 16;

/// How long to wait for a connection before a query counts as failed.
const CONNECTING: Duration = Duration::from_secs(2);

/// How often the checkpoint is read while someone waits and no task of this process moves it.
const POLL: Duration = Duration::from_millis(10);

impl Queries {
    /// `progress` is that of [`crate::follow`] where it runs in the same process, else a new one.
    pub async fn connect(
        database_url: &str,
        access: Access,
        seal: &Seal,
        progress: Progress,
    ) -> Result<Self, sqlx::Error> {
        // Which filters are given differs from call to call, and so does the best plan.
        let options = options(database_url)?.options([
            ("statement_timeout", "2s"),
            ("default_transaction_read_only", "on"),
            ("plan_cache_mode", "force_custom_plan"),
        ]);
        let pool = event_store::pool_options(CONNECTIONS).acquire_timeout(CONNECTING);
        let log = Log::new(pool.connect_with(options).await?);
        Ok(Self { log, access, cursors: CursorKey::new(seal), progress })
    }

    /// Adds what `/metrics` asks the database: how far the views are behind.
    #[must_use]
    pub fn sampled(&self, health: Health) -> Health {
        LazyLock::force(&METRICS);
        let queries = self.clone();
        health.sample("views", SAMPLE_TIME, move || {
            let queries = queries.clone();
            async move { metrics::show_lag(queries.pool()).await }
        })
    }

    pub(crate) fn pool(&self) -> &PgPool {
        self.log.pool()
    }

    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    pub(crate) async fn head(&self) -> Result<Head, Problem> {
        self.log.head().await.map_err(unreadable)
    }

    /// Waits until the views are as fresh as they must be.
    pub(crate) async fn wait(&self, freshness: Freshness) -> Result<(), Problem> {
        if freshness.min_position.is_none() {
            return Ok(());
        }
        let mut seen = self.progress.subscribe();
        let head = || async { Ok(self.head().await?.position) };
        tokio::select! {
            biased; // what is there already needs no question
            waited = freshness.wait(&mut seen, head) => waited,
            problem = self.poll() => Err(problem),
        }
    }

    /// Looks for one thing. What is not there may be on its way: before it counts as absent, the view must have
    /// reached the head as it was on arrival, so that what was answered 201 is never 404.
    pub(crate) async fn find<T, F>(
        &self,
        freshness: Freshness,
        absent: &'static str,
        read: impl Fn() -> F,
    ) -> Result<Found<T>, Problem>
    where
        F: Future<Output = Result<Found<Option<T>>, Problem>>,
    {
        let Found { position, item } = read().await?;
        reflects(freshness, position)?;
        if let Some(item) = item {
            return Ok(Found { position, item });
        }
        let head = self.head().await?.position;
        if position < head {
            let freshness = Freshness { min_position: Some(head), ..freshness };
            self.wait(freshness).await?;
            let Found { position, item } = read().await?;
            reflects(freshness, position)?;
            if let Some(item) = item {
                return Ok(Found { position, item });
            }
        }
        Err(Problem::of(absent))
    }

    /// Returns once the views have moved beyond a position, or the time is over.
    pub(crate) async fn moved(&self, position: i64, deadline: Instant) -> Result<(), Problem> {
        let mut seen = self.progress.subscribe();
        let moved = async { _ = timeout_at(deadline, seen.wait_for(|reached| position < *reached)).await };
        tokio::select! {
            biased;
            () = moved => Ok(()),
            problem = self.poll() => Err(problem),
        }
    }

    /// The position after which a cursor goes on.
    pub(crate) fn after(
        &self,
        route: &str,
        partner: Option<PartnerId>,
        filters: &str,
        cursor: Option<&str>,
    ) -> Result<Option<i64>, Problem> {
        let Some(cursor) = cursor else { return Ok(None) };
        let last = self.cursors.open(route, partner, filters, cursor)?;
        last.parse().map(Some).map_err(|_| Problem::of("cursor-invalid"))
    }

    /// A page of a list from one item more than was asked for, each with its place in the order.
    pub(crate) fn page<T>(
        &self,
        route: &str,
        partner: Option<PartnerId>,
        filters: &str,
        limit: usize,
        items: Vec<(i64, T)>,
    ) -> Page<T> {
        let page = Page::new(items, limit, |(place, _)| self.cursors.seal(route, partner, filters, &place.to_string()));
        let data = page.data.into_iter().map(|(_, item)| item).collect();
        Page { data, has_more: page.has_more, next_cursor: page.next_cursor }
    }

    /// Reads how far the views are, again and again, while no task of this process tells; ends only with a problem.
    /// One query reads for all that wait, and the next one takes over when it leaves.
    async fn poll(&self) -> Problem {
        let _turn = self.progress.polling().await;
        loop {
            if !self.progress.is_fed() {
                let position = sqlx::query_scalar("select min(position) from checkpoints").fetch_one(self.pool()).await;
                match position {
                    Ok(position) => self.progress.seen(position),
                    Err(error) => return failed(error),
                }
            }
            sleep(POLL).await;
        }
    }
}

impl FromRef<Queries> for Access {
    fn from_ref(queries: &Queries) -> Self {
        queries.access.clone()
    }
}

/// Every GET of API.md that reads views or the log, without [`api_contract::layer`].
pub fn routes(queries: Queries) -> Router {
    Router::new()
        .route("/v1/partners", get(partners::list))
        .route("/v1/partners/{id}", get(partners::show))
        .route("/v1/wallets", get(wallets::list))
        .route("/v1/wallets/{id}", get(wallets::show))
        .route("/v1/wallets/{id}/balance", get(balances::show))
        .route("/v1/wallets/{id}/entries", get(entries::list))
        .route("/v1/transactions", get(transactions::list))
        .route("/v1/transactions/{id}", get(transactions::show))
        .route("/v1/head", get(events::head))
        .route("/v1/events", get(events::list))
        .with_state(queries)
}

/// What must hold for queries to be answered.
pub fn health(queries: &Queries) -> Health {
    let queries = queries.clone();
    queries.sampled(Health::new()).check("views", Duration::from_secs(2), move || {
        let pool = queries.pool().clone();
        async move { sqlx::query("select from checkpoints").fetch_all(&pool).await.map(|_| ()) }
    })
}

/// This service's part of the OpenAPI document.
pub fn openapi() -> utoipa::openapi::OpenApi {
    #[derive(OpenApi)]
    #[openapi(paths(
        partners::list,
        partners::show,
        wallets::list,
        wallets::show,
        balances::show,
        entries::list,
        transactions::list,
        transactions::show,
        events::head,
        events::list,
    ))]
    struct Document;
    Document::openapi()
}

/// Whose things a client may see: its partner's, or everybody's (`None`) for the operator and our own workflows.
pub(crate) fn visible_to(client: &Client) -> Result<Option<PartnerId>, Problem> {
    if client.is_admin() || (client.partner.is_none() && client.scopes.allow(Scope::Workflow)) {
        return Ok(None);
    }
    client.partner().map(Some)
}

/// What was read must have what was waited for: a crash of Postgres may take back the last pages of the views, and then
/// what is remembered of their progress is not true for a while.
pub(crate) fn reflects(freshness: Freshness, position: i64) -> Result<(), Problem> {
    match freshness.min_position {
        Some(wanted) if position < wanted => Err(Problem::of("projection-behind")),
        _ => Ok(()),
    }
}

/// A statement failed: it took too long, or Postgres is not well.
pub(crate) fn failed(error: sqlx::Error) -> Problem {
    match error.as_database_error().and_then(|refusal| refusal.code()).as_deref() {
        Some("57014") => Problem::of("query-timeout"),
        _ => Problem::storage(&error),
    }
}

/// The log could not be read.
pub(crate) fn unreadable(error: StoreError) -> Problem {
    match error {
        StoreError::Database(error) => failed(error),
        StoreError::Late(_) => Problem::storage(&error),
        StoreError::Corrupt(_) => Problem::internal(&error),
    }
}

/// A view's checkpoint is a row that the migration made.
pub(crate) fn no_checkpoint() -> Problem {
    Problem::storage(&sqlx::Error::RowNotFound)
}

/// What a view holds cannot be shown.
pub(crate) fn unfit(error: impl std::error::Error + Send + Sync + 'static) -> Problem {
    failed(sqlx::Error::Decode(Box::new(error)))
}

/// An event was found under a question that it does not answer: the view is not what the log says.
pub(crate) fn misposted(position: i64) -> Problem {
    unfit(std::io::Error::other(format!("position {position} is posted where it does not belong")))
}

pub(crate) fn timestamp(at: OffsetDateTime) -> Result<Timestamp, Problem> {
    Timestamp::try_from(at).map_err(unfit)
}

pub(crate) fn currency(code: &str) -> Result<Currency, Problem> {
    Currency::from_str(code).map_err(unfit)
}

/// With all minor digits of its currency, whatever arithmetic has left of them.
pub(crate) fn balance(mut value: Decimal, currency: Currency) -> Balance {
    value.rescale(currency.minor_digits());
    Balance::from(value)
}

/// One row more than a page has tells whether there is another one.
pub(crate) fn one_more(limit: usize) -> i64 {
    i64::try_from(limit).map_or(i64::MAX, |limit| limit + 1)
}

/// A range of times does not end before it begins.
pub(crate) fn range(from: Option<Timestamp>, to: Option<Timestamp>) -> Result<(), Problem> {
    if from.zip(to).is_some_and(|(from, to)| to < from) {
        return Err(Problem::of("time-range-invalid").at("/from", "the range ends before it begins"));
    }
    Ok(())
}

/// A type of transactions to filter by. Of some that the contract names there are none yet: nothing is found then.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct KindName(pub(crate) String);

/// A status of transactions to filter by, likewise.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct StatusName(pub(crate) String);

const KINDS: [&str; 8] =
    ["TRANSFER", "ADJUSTMENT", "TOP_UP", "CREDIT_PURCHASE", "BILL_PAYMENT", "PAYOUT", "CAPTURE", "REFUND"];
const STATUSES: [&str; 5] = ["PENDING", "SUCCESS", "FAILED", "REVERSED", "EXPIRED"];

impl TryFrom<String> for KindName {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if KINDS.contains(&&*text) { Ok(Self(text)) } else { Err("not a type of transactions") }
    }
}

impl TryFrom<String> for StatusName {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if STATUSES.contains(&&*text) { Ok(Self(text)) } else { Err("not a status of transactions") }
    }
}
