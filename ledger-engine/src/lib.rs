//! The heart: gathers commands, decides them one after another against the book, appends them in groups, and
//! answers after the commit.
//!
//! Third room on the road. `command-api` calls it over HTTP's head; benchmarks and crash tests call it directly.
//!
//! # Why one task
//! Decisions are made in memory, in order, by one task, so a hot wallet costs nothing extra and no lock is ever
//! taken on a wallet. While one append is in flight, the commands that come are decided into the next.
//!
//! # Why memory is bounded
//! The book holds what changed since its last snapshot, and what was looked at lately. A command about anything else
//! waits aside for one query, and holds up nobody who does not need it.
//!
//! Left out: rules (ledger-core), the append itself (event-store), HTTP and who may call (command-api).

mod batch;
mod engine;
mod keys;
mod ledger;
mod load;
mod metrics;
mod replays;
mod trace;

pub use ledger::{CommandError, EngineError, Happened, Ledger, Receipt, Settings};
