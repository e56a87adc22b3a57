//! The door: how many requests may be at work at once, and what is told to one more.
//!
//! A server that takes on more than it can do answers all of it late. One request more than there are places is refused
//! from its head alone, before a token is verified, JSON is parsed or anything is asked of anybody: a refusal must cost
//! a small part of the work that it spares, or there is no time left for what was let in.
//!
//! A request takes its place when its body has arrived, so slow senders cannot fill the places; and leaves it with the
//! head of its answer. Reads pass freely: some wait on purpose, health is among them, and they have other bounds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::http::Method;

use crate::http::Limits;

/// One for all connections of a server.
pub(crate) struct Door {
    places: usize,
    always: &'static [&'static str],
    taken: AtomicUsize,
    /// Since it was last said in the log, and when that was, in milliseconds since `begun`.
    refused: AtomicU64,
    said_at: AtomicU64,
    begun: Instant,
    refusals: Pace,
}

/// Refusals in a row: so many a second at once, then each waits for its turn, but never longer than `wait_max`.
///
/// A refusal costs a tenth of the work that it spares. Told at once, a client that comes again at once is told so many
/// times that no time is left for what was let in; and a client that waits as it is told never notices the pause.
struct Pace {
    every_micros: u64,
    wait_max: Duration,
    /// When the next one is due, in microseconds since the door's beginning.
    next: AtomicU64,
}

/// A request that may have a place; the place is free again when the last clone is gone.
#[derive(Clone)]
pub(crate) struct Guest(Arc<Entry>);

struct Entry {
    door: Arc<Door>,
    entered: AtomicBool,
}

/// A line for each refusal would be more work than the refusal.
const SAID_EVERY: Duration = Duration::from_secs(1);

impl Door {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            places: limits.requests,
            always: limits.always,
            taken: AtomicUsize::new(0),
            refused: AtomicU64::new(0),
            said_at: AtomicU64::new(0),
            begun: Instant::now(),
            refusals: Pace {
                every_micros: 1_000_000 / u64::from(limits.refusals_per_second.max(1)),
                wait_max: limits.refusal_wait,
                next: AtomicU64::new(0),
            },
        }
    }

    /// Nobody, if there is no place for such a request. What enters meanwhile is bounded by the number of connections.
    pub(crate) fn admit(self: &Arc<Self>, method: &Method, path: &str) -> Option<Option<Guest>> {
        let reads = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
        if reads || self.always.iter().any(|always| path.starts_with(always)) {
            return Some(None);
        }
        if self.places <= self.taken.load(Ordering::Relaxed) {
            self.turned_away();
            return None;
        }
        Some(Some(Guest(Arc::new(Entry { door: self.clone(), entered: AtomicBool::new(false) }))))
    }

    /// How long this refusal waits before it is told.
    pub(crate) fn pause(&self) -> Duration {
        self.refusals.take_turn(self.begun.elapsed())
    }

    fn turned_away(&self) {
        let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let said_at = self.said_at.load(Ordering::Relaxed);
        let every = u64::try_from(SAID_EVERY.as_millis()).unwrap_or(u64::MAX);
        if said_at != 0 && now < said_at.saturating_add(every) {
            return;
        }
        if self.said_at.compare_exchange(said_at, now.max(1), Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.refused.fetch_sub(refused, Ordering::Relaxed);
            tracing::warn!(requests.refused = refused, places = self.places, "overloaded: more requests than places");
        }
    }
}

impl Pace {
    fn take_turn(&self, now: Duration) -> Duration {
        let now = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
        let wait_max = u64::try_from(self.wait_max.as_micros()).unwrap_or(u64::MAX);
        let next =
            |due: u64| (due <= now.saturating_add(wait_max)).then(|| due.max(now).saturating_add(self.every_micros));
        match self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) {
            Ok(due) => Duration::from_micros(due.saturating_sub(now)),
            Err(_) => self.wait_max,
        }
    }
}

impl Guest {
    /// The request is here whole: from now on it is work.
    pub(crate) fn enter(&self) {
        if !self.0.entered.swap(true, Ordering::Relaxed) {
            self.0.door.taken.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if *self.entered.get_mut() {
            self.door.taken.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_at_once_until_there_are_too_many_and_never_wait_longer_than_said() {
        let limits = Limits { refusals_per_second: 100, refusal_wait: Duration::from_millis(50), ..Limits::default() };
        let pace = Door::new(&limits).refusals;
        let now = Duration::from_secs(1);
        let waits: Vec<u128> = (0..8).map(|_| pace.take_turn(now).as_millis()).collect();
        assert_eq!(waits, [0, 10, 20, 30, 40, 50, 50, 50]);
        assert_eq!(pace.take_turn(now + Duration::from_secs(1)), Duration::ZERO, "what is past is forgotten");
    }
}
