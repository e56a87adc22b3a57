//! History can always be read: one written sample of every event there has ever been, in `tests/history/`.
//!
//! A file is named after its event type and version, and is never edited. A new event or version adds one.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::collections::BTreeSet;
use std::path::Path;

use cqrs_es::persist::{EventUpcaster, SerializedEvent};
use ledger_core::{CommandEvent, Event, PartnerEvent, TransactionEvent, WalletEvent};
use serde::Deserialize;
use serde_json::value::RawValue;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sample {
    aggregate_type: String,
    aggregate_id: String,
    event_type: String,
    event_version: String,
    payload: Box<RawValue>,
}

fn samples() -> Vec<(String, Sample)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/history");
    let mut samples: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|file| {
            let path = file.unwrap().path();
            let sample = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
            (path.file_stem().unwrap().to_string_lossy().into_owned(), sample)
        })
        .collect();
    samples.sort_by(|a, b| a.0.cmp(&b.0));
    samples
}

fn read(sample: &Sample) -> Event {
    let Sample { aggregate_type, aggregate_id, event_type, event_version, payload } = sample;
    Event::read(aggregate_type, aggregate_id, event_type, event_version, payload.get()).unwrap()
}

#[test]
fn every_event_ever_written_is_read_and_todays_are_written_the_same_to_the_byte() {
    for (name, sample) in samples() {
        let event = read(&sample);
        assert_eq!(name, format!("{}-{}", sample.event_type, sample.event_version));
        if sample.event_version == event.event_version() {
            assert_eq!(event.payload(), sample.payload.get(), "{name}");
        }
    }
}

#[test]
fn every_event_that_can_be_written_has_a_sample() {
    // No wildcard: a new event does not compile here until it is listed below.
    let known = |event: &Event| match event {
        Event::Wallet(
            _,
            WalletEvent::Opened { .. }
            | WalletEvent::Frozen { .. }
            | WalletEvent::Unfrozen { .. }
            | WalletEvent::Closed { .. },
        )
        | Event::Partner(
            _,
            PartnerEvent::Registered { .. }
            | PartnerEvent::Suspended { .. }
            | PartnerEvent::Resumed {}
            | PartnerEvent::SecretRotated { .. },
        )
        | Event::Transaction(
            _,
            TransactionEvent::Posted { .. }
            | TransactionEvent::Requested { .. }
            | TransactionEvent::Settled { .. }
            | TransactionEvent::Failed { .. }
            | TransactionEvent::Expired { .. }
            | TransactionEvent::Declined { .. },
        )
        | Event::Command(_, CommandEvent::Declined { .. } | CommandEvent::BatchDeclined { .. }) => event.event_type(),
    };
    let sampled: BTreeSet<_> = samples().iter().map(|(_, sample)| known(&read(sample))).collect();
    let listed = [
        "CommandDeclined",
        "BatchDeclined",
        "PartnerRegistered",
        "PartnerResumed",
        "PartnerSecretRotated",
        "PartnerSuspended",
        "TransactionDeclined",
        "TransactionExpired",
        "TransactionFailed",
        "TransactionPosted",
        "TransactionRequested",
        "TransactionSettled",
        "WalletClosed",
        "WalletFrozen",
        "WalletOpened",
        "WalletUnfrozen",
    ];
    assert_eq!(sampled, BTreeSet::from(listed));
}

/// An upcaster of the kind that a changed shape would need: `WalletFrozen` 0.9.0 called the reason `note`.
struct NoteBecomesReason;

impl EventUpcaster for NoteBecomesReason {
    fn can_upcast(&self, event_type: &str, event_version: &str) -> bool {
        event_type == "WalletFrozen" && event_version == "0.9.0"
    }

    fn upcast(&self, mut event: SerializedEvent) -> SerializedEvent {
        let frozen = event.payload["WalletFrozen"].as_object_mut().unwrap();
        let note = frozen.remove("note").unwrap();
        frozen.insert("reason".to_owned(), note);
        event.event_version = "1.0.0".to_owned();
        event
    }
}

#[test]
fn an_older_version_is_lifted_before_it_is_read_and_an_unknown_one_is_refused() {
    let id = "wal_0192f0c1-2d3e-7abc-8def-0123456789ab";
    let old = r#"{"WalletFrozen":{"note":"stolen","walletVersion":2,"balanceAfter":"1.00"}}"#;
    let new = r#"{"WalletFrozen":{"reason":"stolen","walletVersion":2,"balanceAfter":"1.00"}}"#;
    let upcasters: Vec<Box<dyn EventUpcaster>> = vec![Box::new(NoteBecomesReason)];
    let lifted = Event::read_upcast(&upcasters, "wallet", id, "WalletFrozen", "0.9.0", old).unwrap();
    assert_eq!(lifted, Event::read("wallet", id, "WalletFrozen", "1.0.0", new).unwrap());
    assert!(Event::read("wallet", id, "WalletFrozen", "0.9.0", old).is_err());
}

#[test]
fn history_that_was_never_written_is_refused() {
    let id = "txn_0192f0c1-2d3e-7abc-8def-0123456789ab";
    let wallet = "wal_0192f0c1-2d3e-7abc-8def-0123456789ab";
    let entry = |direction: &str, amount: &str| {
        format!(
            r#"{{"walletId":"{wallet}","direction":"{direction}","amount":"{amount}","balanceAfter":"0.00","walletVersion":2}}"#
        )
    };
    let settled = |entries: &str| {
        format!(
            r#"{{"TransactionSettled":{{"walletId":"{wallet}","currency":"EUR","entries":[{entries}],"providerReference":"r"}}}}"#
        )
    };
    let read = |payload: &str| Event::read("transaction", id, "TransactionSettled", "1.0.0", payload);
    assert!(read(&settled(&format!("{},{}", entry("DEBIT", "1.00"), entry("CREDIT", "1.00")))).is_ok());
    assert!(read(&settled(&format!("{},{}", entry("DEBIT", "1.00"), entry("CREDIT", "1.01")))).is_err(), "unbalanced");
    assert!(read(&settled("")).is_err(), "no entries");
    assert!(
        read(r#"{"TransactionExpired":{"walletId":"wal_0192f0c1-2d3e-7abc-8def-0123456789ab"}}"#).is_err(),
        "another type"
    );
    assert!(Event::read("nobody", id, "X", "1.0.0", "{}").is_err());
}
