//! A consumer as ours are: what it applied and how far it is are written in one transaction, in a table of its own.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use event_feed::{FeedSettings, Follow, Log};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::ledger::{Ledger, PATIENCE};

pub(crate) struct Recorder {
    name: String,
    pool: PgPool,
    log: Log,
    settings: FeedSettings,
    /// When each commit was applied.
    pub(crate) applied: Arc<Mutex<Vec<(i64, Instant)>>>,
    task: JoinHandle<()>,
}

impl Recorder {
    pub(crate) async fn start(ledger: &Ledger, name: &str) -> Self {
        let pool = PgPoolOptions::new().max_connections(2).connect(&ledger.url).await.unwrap();
        // No key on the positions: what is applied twice shall be seen twice.
        sqlx::raw_sql(
            "create table if not exists applied (follower text not null, position bigint not null);
             create table if not exists checkpoints (follower text primary key, commit_number bigint not null);",
        )
        .execute(&pool)
        .await
        .unwrap();
        sqlx::query("insert into checkpoints values ($1, 0)").bind(name).execute(&pool).await.unwrap();
        let applied = Arc::new(Mutex::new(Vec::new()));
        let (log, settings) = (ledger.log().await, ledger.settings.clone());
        let task = tokio::spawn(record(name.to_owned(), pool.clone(), log.clone(), settings.clone(), applied.clone()));
        Self { name: name.to_owned(), pool, log, settings, applied, task }
    }

    /// Ends it wherever it is, and starts it at its checkpoint.
    pub(crate) async fn crash(&mut self) {
        self.task.abort();
        (&mut self.task).await.unwrap_err();
        let (pool, log) = (self.pool.clone(), self.log.clone());
        self.task = tokio::spawn(record(self.name.clone(), pool, log, self.settings.clone(), self.applied.clone()));
    }

    pub(crate) fn reached(&self) -> i64 {
        self.applied.lock().unwrap().last().map_or(0, |(number, _)| *number)
    }

    /// Waits until it is at the ledger's head, and checks that it has applied every position once.
    pub(crate) async fn has_applied_all_once(&self, ledger: &Ledger) {
        let deadline = Instant::now() + PATIENCE;
        while self.reached() < ledger.head.commit {
            assert!(!self.task.is_finished(), "the recorder ended: see above");
            assert!(Instant::now() < deadline, "at {} of {}", self.reached(), ledger.head.commit);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let found: (i64, i64, Option<i64>, Option<i64>) = sqlx::query_as(
            "select count(*), count(distinct position), min(position), max(position) from applied where follower = $1",
        )
        .bind(&self.name)
        .fetch_one(&self.pool)
        .await
        .unwrap();
        let head = ledger.head.position;
        assert_eq!(found, (head, head, Some(1), Some(head)), "each position from 1 to the head, once");
    }
}

async fn record(
    name: String,
    pool: PgPool,
    log: Log,
    settings: FeedSettings,
    applied: Arc<Mutex<Vec<(i64, Instant)>>>,
) {
    let after: i64 = sqlx::query_scalar("select commit_number from checkpoints where follower = $1")
        .bind(&name)
        .fetch_one(&pool)
        .await
        .unwrap();
    let mut follow = Follow::start(log, settings, after).await;
    loop {
        let page = match follow.next().await {
            Ok(page) => page,
            Err(error) => {
                assert!(!error.is_final(), "{error}");
                continue;
            }
        };
        let (first, last) = (page[0].number, page[page.len() - 1].number);
        let positions: Vec<_> = page.iter().flat_map(|commit| &commit.events).map(|event| event.position).collect();
        let mut tx = pool.begin().await.unwrap();
        let moved = sqlx::query("update checkpoints set commit_number = $3 where follower = $1 and commit_number = $2");
        let moved = moved.bind(&name).bind(first - 1).bind(last).execute(&mut *tx).await.unwrap();
        assert_eq!(moved.rows_affected(), 1, "the page does not begin where the checkpoint is");
        let insert = sqlx::query("insert into applied select $1, unnest($2::bigint[])");
        insert.bind(&name).bind(positions).execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
        let now = Instant::now();
        applied.lock().unwrap().extend(page.iter().map(|commit| (commit.number, now)));
    }
}
