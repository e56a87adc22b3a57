//! The projecting task: follows the log and writes each page into all views, in one transaction with their checkpoints.
//!
//! The checkpoints move first and only from where this task last saw them, so of two projectors one finds that the
//! other was quicker, and no page is written twice.
//!
//! # Why its commits may be lost
//! It connects with `synchronous_commit` off: a crash of Postgres may lose the last pages together with their
//! checkpoints, and the log, which loses nothing, has them all. Waiting for the disk would only make views late.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use event_feed::{FeedSettings, Follow, Log, RecordedEvent, StoreError, within};
use runtime::shutdown::Shutdown;
use runtime::trace::{KeyValue, SpanKind, Stage};
use sqlx::{PgConnection, PgPool};
use tokio::sync::{Mutex, MutexGuard, mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::metrics::METRICS;
use crate::page::{Page, PageError};
use crate::{VIEWS, View, options};

/// What can be set from outside.
#[derive(Clone, Debug)]
pub struct Settings {
    pub database_url: String,
    pub feed: FeedSettings,
}

/// How far the views have come, for queries in the same process: they need not ask Postgres. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    position: watch::Sender<i64>,
    /// Whether a projecting task of this process moves it at the moment.
    fed: AtomicBool,
    /// Held by the one query that reads the checkpoints for all that wait.
    polling: Mutex<()>,
}

/// One to write, one to read the log meanwhile.
const CONNECTIONS: u32 = 2;

/// Events that a view which is behind the others takes at a time.
const CATCH_UP_EVENTS: i64 = 5_000;

/// Pages that are read while another one is written, and events that are then written together.
const READ_AHEAD: usize = 4;
const PAGE_EVENTS: usize = 10_000;

/// From one page to the next under load. Whoever has written waits so long to read it.
const PACE: Duration = Duration::from_millis(10);

/// How often an idle projector looks whether the checkpoints are still where it left them.
const LOOK_BACK: Duration = Duration::from_secs(1);

/// The server ends what takes longer than any page should, such as waiting for a stuck holder of the checkpoints.
const STATEMENT_TIME: &str = "30s";

/// And what it does not end, because it or the way to it is gone, is given up here: reading, and writing a page.
const READING: Duration = Duration::from_secs(15);
const WRITING: Duration = Duration::from_secs(40);

/// Pauses after a failure.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How long a stop waits for connections to be given back.
const CLOSING: Duration = Duration::from_secs(2);

/// A page could not be written.
#[derive(Debug, thiserror::Error)]
enum ProjectError {
    /// It can be tried again.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    /// Another projector was quicker, or Postgres has lost what was written last: go on from where the checkpoints are.
    #[error("the checkpoints have moved")]
    Overtaken,
}

/// Projects until a stop is wanted, through outages of Postgres and NATS. `Err`: the log cannot be projected.
pub async fn follow(settings: Settings, progress: Progress, shutdown: Shutdown) -> anyhow::Result<()> {
    let options = options(&settings.database_url)?;
    let options = options.options([("synchronous_commit", "off"), ("statement_timeout", STATEMENT_TIME)]);
    let pool = event_store::pool_options(CONNECTIONS).connect_lazy_with(options);
    let log = Log::new(pool.clone());
    let mut pause = PAUSE_MIN;
    let mut told = false; // of this outage
    loop {
        let mut worked = false;
        let session = session(&pool, &log, &settings.feed, &progress, &mut worked);
        let error = tokio::select! {
            () = shutdown.requested() => break,
            Err(error) = session => error,
        };
        // Until it works again others may move the views, and a crash of Postgres may have moved them back.
        progress.0.fed.store(false, Ordering::Relaxed);
        if worked {
            pause = PAUSE_MIN;
            told = false;
        }
        METRICS.interruptions.inc();
        if !is_passing(&error) {
            return Err(error);
        }
        if matches!(error.downcast_ref(), Some(ProjectError::Overtaken)) {
            tracing::debug!("another projector is at work");
        } else if !std::mem::replace(&mut told, true) {
            tracing::warn!(error = format!("{error:#}"), "projecting is interrupted; it is tried again until it works");
        }
        tokio::select! {
            () = shutdown.requested() => break,
            () = sleep(pause) => pause = PAUSE_MAX.min(pause * 2),
        }
    }
    progress.0.fed.store(false, Ordering::Relaxed);
    // A connection may be waiting for an answer that never comes.
    _ = timeout(CLOSING, pool.close()).await;
    Ok(())
}

/// Projects from the checkpoints until something fails.
async fn session(
    pool: &PgPool,
    log: &Log,
    feed: &FeedSettings,
    progress: &Progress,
    worked: &mut bool,
) -> anyhow::Result<std::convert::Infallible> {
    let (mut position, commit) = level(pool, log).await?;
    progress.reached(position);
    let follow = Follow::start(log.clone(), feed.clone(), commit).await.named("projector").paced(PACE);
    let (sender, mut pages) = mpsc::channel(READ_AHEAD);
    let _reading = AbortOnDropHandle::new(tokio::spawn(read_ahead(follow, sender)));
    let mut failed = None;
    loop {
        if let Some(error) = failed {
            return Err(error);
        }
        // Commits here do not wait for the disk, so a crash of Postgres may take the last ones back. If it is up again
        // before we ask it anything, no error tells; with nothing new to write, only looking does.
        let mut page = loop {
            if let Ok(page) = timeout(LOOK_BACK, pages.recv()).await {
                break page.context("the reading of the log ended")??;
            }
            if checkpoints_of(pool).await?.iter().any(|(_, at, _)| *at != position) {
                return Err(ProjectError::Overtaken.into());
            }
        };
        // What was read while the last page was written goes in at once: the further behind, the less each event costs.
        while page.events.len() < PAGE_EVENTS
            && let Ok(next) = pages.try_recv()
        {
            match next {
                Ok(next) => page.add(next),
                Err(error) => failed = Some(error),
            }
        }
        let stage = page.stage.take();
        let begun = Instant::now();
        write(pool, &page, VIEWS.iter(), position).await?;
        METRICS.projected(page.position - position, begun.elapsed());
        if let Some(stage) = stage {
            stage.end([
                KeyValue::new("daybook.page.events", page.position - position),
                KeyValue::new("daybook.page.position", page.position),
            ]);
        }
        position = page.position;
        progress.reached(position);
        *worked = true;
    }
}

/// Reads the next pages while others are written, until it fails or nobody wants them.
async fn read_ahead(mut follow: Follow, pages: mpsc::Sender<anyhow::Result<Page>>) {
    loop {
        let page = match follow.next().await {
            Ok(commits) => {
                let traces = commits.iter().flat_map(|commit| &commit.events).map(RecordedEvent::traceparent);
                let stage = Stage::begin("project", SpanKind::Consumer, traces);
                Page::read(&commits).map(|page| Page { stage, ..page }).map_err(anyhow::Error::from)
            }
            Err(error) => Err(error.into()),
        };
        let ends = page.is_err();
        if pages.send(page).await.is_err() || ends {
            return;
        }
    }
}

/// Brings views that are behind the others, such as new ones, to where the others are; answers where that is.
async fn level(pool: &PgPool, log: &Log) -> anyhow::Result<(i64, i64)> {
    let checkpoints = checkpoints_of(pool).await?;
    let (top, top_commit) =
        checkpoints.iter().map(|(_, position, commit)| (*position, *commit)).max().unwrap_or_default();
    for (view, mut position, mut commit) in checkpoints {
        if position < top {
            tracing::info!(view = view.name, position, to = top, "a view catches up with the others");
        }
        while position < top {
            let commits = within(READING, log.commits_after(commit, CATCH_UP_EVENTS)).await?;
            let commits: Vec<_> =
                commits.into_iter().take_while(|commit| commit.number <= top_commit).map(Arc::new).collect();
            anyhow::ensure!(!commits.is_empty(), "the views are at commit {top_commit}, which is not in the log");
            let page = Page::read(&commits)?;
            write(pool, &page, std::iter::once(view), position).await?;
            (position, commit) = (page.position, page.commit);
        }
    }
    Ok((top, top_commit))
}

async fn checkpoints_of(pool: &PgPool) -> anyhow::Result<Vec<(&'static View, i64, i64)>> {
    let reading = async { checkpoints(&mut *pool.acquire().await?).await };
    timeout(READING, reading).await.context("reading the checkpoints took too long")?
}

/// Where each view is.
pub(crate) async fn checkpoints(connection: &mut PgConnection) -> anyhow::Result<Vec<(&'static View, i64, i64)>> {
    let rows: Vec<(String, i64, i64)> =
        sqlx::query_as("select view, position, commit_number from views.checkpoints").fetch_all(connection).await?;
    let checkpoint = |view: &'static View| {
        let row = rows.iter().find(|(name, ..)| name == view.name);
        let (_, position, commit) = row.with_context(|| format!("the view {} has no checkpoint", view.name))?;
        Ok((view, *position, *commit))
    };
    VIEWS.iter().map(checkpoint).collect()
}

/// Writes a page into views that are all at the position before it.
async fn write(
    pool: &PgPool,
    page: &Page,
    views: impl Iterator<Item = &'static View> + Clone,
    from: i64,
) -> Result<(), ProjectError> {
    within(WRITING, write_unbounded(pool, page, views, from)).await
}

async fn write_unbounded(
    pool: &PgPool,
    page: &Page,
    views: impl Iterator<Item = &'static View> + Clone,
    from: i64,
) -> Result<(), ProjectError> {
    let names: Vec<_> = views.clone().map(|view| view.name).collect();
    let mut tx = pool.begin().await?;
    let moved = sqlx::query(
        "update views.checkpoints set position = $3, commit_number = $4 where view = any($1) and position = $2",
    )
    .bind(&names)
    .bind(from)
    .bind(page.position)
    .bind(page.commit)
    .execute(&mut *tx)
    .await?;
    if usize::try_from(moved.rows_affected()).is_ok_and(|moved| moved != names.len()) {
        return Err(ProjectError::Overtaken);
    }
    for view in views {
        (view.write)(page, &mut tx).await?;
    }
    tx.commit().await?;
    Ok(())
}

/// Whether trying again can help: an outage, or another projector. A log that cannot be read will not heal.
fn is_passing(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<event_feed::FeedError>() {
        Some(feed) => !feed.is_final(),
        None => match error.downcast_ref::<PageError>() {
            Some(PageError::Corrupt { .. } | PageError::Store(StoreError::Corrupt(_))) => false,
            Some(PageError::Store(_)) | None => true,
        },
    }
}

impl Progress {
    /// Returns once the projecting task of this process has folded everything up to a position.
    pub async fn reaches(&self, position: i64) {
        // An error would say that nobody can move it any more; we hold an end of it ourselves.
        self.subscribe().wait_for(|reached| position <= *reached).await.ok();
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<i64> {
        self.0.position.subscribe()
    }

    pub(crate) fn is_fed(&self) -> bool {
        self.0.fed.load(Ordering::Relaxed)
    }

    /// The turn to read the checkpoints for everyone who waits.
    pub(crate) async fn polling(&self) -> MutexGuard<'_, ()> {
        self.0.polling.lock().await
    }

    /// A query has seen the views at this position.
    pub(crate) fn seen(&self, position: i64) {
        self.0.position.send_if_modified(|current| {
            let further = *current < position;
            *current = position.max(*current);
            further
        });
    }

    fn reached(&self, position: i64) {
        self.0.fed.store(true, Ordering::Relaxed);
        self.0.position.send_replace(position);
    }
}
