//! Following along: one connection that reads commits in order, again and again, for relay and followers.
//!
//! Beside [`Log`], which reads over a pool what is asked for now and then. Whoever asks fifty times a second would
//! pay the pool's two pings around each question; and a peer that vanishes without a word would keep a pool's connection
//! for as long as TCP hopes. Here every answer has a bound, and a connection that was late, that failed, or whose
//! question was dropped half-way is closed and never used again.

use std::sync::Arc;
use std::time::Duration;

use ledger_core::LedgerId;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, PgConnection};
use tokio::time::timeout;

use crate::hash::Hash;
use crate::log::{BYTES_MAX, commits_after, head, ledger_id};
use crate::record::sized;
use crate::{Commit, Head, Log, Recent, StoreError};

/// How long Postgres may take to answer, a new connection included.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long the server lets one statement work, in milliseconds. Less than [`PATIENCE`]: what we have given up is over there too.
const STATEMENT_MILLIS: u32 = 4_000;

/// When the server takes us for gone and ends our session, in seconds: after so much silence it asks this often, this many times.
pub(crate) const SILENCE: [(&str, u32); 3] =
    [("tcp_keepalives_idle", 30), ("tcp_keepalives_interval", 10), ("tcp_keepalives_count", 3)];

/// A reader of the log over a connection of its own, made when it is first needed and whenever the last one was lost.
#[derive(Debug)]
pub struct Reader {
    options: PgConnectOptions,
    connection: Option<PgConnection>,
    recent: Option<Recent>,
}

impl Reader {
    /// As the same role, in the same database, with the same memory.
    pub fn beside(log: &Log) -> Self {
        let options = log.pool().connect_options().as_ref().clone();
        let options = options.options([("statement_timeout", STATEMENT_MILLIS)]).options(SILENCE);
        Self { options, connection: None, recent: log.recent().cloned() }
    }

    pub async fn ledger_id(&mut self) -> Result<LedgerId, StoreError> {
        self.ask(async |connection| ledger_id(connection).await).await
    }

    pub async fn head(&mut self) -> Result<Head, StoreError> {
        self.ask(async |connection| head(connection).await).await
    }

    /// As [`Log::commits_after`], from memory if the next commit is there.
    pub async fn commits_after(&mut self, commit: i64, events_max: i64) -> Result<Vec<Arc<Commit>>, StoreError> {
        let recent = self.recent.as_ref().map(|recent| recent.after(commit, events_max, BYTES_MAX));
        if let Some(commits) = recent.filter(|commits| !commits.is_empty()) {
            return Ok(commits);
        }
        let read = self.ask(async |connection| commits_after(connection, commit, events_max).await).await?;
        Ok(read.into_iter().map(Arc::new).collect())
    }

    /// Forgets what is in memory if the log does not hold it: a backup may have been restored. To be asked before anything is taken
    /// up that the log says.
    pub async fn check_recent(&mut self) -> Result<(), StoreError> {
        // Looked at before the log is asked: what was in the log then, is.
        let Some((recent, last)) = self.recent.clone().and_then(|recent| recent.last().map(|last| (recent, last)))
        else {
            return Ok(());
        };
        if self.chain_of(last.number).await? != Some(last.chain) {
            recent.clear();
        }
        Ok(())
    }

    /// The chain of a commit, if it is in the log. Memory is not asked.
    pub async fn chain_of(&mut self, commit: i64) -> Result<Option<Hash>, StoreError> {
        let chain = async |connection: &mut PgConnection| {
            let query = sqlx::query_scalar("select chain from ledger.commits where number = $1").bind(commit);
            let found: Option<Vec<u8>> = query.fetch_optional(connection).await?;
            found.map(|chain| sized("chain", chain)).transpose()
        };
        self.ask(chain).await
    }

    async fn ask<T>(
        &mut self,
        question: impl AsyncFnOnce(&mut PgConnection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let kept = self.connection.take(); // it comes back with an answer, or not at all
        let asked = async {
            let mut connection = match kept {
                Some(connection) => connection,
                None => self.options.connect().await?,
            };
            let answer = question(&mut connection).await?;
            Ok::<_, StoreError>((answer, connection))
        };
        let (answer, connection) = timeout(PATIENCE, asked).await.map_err(|_| StoreError::Late(PATIENCE))??;
        self.connection = Some(connection);
        Ok(answer)
    }
}
