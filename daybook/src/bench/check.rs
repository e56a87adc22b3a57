//! The log's word on what was answered: what was accepted is in it once, what was refused is not.
//!
//! Read from Postgres, beside the server. A key is in the log as its hash, so the hashes are made again from the keys
//! that were sent.

use std::collections::HashMap;

use anyhow::ensure;
use futures::TryStreamExt;
use ledger_core::ClientId;
use serde::Serialize;
use sqlx::{Connection, PgConnection};

/// What a client was told about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// Never sent.
    Nothing,
    Accepted,
    /// 503 `overloaded`: not executed.
    Refused,
    /// No answer, or `outcome-unknown`.
    Unknown,
    /// Any other answer.
    Otherwise,
}

/// Each is a number of requests. All but the first two are zero where the promises hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Verdict {
    pub(crate) accepted_and_executed_once: u64,
    pub(crate) refused_and_not_executed: u64,
    pub(crate) accepted_and_not_executed: u64,
    pub(crate) refused_and_executed: u64,
    pub(crate) executed_twice: u64,
    /// Either is right.
    pub(crate) unknown_and_executed: u64,
    pub(crate) unknown_and_not_executed: u64,
    pub(crate) answered_otherwise: u64,
}

impl Verdict {
    pub(crate) fn holds(&self) -> bool {
        self.accepted_and_not_executed == 0 && self.refused_and_executed == 0 && self.executed_twice == 0
    }
}

/// The position of the log's last event.
pub(crate) async fn head(database_url: &str) -> anyhow::Result<i64> {
    let mut connection = PgConnection::connect(database_url).await?;
    let head = sqlx::query_scalar("select last_position from ledger.commits order by number desc limit 1");
    let head = head.fetch_one(&mut connection).await?;
    connection.close().await?;
    Ok(head)
}

/// Fails unless the log has exactly so many events of a type after a position: a rate is of what the log has.
pub(crate) async fn in_log_since(database_url: &str, position: i64, event_type: &str, told: u64) -> anyhow::Result<()> {
    let mut connection = PgConnection::connect(database_url).await?;
    let found: i64 = sqlx::query_scalar("select count(*) from ledger.events where $1 < position and event_type = $2")
        .bind(position)
        .bind(event_type)
        .fetch_one(&mut connection)
        .await?;
    connection.close().await?;
    ensure!(i64::try_from(told) == Ok(found), "{told} commands were answered, and the log has {found} {event_type}");
    Ok(())
}

/// What a transfer leaves in the log.
pub(crate) const POSTED: &str = "TransactionPosted";

/// Compares what was told with the log after a position. `key` gives the key of a request by its number.
pub(crate) async fn compare(
    database_url: &str,
    position: i64,
    client: ClientId,
    told: &[Told],
    key: impl Fn(u64) -> String,
) -> anyhow::Result<Verdict> {
    let mut executed: HashMap<[u8; 16], u64> = HashMap::new();
    let mut connection = PgConnection::connect(database_url).await?;
    {
        let mut keys = sqlx::query_scalar::<_, Vec<u8>>(
            "select key_hash from ledger.events where $1 < position and key_hash is not null",
        )
        .bind(position)
        .fetch(&mut connection);
        while let Some(hash) = keys.try_next().await? {
            let hash = hash.try_into().map_err(|_| anyhow::anyhow!("a key hash that is not 16 bytes long"))?;
            *executed.entry(hash).or_default() += 1;
        }
    }
    connection.close().await?;
    let mut verdict = Verdict::default();
    for (number, told) in (0..).zip(told) {
        if *told == Told::Nothing {
            continue;
        }
        let times = executed.get(&api_contract::key_hash(client, key(number))).copied().unwrap_or(0);
        let count = match (told, times) {
            (_, 2..) => &mut verdict.executed_twice,
            (Told::Accepted, 1) => &mut verdict.accepted_and_executed_once,
            (Told::Accepted, _) => &mut verdict.accepted_and_not_executed,
            (Told::Refused, 0) => &mut verdict.refused_and_not_executed,
            (Told::Refused, _) => &mut verdict.refused_and_executed,
            (Told::Unknown, 0) => &mut verdict.unknown_and_not_executed,
            (Told::Unknown, _) => &mut verdict.unknown_and_executed,
            (Told::Otherwise | Told::Nothing, _) => &mut verdict.answered_otherwise,
        };
        *count += 1;
    }
    Ok(verdict)
}
