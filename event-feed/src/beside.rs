//! Where relay and followers are one process: commits that the relay has read go to the followers as they are.
//!
//! The same road with the bus left out: nothing is written as JSON, read again and hashed again for each follower. The relay
//! read them in the log, or in the memory of an engine that had them acknowledged, so they are the log's; whoever misses
//! some, or finds no relay at work beside it, goes on with the bus or Postgres as everywhere. The relay publishes all the
//! same, for others.

use std::sync::Arc;

use event_store::{Commit, Recent};
use tokio::sync::watch;

/// The last commits that a relay of this process has read. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Beside(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    kept: Recent,
    /// The last commit that is kept; `None` while no relay is at work here.
    last: watch::Sender<Option<i64>>,
}

impl Beside {
    /// Commits that the log has, each the next after the one before.
    pub(crate) fn tell(&self, commits: &[Arc<Commit>]) {
        for commit in commits {
            self.0.kept.push(commit.clone());
        }
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
        self.0.kept.clear();
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
        self.0.kept.after(number - 1, events_max, bytes_max)
    }
}
