//! The second opinion: re-derives everything from the log with its own naive fold.
//!
//! Beside the road, looking at the log alone. [`audit`] reads a database, [`export`] writes its log to a file
//! that anyone can keep, [`verify`] checks such a file without any database. Formats and hashes are written
//! down here a second time, from the text of API.md, "The log", and not taken from the crates that write the
//! log: a shared function would share its mistakes. `docs/verify_export.py` is a third time, in another language.
//!
//! # What it cannot see
//! The chain shows that a log agrees with itself. Whoever may write every row and recomputes every hash from
//! some position on has made another log that agrees with itself, and whoever cuts off whole commits at the end
//! has made a shorter one. Both are seen only by comparing with something they could not reach: a `checkpoint`
//! that was taken before (the last line of any export, `GET /v1/head`) and is kept elsewhere. Money at the bank
//! is not looked at either: the log can say what the bank owes us, not whether it has it.
//!
//! Left out: repairing anything; printing (the `daybook` command does).
#![deny(clippy::arithmetic_side_effects)]

mod audit;
mod check;
mod export;
mod fold;
mod hash;
mod money;
mod once;
mod payload;
mod record;
mod report;
mod rows;
mod verify;
mod views;

pub use audit::audit;
pub use export::{ExportSummary, export};
pub use report::{CurrencyTotal, Finding, Report, ViewChecked, ViewsChecked};
pub use verify::verify;
