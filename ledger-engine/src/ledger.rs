//! The ledger as its callers see it: a command goes in, a receipt comes out.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use event_store::{Commit, Log, Recent, RecordedEvent, SnapshotError, StoreError, Writer};
use ledger_core::{Command, CorruptEvent, Event, Refusal, Timestamp};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use crate::engine::Engine;
use crate::metrics::{Call, METRICS};
use crate::replays::Replays;
use crate::trace::Trace;

/// How long a call whose key is in flight already waits for that.
const KEY_PATIENCE: Duration = Duration::from_secs(2);

/// Connections beside the appending one: they read what replays and streams answer.
const READERS: u32 = 4;

/// A handle on the one engine of this process. Cloning it is cheap.
#[derive(Clone, Debug)]
pub struct Ledger {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    submit: Mutex<Option<mpsc::Sender<Box<Job>>>>,
    /// What is left of [`Settings::bytes_max`].
    room: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    pace: Pace,
    in_memory: Arc<AtomicUsize>,
    settings: Settings,
    in_flight: Mutex<HashMap<[u8; 16], usize>>,
    log: Log,
    recent: Option<Recent>,
    replays: Replays,
    task: Mutex<Option<JoinHandle<()>>>,
}

/// The bounds of the engine.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Commands that may wait; one more is told that the ledger is overloaded.
    pub queue_max: usize,
    /// Memory, in bytes, of all commands that wait or are being appended; one that would pass it is told likewise.
    pub bytes_max: u32,
    /// How long a command may wait to be taken up; after that it is told likewise, and is not executed.
    pub wait_max: Duration,
    /// How long a command may expect to wait when it comes, by the last appends' time; beyond that it is told likewise.
    pub wait_expected_max: Duration,
    /// Decisions that go into one append; a batch command may bring it beyond that by its own.
    pub batch_max: usize,
    /// Decisions that make it worth while to send a batch before the one that it follows is through.
    pub ahead_min: usize,
    /// Commands that are enough for a commit. With fewer it may wait for as many as were here a moment ago.
    pub gather_min: usize,
    /// How long after the last commit was begun it waits for so many, about; for fewer it waits less, in proportion.
    pub gather_within: Duration,
    /// Idempotency keys kept in memory.
    pub keys_max: usize,
    /// Wallets kept in memory, about: those that changed since the last snapshot must stay, up to twice this.
    pub wallets_max: usize,
    /// Events after which the book's snapshot is written again: what a start after a crash reads at most, about.
    pub snapshot_every: i64,
    /// How often an engine that has nothing to do looks for what others have appended: its next command need not wait for
    /// that.
    pub look_every: Duration,
    /// How long a caller waits before it is told that it is not known what became of its command.
    pub answer_within: Duration,
    /// Whether there is a tracer to tell of commands in sampled traces. If not, no command is looked at for that.
    pub traces: bool,
    /// Whether the last commits stay in memory for those of this process who follow the log: [`Ledger::recent`].
    pub keep_recent: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            queue_max: 8_192,
            bytes_max: 16 * 1024 * 1024,
            wait_max: Duration::from_secs(5),
            wait_expected_max: Duration::from_millis(250),
            batch_max: 1_024,
            ahead_min: 96,
            gather_min: 48,
            gather_within: Duration::from_millis(4),
            keys_max: 200_000,
            wallets_max: 400_000,
            snapshot_every: 500_000,
            look_every: Duration::from_secs(1),
            answer_within: Duration::from_secs(15),
            traces: false,
            keep_recent: false,
        }
    }
}

/// What happened, as it stands in the log. Answers are built from this alone, the first time and on every replay.
#[derive(Clone, Debug)]
pub struct Receipt {
    /// The key had been used for the same request before, and this is what happened then.
    pub replayed: bool,
    happening: Happening,
    /// The same as types, if they were decided just now. Reading what was written gives the same.
    decided: Vec<Event>,
    /// The stream of the first event, if it began before the command.
    stream: Option<Vec<RecordedEvent>>,
}

/// Where a command's events are.
#[derive(Clone, Debug)]
pub(crate) enum Happening {
    /// At these places of a commit that was appended just now, which its commands share.
    InCommit(Arc<Commit>, Range<usize>),
    Apart(Vec<RecordedEvent>),
}

/// An event of the log as a type.
#[derive(Clone, Debug, PartialEq)]
pub struct Happened {
    pub event: Event,
    pub position: i64,
    pub recorded_at: Timestamp,
}

impl Receipt {
    /// The command's events; there is at least one.
    pub fn events(&self) -> &[RecordedEvent] {
        self.happening.events()
    }

    /// The position of the command's last event.
    pub fn position(&self) -> i64 {
        self.events().last().expect("a receipt has events").position
    }

    /// The stream of the command's first event, from its beginning up to the command's last event in it.
    pub fn stream(&self) -> impl Iterator<Item = &RecordedEvent> {
        let of_first =
            |event: &&RecordedEvent| self.events().first().is_some_and(|e| e.aggregate_id == event.aggregate_id);
        let own = self.stream.is_none().then(|| self.events().iter().filter(of_first));
        self.stream.iter().flatten().chain(own.into_iter().flatten())
    }

    /// What [`Receipt::stream`] holds, as types.
    pub fn happened_in_stream(&self) -> Result<Vec<Happened>, CorruptEvent> {
        match &self.stream {
            Some(stream) => stream.iter().map(Happened::read).collect(),
            None => {
                let first = self.events().first().map(|event| event.aggregate_id.as_str()).unwrap_or_default();
                self.with_types().filter(|(event, _)| event.aggregate_id == first).map(happened).collect()
            }
        }
    }

    /// What the command's events say, as types.
    pub fn happened(&self) -> Result<Vec<Happened>, CorruptEvent> {
        self.with_types().map(happened).collect()
    }

    fn with_types(&self) -> impl Iterator<Item = (&RecordedEvent, Option<&Event>)> {
        self.events().iter().enumerate().map(|(place, event)| (event, self.decided.get(place)))
    }
}

impl Happening {
    fn events(&self) -> &[RecordedEvent] {
        match self {
            Self::InCommit(commit, places) => &commit.events[places.clone()],
            Self::Apart(events) => events,
        }
    }
}

fn happened((recorded, decided): (&RecordedEvent, Option<&Event>)) -> Result<Happened, CorruptEvent> {
    match decided {
        None => Happened::read(recorded),
        Some(event) => {
            let RecordedEvent { position, recorded_at, .. } = *recorded;
            Ok(Happened { event: event.clone(), position, recorded_at })
        }
    }
}

impl Happened {
    fn read(recorded: &RecordedEvent) -> Result<Self, CorruptEvent> {
        let RecordedEvent { position, recorded_at, .. } = *recorded;
        Ok(Self { event: recorded.read()?, position, recorded_at })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// Refused and, as there was no key to keep the refusal under, not written.
    #[error(transparent)]
    Refused(Refusal),
    #[error("the key was used for another request")]
    KeyReused,
    #[error("a command with this key is in flight")]
    KeyInFlight,
    /// Not executed.
    #[error("too many commands are waiting")]
    Overloaded,
    /// It may have happened. Repeating it with the same key finds out.
    #[error("it is not known what became of the command")]
    OutcomeUnknown,
    /// Not executed.
    #[error("the ledger cannot write")]
    Unavailable,
}

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("position {position}: {error}")]
    Corrupt { position: i64, error: CorruptEvent },
    #[error("commit {commit} does not follow the one before it")]
    Chain { commit: i64 },
    #[error("the log went back: its head is not in it")]
    WentBack,
    #[error("an id or a key is taken, and not by a key of the batch")]
    Taken,
    #[error(
        "the book's snapshot is not of this log. It follows from the log: with no engine running, empty \
         ledger.book_snapshot, ledger.book_wallets and ledger.book_partners"
    )]
    Snapshot,
    #[error("what has left memory is no longer in the book's snapshot: {0}. A new start folds the log anew")]
    SnapshotWentBack(SnapshotError),
}

impl From<SnapshotError> for EngineError {
    fn from(error: SnapshotError) -> Self {
        match error {
            SnapshotError::Store(error) => Self::Store(error),
            SnapshotError::WentBack { .. } => Self::SnapshotWentBack(error),
        }
    }
}

impl EngineError {
    /// Whether it says something about the moment and nothing about the log.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(self, Self::Store(StoreError::Database(_) | StoreError::Late(_)))
    }
}

/// A command on its way through the engine.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) command: Command,
    pub(crate) answer: oneshot::Sender<Result<Decided, CommandError>>,
    pub(crate) stage: Arc<Stage>,
    pub(crate) submitted: std::time::Instant,
    pub(crate) trace: Option<Box<Trace>>,
    /// What the log holds about the key, once it was asked: the request that it was used for.
    pub(crate) key_in_log: Option<Option<[u8; 32]>>,
    /// How often it was sent to wait for what it lacks.
    pub(crate) loads: u32,
    /// Kept until it is answered.
    _room: OwnedSemaphorePermit,
    _waiting: Waiting,
}

impl Job {
    pub(crate) fn refuse(self: Box<Self>, error: CommandError) {
        self.answer.send(Err(error)).ok(); // a caller that left does not mind
    }
}

/// Counts the decisions of a command among those under way, as long as it lives.
#[derive(Debug)]
struct Waiting(Arc<AtomicUsize>, usize);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
        METRICS.queue.sub(gauge(self.1));
    }
}

/// How long appends have taken lately, in microseconds: the last one counts a quarter.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pace(Arc<AtomicU64>);

impl Pace {
    /// Called by the engine alone.
    pub(crate) fn measured(&self, append: Duration) {
        let (before, now) = (self.0.load(Ordering::Relaxed), u64::try_from(append.as_micros()).unwrap_or(u64::MAX / 4));
        self.0.store(before - before / 4 + now / 4, Ordering::Relaxed);
    }

    fn of_appends(&self, appends: usize) -> Duration {
        Duration::from_micros(self.0.load(Ordering::Relaxed).saturating_mul(appends as u64))
    }
}

/// How the engine answers once the log has it.
#[derive(Debug)]
pub(crate) enum Decided {
    /// These events were appended; they are the same twice, as written and as types.
    Appended(Happening, Vec<Event>),
    /// The key's command is in the log already.
    InLog,
}

/// Whether a waiting command has been taken up, into an append. Either its caller gives it up or the engine takes it, never both.
#[derive(Debug, Default)]
pub(crate) struct Stage(AtomicU8);

impl Stage {
    const WAITING: u8 = 0;
    const TAKEN: u8 = 1;
    const GIVEN_UP: u8 = 2;

    /// The engine takes the command; false when its caller has given it up.
    pub(crate) fn take(&self) -> bool {
        self.leave_for(Self::TAKEN)
    }

    fn give_up(&self) -> bool {
        self.leave_for(Self::GIVEN_UP)
    }

    fn leave_for(&self, next: u8) -> bool {
        let left = self.0.compare_exchange(Self::WAITING, next, Ordering::AcqRel, Ordering::Acquire);
        left.is_ok() || left == Err(next) // taken once, it stays taken when a batch is decided again
    }
}

impl Ledger {
    /// Reads the snapshot and the log after it, and starts deciding. Its connections act as `daybook_ledger`.
    pub async fn start(database_url: &str, settings: Settings) -> Result<Self, EngineError> {
        let writer = Writer::new(database_url)?;
        let log = Log::beside(&writer, READERS).await?;
        let pace = Pace::default();
        let in_memory = Arc::default();
        let engine = Engine::start(writer, log.clone(), settings, pace.clone(), Arc::clone(&in_memory)).await?;
        let recent = engine.recent().cloned();
        let (submit, commands) = mpsc::channel(settings.queue_max);
        let task = tokio::spawn(engine.run(commands));
        let inner = Inner {
            submit: Mutex::new(Some(submit)),
            room: Arc::new(Semaphore::new(settings.bytes_max as usize)),
            waiting: Arc::default(),
            pace,
            in_memory,
            settings,
            in_flight: Mutex::default(),
            replays: Replays::start(log.clone()),
            log,
            recent,
            task: Mutex::new(Some(task)),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Decides and appends the command, and answers once Postgres has committed it.
    ///
    /// A command that was taken up runs to its end, also when the caller goes away.
    pub async fn execute(&self, command: Command) -> Result<Receipt, CommandError> {
        let call = Call::of(&command);
        let result = self.take(command).await;
        call.ended(&result);
        result
    }

    async fn take(&self, command: Command) -> Result<Receipt, CommandError> {
        let settings = &self.inner.settings;
        let submitted = Instant::now();
        let (deadline, wait_until) = (submitted + settings.answer_within, submitted + settings.wait_max);
        let waiting = self.wait(command.decisions())?;
        let key = command.key.map(|key| key.hash);
        let in_flight = key.map(|key| InFlight::enter(&self.inner, key));
        let bytes = u32::try_from(command.bytes()).unwrap_or(u32::MAX);
        let room = self.inner.room.clone().try_acquire_many_owned(bytes).map_err(|_| CommandError::Overloaded)?;
        let (answer, mut answered) = oneshot::channel();
        let stage = Arc::new(Stage::default());
        let (key_in_log, loads) = (None, 0);
        let submitted_at = submitted.into_std();
        let trace = if settings.traces { Trace::of(&command, submitted_at) } else { None };
        let job = Job {
            command,
            answer,
            stage: stage.clone(),
            submitted: submitted_at,
            trace,
            key_in_log,
            loads,
            _room: room,
            _waiting: waiting,
        };
        self.submit(Box::new(job))?; // large, and moved often

        let second = in_flight.as_ref().is_some_and(|entered| entered.second);
        let patience = if second { deadline.min(submitted + KEY_PATIENCE) } else { deadline };
        // One timer at a time: there is one for each command under way.
        let mut decided = timeout_at(wait_until.min(patience), &mut answered).await;
        if decided.is_err() && wait_until < patience {
            if stage.give_up() {
                return Err(CommandError::Overloaded);
            }
            decided = timeout_at(patience, &mut answered).await;
        }
        let decided = match decided {
            Ok(Ok(decided)) => decided?,
            Ok(Err(_)) if stage.give_up() => return Err(CommandError::Unavailable), // it stopped before this one
            Ok(Err(_)) => return Err(CommandError::OutcomeUnknown),                 // the engine stopped in the middle
            Err(_) if second => return Err(CommandError::KeyInFlight),
            Err(_) if stage.give_up() => return Err(CommandError::Overloaded),
            Err(_) => return Err(CommandError::OutcomeUnknown),
        };
        // What follows only reads. The command is in the log, so a failure here is not its failure.
        let receipt = self.receipt(decided, key);
        match timeout_at(deadline.max(Instant::now() + KEY_PATIENCE), receipt).await {
            Ok(Ok(receipt)) => Ok(receipt),
            Ok(Err(error)) => {
                tracing::warn!(%error, "a committed command's receipt could not be read");
                Err(CommandError::OutcomeUnknown)
            }
            Err(_) => Err(CommandError::OutcomeUnknown),
        }
    }

    /// Takes no more commands, finishes those it has, and stops; waits at most `within`.
    pub async fn stop(&self, within: Duration) {
        self.inner.submit.lock().unwrap_or_else(PoisonError::into_inner).take();
        let task = self.inner.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            let abort = task.abort_handle();
            if timeout(within, task).await.is_err() {
                tracing::warn!("the engine did not finish in time; what it was appending is settled by its keys");
                abort.abort();
            }
        }
    }

    /// The log, to be read.
    pub fn log(&self) -> &Log {
        &self.inner.log
    }

    /// What the engine has appended last, if it is kept ([`Settings::keep_recent`]).
    pub fn recent(&self) -> Option<&Recent> {
        self.inner.recent.as_ref()
    }

    /// Whether commands can be executed: false once the engine has stopped, for whatever reason.
    pub fn is_running(&self) -> bool {
        let submit = self.inner.submit.lock().unwrap_or_else(PoisonError::into_inner);
        submit.as_ref().is_some_and(|submit| !submit.is_closed())
    }

    /// Refuses a command that would have to wait too long: at once, when nothing was done for it yet.
    fn wait(&self, decisions: usize) -> Result<Waiting, CommandError> {
        let Inner { settings, waiting, pace, .. } = &*self.inner;
        let ahead = waiting.fetch_add(decisions, Ordering::Relaxed);
        METRICS.queue.add(gauge(decisions));
        let counted = Waiting(waiting.clone(), decisions);
        // Two batches are always under way, whatever an append takes: without them nobody would find out that it is quick again.
        let queued = ahead.saturating_sub(2 * settings.batch_max);
        let appends = queued / settings.batch_max + 2;
        if 0 < queued && settings.wait_expected_max < pace.of_appends(appends) {
            return Err(CommandError::Overloaded);
        }
        Ok(counted)
    }

    /// How many wallets, partners and open transactions are in memory, about.
    pub fn in_memory(&self) -> usize {
        self.inner.in_memory.load(Ordering::Relaxed)
    }

    fn submit(&self, job: Box<Job>) -> Result<(), CommandError> {
        let submit = self.inner.submit.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let submit = submit.ok_or(CommandError::Unavailable)?;
        submit.try_send(job).map_err(|refused| match refused {
            mpsc::error::TrySendError::Full(_) => CommandError::Overloaded,
            mpsc::error::TrySendError::Closed(_) => CommandError::Unavailable,
        })
    }

    async fn receipt(&self, decided: Decided, key: Option<[u8; 16]>) -> Result<Receipt, StoreError> {
        let log = &self.inner.log;
        let (replayed, happening, decided) = match decided {
            Decided::Appended(happening, decided) => (false, happening, decided),
            Decided::InLog => {
                let key = key.expect("only a key's command can be in the log already");
                (true, Happening::Apart(self.inner.replays.read(key).await?), Vec::new())
            }
        };
        let [first, ..] = happening.events() else {
            return Err(StoreError::Corrupt("a key's command has no events".to_owned()));
        };
        if first.sequence == 1 {
            return Ok(Receipt { replayed, happening, decided, stream: None });
        }
        // Who waits for the database keeps what is its own, and not the whole commit.
        let events = happening.events().to_vec();
        drop(happening);
        let (first, last) = (&events[0], &events[events.len() - 1]);
        let stream = Some(log.stream(&first.aggregate_type, &first.aggregate_id, last.position).await?);
        Ok(Receipt { replayed, happening: Happening::Apart(events), decided, stream })
    }
}

/// Counts the calls in flight by key, as long as it lives.
struct InFlight<'a> {
    inner: &'a Inner,
    key: [u8; 16],
    second: bool,
}

impl<'a> InFlight<'a> {
    fn enter(inner: &'a Inner, key: [u8; 16]) -> Self {
        let mut in_flight = inner.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        let calls = in_flight.entry(key).or_default();
        *calls += 1;
        Self { inner, key, second: 1 < *calls }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let mut in_flight = self.inner.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(calls) = in_flight.get_mut(&self.key) {
            *calls -= 1;
            if *calls == 0 {
                in_flight.remove(&self.key);
            }
        }
    }
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
