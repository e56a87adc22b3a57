//! The whole system as its users find it: the `daybook` program as a process, over HTTP and the command line.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

mod batch;
mod bench;
mod crash;
mod demo;
mod doctor;
mod lifecycle;
mod metrics;
mod process;
mod readme;
mod road;
mod scopes;
mod servers;
mod tail;
mod traces;
