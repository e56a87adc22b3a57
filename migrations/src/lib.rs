//! The schemas of Daybook's database, and the one way to bring a database up to date.
//!
//! One numbered file for each room that keeps something: `ledger` is the truth, `views` can be rebuilt from
//! it, `access`, `webhooks` and `workflows` hold facts of their own. Each file says who may touch its tables.
//! Left out: any data but the genesis of the ledger.

use anyhow::Context;
use sha2::{Digest, Sha256};
use sqlx::migrate::Migrator;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

/// What this build brings a database to: `daybook doctor` compares it with what has been applied.
pub static MIGRATOR: Migrator = sqlx::migrate!("../migrations");

/// Brings the database at `url` up to date and opens its ledger, as the owner of its tables. Repeating it changes nothing.
pub async fn run(url: &str) -> anyhow::Result<()> {
    let mut connection = PgConnection::connect(url).await.context("connecting to migrate")?;
    MIGRATOR.run(&mut connection).await.context("migrating")?;
    open_ledger(&mut connection).await?;
    connection.close().await?;
    Ok(())
}

/// Commit 0 binds the ledger's id: `chain` = SHA-256("daybook" ‖ id). A ledger is opened once.
async fn open_ledger(connection: &mut PgConnection) -> anyhow::Result<()> {
    let id = Uuid::now_v7();
    let chain = Sha256::new().chain_update("daybook").chain_update(id.as_bytes()).finalize();
    sqlx::query(
        "with opened as (insert into ledger.identity (id) values ($1) on conflict do nothing returning id)
         insert into ledger.commits (number, first_position, last_position, root, chain, recorded_at)
         select 0, 0, 0, $2, $2, now() from opened",
    )
    .bind(id)
    .bind(chain.as_slice())
    .execute(connection)
    .await
    .context("opening the ledger")?;
    Ok(())
}
