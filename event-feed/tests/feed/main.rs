//! The feed on a real Postgres and a real nats-server, through everything that can happen to either.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

mod beside;
mod black_holes;
mod following;
mod ledger;
mod outages;
mod proxy;
mod recorder;
mod relays;
mod tampering;
