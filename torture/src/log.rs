//! The log as it lies in Postgres, and its hashes as API.md, "The log", defines them: written down again here, from the
//! contract alone.
//!
//! Left out: what the events mean (`fold.rs`).

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Log {
    pub(crate) ledger: Uuid,
    pub(crate) commits: Vec<Commit>,
    pub(crate) events: Vec<Event>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Commit {
    pub(crate) number: i64,
    pub(crate) first: i64,
    pub(crate) last: i64,
    pub(crate) root: Vec<u8>,
    pub(crate) chain: Vec<u8>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Event {
    pub(crate) position: i64,
    pub(crate) commit: i64,
    pub(crate) aggregate_type: String,
    pub(crate) aggregate_id: String,
    pub(crate) sequence: i64,
    pub(crate) event_type: String,
    pub(crate) event_version: String,
    /// As stored, byte for byte.
    pub(crate) payload: String,
    pub(crate) metadata: String,
    pub(crate) command: Uuid,
    /// Microseconds since 1970.
    pub(crate) recorded_at: i64,
    pub(crate) leaf: Vec<u8>,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) request: Option<Vec<u8>>,
}

impl Log {
    /// All of it, past every wire and every service.
    pub(crate) async fn read(database_url: &str) -> anyhow::Result<Self> {
        let mut connection = PgConnection::connect(database_url).await.context("connecting to read the log")?;
        let ledger = sqlx::query_scalar("select id from ledger.identity").fetch_one(&mut connection).await?;
        let commits = sqlx::query(
            "select number, first_position, last_position, root, chain from ledger.commits order by number",
        );
        let commits = commits.fetch_all(&mut connection).await?.iter().map(commit).collect::<Result<_, _>>()?;
        let events = sqlx::query(
            "select position, commit_number, aggregate_type, aggregate_id, sequence, event_type, event_version,
                    payload::text as payload, metadata::text as metadata, command_id,
                    (extract(epoch from recorded_at) * 1000000)::bigint as recorded_at, leaf_hash, key_hash, request_hash
             from ledger.events order by position",
        );
        let events = events.fetch_all(&mut connection).await?.iter().map(event).collect::<Result<_, _>>()?;
        connection.close().await.ok(); // everything has been read
        Ok(Self { ledger, commits, events })
    }

    pub(crate) fn head(&self) -> i64 {
        self.events.last().map_or(0, |event| event.position)
    }
}

impl Event {
    /// What is inside of the one key that the payload has; it must be the event's type.
    pub(crate) fn content(&self) -> Option<Value> {
        let mut payload: Value = serde_json::from_str(&self.payload).ok()?;
        Some(payload.get_mut(&self.event_type)?.take())
    }

    /// SHA-256(0x00 ‖ each field's length and bytes).
    pub(crate) fn leaf_of_content(&self) -> Vec<u8> {
        let mut hash = Sha256::new();
        hash.update([0]);
        for field in [
            self.aggregate_type.as_bytes(),
            self.aggregate_id.as_bytes(),
            &self.sequence.to_be_bytes(),
            self.event_type.as_bytes(),
            self.event_version.as_bytes(),
            &self.recorded_at.to_be_bytes(),
            self.command.as_bytes(),
            self.key.as_deref().unwrap_or_default(),
            self.request.as_deref().unwrap_or_default(),
            self.payload.as_bytes(),
            self.metadata.as_bytes(),
        ] {
            hash.update(u32::try_from(field.len()).unwrap_or(u32::MAX).to_be_bytes());
            hash.update(field);
        }
        hash.finalize().to_vec()
    }
}

/// The id under which a webhook reports the event with this leaf as this type.
pub(crate) fn webhook_id(leaf: &[u8], event_type: &str) -> String {
    let hash = Sha256::new().chain_update(leaf).chain_update(event_type).finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash[..16]);
    format!("evt_{}", uuid::Builder::from_custom_bytes(bytes).into_uuid())
}

/// The first 16 bytes of SHA-256(client ‖ 0 ‖ key); if the key ends in a UUIDv7, the time in it instead of the first six.
pub(crate) fn key_hash(client: &str, key: &str) -> Vec<u8> {
    let hash = Sha256::new().chain_update(client).chain_update([0]).chain_update(key).finalize();
    match time_at_the_end(key.as_bytes()) {
        Some(time) => [&time[..], &hash[6..16]].concat(),
        None => hash[..16].to_vec(),
    }
}

/// Read letter by letter, and not by the library that the product uses.
fn time_at_the_end(key: &[u8]) -> Option<[u8; 6]> {
    let uuid = key.len().checked_sub(36).map(|from| &key[from..])?;
    let shape = b"xxxxxxxx-xxxx-7xxx-vxxx-xxxxxxxxxxxx";
    let fits = uuid.iter().zip(shape).all(|(letter, wanted)| match wanted {
        b'x' => letter.is_ascii_hexdigit(),
        b'v' => b"89abAB".contains(letter),
        other => letter == other,
    });
    let digits = String::from_utf8([&uuid[..8], &uuid[9..13]].concat()).ok()?;
    let time = u64::from_str_radix(&digits, 16).ok().filter(|_| fits)?;
    time.to_be_bytes()[2..].try_into().ok()
}

/// The chain of commit 0.
pub(crate) fn genesis(ledger: Uuid) -> Vec<u8> {
    Sha256::new().chain_update("daybook").chain_update(ledger.as_bytes()).finalize().to_vec()
}

pub(crate) fn chain(previous: &[u8], root: &[u8], first: i64, last: i64) -> Vec<u8> {
    let hash = Sha256::new().chain_update(previous).chain_update(root);
    hash.chain_update(first.to_be_bytes()).chain_update(last.to_be_bytes()).finalize().to_vec()
}

/// The Merkle tree hash of RFC 6962 over leaves that are hashes already.
pub(crate) fn root(leaves: &[Vec<u8>]) -> Vec<u8> {
    match leaves {
        [] => Sha256::digest([]).to_vec(),
        [leaf] => leaf.clone(),
        _ => {
            let mut split = 1;
            while split * 2 < leaves.len() {
                split *= 2;
            }
            let (left, right) = leaves.split_at(split);
            Sha256::new().chain_update([1]).chain_update(root(left)).chain_update(root(right)).finalize().to_vec()
        }
    }
}

fn commit(row: &sqlx::postgres::PgRow) -> sqlx::Result<Commit> {
    Ok(Commit {
        number: row.try_get("number")?,
        first: row.try_get("first_position")?,
        last: row.try_get("last_position")?,
        root: row.try_get("root")?,
        chain: row.try_get("chain")?,
    })
}

fn event(row: &sqlx::postgres::PgRow) -> sqlx::Result<Event> {
    Ok(Event {
        position: row.try_get("position")?,
        commit: row.try_get("commit_number")?,
        aggregate_type: row.try_get("aggregate_type")?,
        aggregate_id: row.try_get("aggregate_id")?,
        sequence: row.try_get("sequence")?,
        event_type: row.try_get("event_type")?,
        event_version: row.try_get("event_version")?,
        payload: row.try_get("payload")?,
        metadata: row.try_get("metadata")?,
        command: row.try_get("command_id")?,
        recorded_at: row.try_get("recorded_at")?,
        leaf: row.try_get("leaf_hash")?,
        key: row.try_get("key_hash")?,
        request: row.try_get("request_hash")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors of `docs/`, which a program computed that shares no code with Daybook.
    #[test]
    fn the_hashes_are_those_of_the_published_vectors() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/test-vectors.json");
        let vectors: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        let unhex = |text: &Value| -> Vec<u8> {
            let text = text.as_str().unwrap();
            (0..text.len() / 2).map(|at| u8::from_str_radix(&text[at * 2..at * 2 + 2], 16).unwrap()).collect()
        };
        let of = |kind: &str| vectors[kind].as_array().unwrap().clone();
        for vector in of("root") {
            let leaves: Vec<_> = vector["leaves"].as_array().unwrap().iter().map(unhex).collect();
            assert_eq!(root(&leaves), unhex(&vector["root"]));
        }
        for vector in of("genesis") {
            assert_eq!(genesis(vector["ledger"].as_str().unwrap().parse().unwrap()), unhex(&vector["chain"]));
        }
        for vector in of("chain") {
            let (first, last) = (vector["first"].as_i64().unwrap(), vector["last"].as_i64().unwrap());
            assert_eq!(
                chain(&unhex(&vector["previous"]), &unhex(&vector["root"]), first, last),
                unhex(&vector["chain"])
            );
        }
        for vector in of("keyHash") {
            let (client, key) = (vector["clientId"].as_str().unwrap(), vector["key"].as_str().unwrap());
            assert_eq!(key_hash(client, key), unhex(&vector["keyHash"]));
        }
        for vector in of("webhookEventId") {
            assert_eq!(webhook_id(&unhex(&vector["leaf"]), vector["eventType"].as_str().unwrap()), vector["eventId"]);
        }
    }
}
