//! A page of the log as views fold it: read once, written into every view.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use api_contract::TransactionBody;
use event_feed::{Commit, Log, StoreError};
use ledger_core::{CorruptEvent, Entry, Event, Instruction, Timestamp, TransactionEvent, TransactionId};
use sqlx::PgPool;
use time::OffsetDateTime;

impl From<sqlx::Error> for PageError {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

/// Whole commits, contiguous.
pub(crate) struct Page {
    pub(crate) events: Vec<Happened>,
    /// The first event of every transaction that ends in this page, wherever that event is.
    begun: HashMap<TransactionId, Begun>,
    /// Of its last event.
    pub(crate) position: i64,
    pub(crate) commit: i64,
}

pub(crate) struct Happened {
    pub(crate) position: i64,
    pub(crate) recorded_at: Timestamp,
    /// Of the command that it was part of: in the log it stands on the command's first event alone.
    pub(crate) key_hash: Option<[u8; 16]>,
    pub(crate) event: Event,
}

/// How a transaction that ends later began.
pub(crate) struct Begun {
    pub(crate) position: i64,
    pub(crate) recorded_at: Timestamp,
    pub(crate) key_hash: Option<[u8; 16]>,
    event: TransactionEvent,
}

/// Something happened to a transaction.
pub(crate) struct Step<'p> {
    pub(crate) id: TransactionId,
    pub(crate) event: &'p TransactionEvent,
    pub(crate) happened: &'p Happened,
    /// Its first event, which may be this very one.
    pub(crate) instruction: &'p Arc<Instruction>,
    begun: Option<&'p Begun>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum PageError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("position {position} cannot be read: {source}")]
    Corrupt { position: i64, source: CorruptEvent },
    #[error("{0} ends without having been pending")]
    NeverBegun(TransactionId),
}

impl Page {
    /// Reads the commits' events, and from the log what they refer to.
    pub(crate) async fn read(log: &Log, commits: &[Arc<Commit>]) -> Result<Self, PageError> {
        let last = commits.last().expect("a page has commits");
        let mut events = Vec::new();
        let mut keyed = None;
        for recorded in commits.iter().flat_map(|commit| &commit.events) {
            let position = recorded.position;
            let event = recorded.read().map_err(|source| PageError::Corrupt { position, source })?;
            let recorded_at = recorded.recorded_at;
            keyed = recorded.key_hash.map(|key| (recorded.command_id, key)).or(keyed);
            let key_hash = keyed.and_then(|(command, key)| (command == recorded.command_id).then_some(key));
            events.push(Happened { position, recorded_at, key_hash, event });
        }
        let mut begun = HashMap::new();
        let mut elsewhere = HashSet::new();
        for happened in &events {
            let Event::Transaction(id, event) = &happened.event else { continue };
            if matches!(event, TransactionEvent::Requested { .. }) {
                begun.insert(*id, Begun::of(happened, event));
            } else if event.instruction().is_none() && !begun.contains_key(id) {
                elsewhere.insert(*id);
            }
        }
        if !elsewhere.is_empty() {
            begin(log.pool(), &elsewhere, &mut begun).await?;
        }
        if let Some(id) = elsewhere.into_iter().find(|id| !begun.contains_key(id)) {
            return Err(PageError::NeverBegun(id));
        }
        Ok(Self { events, begun, position: last.last, commit: last.number })
    }

    /// What happened to transactions, in order.
    pub(crate) fn steps(&self) -> impl Iterator<Item = Step<'_>> {
        self.events.iter().filter_map(|happened| {
            let Event::Transaction(id, event) = &happened.event else { return None };
            let begun = self.begun.get(id).filter(|begun| begun.position != happened.position);
            let first = begun.map_or(event, |begun| &begun.event);
            let instruction = first.instruction().expect("the first event of a transaction has its instruction");
            Some(Step { id: *id, event, happened, instruction, begun })
        })
    }
}

impl Begun {
    fn of(happened: &Happened, event: &TransactionEvent) -> Self {
        let Happened { position, recorded_at, key_hash, .. } = *happened;
        Self { position, recorded_at, key_hash, event: event.clone() }
    }
}

impl<'p> Step<'p> {
    /// The transaction as API.md shows it after this step.
    pub(crate) fn body(&self) -> TransactionBody {
        let Happened { position, recorded_at, .. } = *self.happened;
        match self.begun {
            None => TransactionBody::new(self.event, self.id, position, recorded_at),
            Some(begun) => {
                let mut body = TransactionBody::new(&begun.event, self.id, begun.position, begun.recorded_at);
                body.apply(self.event, position, recorded_at);
                body
            }
        }
    }

    /// Position, time and key of the transaction's first event.
    pub(crate) fn first(&self) -> (i64, Timestamp, Option<[u8; 16]>) {
        match self.begun {
            None => (self.happened.position, self.happened.recorded_at, self.happened.key_hash),
            Some(begun) => (begun.position, begun.recorded_at, begun.key_hash),
        }
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = &'p Entry> + use<'p> {
        self.event.entries().into_iter().flatten()
    }
}

/// The aggregate type of transactions in the log.
const TRANSACTION: &str = "transaction";

/// Reads from the log how transactions began that were pending at first.
async fn begin(
    pool: &PgPool,
    ids: &HashSet<TransactionId>,
    begun: &mut HashMap<TransactionId, Begun>,
) -> Result<(), PageError> {
    type Row = (String, String, String, String, i64, OffsetDateTime, Option<Vec<u8>>);
    let rows: Vec<Row> = sqlx::query_as(
        "select aggregate_id, event_type, event_version, payload::text, position, recorded_at, key_hash
         from ledger.events where aggregate_type = $1 and aggregate_id = any($2) and sequence = 1",
    )
    .bind(TRANSACTION)
    .bind(ids.iter().map(ToString::to_string).collect::<Vec<_>>())
    .fetch_all(pool)
    .await
    .map_err(StoreError::from)?;
    for (aggregate_id, event_type, event_version, payload, position, recorded_at, key_hash) in rows {
        let event = Event::read(TRANSACTION, &aggregate_id, &event_type, &event_version, &payload)
            .map_err(|source| PageError::Corrupt { position, source })?;
        let Event::Transaction(id, event @ TransactionEvent::Requested { .. }) = event else { continue };
        let recorded_at = Timestamp::try_from(recorded_at).map_err(|error| StoreError::Corrupt(error.to_string()))?;
        let key_hash = key_hash.and_then(|hash| hash.try_into().ok());
        begun.insert(id, Begun { position, recorded_at, key_hash, event });
    }
    Ok(())
}

/// What was asked for, of the events that say it.
trait HasInstruction {
    fn instruction(&self) -> Option<&Arc<Instruction>>;
}

impl HasInstruction for TransactionEvent {
    fn instruction(&self) -> Option<&Arc<Instruction>> {
        match self {
            Self::Posted { instruction, .. }
            | Self::Requested { instruction, .. }
            | Self::Declined { instruction, .. } => Some(instruction),
            Self::Settled { .. } | Self::Failed { .. } | Self::Expired { .. } => None,
        }
    }
}
