//! How far the views are behind the log, while a workload runs and until they are level again.
//!
//! Looked at every 20 ms, log and checkpoints in one statement. In events it is the difference. In time it is the age
//! of the oldest event that the views do not have: now, less the last look at which the log did not have it yet. So it
//! is too long by up to a look, never too short.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;
use sqlx::{Connection, PgConnection};

use super::figures::{Latencies, millis};

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Lag {
    pub(crate) p50_millis: f64,
    pub(crate) p99_millis: f64,
    pub(crate) max_millis: f64,
    pub(crate) p50_events: u64,
    pub(crate) p99_events: u64,
    pub(crate) max_events: u64,
    looks: u64,
    /// After the last answer; nothing if they were not level in [`LEVEL_TIME`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) level_after_seconds: Option<f64>,
}

/// Looks, from a thread of its own, until it is stopped.
pub(crate) struct Watch {
    over: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<(Latencies, Latencies)>>,
    database_url: String,
}

const LOOK: Duration = Duration::from_millis(20);

/// How long the views may take to be level again; what comes next begins when they are.
const LEVEL_TIME: Duration = Duration::from_secs(300);

impl Watch {
    pub(crate) fn start(database_url: &str) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (stop, url) = (over.clone(), database_url.to_owned());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(watch(&url, &stop))
        });
        Self { over, thread, database_url: database_url.to_owned() }
    }

    /// When the last answer has come: waits until the views are level.
    pub(crate) async fn stop(self) -> anyhow::Result<Lag> {
        self.over.store(true, Ordering::Relaxed);
        let level_after_seconds = until_level(&self.database_url).await?.map(|took| took.as_secs_f64());
        let watched = tokio::task::spawn_blocking(|| self.thread.join()).await?;
        let (ages, events) = watched.map_err(|_| anyhow::anyhow!("the thread that looked at the views panicked"))??;
        let count = |quantile| u64::try_from(events.at(quantile).as_micros()).unwrap_or(u64::MAX);
        Ok(Lag {
            p50_millis: millis(ages.at(0.5)),
            p99_millis: millis(ages.at(0.99)),
            max_millis: millis(ages.at(1.0)),
            p50_events: count(0.5),
            p99_events: count(0.99),
            max_events: count(1.0),
            looks: ages.count(),
            level_after_seconds,
        })
    }
}

/// Where the log ends, and what the view that is furthest behind has.
pub(crate) async fn positions(connection: &mut PgConnection) -> sqlx::Result<(i64, i64)> {
    let positions = "select (select last_position from ledger.commits order by number desc limit 1),
                            (select min(position) from views.checkpoints)";
    sqlx::query_as(positions).fetch_one(connection).await
}

/// How long it takes until the views have all of the log, which nobody adds to.
pub(crate) async fn until_level(database_url: &str) -> anyhow::Result<Option<Duration>> {
    let mut connection = PgConnection::connect(database_url).await?;
    let begun = Instant::now();
    while begun.elapsed() < LEVEL_TIME {
        let (head, views) = positions(&mut connection).await?;
        if head <= views {
            connection.close().await?;
            return Ok(Some(begun.elapsed()));
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(None)
}

/// Ages, and numbers of events, which are kept as microseconds: of both only the distribution is wanted.
async fn watch(database_url: &str, over: &AtomicBool) -> anyhow::Result<(Latencies, Latencies)> {
    let mut connection = PgConnection::connect(database_url).await?;
    let (mut ages, mut events) = (Latencies::new(), Latencies::new());
    let mut looks: VecDeque<(Instant, i64)> = VecDeque::new();
    while !over.load(Ordering::Relaxed) {
        let (head, views) = positions(&mut connection).await?;
        let now = Instant::now();
        looks.push_back((now, head));
        // The first look that is kept is the last one at which the log ended within what the views have now.
        while looks.get(1).is_some_and(|(_, head)| *head <= views) {
            looks.pop_front();
        }
        let since = looks.front().map_or(now, |(at, _)| *at);
        ages.record(if head <= views { Duration::ZERO } else { now - since });
        events.record(Duration::from_micros(u64::try_from(head - views).unwrap_or(0)));
        tokio::time::sleep(LOOK).await;
    }
    connection.close().await?;
    Ok((ages, events))
}
