//! The hashes of API.md, "The log", written from its text.
//!
//! The tree is built as leaves arrive, keeping one node for each power of two, so a commit of any size takes no
//! memory. It is the tree of RFC 6962: splitting at the largest power of two below the size gives the same nodes.

use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::record::StoredEvent;

pub(crate) type Hash = [u8; 32];

/// A Merkle tree that grows to the right.
#[derive(Default)]
pub(crate) struct Tree {
    /// Complete subtrees from left to right, each with its height; heights fall strictly.
    complete: Vec<(u32, Hash)>,
}

impl Tree {
    pub(crate) fn push(&mut self, leaf: Hash) {
        let mut grown = (0_u32, leaf);
        while let Some((height, left)) = self.complete.pop_if(|(height, _)| *height == grown.0) {
            grown = (height.saturating_add(1), node(&left, &grown.1));
        }
        self.complete.push(grown);
    }

    pub(crate) fn root(&self) -> Hash {
        let mut subtrees = self.complete.iter().rev().map(|(_, hash)| *hash);
        let Some(right) = subtrees.next() else { return Sha256::digest([]).into() };
        subtrees.fold(right, |right, left| node(&left, &right))
    }
}

fn node(left: &Hash, right: &Hash) -> Hash {
    Sha256::new().chain_update([1]).chain_update(left).chain_update(right).finalize().into()
}

/// SHA-256(0x00 ‖ each field with its length before it).
pub(crate) fn leaf(event: &StoredEvent) -> Hash {
    let sequence = event.sequence.to_be_bytes();
    let recorded_at = event.recorded_at.to_be_bytes();
    let fields: [&[u8]; 11] = [
        event.aggregate_type.as_bytes(),
        event.aggregate_id.as_bytes(),
        &sequence,
        event.event_type.as_bytes(),
        event.event_version.as_bytes(),
        &recorded_at,
        event.command_id.as_bytes(),
        event.key_hash.as_deref().unwrap_or_default(),
        event.request_hash.as_deref().unwrap_or_default(),
        event.payload.as_bytes(),
        event.metadata.as_bytes(),
    ];
    let mut hash = Sha256::new_with_prefix([0]);
    for field in fields {
        // Postgres and the reader of exports both stop far below 4 GiB.
        let length = u32::try_from(field.len()).expect("a field is shorter than 4 GiB");
        hash.update(length.to_be_bytes());
        hash.update(field);
    }
    hash.finalize().into()
}

/// SHA-256(previous chain ‖ root ‖ first ‖ last).
pub(crate) fn chain(previous: &[u8], root: &[u8], first: i64, last: i64) -> Hash {
    let mut hash = Sha256::new();
    hash.update(previous);
    hash.update(root);
    hash.update(first.to_be_bytes());
    hash.update(last.to_be_bytes());
    hash.finalize().into()
}

/// SHA-256("daybook" ‖ the ledger's id).
pub(crate) fn genesis(ledger: Uuid) -> Hash {
    Sha256::new_with_prefix(b"daybook").chain_update(ledger.as_bytes()).finalize().into()
}

/// `evt_` and the UUIDv8 from SHA-256(leaf).
pub(crate) fn event_id(leaf: &[u8]) -> String {
    format!("evt_{}", uuid_v8(Sha256::digest(leaf).as_slice()))
}

/// RFC 9562, section 5.8: 122 free bits, version 8, variant 10.
fn uuid_v8(hash: &[u8]) -> Uuid {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(hash.get(..16).expect("a SHA-256 has 32 bytes"));
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Uuid::from_bytes(bytes)
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads lower-case hex, and nothing else.
pub(crate) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !digits || !text.len().is_multiple_of(2) {
        return None;
    }
    let pair = |at: usize| u8::from_str_radix(text.get(at..at.checked_add(2)?)?, 16).ok();
    (0..text.len()).step_by(2).map(pair).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::record::StoredEvent;

    fn vectors(name: &str) -> Vec<Value> {
        let all: Value = serde_json::from_str(include_str!("../../docs/test-vectors.json")).unwrap();
        let vectors = all[name].as_array().unwrap().clone();
        assert!(!vectors.is_empty());
        vectors
    }

    fn bytes(value: &Value) -> Vec<u8> {
        from_hex(value.as_str().unwrap()).unwrap()
    }

    #[test]
    fn leaves_and_event_ids_are_those_of_the_vectors() {
        for vector in vectors("leaf") {
            let mut line = vector.clone();
            let text = |name: &str| vector[name].as_str().unwrap().to_owned();
            let own = line.as_object_mut().unwrap();
            own.remove("name");
            own.remove("leaf");
            own.insert("leafHash".to_owned(), text("leaf").into());
            own.insert("eventId".to_owned(), event_id(&bytes(&vector["leaf"])).into());
            own.insert("position".to_owned(), 1.into());
            own.insert("commit".to_owned(), 1.into());
            // In a line payload and metadata are JSON, in the vectors they are text: both spell the same bytes.
            for name in ["payload", "metadata"] {
                own.insert(name.to_owned(), Value::Null);
            }
            let mut event = StoredEvent::from_line(&line.to_string()).unwrap();
            (event.payload, event.metadata) = (text("payload"), text("metadata"));
            assert_eq!(hex(&leaf(&event)), text("leaf"), "{}", vector["name"]);
        }
        for vector in vectors("eventId") {
            assert_eq!(event_id(&bytes(&vector["leaf"])), vector["eventId"].as_str().unwrap());
        }
    }

    #[test]
    fn roots_and_chains_are_those_of_the_vectors() {
        for vector in vectors("root") {
            let mut tree = Tree::default();
            for leaf in vector["leaves"].as_array().unwrap() {
                tree.push(bytes(leaf).try_into().unwrap());
            }
            assert_eq!(tree.root().as_slice(), bytes(&vector["root"]));
        }
        for vector in vectors("chain") {
            let number = |name: &str| vector[name].as_i64().unwrap();
            let own = chain(&bytes(&vector["previous"]), &bytes(&vector["root"]), number("first"), number("last"));
            assert_eq!(own.as_slice(), bytes(&vector["chain"]));
        }
        for vector in vectors("genesis") {
            let ledger = vector["ledger"].as_str().unwrap().parse().unwrap();
            assert_eq!(genesis(ledger).as_slice(), bytes(&vector["chain"]));
        }
    }
}
