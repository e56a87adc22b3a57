//! Connections to the schema `access`, which may fall silent: each wait for one has a bound.
//!
//! A question that is dropped half-way goes back to its pool with its connection, and sqlx asks that one for a sign of life
//! without a bound. If its peer vanished without a word, the place would be lost, and with the last place the service.

use std::time::Duration;

use sqlx::postgres::PgPoolOptions;
use sqlx::{Connection, Error};
use tokio::time::timeout;

/// A statement about tokens that takes longer has failed.
pub(crate) const STATEMENT_TIME: Duration = Duration::from_secs(2);

/// For all that one call asks of the database. Postgres ends a slow statement by itself; this ends waiting for silence.
const CALL_TIME: Duration = Duration::from_secs(5);

/// A pool whose connections are closed if they do not show in time, after each use, that they are in order. Before one is
/// used sqlx asks it too, within the time to acquire it.
pub(crate) fn pool_options(connections: u32) -> PgPoolOptions {
    PgPoolOptions::new().max_connections(connections).acquire_timeout(STATEMENT_TIME).after_release(|connection, _| {
        Box::pin(async move {
            let asked = timeout(STATEMENT_TIME, connection.ping()).await;
            Ok(asked.is_ok_and(|asked| asked.is_ok()))
        })
    })
}

/// Bounds what a caller waits for.
pub(crate) async fn within_bounds<T, E: From<Error>>(work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    timeout(CALL_TIME, work).await.unwrap_or_else(|_| {
        let silent = std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer in time");
        Err(Error::Io(silent).into())
    })
}
