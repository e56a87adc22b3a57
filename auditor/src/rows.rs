//! Reading the log's tables as they are, all of them in one snapshot.
//!
//! Two cursors, so that no row is skipped whatever its position says. A task of its own reads ahead, so that the database
//! works while what came is checked; so many rows are ahead, and memory stays bounded. The snapshot is held for as long as
//! the reading takes: on a busy system that is how long vacuum must wait.

use std::collections::VecDeque;

use anyhow::Context;
use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{ConnectOptions, Connection, PgConnection, Row};
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle};
use uuid::Uuid;

use crate::record::{CommitRow, StoredCommit, StoredEvent};

/// Rows fetched at a time. One event may be as large as a request; most are 1 KB.
const PAGE: usize = 1_000;

/// Pages that may wait to be checked.
const PAGES_AHEAD: usize = 2;

/// Microseconds from 1970 to 2000, where Postgres begins to count.
const YEAR_2000: i64 = 946_684_800_000_000;

pub(crate) struct Rows {
    connection: PgConnection,
    commits: VecDeque<StoredCommit>,
    events: VecDeque<StoredEvent>,
    pub(crate) ledger: Option<Uuid>,
    /// Where the log ends, by its last commit.
    pub(crate) head: i64,
}

/// What the log says next.
pub(crate) enum Next {
    Event(StoredEvent),
    Commit(StoredCommit),
}

/// Rows on their way.
pub(crate) struct Reading {
    pages: mpsc::Receiver<Vec<Next>>,
    task: JoinHandle<anyhow::Result<Rows>>,
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
        for cursor in [
            "declare commits no scroll cursor for
             select number, first_position, last_position, root, chain, previous_number, previous_last, previous_chain,
                 recorded_at
             from ledger.commits order by number",
            "declare events no scroll cursor for
             select position, commit_number, command_id, aggregate_type, aggregate_id, sequence, event_type, event_version,
                 payload::text, metadata::text, leaf_hash, key_hash, request_hash, recorded_at
             from ledger.events order by position",
        ] {
            sqlx::query(cursor).execute(&mut connection).await.context("reading the log")?;
        }
        Ok(Self { connection, commits: VecDeque::new(), events: VecDeque::new(), ledger, head: head.unwrap_or(0) })
    }

    /// Reads all of the log: commit 0, each other one behind the events up to its last position, and what lies behind the last.
    pub(crate) fn read(self) -> Reading {
        let (ready, pages) = mpsc::channel(PAGES_AHEAD);
        Reading { pages, task: tokio::spawn(self.read_to(ready)) }
    }

    async fn read_to(mut self, ready: mpsc::Sender<Vec<Next>>) -> anyhow::Result<Self> {
        let mut page = Vec::new();
        let mut next = self.next_commit().await?;
        if let Some(genesis) = next.take_if(|first| first.number <= 0) {
            page.push(Next::Commit(genesis)); // it has no events, whatever it says
            next = self.next_commit().await?;
        }
        loop {
            let commit = next.take();
            let up_to = commit.as_ref().map_or(i64::MAX, |commit| commit.last);
            while let Some(event) = self.next_event(up_to).await? {
                page.push(Next::Event(event));
                if PAGE <= page.len() && ready.send(std::mem::take(&mut page)).await.is_err() {
                    return Ok(self); // nobody wants to know any more
                }
            }
            let Some(commit) = commit else { break };
            page.push(Next::Commit(commit));
            if PAGE <= page.len() && ready.send(std::mem::take(&mut page)).await.is_err() {
                return Ok(self);
            }
            next = self.next_commit().await?;
        }
        ready.send(page).await.ok();
        Ok(self)
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
            let read = |row| event(row).with_context(|| format!("position {:?}", row.try_get::<i64, _>(0).ok()));
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

impl Reading {
    /// Some more of the log; none at its end.
    pub(crate) async fn next(&mut self) -> Option<Vec<Next>> {
        self.pages.recv().await
    }

    /// The snapshot again, once nothing more comes; or why it was no longer possible to read.
    pub(crate) async fn end(self) -> anyhow::Result<Rows> {
        drop(self.pages);
        match self.task.await.map_err(JoinError::try_into_panic) {
            Ok(ended) => ended,
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            Err(Err(cancelled)) => Err(cancelled.into()),
        }
    }
}

fn commit(row: &PgRow) -> Result<StoredCommit, sqlx::Error> {
    Ok(StoredCommit {
        number: row.try_get(0)?,
        first: row.try_get(1)?,
        last: row.try_get(2)?,
        root: row.try_get(3)?,
        chain: row.try_get(4)?,
        row: Some(CommitRow {
            previous_number: row.try_get(5)?,
            previous_last: row.try_get(6)?,
            previous_chain: row.try_get(7)?,
            recorded_at: micros(row, 8)?,
        }),
    })
}

fn event(row: &PgRow) -> Result<StoredEvent, sqlx::Error> {
    Ok(StoredEvent {
        position: row.try_get(0)?,
        commit: row.try_get(1)?,
        command_id: row.try_get(2)?,
        aggregate_type: row.try_get(3)?,
        aggregate_id: row.try_get(4)?,
        sequence: row.try_get(5)?,
        event_type: row.try_get(6)?,
        event_version: row.try_get(7)?,
        payload: row.try_get(8)?,
        metadata: row.try_get(9)?,
        leaf_hash: row.try_get(10)?,
        key_hash: row.try_get(11)?,
        request_hash: row.try_get(12)?,
        recorded_at: micros(row, 13)?,
    })
}

/// Microseconds since 1970, as Postgres keeps them but for the year that it counts from. An infinite time is no number of
/// microseconds: it becomes one that no check accepts.
fn micros(row: &PgRow, column: usize) -> Result<i64, sqlx::Error> {
    let since_2000: i64 = row.try_get_unchecked(column)?;
    let infinite = since_2000 == i64::MAX || since_2000 == i64::MIN;
    Ok(if infinite { i64::MIN } else { since_2000.saturating_add(YEAR_2000) })
}
