//! What relay and followers agree upon: the stream, its one subject, and how a commit is written on it.
//!
//! Stream sequence = commit number − base. The base stands in the stream's description, so the last sequence says
//! which commit came last even when the stream is emptied; and in its subject, so that a relay which still has
//! another base in mind publishes into nothing.

use std::time::Duration;

use async_nats::jetstream::{self, stream};
use async_nats::{ConnectOptions, Event, ServerAddr};
use bytes::Bytes;
use event_store::{Commit, Log, StoreError};
use percent_encoding::percent_decode_str;
use tokio_util::sync::CancellationToken;

use crate::beside::Beside;

/// Where the bus is, and which of its streams is this ledger's.
#[derive(Clone, Debug)]
pub struct FeedSettings {
    /// May hold `user:password@`. `None`: there is no bus, and followers read Postgres alone.
    pub nats_url: Option<String>,
    /// Without dots, spaces and wildcards.
    pub stream: String,
    /// Shared by a relay and followers that are one process; `None` where they are apart.
    pub beside: Option<Beside>,
}

impl FeedSettings {
    /// The settings of the ledger behind `log`: its stream is `daybook-<ledger id>`.
    pub async fn of(log: &Log, nats_url: Option<String>) -> Result<Self, StoreError> {
        Ok(Self { nats_url, stream: format!("daybook-{}", log.ledger_id().await?), beside: None })
    }

    /// For a relay and followers that are one process.
    #[must_use]
    pub fn in_one_process(self) -> Self {
        Self { beside: Some(Beside::default()), ..self }
    }
}

/// A longer commit travels as its numbers and hashes alone; the follower reads its events in Postgres.
pub(crate) const MESSAGE_BYTES_MAX: usize = 256 * 1024;

/// Followers never need the bus's past: these only bound what it may take.
const AGE_MAX: Duration = Duration::from_secs(60 * 60);
const BYTES_MAX: i64 = 32 * 1024 * 1024;

/// What a message takes beside its body: its headers.
pub(crate) const HEADERS_BYTES_MAX: usize = 1024;

/// How long the bus may take to answer anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// How often a silent bus is asked whether it is still there. After two unanswered times the connection counts as lost.
const PING: Duration = Duration::from_secs(5);

/// One connection to the bus, for whoever asks.
pub(crate) struct Connection {
    pub(crate) jetstream: jetstream::Context,
    lost: CancellationToken,
}

/// Connects, under a name for the server's list of connections.
pub(crate) async fn connect(url: &str, name: &str) -> Result<Connection, async_nats::Error> {
    let address: ServerAddr = url.parse()?;
    let lost = CancellationToken::new();
    let loss = lost.clone();
    let mut options = ConnectOptions::new()
        .name(name)
        .connection_timeout(PATIENCE)
        .request_timeout(Some(PATIENCE))
        .ping_interval(PING)
        .event_callback(move |event| {
            if matches!(event, Event::Disconnected | Event::Closed) {
                loss.cancel();
            }
            std::future::ready(())
        });
    // async-nats leaves the credentials of an address unread.
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    if let (Some(user), Some(password)) = (address.username(), address.password()) {
        options = options.user_and_password(decoded(user), decoded(password));
    }
    let client = options.connect(address).await?;
    let jetstream = jetstream::context::ContextBuilder::new().timeout(PATIENCE).build(client);
    Ok(Connection { jetstream, lost })
}

impl Connection {
    /// Does work over this connection, until the connection is lost.
    ///
    /// The client would connect again by itself. But the server that it finds may have another stream, and what was in
    /// flight would be waited for in vain: so every loss is a new beginning.
    pub(crate) async fn during<T, E: From<Lost>>(&self, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        tokio::select! {
            biased;
            done = work => done,
            () = self.lost.cancelled() => Err(Lost.into()),
        }
    }

    /// The longest body that server and followers take.
    pub(crate) fn body_bytes_max(&self) -> usize {
        MESSAGE_BYTES_MAX.min(self.jetstream.client().max_payload().saturating_sub(HEADERS_BYTES_MAX))
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the connection to the bus is lost")]
pub(crate) struct Lost;

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

/// Which part of what was asked for the stream does not have: a server says nothing about what it does not know, and an
/// operator may have changed what there was.
pub(crate) fn difference(asked: &stream::Config, given: &stream::Config) -> Option<&'static str> {
    // "No limit" is 0 in what is asked and -1 in what is answered.
    let unlimited = |limit: i64| limit <= 0;
    let same = [
        ("description", asked.description == given.description),
        ("subjects", asked.subjects == given.subjects),
        ("retention", asked.retention == given.retention),
        ("discard", asked.discard == given.discard),
        ("storage", asked.storage == given.storage),
        ("num_replicas", asked.num_replicas == given.num_replicas),
        ("max_age", asked.max_age == given.max_age),
        ("max_bytes", asked.max_bytes == given.max_bytes),
        ("max_msgs", unlimited(given.max_messages)),
        ("max_msgs_per_subject", unlimited(given.max_messages_per_subject)),
        ("max_msg_size", unlimited(given.max_message_size.into())),
        ("max_consumers", unlimited(given.max_consumers.into())),
        ("no_ack", !given.no_ack),
        ("sealed", !given.sealed),
        ("mirror", given.mirror.is_none()),
        ("sources", given.sources.as_ref().is_none_or(Vec::is_empty)),
    ];
    same.iter().find(|(_, same)| !same).map(|(name, _)| *name)
}

/// A commit as a body of so many bytes at most, without its events if need be.
pub(crate) fn write(commit: &Commit, bytes_max: usize) -> Bytes {
    // Written in full it would be longer still.
    if bytes_max < commit.bytes() {
        return bare(commit);
    }
    let body = serde_json::to_vec(commit).expect("payload and metadata were JSON when Postgres took them");
    if body.len() <= bytes_max {
        return body.into();
    }
    bare(commit)
}

fn bare(commit: &Commit) -> Bytes {
    let bare = Commit { events: Vec::new(), ..*commit };
    serde_json::to_vec(&bare).expect("numbers and hashes are JSON").into()
}

pub(crate) fn read(body: &[u8]) -> Result<Commit, serde_json::Error> {
    serde_json::from_slice(body)
}
