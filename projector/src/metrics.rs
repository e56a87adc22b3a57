//! What projecting counts, and how far the views are behind; `docs/metrics.md` says what each means.

use std::sync::LazyLock;
use std::time::Duration;

use event_store::Log;
use prometheus::{
    GaugeVec, Histogram, IntCounter, IntGaugeVec, register_gauge_vec, register_histogram, register_int_counter,
    register_int_gauge_vec,
};
use sqlx::PgPool;

use crate::VIEWS;
use crate::project::checkpoints;

pub(crate) static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::register);

pub(crate) struct Metrics {
    events: IntCounter,
    page_seconds: Histogram,
    page_events: Histogram,
    pub(crate) interruptions: IntCounter,
    lag_events: IntGaugeVec,
    lag_seconds: GaugeVec,
}

/// Asks where the views are and where the log is, and shows it.
pub(crate) async fn show_lag(pool: &PgPool) -> anyhow::Result<()> {
    let log = Log::new(pool.clone());
    let checkpoints = checkpoints(&mut *pool.acquire().await?).await?;
    let furthest_behind = checkpoints.iter().map(|(.., commit)| *commit).min().unwrap_or_default();
    event_feed::show_lag(&log, "projector", furthest_behind).await?;
    // They stand together, but for one that catches up.
    let mut last = (furthest_behind, log.behind(furthest_behind).await?);
    for (view, _, commit) in checkpoints {
        if last.0 != commit {
            last = (commit, log.behind(commit).await?);
        }
        METRICS.lag_events.with_label_values(&[view.name]).set(last.1.events);
        METRICS.lag_seconds.with_label_values(&[view.name]).set(last.1.seconds);
    }
    Ok(())
}

impl Metrics {
    /// All views have a page more.
    pub(crate) fn projected(&self, events: i64, took: Duration) {
        let events = u32::try_from(events).unwrap_or(u32::MAX); // a page is small
        self.events.inc_by(events.into());
        self.page_events.observe(events.into());
        self.page_seconds.observe(took.as_secs_f64());
    }

    fn register() -> Self {
        let known = "each name is registered once, here";
        let seconds = [0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 40.0];
        let sizes = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0];
        let metrics = Self {
            events: register_int_counter!(
                "daybook_projector_events_total",
                "Events that this projector has folded into all views."
            )
            .expect(known),
            page_seconds: register_histogram!(
                "daybook_projector_page_seconds",
                "What folding a page of the log into all views took, its transaction included, in seconds.",
                seconds.to_vec()
            )
            .expect(known),
            page_events: register_histogram!("daybook_projector_page_events", "Events in such a page.", sizes.to_vec())
                .expect(known),
            interruptions: register_int_counter!(
                "daybook_projector_interruptions_total",
                "How often projecting was interrupted, and began again from the checkpoints."
            )
            .expect(known),
            lag_events: register_int_gauge_vec!(
                "daybook_view_lag_events",
                "Events that a view does not have yet.",
                &["view"]
            )
            .expect(known),
            lag_seconds: register_gauge_vec!(
                "daybook_view_lag_seconds",
                "How old the first commit is that a view does not have yet, in seconds; 0 if there is none.",
                &["view"]
            )
            .expect(known),
        };
        for view in VIEWS {
            metrics.lag_events.with_label_values(&[view.name]);
            metrics.lag_seconds.with_label_values(&[view.name]);
        }
        metrics
    }
}
