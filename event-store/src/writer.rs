//! Appending: a compare-and-swap on the next commit, in one statement.
//!
//! The commit row is the only place where two writers meet. The second waits for the first one's row and then
//! fails on its number; the foreign key to the previous commit refuses a gap, a fork, and a writer whose head is
//! not in this log. So no session lock, lease or sequence carries correctness here. Fairness is a second matter:
//! a writer that lost takes all of `ledger.turn` first ([`Writer::take_turn`]) and cannot lose again. Since all others wait
//! for that row, the server takes it back from a holder that has gone quiet. Speed is a third: the events of one engine's
//! commits go in one after the other, in a lane that it names, and that lock too carries no correctness.
//!
//! Left out: what to do about a failure. That is `ledger-engine`'s.

use std::time::Duration;

use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::postgres::types::Oid;
use sqlx::postgres::{
    PgArgumentBuffer, PgArguments, PgConnectOptions, PgDatabaseError, PgHasArrayType, PgSeverity, PgTypeInfo,
};
use sqlx::{Arguments, ConnectOptions, Connection, Encode, PgConnection, Postgres, Type};
use tokio::time::timeout;
use uuid::Uuid;

use crate::hash::Hash;
use crate::reader::SILENCE;
use crate::{Commit, Head, Log, RecordedEvent, StoreError, log, options, pool_options};

/// How long an append may take before its outcome counts as unknown.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long the server lets one statement wait or work, in milliseconds. Less than [`PATIENCE`]: what we have given up is
/// over there too, and no backends pile up that wait for writers which are gone.
const STATEMENT_MILLIS: u32 = 5_000;

/// How long the server lets the holder of the turn be quiet, in milliseconds. One that was paused, or cut off from the
/// network, would hold up all others; it has lost nothing but its turn.
const QUIET_MILLIS: u32 = 3_000;

/// One connection that appends. Reads that a decision needs go over it too.
#[derive(Debug)]
pub struct Writer {
    options: PgConnectOptions,
    /// Shared by the writers of one engine: the events of its commits go in one after the other.
    lane: i32,
    connection: Option<PgConnection>,
    has_turn: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Another commit has this number: read the tail and decide again.
    #[error("another commit took the number")]
    Lost,
    /// A command with one of these keys, or one of these very events, is in the log already.
    #[error("a key or an event's place is in use")]
    KeyTaken,
    /// The commit that this one follows is not in the log: the log is not the one that was read.
    #[error("the log went back: the head is not in it")]
    WentBack,
    /// It may be in the log or not, or come in later. Settle it by sending the identical commit again.
    #[error("the outcome is unknown: {0}")]
    Unknown(String),
    /// This attempt has done nothing. If the commit was sent before, that says nothing about the earlier attempt.
    #[error("not done: {0}")]
    NotDone(#[source] StoreError),
    /// The log refuses what is in it, and would refuse it every time: it is not in the log and never will be.
    #[error("refused by the database: {0}")]
    Rejected(#[source] sqlx::Error),
}

impl Writer {
    pub fn new(database_url: &str) -> Result<Self, StoreError> {
        let [.., a, b, c, d] = Uuid::now_v7().into_bytes(); // by chance: engines that meet in a lane are slower, no more
        let lane = i32::from_be_bytes([a, b, c, d]);
        Ok(Self { options: options(database_url, "daybook_ledger")?, lane, connection: None, has_turn: false })
    }

    /// One more, to the same server; it connects when it is first used.
    pub fn another(&self) -> Self {
        Self { options: self.options.clone(), lane: self.lane, connection: None, has_turn: false }
    }

    /// Appends one commit. After [`Writer::take_turn`] it ends that turn, whatever comes of it.
    pub async fn append(&mut self, commit: &Commit) -> Result<(), AppendError> {
        self.append_as(commit, false).await
    }

    /// Appends one commit while another writer of this process is appending the one it follows: the database does most of
    /// the work for both at once. [`AppendError::WentBack`] then may mean no more than that it came too early.
    pub async fn append_ahead(&mut self, commit: &Commit) -> Result<(), AppendError> {
        self.append_as(commit, true).await
    }

    async fn append_as(&mut self, commit: &Commit, ahead: bool) -> Result<(), AppendError> {
        let had_turn = std::mem::take(&mut self.has_turn);
        let lane = (!had_turn).then_some(self.lane); // who has the turn is alone
        let connection = self.connection().await.map_err(AppendError::NotDone)?;
        let append = async {
            insert(connection, commit, ahead, lane).await?;
            if had_turn {
                sqlx::query("commit").execute(connection).await?;
            }
            Ok(())
        };
        match timeout(PATIENCE, append).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(self.failed(had_turn, error).await),
            Err(_) => {
                self.connection = None;
                Err(AppendError::Unknown(StoreError::Late(PATIENCE).to_string()))
            }
        }
    }

    /// Waits for the turn to append and reads what others have appended after `commit`, at most `events_max` events at
    /// a time: call again while there is more. Only the holder of the turn can append until its next [`Writer::append`]
    /// or [`Writer::give_turn_back`].
    pub async fn take_turn(&mut self, commit: i64, events_max: i64) -> Result<Vec<Commit>, StoreError> {
        let has_turn = self.has_turn;
        let connection = self.connection().await?;
        let read = async {
            if !has_turn {
                sqlx::query("begin").execute(&mut *connection).await?;
                // In the order in which an append takes them.
                let turn = "select from ledger.turn order by place for no key update";
                sqlx::query(turn).execute(&mut *connection).await?;
            }
            log::commits_after(connection, commit, events_max).await
        };
        let tail = in_time(read).await;
        self.has_turn = tail.is_ok();
        if tail.is_err() {
            self.connection = None; // its transaction dies with it
        }
        tail
    }

    /// Whether nobody else can append now. A connection that was lost took the turn with it.
    pub fn has_turn(&self) -> bool {
        self.has_turn
    }

    pub async fn give_turn_back(&mut self) {
        if std::mem::take(&mut self.has_turn)
            && let Some(connection) = &mut self.connection
            && in_time(sqlx::query("rollback").execute(connection)).await.is_err()
        {
            self.connection = None;
        }
    }

    /// The chain of a commit, if it is in the log.
    pub async fn chain_of(&mut self, commit: i64) -> Result<Option<Hash>, StoreError> {
        let connection = self.connection().await?;
        let query = sqlx::query_scalar("select chain from ledger.commits where number = $1").bind(commit);
        let found: Option<Vec<u8>> = in_time(query.fetch_optional(connection)).await?;
        found.map(|chain| crate::record::sized("chain", chain)).transpose()
    }

    /// The head of the log as it was with a commit; that of commit 0 is the head of an empty log.
    pub async fn head_at(&mut self, commit: i64) -> Result<Option<Head>, StoreError> {
        let connection = self.connection().await?;
        let query = "select number, last_position, chain, recorded_at from ledger.commits where number = $1";
        let row = in_time(sqlx::query(query).bind(commit).fetch_optional(connection)).await?;
        row.as_ref().map(log::head_from_row).transpose()
    }

    /// Forgets the connection: the next call makes a new one. An open turn is lost with it.
    pub fn disconnect(&mut self) {
        self.connection = None;
        self.has_turn = false;
    }

    /// Closes politely; a dropped connection would do as well.
    pub async fn close(mut self) {
        if let Some(connection) = self.connection.take() {
            in_time(connection.close()).await.ok();
        }
    }

    async fn connection(&mut self) -> Result<&mut PgConnection, StoreError> {
        if self.connection.is_none() {
            self.has_turn = false;
            let options = self.options.clone().options([
                ("statement_timeout", STATEMENT_MILLIS),
                ("idle_in_transaction_session_timeout", QUIET_MILLIS),
            ]);
            let options = options.options(SILENCE);
            // Acknowledged means kept, whatever the server's default is.
            let options = options.options([("synchronous_commit", "on")]);
            self.connection = Some(in_time(options.connect()).await?);
        }
        Ok(self.connection.as_mut().expect("connected above"))
    }

    /// Sorts an error by what is known about the commit, and leaves the connection clean.
    async fn failed(&mut self, had_turn: bool, error: sqlx::Error) -> AppendError {
        let refusal = error.as_database_error().and_then(|refusal| refusal.try_downcast_ref::<PgDatabaseError>());
        // An ERROR ends the statement and takes back all that its transaction did. FATAL and PANIC end the connection,
        // perhaps in the middle of the commit; class 08 and 40003 are what something in between says of that.
        let Some(refusal) = refusal.filter(|refusal| {
            matches!(refusal.severity(), PgSeverity::Error)
                && !refusal.code().starts_with("08")
                && refusal.code() != "40003"
        }) else {
            self.connection = None;
            return AppendError::Unknown(error.to_string());
        };
        let sorted = match (refusal.code(), refusal.constraint()) {
            // One that was sent ahead meets the other's events before its commit.
            ("23505", Some("commits_pkey" | "commits_head" | "events_position")) => AppendError::Lost,
            // An event's place is looked at before its key: a command that comes again with the same ids meets that first.
            ("23505", Some("events_key" | "events_stream" | "events_stream_of_transaction")) => AppendError::KeyTaken,
            ("23503", Some("commits_previous")) => AppendError::WentBack,
            // Class 22, data, and class 23, constraints: about what is in the commit, so no attempt can fare better.
            (code, _) if code.starts_with("22") || code.starts_with("23") => AppendError::Rejected(error),
            _ => AppendError::NotDone(error.into()),
        };
        if had_turn {
            self.has_turn = true;
            self.give_turn_back().await;
        }
        sorted
    }
}

async fn insert(
    connection: &mut PgConnection,
    commit: &Commit,
    ahead: bool,
    lane: Option<i32>,
) -> Result<(), sqlx::Error> {
    let events = &commit.events;
    let texts = |of: fn(&RecordedEvent) -> &str| events.iter().map(of).collect::<Vec<_>>();
    let jsons = |of: fn(&RecordedEvent) -> &str| events.iter().map(|event| JsonText(of(event))).collect::<Vec<_>>();
    let recorded_at = commit.head().recorded_at.date_time();
    let mut arguments = PgArguments::default();
    let texts_bytes: usize = events.iter().map(|event| event.payload.len() + event.metadata.len()).sum();
    arguments.reserve(20, texts_bytes + events.len() * REST_BYTES);
    let bound = (|| {
        arguments.add(commit.number)?;
        arguments.add(commit.first)?;
        arguments.add(commit.first - 1)?;
        arguments.add(commit.previous_chain.as_slice())?;
        arguments.add(commit.root.as_slice())?;
        arguments.add(commit.chain.as_slice())?;
        arguments.add(recorded_at)?;
        arguments.add(texts(|event| &event.aggregate_type))?;
        arguments.add(texts(|event| &event.aggregate_id))?;
        arguments.add(events.iter().map(|event| event.sequence).collect::<Vec<_>>())?;
        arguments.add(texts(|event| &event.event_type))?;
        arguments.add(texts(|event| &event.event_version))?;
        arguments.add(jsons(|event| &event.payload))?;
        arguments.add(jsons(|event| &event.metadata))?;
        arguments.add(events.iter().map(|event| event.command_id.uuid()).collect::<Vec<_>>())?;
        arguments.add(events.iter().map(|event| event.leaf_hash.as_slice()).collect::<Vec<_>>())?;
        arguments
            .add(events.iter().map(|event| event.key_hash.as_ref().map(|hash| hash.as_slice())).collect::<Vec<_>>())?;
        arguments.add(
            events.iter().map(|event| event.request_hash.as_ref().map(|hash| hash.as_slice())).collect::<Vec<_>>(),
        )?;
        arguments.add(ahead)?;
        arguments.add(lane)
    })();
    bound.map_err(sqlx::Error::Encode)?;
    let append = "select ledger.append($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20)";
    sqlx::query_with(append, arguments).execute(connection).await?;
    Ok(())
}

/// Bytes of an event's other values in a statement, about.
const REST_BYTES: usize = 320;

/// A text that Postgres takes as `json`, byte for byte as it is. sqlx itself would bind `jsonb`, which reorders keys; and a
/// text that the statement casts is parsed while other commits wait for it.
struct JsonText<'a>(&'a str);

impl Type<Postgres> for JsonText<'_> {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(Oid(114)) // pg_type.dat: json
    }
}

impl PgHasArrayType for JsonText<'_> {
    fn array_type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(Oid(199)) // and json[]
    }
}

impl<'q> Encode<'q, Postgres> for JsonText<'_> {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        <&str as Encode<Postgres>>::encode_by_ref(&self.0, buffer)
    }
}

/// Bounds a wait for the database.
pub(crate) async fn in_time<T, E: Into<StoreError>>(work: impl Future<Output = Result<T, E>>) -> Result<T, StoreError> {
    match timeout(PATIENCE, work).await {
        Ok(answer) => answer.map_err(Into::into),
        Err(_) => Err(StoreError::Late(PATIENCE)),
    }
}

impl Log {
    /// A reader beside a writer, over connections of its own in the same role.
    pub async fn beside(writer: &Writer, connections: u32) -> Result<Self, StoreError> {
        // On: once a snapshot is written, what it holds may leave memory.
        let options = writer.options.clone().options([("synchronous_commit", "on")]);
        // All engines write one snapshot: one that was paused amid its own must not hold up the others.
        let options = options.options([("idle_in_transaction_session_timeout", 3 * QUIET_MILLIS)]);
        Ok(Self::new(pool_options(connections).connect_with(options).await?))
    }
}
