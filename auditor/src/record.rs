//! What the log says, as plain data: from a row of Postgres or a line of an export, before anything is believed.

use serde::ser::Error as _;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::hash::{event_id, from_hex, hex};

pub(crate) struct StoredEvent {
    pub(crate) position: i64,
    pub(crate) commit: i64,
    pub(crate) command_id: Uuid,
    pub(crate) aggregate_type: String,
    pub(crate) aggregate_id: String,
    pub(crate) sequence: i64,
    pub(crate) event_type: String,
    pub(crate) event_version: String,
    pub(crate) payload: String,
    pub(crate) metadata: String,
    /// Microseconds since 1970.
    pub(crate) recorded_at: i64,
    pub(crate) key_hash: Option<Vec<u8>>,
    pub(crate) request_hash: Option<Vec<u8>>,
    pub(crate) leaf_hash: Vec<u8>,
}

pub(crate) struct StoredCommit {
    pub(crate) number: i64,
    pub(crate) first: i64,
    pub(crate) last: i64,
    pub(crate) root: Vec<u8>,
    pub(crate) chain: Vec<u8>,
    /// What only the table has.
    pub(crate) row: Option<CommitRow>,
}

pub(crate) struct CommitRow {
    pub(crate) previous_number: Option<i64>,
    pub(crate) previous_last: Option<i64>,
    pub(crate) previous_chain: Option<Vec<u8>>,
    pub(crate) recorded_at: i64,
}

/// A line of an export: API.md, "The log".
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Line {
    Ledger(LedgerLine),
    Commit(CommitLine),
    Checkpoint(CheckpointLine),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LedgerLine {
    pub(crate) id: String,
    pub(crate) format: i64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CommitLine {
    number: i64,
    first: i64,
    last: i64,
    root: String,
    chain: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CheckpointLine {
    pub(crate) position: i64,
    pub(crate) commit: i64,
    pub(crate) chain: String,
}

/// An event's line, its fields in the order of API.md.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct EventLine<'a> {
    position: i64,
    commit: i64,
    event_id: String,
    command_id: String,
    aggregate_type: String,
    aggregate_id: String,
    sequence: i64,
    event_type: String,
    event_version: String,
    #[serde(borrow)]
    payload: &'a RawValue,
    #[serde(borrow)]
    metadata: &'a RawValue,
    recorded_at: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key_hash: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    request_hash: Option<String>,
    leaf_hash: String,
}

impl StoredEvent {
    pub(crate) fn to_line(&self) -> Result<String, serde_json::Error> {
        let raw = |text: &str| match text.contains(['\n', '\r']) {
            true => Err(serde_json::Error::custom("a line break in payload or metadata")),
            false => Ok(()),
        };
        raw(&self.payload)?;
        raw(&self.metadata)?;
        serde_json::to_string(&EventLine {
            position: self.position,
            commit: self.commit,
            event_id: event_id(&self.leaf_hash),
            command_id: format!("cmd_{}", self.command_id),
            aggregate_type: self.aggregate_type.clone(),
            aggregate_id: self.aggregate_id.clone(),
            sequence: self.sequence,
            event_type: self.event_type.clone(),
            event_version: self.event_version.clone(),
            payload: serde_json::from_str(&self.payload)?,
            metadata: serde_json::from_str(&self.metadata)?,
            recorded_at: time_text(self.recorded_at).ok_or_else(|| serde_json::Error::custom("recordedAt"))?,
            key_hash: self.key_hash.as_deref().map(hex),
            request_hash: self.request_hash.as_deref().map(hex),
            leaf_hash: hex(&self.leaf_hash),
        })
    }

    /// Reads an event's line. Each value has one spelling, so that no byte of a line can change unnoticed.
    pub(crate) fn from_line(line: &str) -> Result<Self, String> {
        let line: EventLine<'_> = serde_json::from_str(line).map_err(|error| error.to_string())?;
        let hash = |name: &str, text: &str| from_hex(text).ok_or_else(|| format!("{name} is not lower-case hex"));
        let leaf_hash = hash("leafHash", &line.leaf_hash)?;
        if line.event_id != event_id(&leaf_hash) {
            return Err("eventId does not follow from leafHash".to_owned());
        }
        Ok(Self {
            position: line.position,
            commit: line.commit,
            command_id: id("cmd_", &line.command_id).ok_or("commandId is not cmd_ and a UUID")?,
            aggregate_type: line.aggregate_type,
            aggregate_id: line.aggregate_id,
            sequence: line.sequence,
            event_type: line.event_type,
            event_version: line.event_version,
            payload: line.payload.get().to_owned(),
            metadata: line.metadata.get().to_owned(),
            recorded_at: time_from_text(&line.recorded_at).ok_or("recordedAt is not a time in UTC with six digits")?,
            key_hash: line.key_hash.map(|text| hash("keyHash", &text)).transpose()?,
            request_hash: line.request_hash.map(|text| hash("requestHash", &text)).transpose()?,
            leaf_hash,
        })
    }
}

impl StoredCommit {
    pub(crate) fn to_line(&self) -> Line {
        Line::Commit(CommitLine {
            number: self.number,
            first: self.first,
            last: self.last,
            root: hex(&self.root),
            chain: hex(&self.chain),
        })
    }

    pub(crate) fn from_line(line: CommitLine) -> Result<Self, String> {
        let hash = |name: &str, text: &str| from_hex(text).ok_or_else(|| format!("{name} is not lower-case hex"));
        Ok(Self {
            number: line.number,
            first: line.first,
            last: line.last,
            root: hash("root", &line.root)?,
            chain: hash("chain", &line.chain)?,
            row: None,
        })
    }
}

/// An id in its one spelling: prefix, then a UUID in lower case with hyphens.
pub(crate) fn id(prefix: &str, text: &str) -> Option<Uuid> {
    let digits = text.strip_prefix(prefix)?;
    let uuid = Uuid::try_parse(digits).ok()?;
    (uuid.hyphenated().to_string() == digits).then_some(uuid)
}

/// RFC 3339 in UTC with six digits of a second.
pub(crate) fn time_text(micros: i64) -> Option<String> {
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(micros).checked_mul(1_000)?).ok()?;
    let (month, fraction) = (u8::from(at.month()), at.microsecond());
    Some(format!(
        "{:04}-{month:02}-{:02}T{:02}:{:02}:{:02}.{fraction:06}Z",
        at.year(),
        at.day(),
        at.hour(),
        at.minute(),
        at.second()
    ))
}

fn time_from_text(text: &str) -> Option<i64> {
    let at = OffsetDateTime::parse(text, &Rfc3339).ok()?;
    let micros = i64::try_from(at.unix_timestamp_nanos().checked_div(1_000)?).ok()?;
    (time_text(micros).as_deref() == Some(text)).then_some(micros)
}
