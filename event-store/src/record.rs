//! An event as the log keeps it, and its one JSON form: in `/v1/events`, in exports and on the bus.

use ledger_core::{CommandId, CorruptEvent, Event, EventId, Timestamp};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;
use sqlx::Row;
use sqlx::postgres::PgRow;
use time::OffsetDateTime;

use crate::StoreError;
use crate::hash::{Hash, Leaf, from_hex, hex, leaf};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedEvent {
    pub position: i64,
    pub commit: i64,
    pub command_id: CommandId,
    pub aggregate_type: String,
    pub aggregate_id: String,
    pub sequence: i64,
    pub event_type: String,
    pub event_version: String,
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
        Event::read(&self.aggregate_type, &self.aggregate_id, &self.event_type, &self.event_version, &self.payload)
    }

    pub fn event_id(&self) -> EventId {
        EventId::from_leaf(&self.leaf_hash)
    }

    /// The leaf hash as its content gives it, whatever is stored.
    pub fn leaf(&self) -> Hash {
        leaf(&Leaf {
            aggregate_type: &self.aggregate_type,
            aggregate_id: &self.aggregate_id,
            sequence: self.sequence,
            event_type: &self.event_type,
            event_version: &self.event_version,
            recorded_at: self.recorded_at,
            command_id: self.command_id,
            key_hash: self.key_hash.as_ref(),
            request_hash: self.request_hash.as_ref(),
            payload: &self.payload,
            metadata: &self.metadata,
        })
    }
}

/// The columns that [`from_row`] reads.
pub(crate) const COLUMNS: &str = "position, commit_number, command_id, aggregate_type, aggregate_id, sequence, event_type, \
    event_version, payload::text as payload, metadata::text as metadata, recorded_at, key_hash, request_hash, leaf_hash";

pub(crate) fn from_row(row: &PgRow) -> Result<RecordedEvent, StoreError> {
    let recorded_at: OffsetDateTime = row.try_get("recorded_at")?;
    Ok(RecordedEvent {
        position: row.try_get("position")?,
        commit: row.try_get("commit_number")?,
        command_id: CommandId::from_uuid(row.try_get("command_id")?),
        aggregate_type: row.try_get("aggregate_type")?,
        aggregate_id: row.try_get("aggregate_id")?,
        sequence: row.try_get("sequence")?,
        event_type: row.try_get("event_type")?,
        event_version: row.try_get("event_version")?,
        payload: row.try_get("payload")?,
        metadata: row.try_get("metadata")?,
        recorded_at: recorded_at.try_into().map_err(|_| StoreError::Corrupt("recorded_at".to_owned()))?,
        key_hash: row.try_get::<Option<Vec<u8>>, _>("key_hash")?.map(|hash| sized("key_hash", hash)).transpose()?,
        request_hash: row
            .try_get::<Option<Vec<u8>>, _>("request_hash")?
            .map(|hash| sized("request_hash", hash))
            .transpose()?,
        leaf_hash: sized("leaf_hash", row.try_get("leaf_hash")?)?,
    })
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
            aggregate_type: read.aggregate_type,
            aggregate_id: read.aggregate_id,
            sequence: read.sequence,
            event_type: read.event_type,
            event_version: read.event_version,
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
