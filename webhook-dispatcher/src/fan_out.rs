//! Fan-out: turns the log into deliveries, once each.
//!
//! It follows the log from the checkpoint. A page's deliveries are inserted in the transaction that advances
//! the checkpoint, so a crash makes none twice and forgets none. That transaction first locks the checkpoint,
//! and so does a registration: an endpoint is either seen here or begins behind what is being turned.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use event_feed::{Commit, FeedError, Follow, RecordedEvent, StoreError, within};
use ledger_core::PartnerId;
use runtime::shutdown::Shutdown;
use runtime::trace::{KeyValue, SpanKind, Stage};
use sqlx::{PgConnection, Row};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::Dispatcher;
use crate::metrics::METRICS;
use crate::notice::{self, EVERYTHING, Notice, NoticeError};

const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// A page that takes longer is given up and tried again: Postgres may be gone without a word.
const TURN_MAX: Duration = Duration::from_secs(60);
const READING: Duration = Duration::from_secs(15);

/// Rows in one insert: a page for many endpoints goes in several, within its one transaction.
const INSERT_MAX: usize = 500;

#[derive(Debug, thiserror::Error)]
enum FanOutError {
    #[error("a page was not turned within {} s", TURN_MAX.as_secs())]
    Late,
    #[error("the database: {0}")]
    Database(#[from] sqlx::Error),
    #[error(transparent)]
    Feed(#[from] FeedError),
    #[error(transparent)]
    Notice(#[from] NoticeError),
}

impl FanOutError {
    /// Trying again cannot help: the log is what has to be looked at.
    fn is_lasting(&self) -> bool {
        match self {
            Self::Late | Self::Database(_) => false,
            Self::Feed(error) => error.is_final(),
            Self::Notice(NoticeError::Store(error)) => matches!(error, StoreError::Corrupt(_)),
            Self::Notice(NoticeError::Corrupt { .. } | NoticeError::NoBeginning { .. }) => true,
        }
    }
}

/// Runs until a stop is wanted, through outages of everything it stands on.
pub(crate) async fn run(dispatcher: &Dispatcher, shutdown: &Shutdown) {
    let mut pause = PAUSE_MIN;
    loop {
        let followed = tokio::select! {
            () = shutdown.requested() => return, // a page cut short is rolled back and comes again
            followed = follow(dispatcher, &mut pause) => followed,
        };
        if let Err(error) = followed {
            if !error.is_lasting() {
                tracing::warn!(%error, pause_ms = pause.as_millis(), "fan-out stopped and will start again");
            } else if dispatcher.obstacle.met(&error.to_string()) {
                tracing::error!(alert = "log", %error, "no more deliveries are made: the log cannot be followed");
            }
            tokio::select! {
                () = shutdown.requested() => return,
                () = sleep(pause) => {}
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

/// Follows until something fails, or until another dispatcher turns out to have moved the checkpoint.
async fn follow(dispatcher: &Dispatcher, pause: &mut Duration) -> Result<(), FanOutError> {
    let checkpoint = sqlx::query("select commit_number, position from webhooks.checkpoint");
    let checkpoint = within(READING, checkpoint.fetch_one(dispatcher.pool())).await?;
    dispatcher.reached(checkpoint.try_get("position")?);
    let after = checkpoint.try_get("commit_number")?;
    let mut feed = Follow::start(dispatcher.log.clone(), dispatcher.feed.clone(), after).await.named("webhooks");
    loop {
        let page = feed.next().await?;
        let traces = page.iter().flat_map(|commit| &commit.events).map(RecordedEvent::traceparent);
        let stage = Stage::begin("fan-out", SpanKind::Consumer, traces);
        let turned = timeout(TURN_MAX, turn(dispatcher, &page)).await.map_err(|_| FanOutError::Late)?;
        let Some(made) = turned? else {
            tracing::info!("another dispatcher has moved the checkpoint");
            return Ok(());
        };
        if let Some(stage) = stage {
            stage.end([KeyValue::new("daybook.page.deliveries", i64::try_from(made).unwrap_or(i64::MAX))]);
        }
        METRICS.made.inc_by(made as u64);
        dispatcher.obstacle.passed();
        *pause = PAUSE_MIN;
        if 0 < made {
            dispatcher.wake.notify_one();
        }
    }
}

/// Turns one page into deliveries and says how many; `None` if the checkpoint is not where the page begins.
async fn turn(dispatcher: &Dispatcher, page: &[Arc<Commit>]) -> Result<Option<usize>, FanOutError> {
    let (Some(first), Some(last)) = (page.first(), page.last()) else { return Ok(Some(0)) };
    let mut tx = dispatcher.pool().begin().await?;
    let at: i64 =
        sqlx::query_scalar("select commit_number from webhooks.checkpoint for update").fetch_one(&mut *tx).await?;
    if at != first.number - 1 {
        return Ok(None);
    }
    let listening = listening(&mut tx, last.number).await?;
    let mut notices = Vec::new();
    if !listening.is_empty() {
        for event in page.iter().flat_map(|commit| &commit.events) {
            notices.extend(notice::of(&dispatcher.reading, event, &listening).await?);
        }
    }
    let made = if notices.is_empty() { 0 } else { insert(&mut tx, &notices, last.number).await? };
    // A page that made nothing may be lost by a crash: it makes nothing again. So it does not wait for the disk.
    let moved = "update webhooks.checkpoint set commit_number = $1, position = $2
                 returning case when $3 then set_config('synchronous_commit', 'off', true) end";
    sqlx::query(moved).bind(last.number).bind(last.last).bind(made == 0).execute(&mut *tx).await?;
    tx.commit().await?;
    dispatcher.reached(last.last);
    Ok(Some(made))
}

/// The partners that have an endpoint for commits up to `commit`.
async fn listening(tx: &mut PgConnection, commit: i64) -> Result<HashSet<PartnerId>, sqlx::Error> {
    let partners: Vec<Uuid> = sqlx::query_scalar(
        "select distinct partner_id from webhooks.endpoints
         where status = 'ACTIVE' and deleted_at is null and after_commit < $1",
    )
    .bind(commit)
    .fetch_all(tx)
    .await?;
    Ok(partners.into_iter().map(PartnerId::from_uuid).collect())
}

struct Listener {
    id: Uuid,
    events: Vec<String>,
    after_commit: i64,
    next_sequence: i64,
}

impl Listener {
    fn wants(&self, notice: &Notice) -> bool {
        self.after_commit < notice.commit
            && self.events.iter().any(|wanted| wanted == EVERYTHING || wanted == notice.event_type.name())
    }
}

/// One row for each notice and endpoint that wants it, each endpoint's numbered without a gap.
async fn insert(tx: &mut PgConnection, notices: &[Notice], commit: i64) -> Result<usize, sqlx::Error> {
    let mut listeners = listeners(tx, notices, commit).await?;
    let mut rows = Rows::default();
    let mut made = 0;
    for notice in notices {
        for listener in listeners.get_mut(&notice.partner).into_iter().flatten() {
            if listener.wants(notice) {
                rows.push(listener, notice);
                made += 1;
            }
            if rows.ids.len() == INSERT_MAX {
                std::mem::take(&mut rows).insert(tx).await?;
            }
        }
    }
    rows.insert(tx).await?;
    let (ids, sequences): (Vec<_>, Vec<_>) =
        listeners.values().flatten().map(|listener| (listener.id, listener.next_sequence)).unzip();
    sqlx::query(
        "update webhooks.endpoints e set next_sequence = told.next_sequence
         from unnest($1::uuid[], $2::bigint[]) as told (id, next_sequence)
         where e.id = told.id and e.next_sequence <> told.next_sequence",
    )
    .bind(ids)
    .bind(sequences)
    .execute(tx)
    .await?;
    Ok(made)
}

/// The endpoints of the partners that are told something. Locked, for whoever disables one holds back what is there
/// by then; in the order of their ids, so that no two such locks can wait for each other.
async fn listeners(
    tx: &mut PgConnection,
    notices: &[Notice],
    commit: i64,
) -> Result<HashMap<PartnerId, Vec<Listener>>, sqlx::Error> {
    let partners: HashSet<_> = notices.iter().map(|notice| notice.partner.uuid()).collect();
    let rows = sqlx::query(
        "select id, partner_id, events, after_commit, next_sequence from webhooks.endpoints
         where partner_id = any($1) and status = 'ACTIVE' and deleted_at is null and after_commit < $2
         order by id for no key update",
    )
    .bind(partners.into_iter().collect::<Vec<_>>())
    .bind(commit)
    .fetch_all(tx)
    .await?;
    let mut listeners: HashMap<_, Vec<_>> = HashMap::new();
    for row in &rows {
        let partner = PartnerId::from_uuid(row.try_get("partner_id")?);
        listeners.entry(partner).or_default().push(Listener {
            id: row.try_get("id")?,
            events: row.try_get("events")?,
            after_commit: row.try_get("after_commit")?,
            next_sequence: row.try_get("next_sequence")?,
        });
    }
    Ok(listeners)
}

/// New deliveries, column by column.
#[derive(Default)]
struct Rows {
    ids: Vec<Uuid>,
    endpoints: Vec<Uuid>,
    event_ids: Vec<Uuid>,
    event_types: Vec<&'static str>,
    sequences: Vec<i64>,
    positions: Vec<i64>,
    bodies: Vec<String>,
    traceparents: Vec<Option<String>>,
}

impl Rows {
    fn push(&mut self, listener: &mut Listener, notice: &Notice) {
        self.ids.push(Uuid::now_v7());
        self.endpoints.push(listener.id);
        self.event_ids.push(notice.event_id.uuid());
        self.event_types.push(notice.event_type.name());
        self.sequences.push(listener.next_sequence);
        self.positions.push(notice.position);
        self.bodies.push(notice.body(listener.next_sequence));
        self.traceparents.push(notice.traceparent.clone());
        listener.next_sequence += 1;
    }

    async fn insert(self, tx: &mut PgConnection) -> Result<(), sqlx::Error> {
        if self.ids.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "insert into webhooks.deliveries
                 (id, endpoint_id, event_id, event_type, sequence, ledger_position, body, traceparent)
             select * from unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[], $5::bigint[], $6::bigint[], $7::text[],
                                  $8::text[])",
        )
        .bind(self.ids)
        .bind(self.endpoints)
        .bind(self.event_ids)
        .bind(self.event_types)
        .bind(self.sequences)
        .bind(self.positions)
        .bind(self.bodies)
        .bind(self.traceparents)
        .execute(tx)
        .await?;
        Ok(())
    }
}
