//! Following the log: each page of commits becomes rows in the transaction that moves the checkpoint.
//!
//! Every workflow looks at every page here, so one checkpoint serves them all. Nothing is called from here:
//! what must be done outside is a row that falls due at once.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use event_feed::{Commit, FeedError, FeedSettings, Follow, Obstacle, within};
use ledger_core::CorruptEvent;
use runtime::shutdown::Shutdown;
use sqlx::PgPool;
use tokio::time::timeout;

use crate::pause::Pause;
use crate::top_up::TopUps;

/// The server ends its statements sooner; this is for when it, or the way to it, is gone without a word.
const READING: Duration = Duration::from_secs(15);
const APPLYING: Duration = Duration::from_secs(40);

/// Follows until a stop is requested. Outages of Postgres and of the bus are waited for.
pub(crate) async fn run(feed: &FeedSettings, top_ups: &TopUps, obstacle: &Obstacle, shutdown: &Shutdown) {
    let mut pause = Pause::new(Duration::from_millis(100), Duration::from_secs(5));
    while !shutdown.is_requested() {
        let ended = tokio::select! {
            () = shutdown.requested() => return,
            ended = follow(feed, top_ups, obstacle, &mut pause) => ended,
        };
        if let Err(error) = ended {
            let (is_lasting, error) = (is_lasting(&error), format!("{error:#}"));
            if !is_lasting {
                tracing::warn!(error, "the log is not being followed; trying again");
            } else if obstacle.met(&error) {
                tracing::error!(alert = "log", error, "the log cannot be followed");
            }
        }
        pause.wait(shutdown).await;
    }
}

/// Trying again cannot help: the log is another one, or holds what nobody can read.
fn is_lasting(error: &anyhow::Error) -> bool {
    let feed = |cause: &FeedError| cause.is_final();
    error.chain().any(|cause| cause.downcast_ref().is_some_and(feed) || cause.is::<CorruptEvent>())
}

async fn follow(feed: &FeedSettings, top_ups: &TopUps, obstacle: &Obstacle, pause: &mut Pause) -> anyhow::Result<()> {
    let pool = top_ups.pool();
    let mut checkpoint = within(READING, checkpoint(pool)).await.context("reading the checkpoint")?;
    let mut follow = Follow::start(top_ups.log().clone(), feed.clone(), checkpoint).await.named("workflows");
    loop {
        let page = follow.next().await.context("the feed")?;
        let Some(last) = page.last() else { continue };
        let applied = timeout(APPLYING, apply(pool, top_ups, checkpoint, &page, last)).await;
        applied.context("a page of the log took too long")?.context("taking a page of the log")?;
        checkpoint = last.number;
        obstacle.passed();
        pause.reset();
    }
}

/// The number of the last commit whose events are all in our tables.
pub(crate) async fn checkpoint(pool: &PgPool) -> sqlx::Result<i64> {
    sqlx::query_scalar("select commit_number from workflows.checkpoint").fetch_one(pool).await
}

async fn apply(pool: &PgPool, top_ups: &TopUps, old: i64, page: &[Arc<Commit>], last: &Commit) -> anyhow::Result<()> {
    let mut tx = pool.begin().await?;
    // First, for it is the lock: of two followers the second waits here and then finds that the page is taken.
    // A page that is nobody's business may be lost by a crash: it comes again. So it does not wait for the disk.
    let idle = !page.iter().flat_map(|commit| &commit.events).any(|event| TopUps::concerns(&event.event_type));
    let moved = sqlx::query(
        "update workflows.checkpoint set commit_number = $2, position = $3 where commit_number = $1
         returning case when $4 then set_config('synchronous_commit', 'off', true) end",
    )
    .bind(old)
    .bind(last.number)
    .bind(last.last)
    .bind(idle)
    .execute(&mut *tx)
    .await?;
    ensure!(moved.rows_affected() == 1, "another follower has moved the checkpoint");
    let changed = top_ups.take_page(&mut tx, page).await?;
    tx.commit().await?;
    if changed {
        top_ups.wake();
    }
    Ok(())
}
