//! The ledger as its callers see it: a command goes in, a receipt comes out.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use event_store::{Log, RecordedEvent, StoreError, Writer};
use ledger_core::{Command, CorruptEvent, Refusal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use crate::engine::Engine;

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
    submit: Mutex<Option<mpsc::Sender<Job>>>,
    /// What is left of [`Settings::bytes_max`].
    room: Arc<Semaphore>,
    in_flight: Mutex<HashMap<[u8; 16], usize>>,
    log: Log,
    wait_max: Duration,
    answer_within: Duration,
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
    /// Commands that go into one append.
    pub batch_max: usize,
    /// Idempotency keys kept in memory.
    pub keys_max: usize,
    /// How long a caller waits before it is told that it is not known what became of its command.
    pub answer_within: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            queue_max: 8_192,
            bytes_max: 16 * 1024 * 1024,
            wait_max: Duration::from_secs(5),
            batch_max: 1_024,
            keys_max: 200_000,
            answer_within: Duration::from_secs(15),
        }
    }
}

/// What happened, as it stands in the log. Answers are built from this alone, the first time and on every replay.
#[derive(Clone, Debug)]
pub struct Receipt {
    /// The key had been used for the same request before, and this is what happened then.
    pub replayed: bool,
    /// The command's events; there is at least one.
    pub events: Vec<RecordedEvent>,
    /// The stream of the command's first event, from its beginning up to the command's last event in it.
    pub stream: Vec<RecordedEvent>,
}

impl Receipt {
    /// The position of the command's last event.
    pub fn position(&self) -> i64 {
        self.events.last().expect("a receipt has events").position
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
    /// Kept until it is answered.
    _room: OwnedSemaphorePermit,
}

/// How the engine answers once the log has it.
#[derive(Debug)]
pub(crate) enum Decided {
    /// These events were appended.
    Appended(Vec<RecordedEvent>),
    /// The key's command is in the log already.
    InLog,
}

/// Whether a waiting command has been taken up. Either its caller gives it up or the engine takes it, never both.
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
    /// Replays the log and starts deciding. Its connections act as `daybook_ledger`.
    pub async fn start(database_url: &str, settings: Settings) -> Result<Self, EngineError> {
        let writer = Writer::new(database_url)?;
        let log = Log::beside(&writer, READERS).await?;
        let mut engine = Engine::new(writer, settings);
        engine.replay(&log).await?;
        let (submit, commands) = mpsc::channel(settings.queue_max);
        let task = tokio::spawn(engine.run(commands));
        let inner = Inner {
            submit: Mutex::new(Some(submit)),
            room: Arc::new(Semaphore::new(settings.bytes_max as usize)),
            in_flight: Mutex::default(),
            log,
            wait_max: settings.wait_max,
            answer_within: settings.answer_within,
            task: Mutex::new(Some(task)),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Decides and appends the command, and answers once Postgres has committed it.
    ///
    /// A command that was taken up runs to its end, also when the caller goes away.
    pub async fn execute(&self, command: Command) -> Result<Receipt, CommandError> {
        let (deadline, wait_until) = (Instant::now() + self.inner.answer_within, Instant::now() + self.inner.wait_max);
        let key = command.key.map(|key| key.hash);
        let in_flight = key.map(|key| InFlight::enter(&self.inner, key));
        let bytes = u32::try_from(command.bytes()).unwrap_or(u32::MAX);
        let room = self.inner.room.clone().try_acquire_many_owned(bytes).map_err(|_| CommandError::Overloaded)?;
        let (answer, mut answered) = oneshot::channel();
        let stage = Arc::new(Stage::default());
        self.submit(Job { command, answer, stage: stage.clone(), _room: room })?;

        let second = in_flight.as_ref().is_some_and(|entered| entered.second);
        let patience = if second { deadline.min(Instant::now() + KEY_PATIENCE) } else { deadline };
        let decided = async {
            match timeout_at(wait_until, &mut answered).await {
                Err(_) if stage.give_up() => Ok(Err(CommandError::Overloaded)),
                Err(_) => answered.await,
                Ok(answer) => answer,
            }
        };
        let decided = match timeout_at(patience, decided).await {
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

    /// Whether commands can be executed: false once the engine has stopped, for whatever reason.
    pub fn is_running(&self) -> bool {
        let submit = self.inner.submit.lock().unwrap_or_else(PoisonError::into_inner);
        submit.as_ref().is_some_and(|submit| !submit.is_closed())
    }

    fn submit(&self, job: Job) -> Result<(), CommandError> {
        let submit = self.inner.submit.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let submit = submit.ok_or(CommandError::Unavailable)?;
        submit.try_send(job).map_err(|refused| match refused {
            mpsc::error::TrySendError::Full(_) => CommandError::Overloaded,
            mpsc::error::TrySendError::Closed(_) => CommandError::Unavailable,
        })
    }

    async fn receipt(&self, decided: Decided, key: Option<[u8; 16]>) -> Result<Receipt, StoreError> {
        let log = &self.inner.log;
        let (replayed, events) = match decided {
            Decided::Appended(events) => (false, events),
            Decided::InLog => (true, log.commands_of_keys(key.as_slice()).await?),
        };
        let (Some(first), Some(last)) = (events.first(), events.last()) else {
            return Err(StoreError::Corrupt("a key's command has no events".to_owned()));
        };
        let stream = if first.sequence == 1 {
            let same = |event: &&RecordedEvent| event.aggregate_id == first.aggregate_id;
            events.iter().filter(same).cloned().collect()
        } else {
            log.stream(&first.aggregate_type, &first.aggregate_id, last.position).await?
        };
        Ok(Receipt { replayed, events, stream })
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
