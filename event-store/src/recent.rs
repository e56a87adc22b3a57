//! The end of the log in memory: the commits that were appended or read last, for whoever in this process follows along.
//!
//! What is in the log never changes, so a commit that is known to be in it may as well be taken from here: who reads it in Postgres
//! pays for the question, the rows and their parsing, and so does Postgres. Who finds nothing here asks there. Left out: what
//! nobody has told, which other processes may have appended.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Commit;

/// The last commits, without a gap. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Recent(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    commits: VecDeque<Arc<Commit>>,
    bytes: usize,
}

/// Payloads and metadata that are kept for those who are not so quick, more than half a second of all that two cores can do; with what
/// else belongs to an event it is twice as much memory.
const BYTES_MAX: usize = 8 * 1024 * 1024;

impl Recent {
    /// A commit that the log has. What does not follow the last one takes the place of all.
    pub fn push(&self, commit: Arc<Commit>) {
        let mut gone = VecDeque::new(); // freed when others can look again
        let mut kept = self.kept();
        if kept.commits.back().is_some_and(|last| last.number + 1 != commit.number) {
            gone = std::mem::take(&mut *kept).commits;
        }
        kept.bytes += commit.bytes();
        kept.commits.push_back(commit);
        while BYTES_MAX < kept.bytes
            && let Some(first) = kept.commits.pop_front()
        {
            kept.bytes -= first.bytes();
            gone.push_back(first);
        }
        drop(kept);
    }

    /// The last one.
    pub fn last(&self) -> Option<Arc<Commit>> {
        self.kept().commits.back().cloned()
    }

    /// Forgets everything: what follows may be of another log.
    pub fn clear(&self) {
        *self.kept() = Kept::default();
    }

    /// Whole commits after the given one: at most so many events, and bytes that only the last commit may go beyond, but one commit at
    /// least. Empty if the next one is not here.
    pub fn after(&self, commit: i64, events_max: i64, bytes_max: usize) -> Vec<Arc<Commit>> {
        let kept = self.kept();
        let skipped = kept.commits.front().map(|first| commit + 1 - first.number);
        let Some(skipped) = skipped.and_then(|skipped| usize::try_from(skipped).ok()) else { return Vec::new() };
        let (mut events, mut bytes) = (0, 0);
        let fits = |commit: &&Arc<Commit>| {
            let is_first = events == 0;
            events += commit.last - commit.first + 1;
            let fits = is_first || (events <= events_max && bytes < bytes_max);
            bytes += commit.bytes();
            fits
        };
        kept.commits.iter().skip(skipped).take_while(fits).cloned().collect()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner) // whole commits go in and out
    }
}

#[cfg(test)]
mod tests {
    use std::ops::RangeInclusive;

    use ledger_core::{CommandEvent, CommandId, Event, Failure, NewEvent, Timestamp};
    use uuid::Uuid;

    use super::*;
    use crate::{Draft, Head};

    /// Commits of one event each, which carries so many bytes.
    fn commits(numbers: RangeInclusive<i64>, bytes: usize) -> Vec<Arc<Commit>> {
        commits_of(1, numbers, bytes)
    }

    fn commits_of(events: i64, numbers: RangeInclusive<i64>, bytes: usize) -> Vec<Arc<Commit>> {
        let at = |number: i64| {
            let failure = Failure { code: "wallet-frozen".to_owned(), detail: "x".repeat(bytes) };
            let id = CommandId::from_uuid(Uuid::from_u128(7));
            let event = Event::Command(id, CommandEvent::Declined { partner_id: None, failure });
            let recorded_at = Timestamp::from_micros(0).unwrap();
            let head = Head { position: events * (number - 1), commit: number - 1, chain: [0; 32], recorded_at };
            let draft = Draft::new(id, None, "{}", NewEvent { sequence: 1, event });
            Arc::new(Commit::seal(&head, recorded_at, &vec![draft; events as usize]))
        };
        numbers.map(at).collect()
    }

    fn told(recent: &Recent, commits: Vec<Arc<Commit>>) {
        commits.into_iter().for_each(|commit| recent.push(commit));
    }

    const NONE: [i64; 0] = [];

    fn numbers(commits: &[Arc<Commit>]) -> Vec<i64> {
        commits.iter().map(|commit| commit.number).collect()
    }

    #[test]
    fn what_follows_is_given_in_order_as_far_as_it_is_wanted() {
        let recent = Recent::default();
        assert_eq!(numbers(&recent.after(0, 10, 1_000)), NONE);
        told(&recent, commits(5..=9, 1));
        assert_eq!(numbers(&recent.after(4, 10, 1_000)), [5, 6, 7, 8, 9]);
        assert_eq!(numbers(&recent.after(6, 2, 1_000)), [7, 8], "so many events");
        assert_eq!(numbers(&recent.after(6, 10, 1)), [7], "one commit at least");
        assert_eq!(numbers(&recent.after(9, 10, 1_000)), NONE, "nothing comes after the last");
        assert_eq!(numbers(&recent.after(3, 10, 1_000)), NONE, "the next one is not here, so none is");
    }

    #[test]
    fn a_page_has_whole_commits_and_no_event_too_many_but_one_commit_at_least() {
        let recent = Recent::default();
        told(&recent, commits_of(3, 1..=4, 1));
        assert_eq!(numbers(&recent.after(0, 8, 1_000)), [1, 2]);
        assert_eq!(numbers(&recent.after(0, 9, 1_000)), [1, 2, 3]);
        assert_eq!(numbers(&recent.after(0, 2, 1_000)), [1]);
    }

    #[test]
    fn there_is_no_gap_in_what_is_kept() {
        let recent = Recent::default();
        told(&recent, commits(1..=3, 1));
        told(&recent, commits(5..=6, 1));
        assert_eq!(numbers(&recent.after(0, 10, 1_000)), NONE);
        assert_eq!(numbers(&recent.after(3, 10, 1_000)), NONE);
        assert_eq!(numbers(&recent.after(4, 10, 1_000)), [5, 6]);
        told(&recent, commits(6..=6, 1));
        assert_eq!(numbers(&recent.after(4, 10, 1_000)), NONE, "told twice, it is as if somebody had begun elsewhere");
        assert_eq!(numbers(&recent.after(5, 10, 1_000)), [6]);
        recent.clear();
        assert_eq!(numbers(&recent.after(5, 10, 1_000)), NONE);
    }

    #[test]
    fn its_memory_is_bounded_and_the_oldest_go_first() {
        let recent = Recent::default();
        told(&recent, commits(1..=20, 1024 * 1024));
        let kept = recent.after(20 - 7, 100, usize::MAX);
        assert_eq!(numbers(&kept), [14, 15, 16, 17, 18, 19, 20]);
        assert_eq!(numbers(&recent.after(20 - 8, 100, usize::MAX)), NONE, "eight are more than 8 MiB");
    }
}
