//! Dispatch: takes what is due, sends it, records what came of it, and clears away what is old.
//!
//! A delivery is claimed under a lease longer than an attempt can take, and its attempt is written before
//! anything is sent. An outcome is recorded only under its own attempt, and only once: whoever was slower than
//! its lease finds the attempt declared unknown, and the delivery another's. So a crash at any moment leads to
//! one more send at most, which says that it may be a duplicate.
//!
//! # Why nobody waits for a slow one
//! Claiming walks from endpoint to endpoint along an index and takes a few of each, the same few however long an
//! endpoint's backlog is; an endpoint that hangs holds its own few places and no more.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use event_feed::within;
use runtime::shutdown::Shutdown;
use sqlx::postgres::PgRow;
use sqlx::postgres::types::PgInterval;
use sqlx::{PgConnection, Row};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use crate::Dispatcher;
use crate::endpoints::{self, DisabledReason};
use crate::metrics::{Attempt, METRICS};
use crate::send::{Attempted, DEADLINE, Due, Outcome, UNKNOWN};

/// Attempts under way at once: of all endpoints together, and of each.
const IN_FLIGHT_MAX: usize = 512;
const PER_ENDPOINT_MAX: i64 = 4;

/// How many are claimed in one statement, bodies included.
const CLAIM_MAX: usize = 128;

/// A claim that takes longer has failed: what it may have taken comes back when the lease ends.
const CLAIMING: Duration = Duration::from_secs(10);

/// Recording may take this long after an attempt's deadline. The lease begins with the claim and covers it all.
const RECORDING: Duration = Duration::from_secs(10);
pub(crate) const LEASE: Duration = Duration::from_secs(40);
const _: () = assert!(CLAIMING.as_secs() + DEADLINE.as_secs() + RECORDING.as_secs() < LEASE.as_secs());

/// How often Postgres is asked for what has become due. New deliveries of this process are known at once.
const POLL: Duration = Duration::from_millis(250);

/// After a stop was requested, attempts under way may go on for so long.
const DRAIN: Duration = Duration::from_secs(10);

const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Runs until a stop is wanted, through outages of Postgres.
pub(crate) async fn run(dispatcher: &Dispatcher, shutdown: &Shutdown) {
    let busy = Busy::default();
    let mut sending = JoinSet::new();
    let mut pause = PAUSE_MIN;
    loop {
        while sending.try_join_next().is_some() {} // a panic was logged where it happened, and its place is free again
        let places = (IN_FLIGHT_MAX - sending.len()).min(CLAIM_MAX);
        let claiming = async {
            if places == 0 {
                return Ok(Vec::new());
            }
            let claimed = timeout(CLAIMING, claim(dispatcher, &busy.by_endpoint(), places)).await;
            claimed.unwrap_or_else(|_| Err(sqlx::Error::PoolTimedOut))
        };
        let claimed = tokio::select! {
            () = shutdown.requested() => break, // a claim cut short leaves an attempt that nobody sent: unknown, not lost
            claimed = claiming => claimed,
        };
        let idle = match claimed {
            Ok(claimed) => {
                pause = PAUSE_MIN;
                let none = claimed.is_empty();
                for due in claimed {
                    let place = busy.take(due.endpoint);
                    let dispatcher = dispatcher.clone();
                    sending.spawn(async move {
                        let attempt = Attempt::begin();
                        let attempted = dispatcher.sender.send(&due).await;
                        attempt.ended(&attempted);
                        drop(attempt);
                        record_persistently(&dispatcher, &due, &attempted).await;
                        drop(place);
                    });
                }
                if none { POLL } else { Duration::ZERO }
            }
            Err(error) => {
                tracing::warn!(%error, pause_ms = pause.as_millis(), "nothing could be claimed");
                let this_time = pause;
                pause = (pause * 2).min(PAUSE_MAX);
                this_time
            }
        };
        tokio::select! {
            () = shutdown.requested() => break,
            _ = sending.join_next(), if !sending.is_empty() && !idle.is_zero() => {}
            () = dispatcher.wake.notified(), if !idle.is_zero() => {}
            () = sleep(idle) => {}
        }
    }
    if timeout(DRAIN, async { while sending.join_next().await.is_some() {} }).await.is_err() {
        tracing::warn!(attempts = sending.len(), "cut off: their outcome is unknown, and they will be sent again");
    }
}

/// How many attempts of each endpoint are under way in this process.
#[derive(Clone, Default)]
struct Busy(Arc<Mutex<HashMap<Uuid, i64>>>);

/// One place of an endpoint, given back however the attempt ends.
struct Place {
    busy: Busy,
    endpoint: Uuid,
}

impl Busy {
    fn take(&self, endpoint: Uuid) -> Place {
        *self.lock().entry(endpoint).or_default() += 1;
        Place { busy: self.clone(), endpoint }
    }

    fn by_endpoint(&self) -> (Vec<Uuid>, Vec<i64>) {
        self.lock().iter().map(|(endpoint, places)| (*endpoint, *places)).unzip()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, i64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner) // counting cannot leave it half-done
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut busy = self.busy.lock();
        if let Some(places) = busy.get_mut(&self.endpoint) {
            *places -= 1;
            if *places == 0 {
                busy.remove(&self.endpoint);
            }
        }
    }
}

/// Takes up to `places` deliveries that are due and writes their attempts.
///
/// A row whose lease has ended is due like any other. Its last attempt is then unknown, which uses up the schedule as
/// a failure does: where that was the last attempt, the delivery is dead and not sent beyond its schedule.
async fn claim(
    dispatcher: &Dispatcher,
    (busy, places_taken): &(Vec<Uuid>, Vec<i64>),
    places: usize,
) -> Result<Vec<Due>, sqlx::Error> {
    let rows = sqlx::query(
        "with recursive waiting (endpoint_id) as (
             (select endpoint_id from webhooks.deliveries where next_due is not null order by endpoint_id limit 1)
             union all
             select (select d.endpoint_id from webhooks.deliveries d
                     where d.next_due is not null and waiting.endpoint_id < d.endpoint_id
                     order by d.endpoint_id limit 1)
             from waiting where waiting.endpoint_id is not null
         ), busy as (
             select * from unnest($1::uuid[], $2::bigint[]) as busy (endpoint_id, places)
         ), candidates as (
             select due.id, due.endpoint_id, due.next_due, due.sequence
             from waiting
             join webhooks.endpoints e on e.id = waiting.endpoint_id
                 and e.status = 'ACTIVE' and e.deleted_at is null and (e.paused_until is null or e.paused_until <= now())
             left join busy on busy.endpoint_id = e.id
             cross join lateral (
                 select d.id, d.endpoint_id, d.next_due, d.sequence from webhooks.deliveries d
                 where d.endpoint_id = waiting.endpoint_id and d.next_due <= now()
                 order by d.next_due, d.sequence
                 limit greatest(0, $3 - coalesce(busy.places, 0))
                 for update of d skip locked
             ) due
         ), picked as (
             select id from (
                 select id, next_due, sequence,
                        row_number() over (partition by endpoint_id order by next_due, sequence) as place
                 from candidates
             ) ranked
             order by place, next_due, sequence limit $4
         ), lost as (
             update webhooks.attempts a set outcome = $7 from picked where a.delivery_id = picked.id and a.outcome is null
         ), dead as (
             update webhooks.deliveries d
             set status = 'DEAD', next_due = null, in_flight = false, ended_at = now(), possible_duplicate = true
             from picked where d.id = picked.id and d.in_flight and $6 <= d.attempts - d.schedule_from
             returning d.id
         ), claimed as (
             update webhooks.deliveries d
             set attempts = d.attempts + 1, in_flight = true, next_due = now() + $5,
                 possible_duplicate = d.possible_duplicate or d.in_flight
             from picked
             where d.id = picked.id and not (d.in_flight and $6 <= d.attempts - d.schedule_from)
             returning d.*
         ), begun as (
             insert into webhooks.attempts (delivery_id, number) select id, attempts from claimed
         )
         select given_up.count as given_up, claimed.id, claimed.endpoint_id, event_id, event_type, body, attempts,
                attempts - schedule_from as round, possible_duplicate, traceparent, e.url, e.sealed_secret
         from (select count(*) from dead) given_up
         left join (claimed join webhooks.endpoints e on e.id = claimed.endpoint_id) on true",
    )
    .bind(busy)
    .bind(places_taken)
    .bind(PER_ENDPOINT_MAX)
    .bind(i64::try_from(places).expect("a few hundred"))
    .bind(interval(LEASE))
    .bind(dispatcher.schedule.attempts_max())
    .bind(UNKNOWN)
    .fetch_all(dispatcher.pool())
    .await?;
    if let Some(first) = rows.first() {
        let given_up: i64 = first.try_get("given_up")?;
        METRICS.given_up.inc_by(given_up.unsigned_abs());
    }
    let is_claimed = |row: &&PgRow| !matches!(row.try_get::<Option<Uuid>, _>("id"), Ok(None));
    rows.iter()
        .filter(is_claimed)
        .map(|row| {
            let endpoint = row.try_get("endpoint_id")?;
            Ok(Due {
                delivery: row.try_get("id")?,
                endpoint,
                event_id: row.try_get("event_id")?,
                event_type: row.try_get("event_type")?,
                url: row.try_get("url")?,
                secret: endpoints::open_secret(&dispatcher.seal, endpoint, row.try_get("sealed_secret")?),
                body: row.try_get("body")?,
                number: row.try_get("attempts")?,
                round: row.try_get("round")?,
                possible_duplicate: row.try_get("possible_duplicate")?,
                traceparent: row.try_get("traceparent")?,
            })
        })
        .collect()
}

/// Records within the lease, or not at all: then the attempt is unknown.
async fn record_persistently(dispatcher: &Dispatcher, due: &Due, attempted: &Attempted) {
    let until = Instant::now() + RECORDING;
    let mut pause = PAUSE_MIN;
    loop {
        let error = match tokio::time::timeout_at(until, record(dispatcher, due, attempted)).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".to_owned(),
        };
        if until < Instant::now() + pause {
            let (delivery, number) = (due.delivery, due.number);
            tracing::error!(error, delivery.id = %delivery, number, "an outcome was not recorded and is now unknown");
            return;
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Records one outcome and what follows from it, all at once. Repeating it changes nothing.
async fn record(dispatcher: &Dispatcher, due: &Due, attempted: &Attempted) -> Result<(), sqlx::Error> {
    let gone = attempted.status.is_some_and(|status| status == reqwest::StatusCode::GONE);
    let wait = dispatcher.schedule.wait_after(due.round).map(|wait| wait.max(attempted.pause.unwrap_or_default()));
    let mut tx = dispatcher.pool().begin().await?;
    // Endpoints are locked before deliveries, here as everywhere.
    let counts = (gone || attempted.pause.is_some()) && speaks_for_endpoint(&mut tx, due).await?;
    if counts && gone && endpoints::disable(&mut tx, due.endpoint, DisabledReason::Gone).await? {
        tracing::info!(webhook.id = %due.endpoint, "disabled: the receiver says that it is gone");
    }
    if let Some(pause) = attempted.pause.filter(|_| counts) {
        sqlx::query("update webhooks.endpoints set paused_until = greatest(paused_until, now() + $2) where id = $1")
            .bind(due.endpoint)
            .bind(interval(pause))
            .execute(&mut *tx)
            .await?;
    }
    let given_up = record_attempt(&mut tx, due, attempted, wait).await?;
    tx.commit().await?;
    METRICS.given_up.inc_by(given_up.into());
    Ok(())
}

/// Whether a receiver's word about its whole endpoint counts. It does not once the endpoint has another URL, nor from an
/// attempt that is no longer ours. Locks the endpoint.
async fn speaks_for_endpoint(tx: &mut PgConnection, due: &Due) -> Result<bool, sqlx::Error> {
    let locked = sqlx::query(
        "select from webhooks.endpoints e
         where e.id = $1 and e.url = $2
             and exists (select from webhooks.deliveries d where d.id = $3 and d.attempts = $4 and d.in_flight)
         for no key update of e",
    )
    .bind(due.endpoint)
    .bind(&due.url)
    .bind(due.delivery)
    .bind(due.number)
    .fetch_optional(tx)
    .await?;
    Ok(locked.is_some())
}

/// Whether the delivery is given up with it.
async fn record_attempt(
    tx: &mut PgConnection,
    due: &Due,
    attempted: &Attempted,
    wait: Option<Duration>,
) -> Result<bool, sqlx::Error> {
    // The delivery before its attempt, here as in claiming. What was held back meanwhile stays so, unless it has arrived
    // after all; what was redelivered meanwhile (`schedule_from` is this attempt) begins its fresh schedule now.
    let ours = sqlx::query(
        "update webhooks.deliveries
         set in_flight = false,
             possible_duplicate = possible_duplicate or $3,
             status = case when $4 then 'DELIVERED' when status = 'HELD' then 'HELD'
                      when schedule_from = attempts then 'PENDING' when $5::interval is null then 'DEAD'
                      else 'RETRYING' end,
             next_due = case when $4 or status = 'HELD' then null when schedule_from = attempts then now()
                        else now() + $5::interval end,
             ended_at = case when $4 then now() when status = 'HELD' then ended_at when schedule_from = attempts then null
                        when $5::interval is null then now() end
         where id = $1 and attempts = $2 and in_flight
         returning status",
    )
    .bind(due.delivery)
    .bind(due.number)
    .bind(attempted.outcome.may_have_arrived())
    .bind(attempted.outcome == Outcome::Delivered)
    .bind(wait.map(interval))
    .fetch_optional(&mut *tx)
    .await?;
    let Some(ours) = ours else {
        return Ok(false); // declared unknown meanwhile, or recorded by an earlier call whose answer was lost
    };
    let answer = attempted.answer.as_ref();
    sqlx::query(
        "update webhooks.attempts
         set outcome = $3, status_code = $4, latency_ms = $5, response_body = $6, response_truncated = $7, detail = $8
         where delivery_id = $1 and number = $2",
    )
    .bind(due.delivery)
    .bind(due.number)
    .bind(attempted.outcome.word())
    .bind(attempted.status.map(|status| i16::try_from(status.as_u16()).expect("a status has three digits")))
    .bind(i32::try_from(attempted.latency.as_millis()).unwrap_or(i32::MAX))
    .bind(answer.map(|answer| answer.body.as_slice()))
    .bind(answer.map(|answer| answer.truncated))
    .bind(attempted.detail.as_deref())
    .execute(tx)
    .await?;
    Ok(ours.try_get::<&str, _>("status")? == "DEAD")
}

/// How long ended deliveries are kept, in days, by their status.
const KEPT: [(&str, i32); 3] = [("DELIVERED", 30), ("DEAD", 90), ("HELD", 90)];

const CLEAR_EVERY: Duration = Duration::from_secs(60);
const CLEAR_MAX: i64 = 500;
const CLEARING: Duration = Duration::from_secs(60);

/// Clears away what has been kept long enough, in small batches, until a stop is wanted.
pub(crate) async fn clear(dispatcher: &Dispatcher, shutdown: &Shutdown) {
    loop {
        let cleared = tokio::select! {
            () = shutdown.requested() => return,
            cleared = within(CLEARING, clear_batch(dispatcher)) => cleared,
        };
        let pause = match cleared {
            Ok(0) => CLEAR_EVERY,
            Ok(_) => PAUSE_MIN, // there is more; but partners come first
            Err(error) => {
                tracing::warn!(%error, "old deliveries were not cleared away");
                CLEAR_EVERY
            }
        };
        tokio::select! {
            () = shutdown.requested() => return,
            () = sleep(pause) => {}
        }
    }
}

async fn clear_batch(dispatcher: &Dispatcher) -> Result<u64, sqlx::Error> {
    let mut cleared = 0;
    for (status, days) in KEPT {
        cleared += sqlx::query(
            // The status twice: one that is redelivered at this moment stays.
            "delete from webhooks.deliveries where status = $1 and id in (
                 select id from webhooks.deliveries
                 where status = $1 and ended_at < now() - make_interval(days => $2) order by ended_at limit $3)",
        )
        .bind(status)
        .bind(days)
        .bind(CLEAR_MAX)
        .execute(dispatcher.pool())
        .await?
        .rows_affected();
    }
    cleared += sqlx::query(
        "delete from webhooks.deliveries where id in (
             select d.id from webhooks.endpoints e
             cross join lateral (select id from webhooks.deliveries where endpoint_id = e.id limit $2) d
             where e.deleted_at < now() - make_interval(days => $1) limit $2)",
    )
    .bind(KEPT[0].1)
    .bind(CLEAR_MAX)
    .execute(dispatcher.pool())
    .await?
    .rows_affected();
    cleared += sqlx::query(
        "delete from webhooks.endpoints where id in (
             select id from webhooks.endpoints e
             where e.deleted_at < now() - make_interval(days => $1)
                 and not exists (select from webhooks.deliveries where endpoint_id = e.id)
             limit $2)",
    )
    .bind(KEPT[0].1)
    .bind(CLEAR_MAX)
    .execute(dispatcher.pool())
    .await?
    .rows_affected();
    Ok(cleared)
}

pub(crate) fn interval(of: Duration) -> PgInterval {
    let microseconds = i64::try_from(of.as_micros()).expect("waits are days at most");
    PgInterval { months: 0, days: 0, microseconds }
}
