//! What partners are told: which events of the log are told, to whom, and in which words.
//!
//! A notice is the same however often it is made: its id follows from the event's leaf and type, its body is
//! folded from the log up to that event and no further.
//!
//! Left out: refusals. Whoever was answered 4xx knows already.

use std::collections::HashSet;

use api_contract::{TransactionBody, WalletBody};
use event_feed::{Log, RecordedEvent, StoreError};
use ledger_core::{
    Balance, CorruptEvent, Event, EventId, PartnerId, Timestamp, TransactionEvent, TransactionId, WalletEvent, WalletId,
};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

/// The types of API.md, "Webhooks out".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventType {
    TransactionCreated,
    TransactionCompleted,
    TransactionFailed,
    WalletOpened,
    WalletFrozen,
    WalletClosed,
}

/// In an endpoint's list of types: all of them, those to come included.
pub(crate) const EVERYTHING: &str = "*";

/// One thing that a partner is told.
#[derive(Debug)]
pub(crate) struct Notice {
    pub(crate) partner: PartnerId,
    pub(crate) event_type: EventType,
    pub(crate) event_id: EventId,
    pub(crate) commit: i64,
    pub(crate) position: i64,
    /// Of the request that led to it.
    pub(crate) traceparent: Option<String>,
    created_at: Timestamp,
    data: Box<RawValue>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum NoticeError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("position {position}: {source}")]
    Corrupt { position: i64, source: CorruptEvent },
    /// A later event of a stream that has no first one.
    #[error("position {position}: its stream does not begin")]
    NoBeginning { position: i64 },
}

impl EventType {
    pub(crate) const ALL: [EventType; 6] = [
        Self::TransactionCreated,
        Self::TransactionCompleted,
        Self::TransactionFailed,
        Self::WalletOpened,
        Self::WalletFrozen,
        Self::WalletClosed,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::TransactionCreated => "transaction.created",
            Self::TransactionCompleted => "transaction.completed",
            Self::TransactionFailed => "transaction.failed",
            Self::WalletOpened => "wallet.opened",
            Self::WalletFrozen => "wallet.frozen",
            Self::WalletClosed => "wallet.closed",
        }
    }
}

/// What is told about an event, in order, if one of `listening` is to be told.
pub(crate) async fn of(
    log: &Log,
    recorded: &RecordedEvent,
    listening: &HashSet<PartnerId>,
) -> Result<Vec<Notice>, NoticeError> {
    let (types, told): (&[EventType], _) = match read(recorded)? {
        Event::Transaction(id, event) => {
            let types: &[EventType] = match event {
                TransactionEvent::Posted { .. } => &[EventType::TransactionCreated, EventType::TransactionCompleted],
                TransactionEvent::Requested { .. } => &[EventType::TransactionCreated],
                TransactionEvent::Settled { .. } => &[EventType::TransactionCompleted],
                TransactionEvent::Failed { .. } | TransactionEvent::Expired { .. } => &[EventType::TransactionFailed],
                TransactionEvent::Declined { .. } => return Ok(Vec::new()),
            };
            (types, transaction(log, recorded, id, &event, listening).await?)
        }
        Event::Wallet(id, event) => {
            let types: &[EventType] = match event {
                WalletEvent::Opened { .. } => &[EventType::WalletOpened],
                WalletEvent::Frozen { .. } => &[EventType::WalletFrozen],
                WalletEvent::Closed { .. } => &[EventType::WalletClosed],
                WalletEvent::Unfrozen { .. } => return Ok(Vec::new()),
            };
            (types, wallet(log, recorded, id, &event, listening).await?)
        }
        Event::Partner(..) | Event::Command(..) => return Ok(Vec::new()),
    };
    let Some((partner, data)) = told else { return Ok(Vec::new()) };
    Ok(types
        .iter()
        .map(|&event_type| Notice {
            partner,
            event_type,
            event_id: EventId::of_webhook(&recorded.leaf_hash, event_type.name()),
            commit: recorded.commit,
            position: recorded.position,
            traceparent: recorded.traceparent().map(str::to_owned),
            created_at: recorded.recorded_at,
            data: data.clone(),
        })
        .collect())
}

impl Notice {
    /// The bytes that are signed and sent: made once for each endpoint, never again.
    pub(crate) fn body(&self, sequence: i64) -> String {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Body<'a> {
            event_id: EventId,
            event_type: &'static str,
            created_at: Timestamp,
            sequence: i64,
            ledger_position: i64,
            data: &'a RawValue,
        }
        let body = Body {
            event_id: self.event_id,
            event_type: self.event_type.name(),
            created_at: self.created_at,
            sequence,
            ledger_position: self.position,
            data: &self.data,
        };
        serde_json::to_string(&body).expect("ids, numbers and JSON are JSON")
    }
}

/// The transaction as it is with this event, and whose it is.
async fn transaction(
    log: &Log,
    recorded: &RecordedEvent,
    id: TransactionId,
    event: &TransactionEvent,
    listening: &HashSet<PartnerId>,
) -> Result<Option<(PartnerId, Box<RawValue>)>, NoticeError> {
    let of_first = |first: &TransactionEvent, at: &RecordedEvent| {
        let partner = instruction_partner(first).filter(|partner| listening.contains(partner))?;
        Some((partner, TransactionBody::new(first, id, at.position, at.recorded_at)))
    };
    let told = if recorded.sequence == 1 {
        of_first(event, recorded)
    } else {
        let stream = log.stream(&recorded.aggregate_type, &recorded.aggregate_id, recorded.position).await?;
        let mut told = None;
        for (place, at) in stream.iter().enumerate() {
            let Event::Transaction(_, event) = read(at)? else {
                return Err(NoticeError::NoBeginning { position: at.position });
            };
            match &mut told {
                None if place == 0 => told = of_first(&event, at),
                None => break,
                Some((_, body)) => body.apply(&event, at.position, at.recorded_at),
            }
        }
        told
    };
    Ok(told.map(|(partner, body)| (partner, raw(&body.for_partner()))))
}

/// The wallet as it is with this event, and whose it is. The system's wallets are nobody's.
async fn wallet(
    log: &Log,
    recorded: &RecordedEvent,
    id: WalletId,
    event: &WalletEvent,
    listening: &HashSet<PartnerId>,
) -> Result<Option<(PartnerId, Box<RawValue>)>, NoticeError> {
    if id.is_system() {
        return Ok(None);
    }
    let body = if recorded.sequence == 1 {
        WalletBody::new(event, id, recorded.recorded_at)
    } else {
        let stream = log.stream(&recorded.aggregate_type, &recorded.aggregate_id, recorded.position).await?;
        let beginning = || NoticeError::NoBeginning { position: recorded.position };
        let first = stream.first().ok_or_else(beginning)?;
        let Event::Wallet(_, opened) = read(first)? else { return Err(beginning()) };
        let mut body = WalletBody::new(&opened, id, first.recorded_at);
        // The money in between is in other streams; a life event says itself what it has come to.
        body.balance = balance_after(event);
        body.available = body.balance.less(body.held).expect("what is held is within what is there");
        body.version = event.wallet_version() - 1;
        body.apply(event);
        body
    };
    let partner = body.partner_id.filter(|partner| listening.contains(partner));
    Ok(partner.map(|partner| (partner, raw(&body))))
}

fn instruction_partner(event: &TransactionEvent) -> Option<PartnerId> {
    match event {
        TransactionEvent::Posted { instruction, .. }
        | TransactionEvent::Requested { instruction, .. }
        | TransactionEvent::Declined { instruction, .. } => instruction.partner_id,
        TransactionEvent::Settled { .. } | TransactionEvent::Failed { .. } | TransactionEvent::Expired { .. } => None,
    }
}

fn balance_after(event: &WalletEvent) -> Balance {
    match event {
        WalletEvent::Opened { balance_after, .. }
        | WalletEvent::Frozen { balance_after, .. }
        | WalletEvent::Unfrozen { balance_after, .. }
        | WalletEvent::Closed { balance_after, .. } => *balance_after,
    }
}

fn read(recorded: &RecordedEvent) -> Result<Event, NoticeError> {
    recorded.read().map_err(|source| NoticeError::Corrupt { position: recorded.position, source })
}

fn raw(body: &impl Serialize) -> Box<RawValue> {
    to_raw_value(body).expect("a body of the contract is JSON")
}
