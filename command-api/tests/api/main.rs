//! Claims about the way in, made over real HTTP on a real Postgres. No view and no bus is near.

#![expect(clippy::unwrap_used, reason = "clippy.toml excepts tests, but not their helpers")]

mod batches;
mod documents;
mod door;
mod forms;
mod held;
mod keys;
mod money;
mod partners;
mod privileged;
mod process;
mod replays;
mod tokens;
mod top_ups;
mod two;
mod wallets;
