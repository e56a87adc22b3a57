//! What workflows count, and how much is under way; `docs/metrics.md` says what each means.

use std::sync::LazyLock;
use std::time::Duration;

use prometheus::{
    Gauge, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, register_gauge, register_histogram_vec,
    register_int_counter_vec, register_int_gauge, register_int_gauge_vec,
};
use sqlx::{PgPool, Row};

pub(crate) static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::register);

pub(crate) struct Metrics {
    steps: IntCounterVec,
    seconds: HistogramVec,
    callbacks: IntCounterVec,
    open: IntGaugeVec,
    overdue: Gauge,
    alerts: IntGauge,
    quarantined: IntGauge,
}

/// What is not at its end, by state.
const OPEN: [&str; 5] = ["requested", "unsure", "waiting", "decided", "blocked"];

/// Further than this the database does not count.
const COUNT_MAX: i64 = 50_000;

impl Metrics {
    /// A step at the bank or the ledger has been taken.
    pub(crate) fn step(&self, step: &'static str, outcome: &'static str, took: Duration) {
        self.steps.with_label_values(&[step, outcome]).inc();
        self.seconds.with_label_values(&[step]).observe(took.as_secs_f64());
    }

    /// A callback was judged.
    pub(crate) fn callback(&self, verdict: &'static str) {
        self.callbacks.with_label_values(&[verdict]).inc();
    }

    fn register() -> Self {
        let known = "each name is registered once, here";
        let seconds = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0];
        let metrics = Self {
            steps: register_int_counter_vec!(
                "daybook_workflow_steps_total",
                "Calls to the bank and commands to the ledger, by action and by what came of them.",
                &["action", "outcome"]
            )
            .expect(known),
            seconds: register_histogram_vec!(
                "daybook_workflow_step_seconds",
                "What a step took, in seconds.",
                &["action"],
                seconds.to_vec()
            )
            .expect(known),
            callbacks: register_int_counter_vec!(
                "daybook_bank_callbacks_total",
                "Callbacks of the bank whose signature was right, by verdict.",
                &["verdict"]
            )
            .expect(known),
            open: register_int_gauge_vec!(
                "daybook_top_ups_open",
                "Top-ups that have not ended, by state; counted up to 50000.",
                &["state"]
            )
            .expect(known),
            overdue: register_gauge!(
                "daybook_top_ups_overdue_seconds",
                "How long the step has been due that is due for longest, in seconds; 0 if none is."
            )
            .expect(known),
            alerts: register_int_gauge!(
                "daybook_top_ups_needing_a_person",
                "Top-ups that a person should look at; counted up to 50000."
            )
            .expect(known),
            quarantined: register_int_gauge!(
                "daybook_bank_callbacks_quarantined",
                "Callbacks of the last day for payments that nobody has asked for; counted up to 50000."
            )
            .expect(known),
        };
        for step in ["register", "ask", "cancel", "settle", "fail", "expire"] {
            metrics.seconds.with_label_values(&[step]);
            metrics.steps.with_label_values(&[step, "unknown"]);
        }
        for verdict in ["accepted", "known", "quarantined", "mismatch", "contrary", "second", "conflict"] {
            metrics.callbacks.with_label_values(&[verdict]);
        }
        for state in OPEN {
            metrics.open.with_label_values(&[state]);
        }
        metrics
    }
}

/// Asks how much is under way, and shows it.
pub(crate) async fn show_open(pool: &PgPool) -> sqlx::Result<()> {
    let row = sqlx::query(
        "with open as (select state from workflows.top_ups where due_at is not null limit $1),
              alerts as (select from workflows.top_ups where alert is not null limit $1),
              quarantined as (select from workflows.callbacks
                              where verdict = 'QUARANTINED' and now() - interval '1 day' < received_last_at limit $1)
         select count(*) filter (where state = 'REQUESTED') as requested, count(*) filter (where state = 'UNSURE') as unsure,
                count(*) filter (where state = 'WAITING') as waiting, count(*) filter (where state = 'DECIDED') as decided,
                count(*) filter (where state = 'BLOCKED') as blocked,
                (select count(*) from alerts) as alerts, (select count(*) from quarantined) as quarantined,
                (select coalesce(extract(epoch from greatest(clock_timestamp() - min(due_at), interval '0')), 0)::float8
                 from workflows.top_ups where due_at is not null) as overdue
         from open",
    )
    .bind(COUNT_MAX)
    .fetch_one(pool)
    .await?;
    for state in OPEN {
        METRICS.open.with_label_values(&[state]).set(row.try_get(state)?);
    }
    METRICS.alerts.set(row.try_get("alerts")?);
    METRICS.quarantined.set(row.try_get("quarantined")?);
    METRICS.overdue.set(row.try_get("overdue")?);
    Ok(())
}
