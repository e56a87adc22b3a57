//! The hashes are those of `docs/test-vectors.json`, which another program computed.
#![expect(clippy::unwrap_used, reason = "clippy.toml excepts tests, but not their helpers")]

use event_store::{RecordedEvent, hash};
use ledger_core::{EventId, LedgerId};
use serde_json::Value;

fn vectors(name: &str) -> Vec<Value> {
    let all: Value = serde_json::from_str(include_str!("../../docs/test-vectors.json")).unwrap();
    let vectors = all[name].as_array().unwrap().clone();
    assert!(!vectors.is_empty());
    vectors
}

fn text<'a>(vector: &'a Value, name: &str) -> &'a str {
    vector[name].as_str().unwrap_or_else(|| panic!("{name} is text"))
}

fn bytes(vector: &Value, name: &str) -> hash::Hash {
    hash::from_hex(text(vector, name)).unwrap()
}

#[test]
fn leaves_are_those_of_the_vectors() {
    for vector in vectors("leaf") {
        let event = RecordedEvent {
            position: 1,
            commit: 1,
            command_id: text(&vector, "commandId").parse().unwrap(),
            aggregate_type: text(&vector, "aggregateType").to_owned().into(),
            aggregate_id: text(&vector, "aggregateId").to_owned(),
            sequence: vector["sequence"].as_i64().unwrap(),
            event_type: text(&vector, "eventType").to_owned().into(),
            event_version: text(&vector, "eventVersion").to_owned().into(),
            payload: text(&vector, "payload").to_owned(),
            metadata: text(&vector, "metadata").to_owned(),
            recorded_at: text(&vector, "recordedAt").parse().unwrap(),
            key_hash: vector["keyHash"].as_str().map(|hash| hash::from_hex(hash).unwrap()),
            request_hash: vector["requestHash"].as_str().map(|hash| hash::from_hex(hash).unwrap()),
            leaf_hash: [0; 32],
        };
        assert_eq!(hash::hex(&event.leaf()), text(&vector, "leaf"), "{}", vector["name"]);
    }
}

#[test]
fn roots_are_those_of_the_vectors() {
    for vector in vectors("root") {
        let leaves = vector["leaves"].as_array().unwrap().iter();
        let leaves: Vec<hash::Hash> = leaves.map(|leaf| hash::from_hex(leaf.as_str().unwrap()).unwrap()).collect();
        assert_eq!(hash::hex(&hash::root(&leaves)), text(&vector, "root"));
    }
}

#[test]
fn chains_are_those_of_the_vectors() {
    for vector in vectors("genesis") {
        let ledger: LedgerId = text(&vector, "ledger").parse().unwrap();
        assert_eq!(hash::hex(&hash::genesis(ledger)), text(&vector, "chain"));
    }
    for vector in vectors("chain") {
        let position = |name: &str| vector[name].as_i64().unwrap();
        let (previous, root) = (bytes(&vector, "previous"), bytes(&vector, "root"));
        let chain = hash::chain(&previous, &root, position("first"), position("last"));
        assert_eq!(hash::hex(&chain), text(&vector, "chain"));
    }
}

#[test]
fn event_ids_are_those_of_the_vectors() {
    for vector in vectors("eventId") {
        assert_eq!(EventId::from_leaf(&bytes(&vector, "leaf")).to_string(), text(&vector, "eventId"));
    }
    for vector in vectors("webhookEventId") {
        let id = EventId::of_webhook(&bytes(&vector, "leaf"), text(&vector, "eventType"));
        assert_eq!(id.to_string(), text(&vector, "eventId"));
    }
}
