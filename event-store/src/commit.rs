//! A commit: the events of one append, with the root and chain that seal them.

use ledger_core::{CommandId, Event, Key, NewEvent, Timestamp};
use serde::{Deserialize, Serialize};

use crate::RecordedEvent;
use crate::hash::{Hash, chain, root};
use crate::record::hash_text;

/// Where the log ends: what the next commit is decided upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub position: i64,
    pub commit: i64,
    pub chain: Hash,
    pub recorded_at: Timestamp,
}

/// One append. What is on the bus and in memory; `ledger.commits` holds all of it but the events.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Commit {
    pub number: i64,
    pub first: i64,
    pub last: i64,
    #[serde(with = "hash_text")]
    pub previous_chain: Hash,
    #[serde(with = "hash_text")]
    pub root: Hash,
    #[serde(with = "hash_text")]
    pub chain: Hash,
    pub events: Vec<RecordedEvent>,
}

/// An event as a decision left it, before the log has given it a place.
#[derive(Clone, Debug)]
pub struct Draft {
    pub command: CommandId,
    /// On a keyed command's first event.
    pub key: Option<Key>,
    pub metadata: String,
    pub sequence: i64,
    pub event: Event,
}

impl Draft {
    pub fn new(command: CommandId, key: Option<Key>, metadata: &str, event: NewEvent) -> Self {
        Self { command, key, metadata: metadata.to_owned(), sequence: event.sequence, event: event.event }
    }
}

/// A commit that grows: its events have their places and their hashes, and more may follow.
#[derive(Debug)]
pub struct OpenCommit {
    head: Head,
    recorded_at: Timestamp,
    events: Vec<RecordedEvent>,
}

impl OpenCommit {
    /// The commit that follows `head`. The clock never goes back in the log, whatever it does outside.
    pub fn after(head: &Head, now: Timestamp) -> Self {
        Self { head: *head, recorded_at: now.max(head.recorded_at), events: Vec::new() }
    }

    /// The position of the next event.
    pub fn next(&self) -> i64 {
        self.head.position + 1 + self.events.len() as i64
    }

    pub fn len(&self) -> usize {
        self.events.len()
    }

    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    pub fn push(&mut self, draft: Draft) {
        let mut event = RecordedEvent {
            position: self.next(),
            commit: self.head.commit + 1,
            command_id: draft.command,
            aggregate_type: draft.event.aggregate_type().into(),
            aggregate_id: draft.event.aggregate_id(),
            sequence: draft.sequence,
            event_type: draft.event.event_type().into(),
            event_version: draft.event.event_version().into(),
            payload: draft.event.payload(),
            metadata: draft.metadata,
            recorded_at: self.recorded_at,
            key_hash: draft.key.map(|key| key.hash),
            request_hash: draft.key.map(|key| key.request),
            leaf_hash: [0; 32],
        };
        event.leaf_hash = event.leaf();
        self.events.push(event);
    }

    /// Closes it. There must be an event.
    pub fn seal(self) -> Commit {
        let Self { head, events, .. } = self;
        let leaves: Vec<_> = events.iter().map(|event| event.leaf_hash).collect();
        let (first, last) = (head.position + 1, events.last().expect("a commit has events").position);
        let root = root(&leaves);
        let chain = chain(&head.chain, &root, first, last);
        Commit { number: head.commit + 1, first, last, previous_chain: head.chain, root, chain, events }
    }
}

impl Commit {
    /// Seals the drafts as the commit that follows `head`.
    pub fn seal(head: &Head, now: Timestamp, drafts: &[Draft]) -> Self {
        let mut open = OpenCommit::after(head, now);
        for draft in drafts {
            open.push(draft.clone());
        }
        open.seal()
    }

    /// What it takes, nearly: its payloads and metadata.
    pub fn bytes(&self) -> usize {
        self.events.iter().map(|event| event.payload.len() + event.metadata.len()).sum()
    }

    /// The head of a log that ends with this commit.
    pub fn head(&self) -> Head {
        let last = self.events.last().expect("a commit has events");
        Head { position: self.last, commit: self.number, chain: self.chain, recorded_at: last.recorded_at }
    }
}
