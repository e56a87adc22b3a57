//! The book's snapshot: the state of wallets and partners at a position, so that a start need not read the whole log.
//!
//! Written off the road of commits by the engine, in one transaction, and only forwards. It is derived: the log
//! alone is the truth, and the auditor never looks here. But running engines let go what they believe to be in it, so a
//! snapshot that went back, or was emptied, ends them, and a foreign key refuses one of a head that is not in the log.
//!
//! Left out: when to write one, and what may then leave memory (ledger-engine).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ledger_core::{Missing, Pages, PartnerId, WalletId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, PgPool, Row};
use tokio::time::sleep;
use uuid::Uuid;

use crate::hash::Hash;
use crate::record::sized;
use crate::writer::in_time;
use crate::{Head, Log, StoreError, within};

/// How wallets and partners are written. A change of their shape takes the next number, and begins with an empty snapshot.
const FORMAT: i16 = 1;

/// Rows in one statement: what the server is kept from commits for at a time.
const ROWS: usize = 256;

/// Between two statements, at most, where commits are made meanwhile.
const REST_MAX: Duration = Duration::from_millis(50);

/// From here on it hurries: another engine waits for the first row no longer than [`WRITING`].
const RESTING: Duration = Duration::from_secs(10);

/// How long one statement of writing may take: the first may have to wait for another engine's snapshot.
const WRITING: Duration = Duration::from_secs(30);

/// The snapshot in a database, for engines.
#[derive(Clone, Debug)]
pub struct Snapshots {
    pool: PgPool,
}

/// Where a snapshot stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotHead {
    pub position: i64,
    pub commit: i64,
    pub chain: Hash,
}

#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the book's snapshot stands at position {stands}, behind {had}, where it stood before")]
    WentBack { stands: i64, had: i64 },
}

impl From<sqlx::Error> for SnapshotError {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

impl Snapshots {
    /// Over the connections of a [`Log`] that were made beside a writer: they may write here too.
    pub fn beside(log: &Log) -> Self {
        Self { pool: log.pool().clone() }
    }

    pub async fn head(&self) -> Result<Option<SnapshotHead>, StoreError> {
        let query = sqlx::query("select position, commit_number, chain from ledger.book_snapshot where format = $1");
        let Some(row) = in_time(query.bind(FORMAT).fetch_optional(&self.pool)).await? else { return Ok(None) };
        Ok(Some(SnapshotHead {
            position: row.try_get("position")?,
            commit: row.try_get("commit_number")?,
            chain: sized("chain", row.try_get("chain")?)?,
        }))
    }

    /// Those of the missing wallets and partners that the snapshot has. It must stand at `had` or further.
    pub async fn read(&self, missing: &Missing, had: i64) -> Result<Pages, SnapshotError> {
        let mut pages = Pages::default();
        if !missing.wallets.is_empty() {
            let ids: Vec<Uuid> = missing.wallets.iter().map(|id| id.uuid()).collect();
            let query = "select stands, id, page.position, wallet
                 from (select coalesce(max(position), 0) as stands from ledger.book_snapshot where format = $1) snapshot
                 left join ledger.book_wallets page on page.format = $1 and page.id = any($2)";
            let rows = in_time(sqlx::query(query).bind(FORMAT).bind(ids).fetch_all(&self.pool)).await?;
            for row in found(&rows, had)? {
                let (id, at) = place(row)?;
                pages.wallets.push((WalletId::from_uuid(id), page(row, "wallet")?, at));
            }
        }
        if !missing.partners.is_empty() {
            let ids: Vec<Uuid> = missing.partners.iter().map(|id| id.uuid()).collect();
            let query = "select stands, id, page.position, partner
                 from (select coalesce(max(position), 0) as stands from ledger.book_snapshot where format = $1) snapshot
                 left join ledger.book_partners page on page.format = $1 and page.id = any($2)";
            let rows = in_time(sqlx::query(query).bind(FORMAT).bind(ids).fetch_all(&self.pool)).await?;
            for row in found(&rows, had)? {
                let (id, at) = place(row)?;
                pages.partners.push((PartnerId::from_uuid(id), page(row, "partner")?, at));
            }
        }
        Ok(pages)
    }

    /// Brings the snapshot to a head: `changes` are all that changed since position `had`, where it must stand, or further.
    /// Nothing is written, and false answered, if another engine's snapshot is as far already: then that one has these
    /// changes. While it `rests`, it waits after each statement for as long as that took, for others want the server too.
    pub async fn write(
        &self,
        head: &Head,
        had: i64,
        changes: &Pages,
        rests: &AtomicBool,
    ) -> Result<bool, SnapshotError> {
        let resting_until = Instant::now() + RESTING;
        let rests = || rests.load(Ordering::Relaxed) && Instant::now() < resting_until;
        let mut tx = within(WRITING, self.pool.begin()).await?;
        // First of all: of two engines the second waits here or at the next statement, so their rows cannot lock each
        // other out.
        let stands = "select position from ledger.book_snapshot where format = $1 for no key update";
        let stands = sqlx::query_scalar(stands).bind(FORMAT).fetch_optional(&mut *tx);
        let stands: Option<i64> = within(WRITING, stands).await?;
        let stands = stands.unwrap_or(0);
        if stands < had {
            return Err(SnapshotError::WentBack { stands, had });
        }
        let forwards = sqlx::query(
            "insert into ledger.book_snapshot as known (format, position, commit_number, chain) values ($1, $2, $3, $4)
             on conflict (format) do update
             set position = excluded.position, commit_number = excluded.commit_number, chain = excluded.chain
             where known.position < excluded.position",
        )
        .bind(FORMAT)
        .bind(head.position)
        .bind(head.commit)
        .bind(head.chain.as_slice())
        .execute(&mut *tx);
        if within(WRITING, forwards).await?.rows_affected() == 0 {
            return Ok(false);
        }
        for wallets in changes.wallets.chunks(ROWS) {
            let upsert = "insert into ledger.book_wallets as known (format, id, position, wallet)
                 select $1, * from unnest($2::uuid[], $3::bigint[], $4::text[])
                 on conflict (format, id) do update set position = excluded.position, wallet = excluded.wallet
                 where known.position < excluded.position";
            let rows = wallets.iter().map(|(id, wallet, at)| (id.uuid(), *at, wallet));
            write_rows(&mut tx, upsert, rows, &rests).await?;
        }
        for partners in changes.partners.chunks(ROWS) {
            let upsert = "insert into ledger.book_partners as known (format, id, position, partner)
                 select $1, * from unnest($2::uuid[], $3::bigint[], $4::text[])
                 on conflict (format, id) do update set position = excluded.position, partner = excluded.partner
                 where known.position < excluded.position";
            let rows = partners.iter().map(|(id, partner, at)| (id.uuid(), *at, partner));
            write_rows(&mut tx, upsert, rows, &rests).await?;
        }
        within(WRITING, tx.commit()).await?;
        Ok(true)
    }
}

async fn write_rows<'a, T: Serialize + 'a>(
    connection: &mut PgConnection,
    upsert: &str,
    rows: impl Iterator<Item = (Uuid, i64, &'a T)>,
    rests: &(dyn Fn() -> bool + Sync),
) -> Result<(), sqlx::Error> {
    let (mut ids, mut positions, mut texts) = (Vec::new(), Vec::new(), Vec::new());
    for (id, position, page) in rows {
        ids.push(id);
        positions.push(position);
        texts.push(serde_json::to_string(page).expect("wallets and partners have no fallible serializers"));
    }
    let begun = Instant::now();
    let upsert = sqlx::query(upsert).bind(FORMAT).bind(ids).bind(positions).bind(texts).execute(connection);
    within(WRITING, upsert).await?;
    if rests() {
        sleep(begun.elapsed().min(REST_MAX)).await;
    }
    Ok(())
}

/// The rows of a left join that found something.
fn found(rows: &[PgRow], had: i64) -> Result<impl Iterator<Item = &PgRow>, SnapshotError> {
    let stands = rows.first().map_or(Ok(0), |row| row.try_get("stands"))?;
    if stands < had {
        return Err(SnapshotError::WentBack { stands, had });
    }
    Ok(rows.iter().filter(|row| row.try_get::<Option<Uuid>, _>("id").ok().flatten().is_some()))
}

fn place(row: &PgRow) -> Result<(Uuid, i64), StoreError> {
    Ok((row.try_get("id")?, row.try_get("position")?))
}

fn page<T: DeserializeOwned>(row: &PgRow, column: &str) -> Result<T, StoreError> {
    let text: &str = row.try_get(column)?;
    serde_json::from_str(text).map_err(|error| StoreError::Corrupt(format!("the book\'s snapshot: {error}")))
}
