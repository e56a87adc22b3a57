//! An event as the log keeps it, and its one JSON form: in `/v1/events`, in exports and on the bus.

use std::borrow::Cow;

use ledger_core::{CommandId, CorruptEvent, Event, EventId, Timestamp};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;
use sqlx::postgres::PgRow;
use sqlx::{Row, ValueRef};
use uuid::Uuid;

use crate::StoreError;
use crate::hash::{Hash, Leaf, from_hex, hex, leaf};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedEvent {
    pub position: i64,
    pub commit: i64,
    pub command_id: CommandId,
    /// One of few names, as the event's type and version are: where this program wrote the event, its own text.
    pub aggregate_type: Cow<'static, str>,
    pub aggregate_id: String,
    pub sequence: i64,
    pub event_type: Cow<'static, str>,
    pub event_version: Cow<'static, str>,
    /// JSON, byte for byte as stored.
    pub payload: String,
    /// JSON, byte for byte as stored.
    pub metadata: String,
    pub recorded_at: Timestamp,
    pub key_hash: Option<[u8; 16]>,
    pub request_hash: Option<[u8; 32]>,
    pub leaf_hash: Hash,
}

impl RecordedEvent {
    /// What happened, as a type.
    pub fn read(&self) -> Result<Event, CorruptEvent> {
        EventRow::from(self).read()
    }

    pub fn event_id(&self) -> EventId {
        EventId::from_leaf(&self.leaf_hash)
    }

    /// The leaf hash as its content gives it, whatever is stored.
    pub fn leaf(&self) -> Hash {
        EventRow::from(self).leaf()
    }
}

/// An event as it lies in a row of the log, borrowed from there: for whoever reads many and keeps few.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventRow<'a> {
    pub position: i64,
    pub commit: i64,
    pub command_id: CommandId,
    pub aggregate_type: &'a str,
    pub aggregate_id: &'a str,
    pub sequence: i64,
    pub event_type: &'a str,
    pub event_version: &'a str,
    pub payload: &'a str,
    pub metadata: &'a str,
    pub recorded_at: Timestamp,
    pub key_hash: Option<&'a [u8; 16]>,
    pub request_hash: Option<&'a [u8; 32]>,
    pub leaf_hash: &'a Hash,
}

/// The columns of an event, in the order in which [`EventRow::of`] takes them.
pub(crate) const COLUMNS: &str = "position, commit_number, command_id, aggregate_type, aggregate_id, sequence, event_type, \
    event_version, payload, metadata, recorded_at, key_hash, request_hash, leaf_hash";

impl<'a> EventRow<'a> {
    /// From the binary form of the [`COLUMNS`], one after the other.
    pub(crate) fn of(mut next: impl FnMut() -> Result<Option<&'a [u8]>, StoreError>) -> Result<Self, StoreError> {
        let mut column = |name| Ok::<_, StoreError>(Column { name, value: next()? });
        Ok(Self {
            position: column("position")?.number()?,
            commit: column("commit_number")?.number()?,
            command_id: CommandId::from_uuid(Uuid::from_bytes(*column("command_id")?.bytes()?)),
            aggregate_type: column("aggregate_type")?.text()?,
            aggregate_id: column("aggregate_id")?.text()?,
            sequence: column("sequence")?.number()?,
            event_type: column("event_type")?.text()?,
            event_version: column("event_version")?.text()?,
            payload: column("payload")?.text()?,
            metadata: column("metadata")?.text()?,
            recorded_at: column("recorded_at")?.time()?,
            key_hash: column("key_hash")?.bytes_if_any()?,
            request_hash: column("request_hash")?.bytes_if_any()?,
            leaf_hash: column("leaf_hash")?.bytes()?,
        })
    }

    /// What happened, as a type.
    pub fn read(&self) -> Result<Event, CorruptEvent> {
        Event::read(self.aggregate_type, self.aggregate_id, self.event_type, self.event_version, self.payload)
    }

    /// The leaf hash as its content gives it, whatever is stored.
    pub fn leaf(&self) -> Hash {
        leaf(&Leaf {
            aggregate_type: self.aggregate_type,
            aggregate_id: self.aggregate_id,
            sequence: self.sequence,
            event_type: self.event_type,
            event_version: self.event_version,
            recorded_at: self.recorded_at,
            command_id: self.command_id,
            key_hash: self.key_hash,
            request_hash: self.request_hash,
            payload: self.payload,
            metadata: self.metadata,
        })
    }
}

impl<'a> From<&'a RecordedEvent> for EventRow<'a> {
    fn from(event: &'a RecordedEvent) -> Self {
        Self {
            position: event.position,
            commit: event.commit,
            command_id: event.command_id,
            aggregate_type: &event.aggregate_type,
            aggregate_id: &event.aggregate_id,
            sequence: event.sequence,
            event_type: &event.event_type,
            event_version: &event.event_version,
            payload: &event.payload,
            metadata: &event.metadata,
            recorded_at: event.recorded_at,
            key_hash: event.key_hash.as_ref(),
            request_hash: event.request_hash.as_ref(),
            leaf_hash: &event.leaf_hash,
        }
    }
}

impl From<EventRow<'_>> for RecordedEvent {
    fn from(row: EventRow<'_>) -> Self {
        Self {
            position: row.position,
            commit: row.commit,
            command_id: row.command_id,
            aggregate_type: row.aggregate_type.to_owned().into(),
            aggregate_id: row.aggregate_id.to_owned(),
            sequence: row.sequence,
            event_type: row.event_type.to_owned().into(),
            event_version: row.event_version.to_owned().into(),
            payload: row.payload.to_owned(),
            metadata: row.metadata.to_owned(),
            recorded_at: row.recorded_at,
            key_hash: row.key_hash.copied(),
            request_hash: row.request_hash.copied(),
            leaf_hash: *row.leaf_hash,
        }
    }
}

/// One value of a row, in Postgres' binary form.
#[derive(Clone, Copy)]
pub(crate) struct Column<'a> {
    pub(crate) name: &'static str,
    pub(crate) value: Option<&'a [u8]>,
}

impl<'a> Column<'a> {
    pub(crate) fn number(self) -> Result<i64, StoreError> {
        self.bytes().map(|bytes| i64::from_be_bytes(*bytes))
    }

    pub(crate) fn bytes<const N: usize>(self) -> Result<&'a [u8; N], StoreError> {
        self.bytes_if_any()?.ok_or_else(|| self.is_not("there"))
    }

    fn bytes_if_any<const N: usize>(self) -> Result<Option<&'a [u8; N]>, StoreError> {
        let sized = |bytes: &'a [u8]| bytes.try_into().map_err(|_| self.is_not(&format!("of {N} bytes")));
        self.value.map(sized).transpose()
    }

    fn text(self) -> Result<&'a str, StoreError> {
        let bytes = self.value.ok_or_else(|| self.is_not("there"))?;
        std::str::from_utf8(bytes).map_err(|_| self.is_not("UTF-8"))
    }

    /// Postgres counts microseconds from the year 2000; the infinite times are at the ends and are none of ours.
    fn time(self) -> Result<Timestamp, StoreError> {
        let micros = self.number()?.checked_add(YEAR_2000);
        micros.and_then(|micros| Timestamp::from_micros(micros).ok()).ok_or_else(|| self.is_not("a time"))
    }

    fn is_not(self, what: &str) -> StoreError {
        StoreError::Corrupt(format!("{} is not {what}", self.name))
    }
}

/// Microseconds from 1970 to 2000.
const YEAR_2000: i64 = 946_684_800_000_000;

/// An event from a row that begins with the [`COLUMNS`].
pub(crate) fn from_row(row: &PgRow) -> Result<RecordedEvent, StoreError> {
    let mut index = 0..;
    let next = || {
        let value = row.try_get_raw(index.next().expect("the range has no end"))?;
        if value.is_null() { Ok(None) } else { Ok(value.as_bytes().map(Some).map_err(sqlx::Error::Decode)?) }
    };
    EventRow::of(next).map(RecordedEvent::from)
}

pub(crate) fn sized<const N: usize>(column: &str, bytes: Vec<u8>) -> Result<[u8; N], StoreError> {
    bytes.try_into().map_err(|_| StoreError::Corrupt(format!("{column} is not of {N} bytes")))
}

/// The JSON form of API.md.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    position: i64,
    commit: i64,
    event_id: EventId,
    command_id: CommandId,
    aggregate_type: &'a str,
    aggregate_id: &'a str,
    sequence: i64,
    event_type: &'a str,
    event_version: &'a str,
    payload: &'a RawValue,
    metadata: &'a RawValue,
    recorded_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_hash: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_hash: Option<String>,
    leaf_hash: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Read {
    position: i64,
    commit: i64,
    command_id: CommandId,
    aggregate_type: String,
    aggregate_id: String,
    sequence: i64,
    event_type: String,
    event_version: String,
    payload: Box<RawValue>,
    metadata: Box<RawValue>,
    recorded_at: Timestamp,
    key_hash: Option<String>,
    request_hash: Option<String>,
    leaf_hash: String,
}

impl Serialize for RecordedEvent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::Error;
        let raw = |text| serde_json::from_str::<&RawValue>(text).map_err(S::Error::custom);
        Written {
            position: self.position,
            commit: self.commit,
            event_id: self.event_id(),
            command_id: self.command_id,
            aggregate_type: &self.aggregate_type,
            aggregate_id: &self.aggregate_id,
            sequence: self.sequence,
            event_type: &self.event_type,
            event_version: &self.event_version,
            payload: raw(&self.payload)?,
            metadata: raw(&self.metadata)?,
            recorded_at: self.recorded_at,
            key_hash: self.key_hash.as_ref().map(|hash| hex(hash)),
            request_hash: self.request_hash.as_ref().map(|hash| hex(hash)),
            leaf_hash: hex(&self.leaf_hash),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for RecordedEvent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let read = Read::deserialize(deserializer)?;
        Ok(Self {
            position: read.position,
            commit: read.commit,
            command_id: read.command_id,
            aggregate_type: read.aggregate_type.into(),
            aggregate_id: read.aggregate_id,
            sequence: read.sequence,
            event_type: read.event_type.into(),
            event_version: read.event_version.into(),
            payload: read.payload.get().to_owned(),
            metadata: read.metadata.get().to_owned(),
            recorded_at: read.recorded_at,
            key_hash: read.key_hash.as_deref().map(unhex).transpose()?,
            request_hash: read.request_hash.as_deref().map(unhex).transpose()?,
            leaf_hash: unhex(&read.leaf_hash)?,
        })
    }
}

pub(crate) fn unhex<const N: usize, E: serde::de::Error>(text: &str) -> Result<[u8; N], E> {
    from_hex(text).ok_or_else(|| E::custom(format_args!("not {N} bytes in lower-case hex")))
}

/// Hashes as hex in JSON, for `#[serde(with = "crate::record::hash_text")]`.
pub(crate) mod hash_text {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(hash: &Hash, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex(hash))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Hash, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        unhex(&text)
    }
}
