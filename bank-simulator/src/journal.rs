//! The bank's memory across restarts: a file with one JSON line per entry, synced before anyone is answered.
//!
//! One thread writes. All lines that came while it synced go into the next sync, so many payments
//! share one. After a failed write the thread ends and nothing is confirmed any more: what the disk
//! holds is then unknown, and the bank must not go on.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;

use anyhow::Context;
use tokio::sync::{mpsc, oneshot};

use crate::book::Entry;

/// Entries that wait for the disk; more are refused.
const QUEUE_MAX: usize = 1024;

/// The way to the disk; without a file every entry is confirmed at once.
pub(crate) struct Journal(Option<mpsc::Sender<Waiting>>);

/// A place in the queue, taken before anything is decided.
pub(crate) struct Place<'a>(Option<mpsc::Permit<'a, Waiting>>);

/// Resolves when an entry, and all before it, are on disk.
pub(crate) struct Written(Option<oneshot::Receiver<()>>);

/// Resolves only when the journal can no longer be written.
pub(crate) type Failure = oneshot::Receiver<io::Error>;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum JournalError {
    #[error("too many entries wait for the disk")]
    Overloaded,
    #[error("the journal can no longer be written")]
    Lost,
}

struct Waiting {
    line: Vec<u8>, // empty for one that only waits for those before it
    written: oneshot::Sender<()>,
}

impl Journal {
    pub(crate) fn in_memory() -> Self {
        Self(None)
    }

    /// Reads the journal and goes on writing it. No other process can have it open meanwhile.
    pub(crate) fn open(path: &Path) -> anyhow::Result<(Self, Vec<Entry>, Failure)> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?; // tokens are in it
        file.try_lock().context("another process writes this journal")?;
        let entries = read(&mut file)?;
        if let Some(folder) = path.canonicalize()?.parent() {
            File::open(folder)?.sync_all()?; // the file's name is part of what must survive
        }
        let (queue, mut waiting) = mpsc::channel(QUEUE_MAX);
        let (failed, failure) = oneshot::channel();
        thread::Builder::new().name("bank-journal".into()).spawn(move || {
            if let Err(error) = write_all(&mut file, &mut waiting) {
                let _ = failed.send(error); // nobody listens when the bank is ending anyway
            }
        })?;
        Ok((Self(Some(queue)), entries, failure))
    }

    pub(crate) fn place(&self) -> Result<Place<'_>, JournalError> {
        let Some(queue) = &self.0 else { return Ok(Place(None)) };
        queue.try_reserve().map(|permit| Place(Some(permit))).map_err(|error| match error {
            mpsc::error::TrySendError::Full(()) => JournalError::Overloaded,
            mpsc::error::TrySendError::Closed(()) => JournalError::Lost,
        })
    }
}

impl Place<'_> {
    /// `None` waits for what was written before.
    pub(crate) fn write(self, entry: Option<&Entry>) -> Written {
        let Some(permit) = self.0 else { return Written(None) };
        let mut line = Vec::new();
        if let Some(entry) = entry {
            line = serde_json::to_vec(entry).expect("an entry is plain data");
            line.push(b'\n');
        }
        let (written, confirmed) = oneshot::channel();
        permit.send(Waiting { line, written });
        Written(Some(confirmed))
    }
}

impl Written {
    pub(crate) async fn confirmed(self) -> Result<(), JournalError> {
        match self.0 {
            Some(confirmed) => confirmed.await.map_err(|_| JournalError::Lost),
            None => Ok(()),
        }
    }
}

/// A last line without its end was never confirmed to anyone; it is cut off. Any other line must be readable.
fn read(file: &mut File) -> anyhow::Result<Vec<Entry>> {
    let (mut entries, mut whole, mut line) = (Vec::new(), 0, Vec::new());
    let mut reader = BufReader::new(&mut *file);
    reader.rewind()?;
    loop {
        line.clear();
        let length = reader.read_until(b'\n', &mut line)?;
        if line.pop() != Some(b'\n') {
            break;
        }
        let entry =
            serde_json::from_slice(&line).with_context(|| format!("line {} cannot be read", entries.len() + 1))?;
        entries.push(entry);
        whole += length as u64;
    }
    file.set_len(whole)?;
    Ok(entries)
}

fn write_all(file: &mut File, waiting: &mut mpsc::Receiver<Waiting>) -> io::Result<()> {
    let mut batch = Vec::new();
    while waiting.blocking_recv_many(&mut batch, QUEUE_MAX) != 0 {
        let lines: Vec<u8> = batch.iter().flat_map(|waiting| &waiting.line).copied().collect();
        if !lines.is_empty() {
            file.write_all(&lines)?;
            file.sync_data()?;
        }
        for Waiting { written, .. } in batch.drain(..) {
            let _ = written.send(()); // whoever asked may have left
        }
    }
    Ok(())
}
