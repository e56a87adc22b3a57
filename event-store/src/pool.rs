//! Pools that survive connections which fall silent.
//!
//! A connection whose question was dropped half-way, because it took too long or nobody wanted the answer any more, goes
//! back to its pool, which asks it for a sign of life and waits for that without a bound. If its peer vanished without a
//! word, the place in the pool would be lost for as long as TCP hopes: a quarter of an hour, or for ever. So it is asked here
//! first, with a bound.
//!
//! Left open: sqlx then asks once more, without one. A peer that falls silent between the two, within a fraction of a
//! millisecond, still takes the place with it.

use std::time::Duration;

use sqlx::postgres::PgPoolOptions;
use sqlx::{Connection, Error};
use tokio::time::timeout;

/// How long to wait for a free connection, or a new one, before a call counts as failed.
const CONNECTING: Duration = Duration::from_secs(5);

/// How long a connection may take to show that it is in order. It may have to read the rest of an answer first.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);

/// A connection that was in order this long ago is not asked again before it is used.
const FRESH: Duration = Duration::from_secs(1);

/// A pool of so many connections at most, each of which is closed if it does not show in time that it is in order.
pub fn pool_options(connections: u32) -> PgPoolOptions {
    PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(CONNECTING)
        .test_before_acquire(false) // but for those that have lain idle, below
        .before_acquire(|connection, meta| {
            Box::pin(async move {
                if meta.idle_for < FRESH {
                    return Ok(true);
                }
                // Short: whoever acquires is waiting, and a new connection has to fit in too.
                let asked = timeout(SIGN_OF_LIFE / 3, connection.ping()).await;
                asked.map_err(|_| silent()).flatten().map(|()| true)
            })
        })
        .after_release(|connection, _| {
            Box::pin(async move {
                let asked = timeout(SIGN_OF_LIFE, connection.ping()).await;
                asked.map_err(|_| silent()).flatten().map(|()| true)
            })
        })
}

/// Bounds what a loop waits for. With a pool as above, the connection that was too slow is closed or found to be in order.
pub async fn within<T, E: From<Error>>(bound: Duration, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    timeout(bound, work).await.unwrap_or_else(|_| Err(silent().into()))
}

fn silent() -> Error {
    Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer in time"))
}
