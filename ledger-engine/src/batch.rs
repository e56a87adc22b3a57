//! Commands decided together: the commit that they become, and what each caller is told once that is in the log.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use event_store::{Commit, Draft, Head, OpenCommit};
use ledger_core::{Book, Event, Key, Mark, Refusal, Timestamp};

use crate::keys::{KeyUse, usage};
use crate::ledger::{CommandError, Decided, Happening, Job};
use crate::metrics::{METRICS, Tally};
use crate::trace::{self, Appended};

#[derive(Debug)]
pub(crate) struct Batch {
    commit: OpenCommit,
    /// The book before the first decision.
    pub(crate) before: Mark,
    /// Each with its outcome, in the order of the decisions.
    decided: Vec<(Box<Job>, Outcome)>,
    keys: HashMap<[u8; 16], [u8; 32]>,
    decisions: usize,
    tally: Tally,
}

#[derive(Debug)]
enum Outcome {
    /// Became as many of the commit's events, which say the same.
    Appended(Vec<Event>),
    /// The key's command is in the log already, or is an earlier one of this batch or of the one before it.
    InLog,
    KeyReused,
    Refused(Refusal),
}

impl Batch {
    /// Nothing yet, to be decided upon `head` and to become the commit that follows it.
    pub(crate) fn after(head: &Head, now: Timestamp, book: &Book) -> Self {
        Self {
            commit: OpenCommit::after(head, now),
            before: book.mark(),
            decided: Vec::new(),
            keys: HashMap::new(),
            decisions: 0,
            tally: Tally::default(),
        }
    }

    /// Decides one command more. `known` is what the log is known to hold about its key; the book is left as the decision
    /// leaves it.
    pub(crate) fn decide(&mut self, book: &mut Book, mut job: Box<Job>, known: KeyUse) {
        let begun = job.trace.as_ref().map(|_| Instant::now());
        self.decisions += job.command.decisions();
        let outcome = match known {
            KeyUse::Same => Outcome::InLog,
            KeyUse::Other => Outcome::KeyReused,
            KeyUse::New => {
                if let Some(Key { hash, request }) = job.command.key {
                    self.keys.insert(hash, request);
                }
                self.execute(book, &job)
            }
        };
        if let (Some(trace), Some(begun)) = (&mut job.trace, begun) {
            trace.decided(begun);
        }
        self.decided.push((job, outcome));
    }

    fn execute(&mut self, book: &mut Book, job: &Job) -> Outcome {
        let command = &job.command;
        let events = match book.execute(command, self.commit.next()) {
            Ok(events) => events,
            Err(refusal) => return Outcome::Refused(refusal),
        };
        let mut decided = Vec::with_capacity(events.len());
        for (place, event) in events.into_iter().enumerate() {
            let key = command.key.filter(|_| place == 0);
            self.tally.add(&event.event);
            decided.push(event.event.clone());
            self.commit.push(Draft::new(command.id, key, &command.metadata, event));
        }
        Outcome::Appended(decided)
    }

    /// What this batch does with a key.
    pub(crate) fn usage(&self, key: &Key) -> KeyUse {
        usage(self.keys.get(&key.hash), key)
    }

    /// From now on no caller can give its command up; false if one has.
    pub(crate) fn take_up(&self) -> bool {
        self.decided.iter().all(|(job, _)| job.stage.take())
    }

    /// Decisions in it, of which a batch command has many.
    pub(crate) fn decisions(&self) -> usize {
        self.decisions
    }

    pub(crate) fn commands(&self) -> usize {
        self.decided.len()
    }

    /// Since when the oldest of its commands waits.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        oldest(&self.decided)
    }

    /// Whether there is nothing to append.
    pub(crate) fn writes_nothing(&self) -> bool {
        self.commit.is_empty()
    }

    /// Whether an answer depends on nothing that will be written: then only the log's head vouches for it.
    pub(crate) fn refuses_without_a_trace(&self) -> bool {
        let refused = |(_, outcome): &(Box<Job>, Outcome)| matches!(outcome, Outcome::Refused(_));
        self.writes_nothing() && self.decided.iter().any(refused)
    }

    /// Closes the batch: what to append, if anything, and whom to answer after that.
    pub(crate) fn close(self) -> (Option<Commit>, Closed) {
        let commit = (!self.commit.is_empty()).then(|| self.commit.seal());
        let Self { before, decided, keys, decisions, tally, .. } = self;
        (commit, Closed { before, decided, keys, decisions, tally, at: Instant::now() })
    }
}

/// A batch whose commit is on its way.
#[derive(Debug)]
pub(crate) struct Closed {
    pub(crate) before: Mark,
    decided: Vec<(Box<Job>, Outcome)>,
    keys: HashMap<[u8; 16], [u8; 32]>,
    decisions: usize,
    tally: Tally,
    at: Instant,
}

impl Closed {
    pub(crate) fn usage(&self, key: &Key) -> KeyUse {
        usage(self.keys.get(&key.hash), key)
    }

    pub(crate) fn commands(&self) -> usize {
        self.decided.len()
    }

    /// Tells every caller. The commit, if the batch had one, is in the log.
    pub(crate) fn answer(self, commit: Option<Arc<Commit>>) {
        if let Some(commit) = &commit {
            METRICS.committed(commit.number, commit.last, self.decisions, commit.events.len());
            self.tally.publish();
        }
        let appended = commit.as_ref().map(|commit| Appended {
            commit: commit.number,
            commands: self.decided.len(),
            events: commit.events.len(),
            begun: self.at,
        });
        let mut traces = Vec::new();
        let mut place = 0;
        for (mut job, outcome) in self.decided {
            if let Some(mut trace) = job.trace.take() {
                trace.appended = matches!(outcome, Outcome::Appended(_));
                traces.push(trace);
            }
            let answer = match outcome {
                Outcome::Appended(decided) => {
                    let places = place..place + decided.len();
                    place = places.end;
                    let commit = commit.clone().expect("what was appended is in a commit");
                    Ok(Decided::Appended(Happening::InCommit(commit, places), decided))
                }
                Outcome::InLog => Ok(Decided::InLog),
                Outcome::KeyReused => Err(CommandError::KeyReused),
                Outcome::Refused(refusal) => Err(CommandError::Refused(refusal)),
            };
            job.answer.send(answer).ok(); // a caller that left has its answer under its key
        }
        trace::tell(traces, appended);
    }

    /// Since when the oldest of its commands waits.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        oldest(&self.decided)
    }

    /// The commands again, to be decided anew or to be given up.
    pub(crate) fn into_jobs(self) -> impl Iterator<Item = Box<Job>> {
        self.decided.into_iter().map(|(job, _)| job)
    }
}

/// They were taken up in the order in which they came, about.
fn oldest(decided: &[(Box<Job>, Outcome)]) -> Option<Instant> {
    decided.first().map(|(job, _)| job.submitted)
}
