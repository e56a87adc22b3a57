//! Reading the log's tables as they are, all of them in one snapshot.
//!
//! Two cursors, so that no row is skipped whatever its position says, and memory stays bounded. The snapshot is
//! held for as long as the reading takes: on a busy system that is how long vacuum must wait.

use std::collections::VecDeque;

use anyhow::Context;
use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{ConnectOptions, Connection, PgConnection, Row};
use uuid::Uuid;

use crate::record::{CommitRow, StoredCommit, StoredEvent};

/// Rows fetched at a time. One event may be as large as a request; most are 1 KB.
const PAGE: i64 = 1_000;

pub(crate) struct Rows {
    connection: PgConnection,
    commits: VecDeque<StoredCommit>,
    events: VecDeque<StoredEvent>,
    pub(crate) ledger: Option<Uuid>,
    /// Where the log ends, by its last commit.
    pub(crate) head: i64,
}

impl Rows {
    /// With the rights of the address itself: an audit reads the views as well.
    pub(crate) async fn open(database_url: &str) -> anyhow::Result<Self> {
        let options: PgConnectOptions = database_url.parse().context("the database's address")?;
        let options = options.application_name("daybook-auditor").options([("jit", "off"), ("timezone", "UTC")]);
        let mut connection = options.connect().await.context("connecting to the database")?;
        sqlx::query("begin transaction isolation level repeatable read, read only").execute(&mut connection).await?;
        let ledger = sqlx::query_scalar("select id from ledger.identity limit 1").fetch_optional(&mut connection).await;
        let ledger = ledger.context("reading the ledger's id: is this a Daybook database?")?;
        let head: Option<i64> =
            sqlx::query_scalar("select max(last_position) from ledger.commits").fetch_one(&mut connection).await?;
        // An infinite time is no number of microseconds: it becomes one that no check accepts.
        for cursor in [
            "declare commits no scroll cursor for
             select number, first_position, last_position, root, chain, previous_number, previous_last, previous_chain,
                 case when isfinite(recorded_at) then (extract(epoch from recorded_at) * 1000000)::bigint
                     else -9223372036854775808 end as recorded_at
             from ledger.commits order by number",
            "declare events no scroll cursor for
             select position, commit_number, command_id, aggregate_type, aggregate_id, sequence, event_type, event_version,
                 payload::text as payload, metadata::text as metadata, leaf_hash, key_hash, request_hash,
                 case when isfinite(recorded_at) then (extract(epoch from recorded_at) * 1000000)::bigint
                     else -9223372036854775808 end as recorded_at
             from ledger.events order by position",
        ] {
            sqlx::query(cursor).execute(&mut connection).await.context("reading the log")?;
        }
        Ok(Self { connection, commits: VecDeque::new(), events: VecDeque::new(), ledger, head: head.unwrap_or(0) })
    }

    /// Commits in the order of their numbers.
    pub(crate) async fn next_commit(&mut self) -> anyhow::Result<Option<StoredCommit>> {
        if self.commits.is_empty() {
            let rows =
                sqlx::query(&format!("fetch forward {PAGE} from commits")).fetch_all(&mut self.connection).await?;
            self.commits = rows.iter().map(commit).collect::<Result<_, _>>().context("reading a commit")?;
        }
        Ok(self.commits.pop_front())
    }

    /// Events in the order of their positions, as far as `up_to`.
    pub(crate) async fn next_event(&mut self, up_to: i64) -> anyhow::Result<Option<StoredEvent>> {
        if self.events.is_empty() {
            let rows =
                sqlx::query(&format!("fetch forward {PAGE} from events")).fetch_all(&mut self.connection).await?;
            let read =
                |row| event(row).with_context(|| format!("position {:?}", row.try_get::<i64, _>("position").ok()));
            self.events = rows.iter().map(read).collect::<Result<_, _>>().context("reading an event")?;
        }
        Ok(self.events.pop_front_if(|event| event.position <= up_to))
    }

    /// The same snapshot, for what else is to be read in it.
    pub(crate) fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    pub(crate) async fn close(self) {
        // The transaction only read: losing it loses nothing.
        self.connection.close().await.ok();
    }
}

fn commit(row: &PgRow) -> Result<StoredCommit, sqlx::Error> {
    Ok(StoredCommit {
        number: row.try_get("number")?,
        first: row.try_get("first_position")?,
        last: row.try_get("last_position")?,
        root: row.try_get("root")?,
        chain: row.try_get("chain")?,
        row: Some(CommitRow {
            previous_number: row.try_get("previous_number")?,
            previous_last: row.try_get("previous_last")?,
            previous_chain: row.try_get("previous_chain")?,
            recorded_at: row.try_get("recorded_at")?,
        }),
    })
}

fn event(row: &PgRow) -> Result<StoredEvent, sqlx::Error> {
    Ok(StoredEvent {
        position: row.try_get("position")?,
        commit: row.try_get("commit_number")?,
        command_id: row.try_get("command_id")?,
        aggregate_type: row.try_get("aggregate_type")?,
        aggregate_id: row.try_get("aggregate_id")?,
        sequence: row.try_get("sequence")?,
        event_type: row.try_get("event_type")?,
        event_version: row.try_get("event_version")?,
        payload: row.try_get("payload")?,
        metadata: row.try_get("metadata")?,
        recorded_at: row.try_get("recorded_at")?,
        key_hash: row.try_get("key_hash")?,
        request_hash: row.try_get("request_hash")?,
        leaf_hash: row.try_get("leaf_hash")?,
    })
}
