//! Reading the log: whole commits in order, single streams, the head.
//!
//! The log never changes behind its head, so two statements about its past need no common snapshot.

use futures::TryStreamExt;
use ledger_core::{Key, LedgerId};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, PgPool, Row};
use time::OffsetDateTime;

use crate::record::{COLUMNS, from_row, sized};
use crate::writer::in_time;
use crate::{Commit, Head, Recent, RecordedEvent, StoreError};

/// The log, for any role that may read the schema `ledger`.
#[derive(Clone, Debug)]
pub struct Log {
    pool: PgPool,
    recent: Option<Recent>,
}

/// Which events of the log are wanted; nothing set means all.
#[derive(Clone, Debug, Default)]
pub struct EventFilter {
    pub aggregate_id: Option<String>,
    pub event_type: Option<String>,
}

/// How far somebody who has the log up to some commit is behind it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Behind {
    pub commits: i64,
    pub events: i64,
    /// How old the first commit is that it does not have, by the database's clock; 0 if it has all.
    pub seconds: f64,
}

/// Payloads and metadata in one page of commits; its last commit may go beyond it.
pub(crate) const BYTES_MAX: usize = 4 * 1024 * 1024;

/// Events in one page of commits, whatever is asked for.
const EVENTS_MAX: i64 = 1 << 32;

impl Log {
    pub fn new(pool: PgPool) -> Self {
        Self { pool, recent: None }
    }

    /// With the memory of an engine of this process, which the [`Reader`](crate::Reader)s beside this log look at first.
    #[must_use]
    pub fn with_recent(self, recent: Option<Recent>) -> Self {
        Self { recent, ..self }
    }

    pub(crate) fn recent(&self) -> Option<&Recent> {
        self.recent.as_ref()
    }

    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    pub async fn ledger_id(&self) -> Result<LedgerId, StoreError> {
        let mut connection = self.pool.acquire().await?;
        ledger_id(&mut connection).await
    }

    pub async fn head(&self) -> Result<Head, StoreError> {
        let mut connection = self.pool.acquire().await?;
        head(&mut connection).await
    }

    /// How far the log goes beyond a commit.
    pub async fn behind(&self, commit: i64) -> Result<Behind, StoreError> {
        let row = sqlx::query(
            "select head.number - $1 as commits, head.last_position - coalesce(own.last_position, 0) as events,
                    coalesce(extract(epoch from clock_timestamp() - next.recorded_at), 0)::float8 as seconds
             from (select number, last_position from ledger.commits order by number desc limit 1) head
             left join ledger.commits own on own.number = $1
             left join ledger.commits next on next.number = $1 + 1",
        )
        .bind(commit)
        .fetch_one(&self.pool)
        .await?;
        let seconds: f64 = row.try_get("seconds")?;
        Ok(Behind { commits: row.try_get("commits")?, events: row.try_get("events")?, seconds: seconds.max(0.0) })
    }

    /// Whole commits after the given one, without a gap: at most `events_max` events and some 4 MiB of them, but one
    /// commit at least if there is one. Empty only where the log ends.
    pub async fn commits_after(&self, commit: i64, events_max: i64) -> Result<Vec<Commit>, StoreError> {
        let mut connection = self.pool.acquire().await?;
        commits_after(&mut connection, commit, events_max).await
    }

    /// The commit that holds a position.
    pub async fn commit_of(&self, position: i64) -> Result<Option<i64>, StoreError> {
        let found = sqlx::query_scalar("select commit_number from ledger.events where position = $1")
            .bind(position)
            .fetch_optional(&self.pool)
            .await?;
        Ok(found)
    }

    /// Events after a position, in order, and the head's position as the same statement saw it.
    pub async fn events_after(
        &self,
        position: i64,
        limit: i64,
        filter: &EventFilter,
    ) -> Result<(i64, Vec<RecordedEvent>), StoreError> {
        let rows = sqlx::query(&format!(
            "select {COLUMNS}, head.head
             from (select last_position as head from ledger.commits order by number desc limit 1) head
             left join lateral (
                 select * from ledger.events
                 where $1 < position and ($3::text is null or aggregate_id = $3) and ($4::text is null or event_type = $4)
                 order by position limit $2
             ) events on true
             order by position"
        ))
        .bind(position)
        .bind(limit)
        .bind(filter.aggregate_id.as_deref())
        .bind(filter.event_type.as_deref())
        .fetch_all(&self.pool)
        .await?;
        let head = rows.first().map_or(Ok(0), |row| row.try_get("head"))?;
        let found = |row: &&PgRow| row.try_get::<Option<i64>, _>("position").ok().flatten().is_some();
        Ok((head, rows.iter().filter(found).map(from_row).collect::<Result<_, _>>()?))
    }

    /// Events of one kind of aggregate after a position, in order, read along their streams: for kinds of which there are few.
    pub async fn kind_after(
        &self,
        aggregate_type: &str,
        position: i64,
        limit: i64,
    ) -> Result<Vec<RecordedEvent>, StoreError> {
        // `offset 0` keeps the planner from reading the whole log along its positions instead.
        let rows = sqlx::query(&format!(
            "select {COLUMNS} from (select * from ledger.events where aggregate_type = {} offset 0) events
             where $1 < position order by position limit $2",
            written_out(aggregate_type)
        ))
        .bind(position)
        .bind(limit)
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(from_row).collect()
    }

    /// One stream in order, up to and including a position (`i64::MAX`: all of it).
    pub async fn stream(
        &self,
        aggregate_type: &str,
        aggregate_id: &str,
        up_to: i64,
    ) -> Result<Vec<RecordedEvent>, StoreError> {
        let mut connection = self.pool.acquire().await?;
        stream(&mut connection, aggregate_type, aggregate_id, up_to).await
    }

    /// The whole streams of some aggregates of one type, each in its order: one query, however many.
    pub async fn streams(
        &self,
        aggregate_type: &str,
        aggregate_ids: &[String],
    ) -> Result<Vec<RecordedEvent>, StoreError> {
        let select = format!(
            "select {COLUMNS} from ledger.events where aggregate_type = {} and aggregate_id = any($1)
             order by aggregate_id, sequence",
            written_out(aggregate_type)
        );
        let rows = sqlx::query(&select).bind(aggregate_ids).fetch_all(&self.pool);
        in_time(rows).await?.iter().map(from_row).collect()
    }

    /// Which of these keys the log knows, and what each was used for.
    pub async fn known_keys(&self, keys: &[[u8; 16]]) -> Result<Vec<Key>, StoreError> {
        let keys: Vec<&[u8]> = keys.iter().map(|key| key.as_slice()).collect();
        let query = sqlx::query("select key_hash, request_hash from ledger.events where key_hash = any($1)").bind(keys);
        let rows = in_time(query.fetch_all(&self.pool)).await?;
        let key = |row: &PgRow| {
            Ok(Key {
                hash: sized("key_hash", row.try_get("key_hash")?)?,
                request: sized("request_hash", row.try_get("request_hash")?)?,
            })
        };
        rows.iter().map(key).collect()
    }

    /// The whole commands that the given keys were used for: each key's command's events are contiguous from the keyed one.
    pub async fn commands_of_keys(&self, keys: &[[u8; 16]]) -> Result<Vec<RecordedEvent>, StoreError> {
        let mut connection = self.pool.acquire().await?;
        commands_of_keys(&mut connection, keys).await
    }
}

pub(crate) async fn ledger_id(connection: &mut PgConnection) -> Result<LedgerId, StoreError> {
    let id = sqlx::query_scalar("select id from ledger.identity").fetch_one(connection).await?;
    Ok(LedgerId::from_uuid(id))
}

pub(crate) async fn head(connection: &mut PgConnection) -> Result<Head, StoreError> {
    let head = "select number, last_position, chain, recorded_at from ledger.commits order by number desc limit 1";
    head_from_row(&sqlx::query(head).fetch_one(connection).await?)
}

pub(crate) fn head_from_row(row: &PgRow) -> Result<Head, StoreError> {
    let recorded_at: OffsetDateTime = row.try_get("recorded_at")?;
    Ok(Head {
        position: row.try_get("last_position")?,
        commit: row.try_get("number")?,
        chain: sized("chain", row.try_get("chain")?)?,
        recorded_at: recorded_at.try_into().map_err(|_| StoreError::Corrupt("recorded_at".to_owned()))?,
    })
}

pub(crate) async fn commits_after(
    connection: &mut PgConnection,
    commit: i64,
    events_max: i64,
) -> Result<Vec<Commit>, StoreError> {
    // As many commits as lie before the one with the first event too many, but one at least: where that event is says so at
    // once, however many events a commit has.
    let rows = sqlx::query(&format!(
        "select {COMMIT_COLUMNS} from ledger.commits
         where $1 < number and number < greatest($1 + 2, coalesce((
             select commit_number from ledger.events
             where position = (select last_position + 1 + $2 from ledger.commits where number = $1)
         ), $1 + 1 + $2))
         order by number limit $2",
    ))
    .bind(commit)
    .bind(events_max.clamp(1, EVENTS_MAX))
    .fetch_all(&mut *connection)
    .await?;
    let mut commits = rows.iter().map(commit_from_row).collect::<Result<Vec<_>, _>>()?;
    let (Some(first), Some(last)) = (commits.first(), commits.last()) else { return Ok(commits) };
    let select = format!("select {COLUMNS} from ledger.events where position between $1 and $2 order by position");
    let mut rows = sqlx::query(&select).bind(first.first).bind(last.last).fetch(&mut *connection);
    let (mut whole, mut bytes) = (0, 0);
    for commit in &mut commits {
        for position in commit.first..=commit.last {
            let event = rows.try_next().await?.as_ref().map(from_row).transpose()?;
            let event = event.filter(|event| event.position == position);
            let event = event.ok_or_else(|| StoreError::Corrupt(format!("position {position} is missing")))?;
            bytes += event.payload.len() + event.metadata.len();
            commit.events.push(event);
        }
        whole += 1;
        if BYTES_MAX <= bytes {
            break;
        }
    }
    drop(rows);
    commits.truncate(whole);
    Ok(commits)
}

/// The columns of a commit, in the order in which [`commit_from_row`] takes them.
const COMMIT_COLUMNS: &str = "number, first_position, last_position, previous_chain, root, chain";

fn commit_from_row(row: &PgRow) -> Result<Commit, StoreError> {
    Ok(Commit {
        number: row.try_get(0)?,
        first: row.try_get(1)?,
        last: row.try_get(2)?,
        previous_chain: sized("previous_chain", row.try_get(3)?)?,
        root: sized("root", row.try_get(4)?)?,
        chain: sized("chain", row.try_get(5)?)?,
        events: Vec::new(),
    })
}

/// A type in SQL itself and not beside it: streams of transactions have an index of their own, and the planner takes it where
/// it sees the type. There are few types, so few statements.
fn written_out(aggregate_type: &str) -> String {
    format!("'{}'", aggregate_type.replace('\'', "''"))
}

pub(crate) async fn stream(
    connection: &mut PgConnection,
    aggregate_type: &str,
    aggregate_id: &str,
    up_to: i64,
) -> Result<Vec<RecordedEvent>, StoreError> {
    let rows = sqlx::query(&format!(
        "select {COLUMNS} from ledger.events
         where aggregate_type = {} and aggregate_id = $1 and position <= $2 order by sequence",
        written_out(aggregate_type)
    ))
    .bind(aggregate_id)
    .bind(up_to)
    .fetch_all(connection)
    .await?;
    rows.iter().map(from_row).collect()
}

pub(crate) async fn commands_of_keys(
    connection: &mut PgConnection,
    keys: &[[u8; 16]],
) -> Result<Vec<RecordedEvent>, StoreError> {
    // A command's events lie together behind its keyed one, within its commit, and no command spans more than
    // its commit: so they are found by position, without an index on command_id. Where the next command begins is looked
    // for first, one event after the other: a commit may hold a thousand commands, and a replay wants one of them.
    let keys: Vec<&[u8]> = keys.iter().map(|key| key.as_slice()).collect();
    let rows = sqlx::query(&format!(
        "select {COLUMNS} from (
             select e.* from ledger.events k
             join ledger.commits c on c.number = k.commit_number
             left join lateral (
                 select position from ledger.events
                 where position between k.position + 1 and c.last_position and command_id <> k.command_id
                 order by position limit 1
             ) next on true
             cross join lateral (
                 select * from ledger.events
                 where position between k.position and coalesce(next.position - 1, c.last_position) offset 0
             ) e
             where k.key_hash = any($1)
         ) events order by position"
    ))
    .bind(keys)
    .fetch_all(connection)
    .await?;
    rows.iter().map(from_row).collect()
}
