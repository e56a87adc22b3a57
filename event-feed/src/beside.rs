//! Where relay and followers are one process: commits that the relay has read go to the followers as they are.
//!
//! The same road with the bus left out: nothing is written as JSON, read again and hashed again for each follower. The relay
//! read them in the log, so they are the log's; whoever misses some, or finds no relay at work beside it, goes on with the
//! bus or Postgres as everywhere. The relay publishes all the same, for others.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_store::Commit;
use tokio::sync::watch;

/// The last commits that a relay of this process has read. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Beside(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    kept: Mutex<Kept>,
    /// The last commit that is kept; `None` while no relay is at work here.
    last: watch::Sender<Option<i64>>,
}

#[derive(Debug, Default)]
struct Kept {
    commits: VecDeque<Arc<Commit>>,
    bytes: usize,
}

/// Payloads and metadata that are kept for followers which are not so quick. Behind that they read Postgres.
const BYTES_MAX: usize = 16 * 1024 * 1024;

impl Beside {
    /// Commits that the log has, each the next after the one before.
    pub(crate) fn tell(&self, commits: &[Arc<Commit>]) {
        let mut kept = self.kept();
        for commit in commits {
            if kept.commits.back().is_some_and(|last| last.number + 1 != commit.number) {
                *kept = Kept::default(); // the relay began elsewhere
            }
            kept.bytes += bytes_of(commit);
            kept.commits.push_back(commit.clone());
        }
        while BYTES_MAX < kept.bytes
            && let Some(first) = kept.commits.pop_front()
        {
            kept.bytes -= bytes_of(&first);
        }
        drop(kept);
        if let Some(last) = commits.last() {
            self.0.last.send_replace(Some(last.number));
        }
    }

    /// The relay is at work and has told all commits up to this one.
    pub(crate) fn begin(&self, commit: i64) {
        self.0.last.send_replace(Some(commit));
    }

    /// No relay is at work here: followers look elsewhere.
    pub(crate) fn end(&self) {
        *self.kept() = Kept::default();
        self.0.last.send_replace(None);
    }

    pub(crate) fn is_fed(&self) -> bool {
        self.0.last.borrow().is_some()
    }

    /// Commits from a number on, so many events and bytes or one commit at least, once there is one; an empty page if the
    /// commit is not kept any more.
    pub(crate) async fn from(&self, number: i64, events_max: i64, bytes_max: usize) -> Vec<Arc<Commit>> {
        let mut last = self.0.last.subscribe();
        // The sender lives as long as we do.
        _ = last.wait_for(|last| last.is_some_and(|last| number <= last)).await;
        let kept = self.kept();
        let skipped = kept.commits.front().map(|first| number - first.number);
        let Some(skipped) = skipped.and_then(|skipped| usize::try_from(skipped).ok()) else { return Vec::new() };
        let (mut events, mut bytes) = (0, 0);
        let fits = |commit: &&Arc<Commit>| {
            let fits = events < events_max && bytes < bytes_max;
            events += commit.last - commit.first + 1;
            bytes += bytes_of(commit);
            fits
        };
        kept.commits.iter().skip(skipped).take_while(fits).cloned().collect()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner) // whole commits go in and out
    }
}

/// What a commit takes, nearly: its payloads and metadata.
pub(crate) fn bytes_of(commit: &Commit) -> usize {
    commit.events.iter().map(|event| event.payload.len() + event.metadata.len()).sum()
}
