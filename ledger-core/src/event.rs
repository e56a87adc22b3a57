//! An event of any kind, between its written form and its type.
//!
//! The written form is history: `event_type` and the payload's only key are the written-out name,
//! `{"TransactionPosted": {…}}`. Older versions are lifted by [`upcasters`] before they are read.

use cqrs_es::Aggregate;
use cqrs_es::persist::{EventUpcaster, SerializedEvent};
use serde::de::DeserializeOwned;

use crate::{
    CommandEvent, CommandId, Partner, PartnerEvent, PartnerId, Transaction, TransactionEvent, TransactionId, Wallet,
    WalletEvent, WalletId,
};

/// The version that is written today, of every event type.
pub(crate) const VERSION: &str = "1.0.0";

/// Bytes that the payload of a transfer does not exceed, as a rule.
const PAYLOAD_USUAL: usize = 768;

/// The stream of commands that became nothing else; it has no aggregate.
const COMMAND: &str = "command";

/// Something that happened, and to what.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Wallet(WalletId, WalletEvent),
    Partner(PartnerId, PartnerEvent),
    Transaction(TransactionId, TransactionEvent),
    Command(CommandId, CommandEvent),
}

/// An event that has not been appended yet.
#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    /// Its place in its stream, from 1.
    pub sequence: i64,
    pub event: Event,
}

/// The log holds something that this code never wrote.
#[derive(Debug, thiserror::Error)]
pub enum CorruptEvent {
    #[error("no aggregate type {0}")]
    AggregateType(String),
    #[error("aggregate id: {0}")]
    AggregateId(#[from] crate::InvalidId),
    #[error("event type {written} holds {found}")]
    EventType { written: String, found: &'static str },
    #[error("no reader for version {0}")]
    Version(String),
    #[error("payload: {0}")]
    Payload(#[from] serde_json::Error),
}

/// What lifts events of older versions to today's. None is needed yet: every event is of version 1.0.0.
///
/// A changed shape gets the next version in `event_version`, an upcaster here, and a sample in `tests/history/`.
pub fn upcasters() -> Vec<Box<dyn EventUpcaster>> {
    Vec::new()
}

impl Event {
    pub const fn aggregate_type(&self) -> &'static str {
        match self {
            Self::Wallet(..) => Wallet::TYPE,
            Self::Partner(..) => Partner::TYPE,
            Self::Transaction(..) => Transaction::TYPE,
            Self::Command(..) => COMMAND,
        }
    }

    pub fn aggregate_id(&self) -> String {
        match self {
            Self::Wallet(id, _) => id.to_string(),
            Self::Partner(id, _) => id.to_string(),
            Self::Transaction(id, _) => id.to_string(),
            Self::Command(id, _) => id.to_string(),
        }
    }

    pub const fn event_type(&self) -> &'static str {
        match self {
            Self::Wallet(_, event) => event.name(),
            Self::Partner(_, event) => event.name(),
            Self::Transaction(_, event) => event.name(),
            Self::Command(_, CommandEvent::Declined { .. }) => "CommandDeclined",
            Self::Command(_, CommandEvent::BatchDeclined { .. }) => "BatchDeclined",
        }
    }

    pub const fn event_version(&self) -> &'static str {
        VERSION
    }

    /// The JSON text that is stored and hashed, byte for byte.
    pub fn payload(&self) -> String {
        let mut written = Vec::with_capacity(PAYLOAD_USUAL);
        let done = match self {
            Self::Wallet(_, event) => serde_json::to_writer(&mut written, event),
            Self::Partner(_, event) => serde_json::to_writer(&mut written, event),
            Self::Transaction(_, event) => serde_json::to_writer(&mut written, event),
            Self::Command(_, event) => serde_json::to_writer(&mut written, event),
        };
        done.expect("events have string keys and no fallible serializers");
        String::from_utf8(written).expect("JSON of strings is UTF-8")
    }

    /// Reads an event as it was written, by today's code or by any before it.
    pub fn read(
        aggregate_type: &str,
        aggregate_id: &str,
        event_type: &str,
        event_version: &str,
        payload: &str,
    ) -> Result<Self, CorruptEvent> {
        if event_version == VERSION {
            return Self::read_current(aggregate_type, aggregate_id, event_type, payload);
        }
        Self::read_upcast(&upcasters(), aggregate_type, aggregate_id, event_type, event_version, payload)
    }

    /// Reads an event of an older version through the given upcasters.
    pub fn read_upcast(
        upcasters: &[Box<dyn EventUpcaster>],
        aggregate_type: &str,
        aggregate_id: &str,
        event_type: &str,
        event_version: &str,
        payload: &str,
    ) -> Result<Self, CorruptEvent> {
        let written = SerializedEvent::new(
            aggregate_id.to_owned(),
            0, // its place in the stream: no upcaster may look at it
            aggregate_type.to_owned(),
            event_type.to_owned(),
            event_version.to_owned(),
            serde_json::from_str(payload)?,
            serde_json::Value::Null,
        );
        let lifted = upcasters.iter().fold(written, |event, upcaster| {
            if upcaster.can_upcast(&event.event_type, &event.event_version) { upcaster.upcast(event) } else { event }
        });
        if lifted.event_version != VERSION {
            return Err(CorruptEvent::Version(lifted.event_version));
        }
        Self::read_current(
            &lifted.aggregate_type,
            &lifted.aggregate_id,
            &lifted.event_type,
            &lifted.payload.to_string(),
        )
    }

    fn read_current(
        aggregate_type: &str,
        aggregate_id: &str,
        event_type: &str,
        payload: &str,
    ) -> Result<Self, CorruptEvent> {
        fn parse<T: DeserializeOwned>(payload: &str) -> Result<T, CorruptEvent> {
            Ok(serde_json::from_str(payload)?)
        }
        let event = match aggregate_type {
            Wallet::TYPE => Self::Wallet(aggregate_id.parse()?, parse(payload)?),
            Partner::TYPE => Self::Partner(aggregate_id.parse()?, parse(payload)?),
            Transaction::TYPE => Self::Transaction(aggregate_id.parse()?, parse(payload)?),
            COMMAND => Self::Command(aggregate_id.parse()?, parse(payload)?),
            other => return Err(CorruptEvent::AggregateType(other.to_owned())),
        };
        if event.event_type() == event_type {
            Ok(event)
        } else {
            Err(CorruptEvent::EventType { written: event_type.to_owned(), found: event.event_type() })
        }
    }
}
