//! The relay: carries committed events from the log to the stream, one message for each commit, in order.
//!
//! There is no outbox table: the log is the outbox, and the stream's last sequence is the cursor. Each publish names
//! the sequence it must follow, so of two relays only one gets a commit in, and nothing is published twice or skipped.
//! A stream that is gone, far behind, of another history or of another shape is made anew from the head: followers
//! read what they miss in Postgres.
//!
//! Beside an engine, what that has appended is read in its memory of the log (`event_store::Recent`) instead of in Postgres.
//!
//! # Why it polls
//! `notify` in the append would take a lock across the whole cluster at every commit, on the one road that all
//! commits share. Asking an index for what comes after a number costs some 50 µs, here and not there.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use async_nats::jetstream::context::{GetStreamErrorKind, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::{ErrorCode, stream};
use event_store::{Commit, Head, Log, Reader, RecordedEvent};
use runtime::shutdown::Shutdown;
use runtime::trace::{KeyValue, SpanKind, Stage};
use tokio::time::{Instant, sleep, sleep_until};

use crate::bus;
use crate::bus::FeedSettings;
use crate::follow::paced;
use crate::metrics::RELAY;

/// Carries the log to the bus until a stop is wanted. Either of the two may go away and come back meanwhile.
pub async fn run(log: Log, settings: FeedSettings, shutdown: Shutdown) -> anyhow::Result<()> {
    Relay::new(log, settings).run(shutdown).await
}

/// As [`run`], with a way to ask how it is.
#[derive(Clone, Debug)]
pub struct Relay {
    log: Log,
    settings: FeedSettings,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Starting,
    Relaying,
    CutOff(String),
}

/// Events in one page, all of which are in flight at once.
const PAGE_EVENTS: i64 = 2_000;

/// From one page to the next, at least: see [`paced`]. Under load a page is then some commits; the questions and wakes for
/// each would cost more than what is in it.
const PACE: Duration = Duration::from_millis(4);

/// Pauses between two looks at a log that had nothing new. The longest is what an idle system's event waits at most.
const LOOK_MIN: Duration = Duration::from_millis(1);
const LOOK_MAX: Duration = Duration::from_millis(20);

/// Pauses after a failure.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How often the stream is looked at. With nothing to publish, nothing else tells that it was deleted or changed, or that
/// the bus is gone without a word.
const LOOK_AT_STREAM: Duration = Duration::from_secs(2);

/// How long a relay that met another one leaves it and the stream alone.
const STANDBY: Duration = Duration::from_millis(250);

/// A stream further behind the log than this is not filled up any more: followers are past that in Postgres.
const BEHIND_MAX: i64 = 20_000;

/// Where the stream stands.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    base: i64,
    /// The last commit that is, or was, in the stream.
    relayed: i64,
}

/// A cursor is of no use any more: another relay got a commit in before us, or the stream is not as it was left.
#[derive(Debug)]
struct Outdated;

/// One connection to the bus and one to the log.
struct Session {
    bus: bus::Connection,
    log: Reader,
}

impl Relay {
    pub fn new(log: Log, settings: FeedSettings) -> Self {
        Self { log, settings, state: Arc::default() }
    }

    /// Whether there is a stream at the moment that commits are, or can be, published to; `Err` says why not.
    pub fn check(&self) -> Result<(), String> {
        match &*self.state.lock().unwrap_or_else(PoisonError::into_inner) {
            State::Relaying => Ok(()),
            State::Starting => Err("the relay has just begun".to_owned()),
            State::CutOff(reason) => Err(reason.clone()),
        }
    }

    pub async fn run(&self, shutdown: Shutdown) -> anyhow::Result<()> {
        let url = self.settings.nats_url.as_deref().context("a relay needs the address of a bus")?;
        let mut pause = PAUSE_MIN;
        let mut told = false; // of this absence
        loop {
            // What a stop cuts off is in the log, and the next relay finds by the stream's last sequence where to go on.
            let ended = tokio::select! {
                () = shutdown.requested() => None,
                Err(error) = self.session(url) => Some(format!("{error:#}")),
            };
            let reason = ended.clone().unwrap_or_else(|| "stopped".to_owned());
            if matches!(self.enter(State::CutOff(reason)), State::Relaying) {
                pause = PAUSE_MIN;
                told = false;
            }
            let Some(error) = ended else { return Ok(()) };
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(error, "the relay is cut off; it tries again until it is not");
            }
            tokio::select! {
                () = shutdown.requested() => return Ok(()),
                () = sleep(pause) => pause = PAUSE_MAX.min(pause * 2),
            }
        }
    }

    /// Answers the state before.
    fn enter(&self, state: State) -> State {
        if !matches!(state, State::Relaying)
            && let Some(beside) = &self.settings.beside
        {
            beside.end();
        }
        RELAY.connected.set(matches!(state, State::Relaying).into());
        std::mem::replace(&mut *self.state.lock().unwrap_or_else(PoisonError::into_inner), state)
    }

    /// The log's commits were there and the stream took them: not before, or a log that cannot be read would look like an
    /// outage that ends ten times a second.
    fn works(&self, cursor: &Cursor) {
        RELAY.reached(cursor.relayed);
        if !matches!(self.enter(State::Relaying), State::Relaying) {
            tracing::info!(stream = self.settings.stream, base = cursor.base, commit = cursor.relayed, "relaying");
        }
    }

    /// Relays over one connection until something fails.
    async fn session(&self, url: &str) -> anyhow::Result<std::convert::Infallible> {
        let bus = bus::connect(url, "daybook relay").await;
        let bus = bus.map_err(|error| anyhow!(error).context("connecting to the bus"))?;
        let mut session = Session { bus, log: Reader::beside(&self.log) };
        loop {
            let cursor = self.adopt(&mut session).await?;
            let Outdated = self.relay(&mut session, cursor).await?;
            if let Some(beside) = &self.settings.beside {
                beside.end();
            }
            tracing::debug!(stream = self.settings.stream, "another relay is at work, or somebody changed the stream");
            sleep(STANDBY).await;
        }
    }

    /// Publishes what comes after the cursor, until it is of no use any more or something fails.
    async fn relay(&self, session: &mut Session, mut cursor: Cursor) -> anyhow::Result<Outdated> {
        let mut look = LOOK_MIN;
        let mut looked = Instant::now();
        let mut next = Instant::now();
        let beside = self.settings.beside.as_ref();
        if let Some(beside) = beside {
            beside.begin(cursor.relayed);
        }
        loop {
            sleep_until(next).await;
            let commits = session.log.commits_after(cursor.relayed, PAGE_EVENTS).await.context("reading the log")?;
            if let Some(beside) = beside {
                beside.tell(&commits);
            }
            next = Instant::now() + paced(PACE, &commits, PAGE_EVENTS);
            if LOOK_AT_STREAM <= looked.elapsed() {
                let found = session.bus.during(stream(&session.bus, &self.settings.stream)).await?;
                if !found.is_some_and(|found| self.is_as_left(found.cached_info(), &cursor)) {
                    return Ok(Outdated);
                }
                looked = Instant::now();
            }
            if commits.is_empty() {
                self.works(&cursor);
                let pause = async {
                    sleep(look).await;
                    Ok::<_, bus::Lost>(())
                };
                session.bus.during(pause).await?;
                look = LOOK_MAX.min(look * 2);
                continue;
            }
            look = LOOK_MIN;
            let traces = commits.iter().flat_map(|commit| &commit.events).map(RecordedEvent::traceparent);
            let stage = Stage::begin("publish", SpanKind::Producer, traces);
            let publishing = publish(&session.bus, &self.settings.stream, &commits, &mut cursor);
            if let Some(Outdated) = session.bus.during(publishing).await? {
                return Ok(Outdated);
            }
            if let Some(stage) = stage {
                stage.end([
                    KeyValue::new("messaging.system", "nats"),
                    KeyValue::new("messaging.operation.type", "send"),
                    KeyValue::new("messaging.destination.name", self.settings.stream.clone()),
                    KeyValue::new("daybook.commit.last", cursor.relayed),
                ]);
            }
            self.works(&cursor);
        }
    }

    fn is_as_left(&self, found: &stream::Info, cursor: &Cursor) -> bool {
        let stream::Info { config, state, .. } = found;
        state.last_sequence == cursor.sequence_of(cursor.relayed)
            && bus::difference(&bus::config(&self.settings.stream, cursor.base), config).is_none()
    }

    /// Finds the stream where it was left, or makes it anew from the head.
    async fn adopt(&self, session: &mut Session) -> anyhow::Result<Cursor> {
        let name = &self.settings.stream;
        let Session { bus, log } = session;
        log.check_recent().await.context("comparing memory with the log")?;
        let head = log.head().await.context("reading the log's head")?;
        if let Some(found) = bus.during(stream(bus, name)).await? {
            match self.examine(bus, log, &found, &head).await? {
                Ok(cursor) => return Ok(cursor),
                Err(reason) => {
                    tracing::warn!(stream = name, reason, "the stream is made anew");
                    let deleted = async { bus.jetstream.delete_stream(name).await.context("deleting the stream") };
                    bus.during(deleted).await?;
                }
            }
        }
        // Another relay may do the same at this moment: made twice alike it is one stream, and unlike it is an error here.
        let making = bus.jetstream.create_stream(bus::config(name, head.commit));
        let made = bus.during(async { making.await.context("making the stream") }).await?;
        RELAY.streams_made.inc();
        let examined = self.examine(bus, log, &made, &head).await?;
        examined.map_err(|reason| anyhow!("the bus did not make the stream that was asked for: {reason}"))
    }

    /// Where a stream stands, or why it cannot be gone on with.
    async fn examine(
        &self,
        bus: &bus::Connection,
        log: &mut Reader,
        found: &stream::Stream,
        head: &Head,
    ) -> anyhow::Result<Result<Cursor, String>> {
        let stream::Info { config, state, .. } = found.cached_info();
        let Some(base) = bus::base(config) else { return Ok(Err("it has no base".to_owned())) };
        if let Some(field) = bus::difference(&bus::config(&self.settings.stream, base), config) {
            return Ok(Err(format!("its {field} is not what is asked for")));
        }
        // Whatever number stands there as the base: what is beyond all commits is not the log's.
        let relayed = base.saturating_add(i64::try_from(state.last_sequence).unwrap_or(i64::MAX));
        if head.commit < relayed {
            // The other relay may have been quicker than our look at the head.
            let now = log.head().await.context("reading the log's head")?;
            if now.commit < relayed {
                return Ok(Err(format!("it is at commit {relayed}, the log at {}", now.commit)));
            }
        }
        if BEHIND_MAX < head.commit - relayed {
            return Ok(Err(format!("it is {} commits behind", head.commit - relayed)));
        }
        let last = async { anyhow::Ok(found.get_raw_message(state.last_sequence).await.ok()) };
        if 0 < state.messages
            && let Some(last) = bus.during(last).await?
        {
            let chain = log.chain_of(relayed).await.context("reading the log")?;
            if bus::read(&last.payload).ok().map(|commit| commit.chain) != chain {
                return Ok(Err(format!("its commit {relayed} is not the log's")));
            }
        }
        Ok(Ok(Cursor { base, relayed }))
    }
}

impl Cursor {
    fn sequence_of(&self, commit: i64) -> u64 {
        u64::try_from(commit - self.base).expect("commits are relayed from the base on")
    }
}

/// Publishes commits that follow the cursor, which moves with every one that came to lie where it must.
async fn publish(
    bus: &bus::Connection,
    stream: &str,
    commits: &[Arc<Commit>],
    cursor: &mut Cursor,
) -> anyhow::Result<Option<Outdated>> {
    let subject = bus::subject(stream, cursor.base);
    let mut acks = Vec::with_capacity(commits.len());
    for commit in commits {
        // If one is refused, so are all behind it: none of them can follow what is not there.
        let message = PublishMessage::build()
            .expected_last_sequence(cursor.sequence_of(commit.number - 1))
            .payload(bus::write(commit, bus.body_bytes_max()));
        acks.push(bus.jetstream.send_publish(subject.clone(), message).await.context("publishing")?);
    }
    for (commit, ack) in commits.iter().zip(acks) {
        match ack.await {
            Ok(ack) if ack.sequence == cursor.sequence_of(commit.number) => {
                cursor.relayed = commit.number;
                RELAY.published.inc();
            }
            Ok(ack) => anyhow::bail!("commit {} came to lie at sequence {}", commit.number, ack.sequence),
            Err(error) if error.kind() == PublishErrorKind::WrongLastSequence => return Ok(Some(Outdated)),
            // Nobody takes what is published under this base.
            Err(error) if error.kind() == PublishErrorKind::StreamNotFound => return Ok(Some(Outdated)),
            Err(error) => return Err(error).context("publishing"),
        }
    }
    Ok(None)
}

/// The stream, if there is one.
async fn stream(bus: &bus::Connection, name: &str) -> anyhow::Result<Option<stream::Stream>> {
    match bus.jetstream.get_stream(name).await {
        Ok(found) => Ok(Some(found)),
        Err(error) if is_absent(&error.kind()) => Ok(None),
        Err(error) => Err(error).context("looking for the stream"),
    }
}

pub(crate) fn is_absent(kind: &GetStreamErrorKind) -> bool {
    matches!(kind, GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND)
}
