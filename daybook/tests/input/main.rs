//! Whatever a careless or hostile client sends gets a clear answer and moves nothing: the running `daybook` process,
//! over a real socket, against tables of inputs.
//!
//! `table.rs` says what holds after every single input; each of the other files is a table, or a claim that is no row of
//! one. Numbers in names are those of the cases of the contract's table of bad input.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

mod batch;
mod callbacks;
mod http;
mod json;
mod keys;
mod money;
#[path = "../system/process.rs"]
#[allow(dead_code, reason = "shared with the target `system`, which uses the rest of it")]
mod process;
mod queries;
mod sockets;
mod strangers;
mod system;
mod table;
mod tokens;
mod webhooks;
mod wire;
