//! The truth: the ordered, hash-chained, append-only log in Postgres.
//!
//! Second room on the road. `ledger-engine` appends through [`Writer`]; everyone else reads through [`Log`].
//! Formats and hashes are those of API.md, "The log"; test vectors are in `docs/test-vectors.md`.
//!
//! Left out: rules (ledger-core), batching and keys (ledger-engine), the bus (event-feed).

mod commit;
pub mod hash;
mod log;
mod pool;
mod reader;
mod recent;
mod record;
mod replay;
mod snapshot;
mod traceparent;
mod writer;

use std::str::FromStr;
use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;

pub use commit::{Commit, Draft, Head, OpenCommit};
pub use log::{Behind, EventFilter, Log};
pub use pool::{pool_options, within};
pub use reader::Reader;
pub use recent::Recent;
pub use record::{EventRow, RecordedEvent};
pub use replay::{CommitRow, Page, Replay};
pub use snapshot::{SnapshotError, SnapshotHead, Snapshots};
pub use traceparent::traceparent;
pub use writer::{AppendError, Writer};

/// Reading failed, or the log holds what it cannot.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the database: {0}")]
    Database(#[from] sqlx::Error),
    #[error("the database gave no answer within {} s", .0.as_secs())]
    Late(Duration),
    #[error("the log holds what it cannot: {0}")]
    Corrupt(String),
}

/// A pool of connections that act as `role`: a slip across schemas is a permission error.
pub async fn connect(database_url: &str, role: &str, connections: u32) -> Result<PgPool, StoreError> {
    let options = options(database_url, role)?;
    Ok(pool_options(connections).connect_with(options).await?)
}

fn options(database_url: &str, role: &str) -> Result<PgConnectOptions, sqlx::Error> {
    // Small indexed statements are all there is: compiling them never pays.
    // No statement here takes long; one that does is waiting for something that will not come.
    let options = [("role", role), ("jit", "off"), ("statement_timeout", "30s")];
    Ok(PgConnectOptions::from_str(database_url)?.application_name(role).options(options))
}
