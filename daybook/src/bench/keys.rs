//! The keys of the load. By default they are UUIDs of version 7, as the README advises: in the index on keys they lie
//! beside each other. Keys by chance, UUIDs of version 4, change another page of it each.
//!
//! A key follows from its number, so that a million of them can be looked for in the log without having been kept.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::ValueEnum;
use serde::Serialize;
use uuid::{Builder, Uuid};

use super::random::Random;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    /// UUIDs of version 7.
    Time,
    /// UUIDs of version 4.
    Random,
}

impl Order {
    /// Behind the name of a measurement.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Time => "",
            Self::Random => ", random keys",
        }
    }

    /// What such a key is in the log, at less cost than hashing one.
    pub(crate) fn hash(self, random: &mut Random) -> [u8; 16] {
        let mut hash = sixteen(random);
        if self == Self::Time {
            hash[..6].copy_from_slice(&Uuid::now_v7().as_bytes()[..6]);
        }
        hash
    }
}

/// Those of one load, different from those of any other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keys {
    order: Order,
    seed: u64,
    begun_millis: u64,
}

/// More than come in a millisecond, unless it is far too much: keys shall not be of times to come when the next load begins.
const EACH_MILLI: u64 = 128;

impl Keys {
    pub(crate) fn new(order: Order) -> Self {
        let begun = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let begun_millis = u64::try_from(begun.as_millis()).expect("for some hundred million years");
        Self { order, seed: Uuid::now_v7().as_u64_pair().1, begun_millis }
    }

    pub(crate) fn of(&self, number: u64) -> Key {
        let mut random = Random::new(Random::new(self.seed ^ number).next());
        let bytes = sixteen(&mut random);
        Key(match self.order {
            Order::Time => {
                let (time, rest) = (self.begun_millis + number / EACH_MILLI, bytes.first_chunk().expect("of sixteen"));
                Builder::from_unix_timestamp_millis(time, rest).into_uuid()
            }
            Order::Random => Builder::from_random_bytes(bytes).into_uuid(),
        })
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Key(Uuid);

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

pub(crate) fn sixteen(random: &mut Random) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&random.next().to_le_bytes());
    bytes[8..].copy_from_slice(&random.next().to_le_bytes());
    bytes
}
