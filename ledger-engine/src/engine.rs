//! The one task that decides and appends.
//!
//! The book is only ever at the log's head, or ahead of it by the batch that is being appended. Every failure of an
//! append is sorted into one of: lost to another engine (read its commits, decide again), a key that was used before
//! the memory of this process (look it up, decide again), refused (nothing happened, say so), not done (try again for a
//! while, then say so), unknown (send the identical commit until its fate is known, whatever else goes wrong).

use std::collections::HashMap;
use std::time::Duration;

use cqrs_es::Aggregate;
use event_store::{AppendError, Commit, Head, Log, StoreError, Writer};
use ledger_core::{Book, Event, Missing, Pages, Timestamp, Transaction, TransactionId};
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::batch::Batch;
use crate::keys::RecentKeys;
use crate::ledger::{CommandError, EngineError, Job, Settings};

/// How many events are read from the log at a time.
const PAGE: i64 = 2_000;

/// Between attempts to reach a database that is away: doubled up to the second figure.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

pub(crate) struct Engine {
    writer: Writer,
    book: Book,
    keys: RecentKeys,
    head: Head,
    settings: Settings,
}

impl Engine {
    pub(crate) fn new(writer: Writer, settings: Settings) -> Self {
        let nowhere = Head { position: 0, commit: -1, chain: [0; 32], recorded_at: Timestamp::EPOCH };
        Self { writer, book: Book::default(), keys: RecentKeys::new(settings.keys_max), head: nowhere, settings }
    }

    /// Folds the whole log into the book.
    pub(crate) async fn replay(&mut self, log: &Log) -> Result<(), EngineError> {
        self.head = self.writer.genesis().await?;
        loop {
            let page = log.commits_after(self.head.commit, PAGE).await?;
            if page.is_empty() {
                tracing::info!(position = self.head.position, commit = self.head.commit, "the book is at the head");
                return Ok(());
            }
            for commit in page {
                self.absorb(&commit)?;
            }
        }
    }

    /// Runs until no handle is left, or the log turns out to be another one or cannot be read any more.
    pub(crate) async fn run(mut self, mut commands: mpsc::Receiver<Job>) {
        let mut jobs = Vec::with_capacity(self.settings.batch_max);
        while 0 < commands.recv_many(&mut jobs, self.settings.batch_max).await {
            jobs.retain(|job| job.stage.take());
            if jobs.is_empty() {
                continue;
            }
            if let Err(error) = self.process(std::mem::take(&mut jobs)).await {
                tracing::error!(
                    position = self.head.position,
                    commit = self.head.commit,
                    %error,
                    "the log does not go on from the head that was acknowledged. The engine stops; find out which database \
                     this is, and who else writes to it, before starting it again"
                );
                return; // callers that wait see the channel close
            }
        }
        self.writer.close().await;
    }

    /// Brings a group of commands to their end and answers all of them. An error is the engine's end.
    async fn process(&mut self, jobs: Vec<Job>) -> Result<(), EngineError> {
        let mut reads = Patience::new();
        // The batch's own, so that nothing can crowd it out before the next decision.
        let mut found = RecentKeys::new(usize::MAX);
        loop {
            match self.lay_in_missing(&jobs).await {
                Ok(()) => {}
                Err(error) if reads.allow_another(&error).await => {
                    self.writer.disconnect();
                    continue;
                }
                Err(error) => {
                    self.give_up(jobs, &error);
                    return Ok(());
                }
            }
            let before = self.book.mark();
            let first = self.head.position + 1;
            let batch = Batch::decide(&mut self.book, first, &self.keys, &found, jobs.iter().map(|job| &job.command));
            let appended = if batch.drafts.is_empty() {
                if batch.refuses_without_a_trace() && !self.writer.has_turn() {
                    Err(Again::Lost) // another engine may have changed what was refused
                } else {
                    self.writer.give_turn_back().await;
                    Ok(None)
                }
            } else {
                let commit = Commit::seal(&self.head, now(), &batch.drafts);
                self.append(&commit).await.map(|()| Some(commit))
            };
            if appended.is_err() {
                self.book.take_back(before);
            }
            match appended {
                Ok(commit) => {
                    self.book.keep(self.book.mark());
                    if let Some(commit) = &commit {
                        self.head = commit.head();
                        for event in &commit.events {
                            self.keys.remember_event(event);
                        }
                    }
                    for (job, answer) in jobs.into_iter().zip(batch.answers(commit)) {
                        job.answer.send(answer).ok(); // a caller that left has its answer under its key
                    }
                    return Ok(());
                }
                Err(Again::Lost) => match self.catch_up().await {
                    Ok(()) => {}
                    Err(error) if reads.allow_another(&error).await => self.writer.disconnect(),
                    Err(error) if error.is_passing() => {
                        self.give_up(jobs, &error);
                        return Ok(());
                    }
                    Err(error) => return Err(error), // what cannot be folded in now never will be
                },
                Err(Again::KeyTaken) => match self.look_up_keys(&jobs, &mut found).await {
                    Ok(()) => {}
                    Err(error) if reads.allow_another(&error).await => self.writer.disconnect(),
                    Err(error) => {
                        self.give_up(jobs, &error);
                        return Ok(());
                    }
                },
                Err(Again::Never(error)) => {
                    self.give_up(jobs, &error);
                    return Ok(());
                }
                Err(Again::WentBack) => return Err(EngineError::WentBack),
            }
        }
    }

    /// Appends, and does not come back before it is known what became of it.
    async fn append(&mut self, commit: &Commit) -> Result<(), Again> {
        let mut pause = PAUSES.0;
        let mut sent_before = false;
        let mut patience = Patience::new();
        loop {
            match self.writer.append(commit).await {
                Ok(()) => return Ok(()),
                Err(AppendError::Unknown(reason)) => {
                    // Nothing may be decided until this is settled, and reading proves nothing: the old backend may
                    // still be at it. The identical commit either goes in or collides with itself.
                    tracing::warn!(
                        commit = commit.number,
                        reason,
                        "the outcome of an append is unknown; sending it again"
                    );
                    sent_before = true;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSES.1);
                }
                Err(AppendError::NotDone(error)) if sent_before => {
                    // Of this attempt that is certain; the one before may have gone in, or may still.
                    tracing::warn!(commit = commit.number, %error, "settling an append failed; sending it again");
                    self.writer.disconnect(); // it may be to a server that is no longer the one that writes
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSES.1);
                }
                Err(AppendError::NotDone(error)) => {
                    let error = error.into();
                    if !patience.allow_another(&error).await {
                        return Err(Again::Never(error));
                    }
                    self.writer.disconnect();
                }
                Err(AppendError::Lost) if sent_before => match self.writer.chain_of(commit.number).await {
                    Ok(Some(chain)) if chain == commit.chain => return Ok(()),
                    Ok(_) => return Err(Again::Lost),
                    Err(error) => {
                        tracing::warn!(commit = commit.number, %error, "asking whose commit it is failed; asking again");
                        self.writer.disconnect();
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(PAUSES.1);
                    }
                },
                Err(AppendError::Lost) => return Err(Again::Lost),
                Err(AppendError::KeyTaken) => return Err(Again::KeyTaken),
                Err(AppendError::WentBack) => return Err(Again::WentBack),
                Err(AppendError::Rejected(error)) => return Err(Again::Never(StoreError::Database(error).into())),
            }
        }
    }

    /// Takes the turn and reads what other engines have appended. The next append cannot lose.
    async fn catch_up(&mut self) -> Result<(), EngineError> {
        loop {
            let tail = self.writer.take_turn(self.head.commit, PAGE).await?;
            if tail.is_empty() {
                return Ok(());
            }
            for commit in tail {
                self.absorb(&commit)?;
            }
        }
    }

    /// Folds a commit of the log in. It must follow the head.
    fn absorb(&mut self, commit: &Commit) -> Result<(), EngineError> {
        if commit.number != self.head.commit + 1 || commit.previous_chain != self.head.chain {
            return Err(EngineError::Chain { commit: commit.number });
        }
        for recorded in &commit.events {
            let read = recorded.read();
            let event = read.map_err(|error| EngineError::Corrupt { position: recorded.position, error })?;
            self.book.apply(recorded.position, &event);
            self.keys.remember_event(recorded);
        }
        self.book.keep(self.book.mark());
        self.head = commit.head();
        Ok(())
    }

    /// Lays in what the commands need and the book does not hold: transactions from their own streams.
    async fn lay_in_missing(&mut self, jobs: &[Job]) -> Result<(), EngineError> {
        for _ in 0..2 {
            let mut missing = Missing::default();
            for job in jobs {
                missing.add(&self.book.missing(&job.command));
            }
            if !missing.transactions.is_empty() {
                let mut found: HashMap<_, _> =
                    missing.transactions.iter().map(|id| (*id, (Transaction::default(), 0))).collect();
                let ids: Vec<_> = found.keys().map(TransactionId::to_string).collect();
                for recorded in self.writer.streams(Transaction::TYPE, &ids).await? {
                    let read = recorded.read();
                    match read.map_err(|error| EngineError::Corrupt { position: recorded.position, error })? {
                        Event::Transaction(id, event) => {
                            let (transaction, at) = found.entry(id).or_default();
                            transaction.apply(event);
                            *at = recorded.position;
                        }
                        _ => unreachable!("a transaction's stream holds its events"),
                    }
                }
                for (id, (transaction, at)) in found {
                    self.book.lay_in_transaction(id, transaction, at);
                }
            }
            self.book.lay_in(&missing, Pages::default());
        }
        Ok(())
    }

    /// Asks the log which of the batch's keys it knows, in one look-up. It must know one more than before, or deciding
    /// again would come to the same.
    async fn look_up_keys(&mut self, jobs: &[Job], found: &mut RecentKeys) -> Result<(), EngineError> {
        let keys: Vec<_> = jobs.iter().filter_map(|job| job.command.key.map(|key| key.hash)).collect();
        let mut more = false;
        for key in self.writer.known_keys(&keys).await? {
            more |= found.remember(&key);
            self.keys.remember(&key);
        }
        if more { Ok(()) } else { Err(EngineError::Taken) }
    }

    /// Nothing of the batch is in the log, and nothing will be.
    fn give_up(&mut self, jobs: Vec<Job>, error: &EngineError) {
        tracing::error!(%error, commands = jobs.len(), "a batch could not be appended; it is not in the log");
        self.writer.disconnect();
        for job in jobs {
            job.answer.send(Err(CommandError::Unavailable)).ok();
        }
    }
}

/// Why a batch is not in the log, and what helps.
enum Again {
    Lost,
    KeyTaken,
    WentBack,
    Never(EngineError),
}

/// How often one group is tried again while the database is away and nothing of it was sent: giving up is safe then.
struct Patience {
    pause: Duration,
    until: Instant,
}

impl Patience {
    fn new() -> Self {
        Self { pause: PAUSES.0, until: Instant::now() + Duration::from_secs(10) }
    }

    /// Waits a little, and says whether trying again can help.
    async fn allow_another(&mut self, error: &EngineError) -> bool {
        if !error.is_passing() || self.until <= Instant::now() {
            return false;
        }
        tracing::warn!(%error, "the database did not do its part; trying again");
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSES.1);
        true
    }
}

fn now() -> Timestamp {
    OffsetDateTime::now_utc().try_into().expect("the clock is between the years 1 and 9999")
}
