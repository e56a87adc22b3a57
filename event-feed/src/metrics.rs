//! What relay and followers count, in the process' own registry; `docs/metrics.md` says what each means.
//!
//! A follower is named by whoever starts it, with a word from the code, so there are as many series as consumers.
//! Left out: how far behind they are. That is asked of the log and their checkpoints, when somebody wants to know
//! ([`show_lag`]): a follower that stands still could not tell it.

use std::sync::LazyLock;

use event_store::{Log, StoreError};
use prometheus::{
    GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, register_gauge, register_gauge_vec,
    register_int_counter, register_int_counter_vec, register_int_gauge, register_int_gauge_vec,
};

/// Asks the log how far a consumer, whose checkpoint this is, is behind, and shows it.
pub async fn show_lag(log: &Log, follower: &'static str, checkpoint: i64) -> Result<(), StoreError> {
    let behind = log.behind(checkpoint).await?;
    FOLLOWERS.lag_events.with_label_values(&[follower]).set(behind.events);
    FOLLOWERS.lag_seconds.with_label_values(&[follower]).set(behind.seconds);
    Ok(())
}

/// Asks the log how far the stream is behind it, and shows it. Nothing, before a relay of this process has seen the stream.
pub async fn show_relay_lag(log: &Log) -> Result<(), StoreError> {
    let relayed = RELAY.relayed.get();
    if RELAY.has_seen.get() != 0 {
        let behind = log.behind(relayed).await?;
        RELAY.lag_commits.set(behind.commits);
        RELAY.lag_seconds.set(behind.seconds);
    }
    Ok(())
}

pub(crate) static RELAY: LazyLock<Relaying> = LazyLock::new(Relaying::register);

pub(crate) struct Relaying {
    pub(crate) published: IntCounter,
    pub(crate) connected: IntGauge,
    pub(crate) streams_made: IntCounter,
    relayed: IntGauge,
    lag_commits: IntGauge,
    lag_seconds: prometheus::Gauge,
    /// Not shown: whether `relayed` means anything yet.
    has_seen: IntGauge,
}

impl Relaying {
    /// The stream has everything up to this commit.
    pub(crate) fn reached(&self, commit: i64) {
        self.relayed.set(commit);
        self.has_seen.set(1);
    }

    fn register() -> Self {
        let known = "each name is registered once, here";
        Self {
            published: register_int_counter!(
                "daybook_relay_published_commits_total",
                "Commits that this relay has published to the bus."
            )
            .expect(known),
            connected: register_int_gauge!("daybook_relay_connected", "1 while the relay has a stream to publish to.")
                .expect(known),
            streams_made: register_int_counter!(
                "daybook_relay_streams_made_total",
                "Streams that this relay has made, because there was none or none that it could go on with."
            )
            .expect(known),
            relayed: register_int_gauge!(
                "daybook_relay_published_commit",
                "The last commit that is in the stream, as far as the relay knows."
            )
            .expect(known),
            lag_commits: register_int_gauge!("daybook_relay_lag_commits", "Commits that are not in the stream yet.")
                .expect(known),
            lag_seconds: register_gauge!(
                "daybook_relay_lag_seconds",
                "How old the first commit is that is not in the stream yet, in seconds; 0 if there is none."
            )
            .expect(known),
            has_seen: IntGauge::new("not_shown", "Not shown.").expect("a good name"),
        }
    }
}

static FOLLOWERS: LazyLock<Followers> = LazyLock::new(Followers::register);

struct Followers {
    commits: IntCounterVec,
    gaps: IntCounterVec,
    repeats: IntCounterVec,
    live: IntGaugeVec,
    lag_events: IntGaugeVec,
    lag_seconds: GaugeVec,
}

/// The handles of one follower.
#[derive(Clone, Debug)]
pub(crate) struct Following {
    pub(crate) from_relay: IntCounter,
    pub(crate) from_bus: IntCounter,
    pub(crate) from_log: IntCounter,
    /// What the bus had was not what comes next, and Postgres was asked.
    pub(crate) gaps: IntCounter,
    /// What the bus had was there already.
    pub(crate) repeats: IntCounter,
    pub(crate) live: IntGauge,
}

impl Following {
    pub(crate) fn of(follower: &'static str) -> Self {
        let all = &*FOLLOWERS;
        Self {
            from_relay: all.commits.with_label_values(&[follower, "relay"]),
            from_bus: all.commits.with_label_values(&[follower, "bus"]),
            from_log: all.commits.with_label_values(&[follower, "log"]),
            gaps: all.gaps.with_label_values(&[follower]),
            repeats: all.repeats.with_label_values(&[follower]),
            live: all.live.with_label_values(&[follower]),
        }
    }
}

impl Followers {
    fn register() -> Self {
        let known = "each name is registered once, here";
        let counters = |name, help, labels: &[&str]| register_int_counter_vec!(name, help, labels).expect(known);
        let gauges = |name, help| register_int_gauge_vec!(name, help, &["follower"]).expect(known);
        Self {
            commits: counters(
                "daybook_feed_commits_total",
                "Commits handed to a follower, by where they came from.",
                &["follower", "source"],
            ),
            gaps: counters(
                "daybook_feed_gaps_total",
                "How often the bus did not have what comes next, and the log was read instead.",
                &["follower"],
            ),
            repeats: counters(
                "daybook_feed_repeats_total",
                "Commits that the bus brought to a follower which had them already.",
                &["follower"],
            ),
            live: gauges("daybook_feed_live", "1 while the follower hears the bus; else it reads the log alone."),
            lag_events: gauges("daybook_feed_lag_events", "Events that the follower has not taken in yet."),
            lag_seconds: register_gauge_vec!(
                "daybook_feed_lag_seconds",
                "How old the first commit is that the follower has not taken in yet, in seconds; 0 if there is none.",
                &["follower"]
            )
            .expect(known),
        }
    }
}
