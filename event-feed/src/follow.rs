//! Following the log: every commit after a given one, once, in order, without a gap.
//!
//! Live commits come over the bus. Messages are believed only if they are the very next commits, their hashes follow
//! from the last one's, and the log has the same chain at the last of them; anything else (a gap, a long commit, garbage,
//! another history, an invention) is a hint to read Postgres. So whoever can publish can make us slow, and nothing else.
//! Twice a second Postgres is asked for its head in any case, for nothing else shows that the last message was lost.
//!
//! # What the bus is not trusted with
//! No durable consumer and no acknowledgement: how far a consumer has come is its own checkpoint, kept with its
//! effects. The consumer made here may vanish at any moment and is made again from the next wanted commit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use event_store::hash::{self, Hash};
use event_store::{Commit, Log, Reader, StoreError};
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::task::AbortOnDropHandle;

use crate::beside::Beside;
use crate::bus;
use crate::bus::FeedSettings;
use crate::metrics::Following;

/// A contiguous run of commits for one consumer.
#[derive(Debug)]
pub struct Follow {
    reader: Reader,
    settings: FeedSettings,
    /// The last commit that was handed out.
    last: i64,
    /// Where that commit ends; read when it is first needed.
    end: Option<End>,
    /// Postgres may have more than was handed out, and is asked before the bus.
    behind: bool,
    bus: Option<Bus>,
    looked: Instant,
    /// The head at the last look.
    head: i64,
    /// Whether the bus gave the next commit since the last look.
    heard: bool,
    /// Not before then; and how long after the next failure.
    resume: Instant,
    pause: Duration,
    pace: Duration,
    metrics: Following,
}

/// Why there is no next page. [`FeedError::is_final`] says whether asking again can help.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The log does not hold the commit that the consumer last had: it was set back, or is another log.
    #[error("the log went back: commit {commit} is not in it as it was followed")]
    WentBack { commit: i64 },
}

/// Events in one page, and bytes of their payloads and metadata from the bus; a single commit may have more. The log
/// bounds its pages' bytes likewise.
const PAGE_EVENTS: i64 = 5_000;
const PAGE_BYTES: usize = 4 * 1024 * 1024;

/// How often Postgres is asked for the head beside a live bus, and without one.
const LOOK_LIVE: Duration = Duration::from_millis(500);
const LOOK_ALONE: Duration = Duration::from_millis(50);

/// From one page to the next, at least. A consumer pays for a page as such, its statements and its commit; under load a page
/// is what came in this time, and what comes alone does not wait.
const PACE: Duration = Duration::from_millis(20);

/// So many events in a page from the relay beside us make the next one wait twice as long, and so on up to [`LONGER_MAX`]
/// times: the more there is to do, the more is done at a time. What holds no more shows that we are behind, and does not wait
/// longer; the bus holds few commits for us, and is not made to wait either.
const BUSY_EVENTS: i64 = 64;
const LONGER_MAX: u32 = 4;

/// Pauses after a failure.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Commits that wait between the bus and the consumer: with messages of at most 256 KiB a bound on memory as well.
const WAITING_MAX: usize = 64;

#[derive(Clone, Copy, Debug)]
struct End {
    position: i64,
    chain: Hash,
}

/// The live side: a task that reads the stream and hands over what it finds, `None` for what cannot be read.
#[derive(Debug)]
struct Bus {
    messages: mpsc::Receiver<Option<Commit>>,
    shared: Arc<Shared>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Shared {
    /// The next commit that is of use.
    wanted: AtomicI64,
    /// Whether there is a consumer on the stream.
    live: AtomicBool,
}

impl Follow {
    /// Starts after a commit: 0 for the whole log. Nothing is asked of anyone before the first [`Follow::next`].
    #[expect(clippy::unused_async, reason = "a start that connects first must not change every consumer")]
    pub async fn start(log: Log, settings: FeedSettings, after_commit: i64) -> Self {
        let now = Instant::now();
        Self {
            reader: Reader::beside(&log),
            settings,
            last: after_commit,
            end: None,
            behind: true,
            bus: None,
            looked: now,
            head: after_commit,
            heard: false,
            resume: now,
            pause: PAUSE_MIN,
            pace: PACE,
            metrics: Following::of("other"),
        }
    }

    /// Counts under a name of its own: one word for each consumer, from the code.
    #[must_use]
    pub fn named(self, follower: &'static str) -> Self {
        Self { metrics: Following::of(follower), ..self }
    }

    /// With another time from one page to the next, for a consumer that is waited for.
    #[must_use]
    pub fn paced(self, pace: Duration) -> Self {
        Self { pace, ..self }
    }

    /// The next page: one whole commit at least, at most some 5,000 events and 4 MiB; waits until there is one.
    ///
    /// Dropping the future loses nothing, at most a connection. After an error the next call waits a little by itself, so a consumer may
    /// simply ask again.
    pub async fn next(&mut self) -> Result<Vec<Arc<Commit>>, FeedError> {
        sleep_until(self.resume).await;
        let page = self.page().await;
        match &page {
            Ok(page) => {
                let pace = if self.is_beside() { paced(self.pace, page, PAGE_EVENTS) } else { self.pace };
                (self.pause, self.resume) = (PAUSE_MIN, Instant::now() + pace);
            }
            Err(_) => {
                self.resume = Instant::now() + self.pause;
                self.pause = PAUSE_MAX.min(self.pause * 2);
            }
        }
        page
    }

    async fn page(&mut self) -> Result<Vec<Arc<Commit>>, FeedError> {
        let end = self.end().await?;
        loop {
            if self.behind {
                let commits = self.reader.commits_after(self.last, PAGE_EVENTS).await?;
                // A page that is not full ends where the log did. Under load there always is a next one: who first had to
                // find nothing would read Postgres for ever.
                let events: usize = commits.iter().map(|commit| commit.events.len()).sum();
                let bytes: usize = commits.iter().map(|commit| commit.bytes()).sum();
                let level = events < PAGE_EVENTS as usize / 2 && bytes < PAGE_BYTES / 2;
                let page = if commits.is_empty() { commits } else { self.take_known(end, commits)? };
                self.metrics.from_log.inc_by(page.len() as u64);
                if level {
                    self.behind = false;
                    self.looked = Instant::now();
                    self.listen();
                }
                if !page.is_empty() {
                    return Ok(page);
                }
            }
            let look = if self.is_live() { LOOK_LIVE } else { LOOK_ALONE };
            tokio::select! {
                biased; // what has arrived already is cheaper than a question
                commits = told(self.settings.beside.as_ref(), self.last + 1) => {
                    self.heard = true;
                    if commits.is_empty() {
                        self.behind = true;
                        continue;
                    }
                    let page = self.take_known(end, commits)?;
                    self.metrics.from_relay.inc_by(page.len() as u64);
                    return Ok(page);
                }
                arrived = hear(&mut self.bus) => match arrived {
                    Some(message) => {
                        let page = self.take_from_bus(end, message).await?;
                        if !page.is_empty() {
                            return Ok(page);
                        }
                    }
                    None => {
                        // The live side is gone, which only a panic of its task can do: it begins again when there is
                        // something new, and not at once, for it may panic again.
                        self.bus = None;
                    }
                },
                () = sleep_until(self.looked + look) => self.look().await?,
            }
        }
    }

    /// Where the last commit ends.
    async fn end(&mut self) -> Result<End, FeedError> {
        if let Some(end) = self.end {
            return Ok(end);
        }
        let end = if self.last == 0 {
            End { position: 0, chain: hash::genesis(self.reader.ledger_id().await?) }
        } else {
            let found = self.reader.commits_after(self.last - 1, 1).await?.into_iter().next();
            let found = found.filter(|commit| commit.number == self.last);
            let commit = found.ok_or(FeedError::WentBack { commit: self.last })?;
            End { position: commit.last, chain: commit.chain }
        };
        self.end = Some(end);
        Ok(end)
    }

    /// Takes commits that are known to be in a log, as far as it is the one that was followed.
    fn take_known(&mut self, mut end: End, commits: Vec<Arc<Commit>>) -> Result<Vec<Arc<Commit>>, FeedError> {
        for (number, commit) in (self.last + 1..).zip(&commits) {
            if commit.number != number || commit.previous_chain != end.chain {
                return Err(FeedError::WentBack { commit: number - 1 });
            }
            end = End { position: commit.last, chain: commit.chain };
        }
        Ok(self.hand_out(end, commits))
    }

    /// Takes a message and what has arrived behind it, as far as it follows and is the log's.
    async fn take_from_bus(&mut self, mut end: End, message: Option<Commit>) -> Result<Vec<Arc<Commit>>, FeedError> {
        let mut message = Some(message);
        let mut page = Vec::new();
        let (mut events, mut bytes) = (0, 0);
        let mut last = self.last;
        let mut gap = false;
        while let Some(arrived) = message {
            match arrived {
                Some(commit) if commit.number <= last => self.metrics.repeats.inc(), // read in Postgres meanwhile
                Some(commit) if follows(&commit, last, &end) => {
                    last = commit.number;
                    end = End { position: commit.last, chain: commit.chain };
                    events += commit.last - commit.first + 1;
                    bytes += commit.bytes();
                    page.push(Arc::new(commit));
                }
                _ => {
                    (self.behind, gap) = (true, true);
                    self.metrics.gaps.inc();
                    break;
                }
            }
            if PAGE_EVENTS <= events || PAGE_BYTES <= bytes {
                break;
            }
            message = self.bus.as_mut().and_then(|bus| bus.messages.try_recv().ok());
        }
        if page.is_empty() {
            return Ok(page);
        }
        // Hashes can be computed by anyone. That these are the log's only the log can say, in one small question a page.
        self.behind = true; // if it says no, or nothing
        if self.reader.chain_of(last).await? != Some(end.chain) {
            tracing::warn!(commit = last, "the bus told of a commit that is not the log's");
            return Ok(Vec::new());
        }
        self.behind = gap;
        self.heard = true;
        self.metrics.from_bus.inc_by(page.len() as u64);
        Ok(self.hand_out(end, page))
    }

    fn hand_out(&mut self, end: End, page: Vec<Arc<Commit>>) -> Vec<Arc<Commit>> {
        self.last = page.last().expect("only pages with commits are handed out").number;
        self.end = Some(end);
        if let Some(bus) = &self.bus {
            bus.shared.wanted.store(self.last + 1, Ordering::Relaxed);
        }
        page
    }

    /// Asks Postgres for the head. What it has more than we do may be on its way over a live bus, unless it has been
    /// for a while or the bus is silent.
    async fn look(&mut self) -> Result<(), FeedError> {
        let head = self.reader.head().await?.commit;
        if head < self.last {
            return Err(FeedError::WentBack { commit: self.last });
        }
        let under_way = self.is_live() && self.heard && self.head <= self.last;
        self.behind = self.last < head && !under_way;
        self.head = head;
        self.heard = false;
        self.looked = Instant::now();
        if !self.behind {
            self.listen();
        }
        Ok(())
    }

    /// Starts the live side, once Postgres has been read to its end, unless the relay beside us is what we listen to.
    fn listen(&mut self) {
        if self.is_beside() {
            self.bus = None;
            return;
        }
        let Some(url) = self.settings.nats_url.clone().filter(|_| self.bus.is_none()) else { return };
        let (sender, messages) = mpsc::channel(WAITING_MAX);
        let shared = Arc::new(Shared { wanted: AtomicI64::new(self.last + 1), live: AtomicBool::new(false) });
        let task = tokio::spawn(listen(url, self.settings.stream.clone(), shared.clone(), sender));
        self.bus = Some(Bus { messages, shared, _task: AbortOnDropHandle::new(task) });
    }

    fn is_beside(&self) -> bool {
        self.settings.beside.as_ref().is_some_and(Beside::is_fed)
    }

    fn is_live(&self) -> bool {
        let listens = self.bus.as_ref().is_some_and(|bus| bus.shared.live.load(Ordering::Relaxed));
        let live = listens || self.is_beside();
        self.metrics.live.set(live.into());
        live
    }
}

impl FeedError {
    /// Asking again cannot help: what this consumer made of the log does not belong to the log that is there, or the log
    /// holds what it cannot.
    pub const fn is_final(&self) -> bool {
        matches!(self, Self::WentBack { .. } | Self::Store(StoreError::Corrupt(_)))
    }
}

/// How long the next page waits after this one, of which there could have been so many events.
pub(crate) fn paced(pace: Duration, page: &[Arc<Commit>], events_max: i64) -> Duration {
    let events: i64 = page.iter().map(|commit| commit.last - commit.first + 1).sum();
    if events_max / 2 <= events {
        return pace;
    }
    pace * u32::try_from(1 + events / BUSY_EVENTS).unwrap_or(LONGER_MAX).min(LONGER_MAX)
}

/// Whether this is the very next commit, whole, of the same history.
fn follows(commit: &Commit, last: i64, end: &End) -> bool {
    let leaves: Vec<_> = commit.events.iter().map(|event| event.leaf_hash).collect();
    let positions = commit.events.iter().zip(commit.first..);
    let whole =
        !leaves.is_empty() && i64::try_from(leaves.len()).is_ok_and(|count| commit.first + count - 1 == commit.last);
    whole
        && commit.number == last + 1
        && commit.first == end.position + 1
        && commit.previous_chain == end.chain
        && commit.chain == hash::chain(&end.chain, &commit.root, commit.first, commit.last)
        && commit.root == hash::root(&leaves)
        && positions.into_iter().all(|(event, position)| {
            event.position == position && event.commit == commit.number && event.leaf() == event.leaf_hash
        })
}

/// What the relay beside us tells from a commit on, or nothing for ever where there is none.
async fn told(beside: Option<&Beside>, commit: i64) -> Vec<Arc<Commit>> {
    match beside {
        Some(beside) => beside.from(commit, PAGE_EVENTS, PAGE_BYTES).await,
        None => std::future::pending().await,
    }
}

/// The next message of the live side, or nothing for ever where there is none.
async fn hear(bus: &mut Option<Bus>) -> Option<Option<Commit>> {
    match bus {
        Some(bus) => bus.messages.recv().await,
        None => std::future::pending().await,
    }
}

/// Reads the stream for as long as anyone wants what it finds, through every absence of the bus.
async fn listen(url: String, stream: String, shared: Arc<Shared>, messages: mpsc::Sender<Option<Commit>>) {
    let mut pause = PAUSE_MIN;
    let mut told = false; // of this absence
    loop {
        let Err(error) = session(&url, &stream, &shared, &messages).await else { return };
        if shared.live.swap(false, Ordering::Relaxed) {
            pause = PAUSE_MIN;
            told = false;
        }
        if !std::mem::replace(&mut told, true) {
            tracing::info!(stream, error, "no bus: following Postgres alone until there is one");
        }
        sleep(pause).await;
        pause = PAUSE_MAX.min(pause * 2);
    }
}

/// Reads the stream over one connection. `Ok` when nobody listens any more.
async fn session(
    url: &str,
    stream: &str,
    shared: &Shared,
    messages: &mpsc::Sender<Option<Commit>>,
) -> Result<(), async_nats::Error> {
    let connection = bus::connect(url, "daybook follower").await?;
    connection.during(read(&connection.jetstream, stream, shared, messages)).await
}

async fn read(
    jetstream: &jetstream::Context,
    stream: &str,
    shared: &Shared,
    messages: &mpsc::Sender<Option<Commit>>,
) -> Result<(), async_nats::Error> {
    let stream = jetstream.get_stream(stream).await?;
    let base = bus::base(&stream.cached_info().config).ok_or("a stream without a base")?;
    let wanted = shared.wanted.load(Ordering::Relaxed);
    let start_sequence = u64::try_from(wanted - base).unwrap_or(0).max(1);
    let consumer = stream
        .create_consumer(pull::Config {
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence },
            ack_policy: AckPolicy::None,
            inactive_threshold: Duration::from_secs(30),
            memory_storage: true,
            ..Default::default()
        })
        .await?;
    let pulled = consumer.stream().max_messages_per_batch(WAITING_MAX).heartbeat(Duration::from_secs(1));
    let mut pulled = pulled.expires(Duration::from_secs(10)).messages().await?;
    shared.live.store(true, Ordering::Relaxed);
    while let Some(message) = pulled.next().await {
        let message = message?;
        let sequence = message.info()?.stream_sequence;
        if base.saturating_add(i64::try_from(sequence)?) < shared.wanted.load(Ordering::Relaxed) {
            continue;
        }
        if messages.send(bus::read(&message.payload).ok()).await.is_err() {
            return Ok(());
        }
    }
    Err("the stream of messages ended".into())
}
