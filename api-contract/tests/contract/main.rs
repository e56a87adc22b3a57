//! The contract at its boundary: real sockets, the real layers, and for credentials a real Postgres.

#![expect(clippy::unwrap_used, reason = "clippy.toml excepts tests, but not their helpers")]

mod access;
mod credentials;
mod http;
mod requests;
mod silence;
