//! What keys were used for, read from the log for replays: many keys in one query.
//!
//! While one query is under way, the next keys gather; so a client that repeats everything costs little more for each than
//! the reading of a row, and takes no more than one connection from those who read streams.

use std::collections::HashMap;
use std::time::Duration;

use event_store::{Log, RecordedEvent, StoreError, within};
use tokio::sync::{mpsc, oneshot};

/// Keys in one query. A batch's key has a thousand events.
const KEYS: usize = 32;

/// Keys that may wait; beyond that their callers wait before them.
const QUEUE: usize = 1_024;

const READING: Duration = Duration::from_secs(5);

/// The reader of replays. Cloning it is cheap.
#[derive(Clone, Debug)]
pub(crate) struct Replays {
    ask: mpsc::Sender<Question>,
}

#[derive(Debug)]
struct Question {
    key: [u8; 16],
    answer: oneshot::Sender<Vec<RecordedEvent>>,
}

impl Replays {
    /// Starts the reading task, which ends with the last handle.
    pub(crate) fn start(log: Log) -> Self {
        let (ask, questions) = mpsc::channel(QUEUE);
        tokio::spawn(read_all(log, questions));
        Self { ask }
    }

    /// The whole command that a key was used for. Why it cannot be read, if so, is logged where it is read.
    pub(crate) async fn read(&self, key: [u8; 16]) -> Result<Vec<RecordedEvent>, StoreError> {
        let (answer, answered) = oneshot::channel();
        self.ask.send(Question { key, answer }).await.map_err(|_| StoreError::Late(READING))?;
        answered.await.map_err(|_| StoreError::Late(READING))
    }
}

async fn read_all(log: Log, mut questions: mpsc::Receiver<Question>) {
    let mut asked = Vec::with_capacity(KEYS);
    while 0 < questions.recv_many(&mut asked, KEYS).await {
        asked.retain(|question| !question.answer.is_closed());
        let mut keys: Vec<_> = asked.iter().map(|question| question.key).collect();
        keys.sort_unstable();
        keys.dedup();
        match within(READING, log.commands_of_keys(&keys)).await {
            Ok(events) => {
                let commands = by_key(events);
                for Question { key, answer } in asked.drain(..) {
                    answer.send(commands.get(&key).cloned().unwrap_or_default()).ok();
                }
            }
            Err(error) => {
                let error: StoreError = error;
                tracing::warn!(%error, keys = keys.len(), "the commands of repeated keys could not be read");
                asked.clear(); // their callers see that no answer comes
            }
        }
    }
}

/// Each command's events lie together behind its keyed one.
fn by_key(events: Vec<RecordedEvent>) -> HashMap<[u8; 16], Vec<RecordedEvent>> {
    let mut commands: HashMap<_, Vec<_>> = HashMap::new();
    let mut current = None;
    for event in events {
        current = event.key_hash.or(current);
        if let Some(key) = current {
            commands.entry(key).or_default().push(event);
        }
    }
    commands
}
