//! What relay and followers agree upon: the stream, its one subject, and how a commit is written on it.
//!
//! Stream sequence = commit number − base. The base stands in the stream's description, so the last sequence says
//! which commit came last even when the stream is emptied; and in its subject, so that a relay which still has
//! another base in mind publishes into nothing.

use std::time::Duration;

use async_nats::jetstream::{self, stream};
use async_nats::{ConnectOptions, ServerAddr};
use bytes::Bytes;
use event_store::{Commit, Log, StoreError};
use percent_encoding::percent_decode_str;

/// Where the bus is, and which of its streams is this ledger's.
#[derive(Clone, Debug)]
pub struct FeedSettings {
    /// May hold `user:password@`. `None`: there is no bus, and followers read Postgres alone.
    pub nats_url: Option<String>,
    /// Without dots, spaces and wildcards.
    pub stream: String,
}

impl FeedSettings {
    /// The settings of the ledger behind `log`: its stream is `daybook-<ledger id>`.
    pub async fn of(log: &Log, nats_url: Option<String>) -> Result<Self, StoreError> {
        Ok(Self { nats_url, stream: format!("daybook-{}", log.ledger_id().await?) })
    }
}

/// A longer commit travels as its numbers and hashes alone; the follower reads its events in Postgres.
const MESSAGE_BYTES_MAX: usize = 256 * 1024;

/// Followers never need the bus's past: these only bound what it may take.
const AGE_MAX: Duration = Duration::from_secs(60 * 60);
const BYTES_MAX: i64 = 32 * 1024 * 1024;

/// How long the bus may take to answer anything.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection of its own for whoever asks, named for the server's list of connections.
pub(crate) async fn connect(url: &str, name: &str) -> Result<jetstream::Context, async_nats::Error> {
    let address: ServerAddr = url.parse()?;
    let mut options = ConnectOptions::new().name(name).connection_timeout(PATIENCE).request_timeout(Some(PATIENCE));
    // async-nats leaves the credentials of an address unread.
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    if let (Some(user), Some(password)) = (address.username(), address.password()) {
        options = options.user_and_password(decoded(user), decoded(password));
    }
    let client = options.connect(address).await?;
    Ok(jetstream::context::ContextBuilder::new().timeout(PATIENCE).build(client))
}

pub(crate) fn subject(stream: &str, base: i64) -> String {
    format!("daybook.{stream}.commits.{base}")
}

/// The stream as it is asked for. Nothing in it is newer than nats-server 2.9.
pub(crate) fn config(stream: &str, base: i64) -> stream::Config {
    stream::Config {
        name: stream.to_owned(),
        description: Some(format!("Daybook's commits; stream sequence = commit number - base; base={base}")),
        subjects: vec![subject(stream, base)],
        retention: stream::RetentionPolicy::Limits,
        discard: stream::DiscardPolicy::Old,
        storage: stream::StorageType::File,
        num_replicas: 1,
        max_age: AGE_MAX,
        max_bytes: BYTES_MAX,
        ..Default::default()
    }
}

/// The base of a stream, if it is a stream of ours.
pub(crate) fn base(config: &stream::Config) -> Option<i64> {
    let (_, base) = config.description.as_deref()?.rsplit_once("base=")?;
    base.parse().ok().filter(|base| 0 <= *base)
}

/// Which part of what was asked for the server did not take. A server says nothing about what it does not know.
pub(crate) fn difference(asked: &stream::Config, given: &stream::Config) -> Option<&'static str> {
    let same = [
        ("description", asked.description == given.description),
        ("subjects", asked.subjects == given.subjects),
        ("retention", asked.retention == given.retention),
        ("discard", asked.discard == given.discard),
        ("storage", asked.storage == given.storage),
        ("num_replicas", asked.num_replicas == given.num_replicas),
        ("max_age", asked.max_age == given.max_age),
        ("max_bytes", asked.max_bytes == given.max_bytes),
    ];
    same.iter().find(|(_, same)| !same).map(|(name, _)| *name)
}

pub(crate) fn write(commit: &Commit) -> Bytes {
    let body = serde_json::to_vec(commit).expect("payload and metadata were JSON when Postgres took them");
    if body.len() <= MESSAGE_BYTES_MAX {
        return body.into();
    }
    let bare = Commit { events: Vec::new(), ..*commit };
    serde_json::to_vec(&bare).expect("numbers and hashes are JSON").into()
}

pub(crate) fn read(body: &[u8]) -> Result<Commit, serde_json::Error> {
    serde_json::from_slice(body)
}
