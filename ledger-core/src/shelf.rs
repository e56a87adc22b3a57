//! One kind of thing in the book's memory: bounded, and able to take back what was not committed.
//!
//! A thing that was changed since the last snapshot stays; everything else can be read again, so it may go when
//! room is needed. Each change is remembered until it is kept, the newest last, so that the changes of one
//! command, of a batch or of all batches under way can be taken back.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// A bounded map with an undo log.
#[derive(Debug)]
pub(crate) struct Shelf<K, V> {
    slots: HashMap<K, Slot<V>>,
    /// What each change that is not kept yet has replaced, in order.
    undo: VecDeque<(K, Option<Slot<V>>)>,
    /// How many changes have been kept so far: marks count from the beginning of all changes.
    kept: u64,
    changed: usize,
    sweep_beyond: usize,
}

#[derive(Clone, Debug, Default)]
struct Slot<V> {
    value: V,
    /// The position of the last event that is in.
    at: i64,
    /// Whether the last snapshot does not have it as it is.
    changed: bool,
    /// Whether anybody has looked at it since the last sweep.
    used: bool,
}

impl<K: Copy + Eq + Hash, V: Clone + Default> Shelf<K, V> {
    pub(crate) fn get(&self, key: K) -> Option<&V> {
        self.slots.get(&key).map(|slot| &slot.value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.slots.iter().map(|(key, slot)| (key, &slot.value))
    }

    /// Whether it is here. Who asks is about to look at it.
    pub(crate) fn holds(&mut self, key: K) -> bool {
        self.slots.get_mut(&key).map(|slot| slot.used = true).is_some()
    }

    /// Puts in what was read from outside, as it was at a position. What is here already is at least as new.
    pub(crate) fn lay_in(&mut self, key: K, value: V, at: i64) {
        self.slots.entry(key).or_insert(Slot { value, at, changed: false, used: true });
    }

    /// The position of the last event that is in, 0 if it is not here.
    pub(crate) fn at(&self, key: K) -> i64 {
        self.slots.get(&key).map_or(0, |slot| slot.at)
    }

    /// Changes it by what happened at a position. A thing that is not here begins as its default. Only what is `revocable`
    /// can be taken back; after a change that is, and until that is kept, the others are too.
    pub(crate) fn change(&mut self, key: K, position: i64, revocable: bool, change: impl FnOnce(&mut V)) {
        let undo = (revocable || !self.undo.is_empty()).then_some(&mut self.undo);
        let slot = match self.slots.entry(key) {
            Entry::Occupied(slot) => {
                let slot = slot.into_mut();
                if let Some(undo) = undo {
                    undo.push_back((key, Some(slot.clone())));
                }
                slot
            }
            Entry::Vacant(place) => {
                if let Some(undo) = undo {
                    undo.push_back((key, None));
                }
                place.insert(Slot::default())
            }
        };
        let before = slot.changed;
        change(&mut slot.value);
        slot.at = slot.at.max(position);
        slot.changed = true;
        slot.used = true;
        if !before {
            self.changed = self.changed.saturating_add(1);
        }
    }

    /// Names this moment, to keep or to take back what comes after it.
    pub(crate) fn mark(&self) -> u64 {
        self.kept.saturating_add(self.undo.len() as u64)
    }

    /// What was changed before the mark stays.
    pub(crate) fn keep(&mut self, mark: u64) {
        while self.kept < mark && self.undo.pop_front().is_some() {
            self.kept = self.kept.saturating_add(1);
        }
    }

    /// What was changed since the mark has not happened.
    pub(crate) fn take_back(&mut self, mark: u64) {
        while mark < self.mark() {
            let Some((key, before)) = self.undo.pop_back() else { return };
            let changed = before.as_ref().is_some_and(|slot| slot.changed);
            match before {
                Some(before) => self.slots.insert(key, before),
                None => self.slots.remove(&key),
            };
            if !changed {
                self.changed = self.changed.saturating_sub(1);
            }
        }
    }

    pub(crate) fn changed(&self) -> usize {
        self.changed
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Everything that was changed since the last snapshot, as it was kept: without what may still be taken back.
    pub(crate) fn changes(&self) -> Vec<(K, V, i64)> {
        let mut kept: HashMap<K, Option<&Slot<V>>> = HashMap::with_capacity(self.undo.len());
        for (key, before) in &self.undo {
            kept.entry(*key).or_insert(before.as_ref());
        }
        let as_kept = |(key, slot)| match kept.get(key) {
            None => Some((key, slot)),
            Some(before) => before.map(|slot| (key, slot)),
        };
        let changed = self.slots.iter().filter_map(as_kept).filter(|(_, slot): &(&K, &Slot<V>)| slot.changed);
        changed.map(|(key, slot)| (*key, slot.value.clone(), slot.at)).collect()
    }

    /// A snapshot has all that happened up to the position; what has not changed since may go.
    pub(crate) fn written(&mut self, position: i64) {
        for slot in self.slots.values_mut().filter(|slot| slot.changed && slot.at <= position) {
            slot.changed = false;
            self.changed = self.changed.saturating_sub(1);
        }
        self.sweep_beyond = 0;
    }

    /// Lets things go until a quarter of the room is free: what nobody has looked at since the last time first. Whether
    /// anything has gone.
    pub(crate) fn make_room(&mut self, max: usize) -> bool {
        let before = self.slots.len();
        if before <= max.max(self.sweep_beyond) {
            return false;
        }
        let goal = max.saturating_sub(max / 4);
        for _ in 0..2 {
            let mut excess = self.slots.len().saturating_sub(goal);
            self.slots.retain(|_, slot| {
                if excess == 0 || slot.changed || std::mem::take(&mut slot.used) {
                    return true;
                }
                excess = excess.saturating_sub(1);
                false
            });
        }
        // What is left had to stay: looking through it again at once would find the same.
        self.sweep_beyond = self.slots.len().saturating_add(max / 16);
        self.slots.len() < before
    }
}

impl<K, V> Default for Shelf<K, V> {
    fn default() -> Self {
        Self { slots: HashMap::new(), undo: VecDeque::new(), kept: 0, changed: 0, sweep_beyond: 0 }
    }
}
