//! The heart: gathers commands, decides them one after another against the book, appends them in groups, and
//! answers after the commit.
//!
//! Third room on the road. `command-api` calls it over HTTP's head; benchmarks and crash tests call it directly.
//!
//! # Why one task
//! Decisions are made in memory, in order, by one task, so a hot wallet costs nothing extra and no lock is ever
//! taken on a wallet. While one append is in flight, commands gather; all that waited go into the next. No timers.
//!
//! Left out: rules (ledger-core), the append itself (event-store), HTTP and who may call (command-api).

mod batch;
mod engine;
mod keys;
mod ledger;

pub use ledger::{CommandError, EngineError, Ledger, Receipt, Settings};
