//! The book's snapshot: the state of wallets and partners at a position, so that a start need not read the whole log.
//!
//! Written off the road of commits by the engine, in one transaction, and only forwards. It is derived: the log
//! alone is the truth, and the auditor never looks here.
//!
//! Left out: when to write one, and what may then leave memory (ledger-engine).

use ledger_core::{Missing, Pages, PartnerId, WalletId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, PgPool, Row};
use uuid::Uuid;

use crate::hash::Hash;
use crate::record::sized;
use crate::writer::in_time;
use crate::{Head, Log, StoreError};

/// How wallets and partners are written. A change of their shape takes the next number, and begins with an empty snapshot.
const FORMAT: i16 = 1;

/// Rows in one statement.
const ROWS: usize = 4_096;

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

    /// Those of the missing wallets and partners that the snapshot has.
    pub async fn read(&self, missing: &Missing) -> Result<Pages, StoreError> {
        let mut pages = Pages::default();
        if !missing.wallets.is_empty() {
            let ids: Vec<Uuid> = missing.wallets.iter().map(|id| id.uuid()).collect();
            let query = "select id, position, wallet from ledger.book_wallets where format = $1 and id = any($2)";
            let rows = in_time(sqlx::query(query).bind(FORMAT).bind(ids).fetch_all(&self.pool)).await?;
            for row in &rows {
                let (id, at) = place(row)?;
                pages.wallets.push((WalletId::from_uuid(id), page(row, "wallet")?, at));
            }
        }
        if !missing.partners.is_empty() {
            let ids: Vec<Uuid> = missing.partners.iter().map(|id| id.uuid()).collect();
            let query = "select id, position, partner from ledger.book_partners where format = $1 and id = any($2)";
            let rows = in_time(sqlx::query(query).bind(FORMAT).bind(ids).fetch_all(&self.pool)).await?;
            for row in &rows {
                let (id, at) = place(row)?;
                pages.partners.push((PartnerId::from_uuid(id), page(row, "partner")?, at));
            }
        }
        Ok(pages)
    }

    /// Brings the snapshot to a head: `changes` are all that changed since the one before. Nothing is written, and false
    /// answered, if another engine's snapshot is as far already: then that one has these changes.
    pub async fn write(&self, head: &Head, changes: &Pages) -> Result<bool, StoreError> {
        let mut tx = self.pool.begin().await?;
        // First of all: of two engines the second waits here, so their rows cannot lock each other out.
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
        .execute(&mut *tx)
        .await?;
        if forwards.rows_affected() == 0 {
            return Ok(false);
        }
        for wallets in changes.wallets.chunks(ROWS) {
            let upsert = "insert into ledger.book_wallets as known (format, id, position, wallet)
                 select $1, * from unnest($2::uuid[], $3::bigint[], $4::text[])
                 on conflict (format, id) do update set position = excluded.position, wallet = excluded.wallet
                 where known.position < excluded.position";
            let rows = wallets.iter().map(|(id, wallet, at)| (id.uuid(), *at, wallet));
            write_rows(&mut tx, upsert, rows).await?;
        }
        for partners in changes.partners.chunks(ROWS) {
            let upsert = "insert into ledger.book_partners as known (format, id, position, partner)
                 select $1, * from unnest($2::uuid[], $3::bigint[], $4::text[])
                 on conflict (format, id) do update set position = excluded.position, partner = excluded.partner
                 where known.position < excluded.position";
            let rows = partners.iter().map(|(id, partner, at)| (id.uuid(), *at, partner));
            write_rows(&mut tx, upsert, rows).await?;
        }
        tx.commit().await?;
        Ok(true)
    }
}

async fn write_rows<'a, T: Serialize + 'a>(
    connection: &mut PgConnection,
    upsert: &str,
    rows: impl Iterator<Item = (Uuid, i64, &'a T)>,
) -> Result<(), sqlx::Error> {
    let (mut ids, mut positions, mut texts) = (Vec::new(), Vec::new(), Vec::new());
    for (id, position, page) in rows {
        ids.push(id);
        positions.push(position);
        texts.push(serde_json::to_string(page).expect("wallets and partners have no fallible serializers"));
    }
    sqlx::query(upsert).bind(FORMAT).bind(ids).bind(positions).bind(texts).execute(connection).await?;
    Ok(())
}

fn place(row: &PgRow) -> Result<(Uuid, i64), StoreError> {
    Ok((row.try_get("id")?, row.try_get("position")?))
}

fn page<T: DeserializeOwned>(row: &PgRow, column: &str) -> Result<T, StoreError> {
    let text: &str = row.try_get(column)?;
    serde_json::from_str(text).map_err(|error| StoreError::Corrupt(format!("the book\'s snapshot: {error}")))
}
