//! What clients see of the read side, over real sockets: a real ledger writes, a relay and a bus carry, a projector
//! folds, and queries answer.

#![expect(clippy::unwrap_used, reason = "clippy.toml excepts tests, but not their helpers")]

mod fresh;
mod lists;
mod log;
mod outage;
mod past;
mod rebuilding;
mod seeing;
mod system;
