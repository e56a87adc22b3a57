//! What making and sending deliveries counts, and how many wait; `docs/metrics.md` says what each means.
//!
//! Left out: partners, endpoints and their URLs. A partner sees its own deliveries over HTTP.

use std::sync::LazyLock;

use prometheus::{
    Gauge, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, register_gauge, register_histogram,
    register_int_counter, register_int_counter_vec, register_int_gauge, register_int_gauge_vec,
};
use sqlx::Row;

use crate::Dispatcher;
use crate::send::Attempted;

pub(crate) static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::register);

pub(crate) struct Metrics {
    pub(crate) made: IntCounter,
    /// Given up, by this process.
    pub(crate) given_up: IntCounter,
    attempts: IntCounterVec,
    seconds: Histogram,
    in_flight: IntGauge,
    waiting: IntGaugeVec,
    dead: IntGauge,
    oldest_due: Gauge,
    endpoints: IntGaugeVec,
}

/// Further than this the database does not count what waits: a long backlog must not make it longer.
const COUNT_MAX: i64 = 50_000;

/// Asks how much waits, and shows it.
pub(crate) async fn show_backlog(dispatcher: &Dispatcher) -> anyhow::Result<()> {
    let checkpoint: i64 =
        sqlx::query_scalar("select commit_number from webhooks.checkpoint").fetch_one(dispatcher.pool()).await?;
    event_feed::show_lag(&dispatcher.log, "webhooks", checkpoint).await?;
    // What is due is looked for from endpoint to endpoint, like in claiming: no index has all of it in order of time.
    let row = sqlx::query(
        "with recursive waiting (endpoint_id) as (
             (select endpoint_id from webhooks.deliveries where next_due is not null order by endpoint_id limit 1)
             union all
             select (select d.endpoint_id from webhooks.deliveries d
                     where d.next_due is not null and waiting.endpoint_id < d.endpoint_id
                     order by d.endpoint_id limit 1)
             from waiting where waiting.endpoint_id is not null
         ), oldest as (
             select extract(epoch from clock_timestamp() - min(due.next_due))::float8 as seconds
             from waiting
             join webhooks.endpoints e on e.id = waiting.endpoint_id
                 and e.status = 'ACTIVE' and e.deleted_at is null and (e.paused_until is null or e.paused_until <= now())
             cross join lateral (
                 select d.next_due from webhooks.deliveries d
                 where d.endpoint_id = waiting.endpoint_id and d.next_due is not null order by d.next_due limit 1
             ) due
         ), open as (
             select status from webhooks.deliveries where next_due is not null limit $1
         ), dead as (
             select from webhooks.deliveries where status = 'DEAD' and ended_at is not null limit $1
         ), endpoints as (
             select count(*) filter (where status = 'ACTIVE' and (paused_until is null or paused_until <= now())) as active,
                    count(*) filter (where status = 'ACTIVE' and now() < paused_until) as paused,
                    count(*) filter (where status = 'DISABLED') as disabled
             from webhooks.endpoints where deleted_at is null
         )
         select (select count(*) from open where status = 'PENDING') as pending,
                (select count(*) from open where status = 'RETRYING') as retrying,
                (select count(*) from dead) as dead,
                (select greatest(coalesce(seconds, 0), 0) from oldest) as oldest,
                active, paused, disabled
         from endpoints",
    )
    .bind(COUNT_MAX)
    .fetch_one(dispatcher.pool())
    .await?;
    for status in ["pending", "retrying"] {
        METRICS.waiting.with_label_values(&[status]).set(row.try_get(status)?);
    }
    for status in ["active", "paused", "disabled"] {
        METRICS.endpoints.with_label_values(&[status]).set(row.try_get(status)?);
    }
    METRICS.dead.set(row.try_get("dead")?);
    METRICS.oldest_due.set(row.try_get("oldest")?);
    Ok(())
}

/// An attempt under way, as long as it lives.
pub(crate) struct Attempt;

impl Attempt {
    pub(crate) fn begin() -> Self {
        METRICS.in_flight.inc();
        Self
    }

    pub(crate) fn ended(&self, attempted: &Attempted) {
        METRICS.attempts.with_label_values(&[attempted.outcome.word()]).inc();
        METRICS.seconds.observe(attempted.latency.as_secs_f64());
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        METRICS.in_flight.dec();
    }
}

impl Metrics {
    fn register() -> Self {
        let known = "each name is registered once, here";
        let gauge = |name, help| register_int_gauge!(name, help).expect(known);
        let gauges = |name, help| register_int_gauge_vec!(name, help, &["status"]).expect(known);
        let seconds = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0];
        let metrics = Self {
            made: register_int_counter!(
                "daybook_webhook_deliveries_made_total",
                "Deliveries made: one for each event and endpoint that wants it."
            )
            .expect(known),
            given_up: register_int_counter!(
                "daybook_webhook_deliveries_given_up_total",
                "Deliveries given up after their last attempt."
            )
            .expect(known),
            attempts: register_int_counter_vec!(
                "daybook_webhook_attempts_total",
                "Attempts to deliver, by what came of them.",
                &["outcome"]
            )
            .expect(known),
            seconds: register_histogram!(
                "daybook_webhook_attempt_seconds",
                "From looking up the receiver's name to the end of its answer, in seconds.",
                seconds.to_vec()
            )
            .expect(known),
            in_flight: gauge("daybook_webhook_attempts_in_flight", "Attempts under way in this process."),
            waiting: gauges(
                "daybook_webhook_backlog_deliveries",
                "Deliveries that have not been taken yet, by status; counted up to 50000.",
            ),
            dead: gauge(
                "daybook_webhook_dead_deliveries",
                "Deliveries that were given up and are still kept; counted up to 50000.",
            ),
            oldest_due: register_gauge!(
                "daybook_webhook_oldest_due_seconds",
                "How long the delivery has been due that is due for longest, in seconds; 0 if none is."
            )
            .expect(known),
            endpoints: gauges("daybook_webhook_endpoints", "Endpoints, by status."),
        };
        for outcome in crate::send::Outcome::ALL {
            metrics.attempts.with_label_values(&[outcome.word()]);
        }
        metrics
    }
}
