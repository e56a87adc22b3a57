//! Recent idempotency keys, in memory and bounded. What is not here may still be in the log: there the unique index
//! is the judge.

use std::collections::{HashMap, VecDeque};

use event_store::EventRow;
use ledger_core::Key;

#[derive(Debug)]
pub(crate) struct RecentKeys {
    max: usize,
    uses: HashMap<[u8; 16], [u8; 32]>,
    order: VecDeque<[u8; 16]>,
}

/// What the log is known to hold about a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyUse {
    New,
    /// The same request: answer what was answered.
    Same,
    /// Another request: refuse.
    Other,
}

/// What is known of a key, given the request that it was used for, if any.
pub(crate) fn usage(request: Option<&[u8; 32]>, key: &Key) -> KeyUse {
    match request {
        None => KeyUse::New,
        Some(request) if *request == key.request => KeyUse::Same,
        Some(_) => KeyUse::Other,
    }
}

impl RecentKeys {
    pub(crate) fn new(max: usize) -> Self {
        Self { max, uses: HashMap::new(), order: VecDeque::new() }
    }

    pub(crate) fn count(&self) -> usize {
        self.uses.len()
    }

    pub(crate) fn usage(&self, key: &Key) -> KeyUse {
        usage(self.uses.get(&key.hash), key)
    }

    pub(crate) fn remember(&mut self, key: &Key) {
        if self.uses.insert(key.hash, key.request).is_none() {
            self.order.push_back(key.hash);
        }
        while self.max < self.order.len() {
            if let Some(oldest) = self.order.pop_front() {
                self.uses.remove(&oldest);
            }
        }
    }

    /// Remembers the key that a recorded event carries, if it carries one.
    pub(crate) fn remember_event(&mut self, event: &EventRow<'_>) {
        if let (Some(hash), Some(request)) = (event.key_hash, event.request_hash) {
            self.remember(&Key { hash: *hash, request: *request });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u8) -> Key {
        Key { hash: [number; 16], request: [number; 32] }
    }

    #[test]
    fn the_oldest_key_is_forgotten_first_and_the_window_stays_bounded() {
        let mut keys = RecentKeys::new(2);
        for number in [1, 2, 2, 3] {
            keys.remember(&key(number));
        }
        assert_eq!([1, 2, 3].map(|number| keys.usage(&key(number))), [KeyUse::New, KeyUse::Same, KeyUse::Same]);
        assert_eq!(keys.usage(&Key { request: [9; 32], ..key(3) }), KeyUse::Other);
        assert_eq!(keys.order.len(), keys.uses.len());
    }
}
