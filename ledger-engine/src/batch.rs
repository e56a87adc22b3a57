//! One group of commands, decided together: what to append, and what each caller is told once that is done.

use event_store::{Commit, Draft};
use ledger_core::{Book, Command, Refusal};

use crate::keys::{KeyUse, RecentKeys};
use crate::ledger::{CommandError, Decided};

#[derive(Debug)]
pub(crate) struct Batch {
    /// The position of the first event.
    first: i64,
    pub(crate) drafts: Vec<Draft>,
    /// In the order of the commands.
    outcomes: Vec<Outcome>,
}

#[derive(Debug)]
enum Outcome {
    /// Appended as the batch's drafts from `from` up to `to`.
    Appended {
        from: usize,
        to: usize,
    },
    /// The key's command is in the log already, or is an earlier one of this batch.
    InLog,
    KeyReused,
    Refused(Refusal),
}

impl Batch {
    /// Decides the commands one after another. `keys` are the recent ones, `found` those of the batch that the log was
    /// asked about. The book is left as the last decision leaves it; it is the caller's to keep that or to take it back.
    pub(crate) fn decide<'a>(
        book: &mut Book,
        first: i64,
        keys: &RecentKeys,
        found: &RecentKeys,
        commands: impl Iterator<Item = &'a Command>,
    ) -> Self {
        let mut batch = Self { first, drafts: Vec::new(), outcomes: Vec::new() };
        let mut here = RecentKeys::new(usize::MAX);
        for command in commands {
            let usage = command.key.map_or(KeyUse::New, |key| {
                let usages = [&here, found, keys].map(|known| known.usage(&key));
                usages.into_iter().find(|usage| *usage != KeyUse::New).unwrap_or(KeyUse::New)
            });
            let outcome = match usage {
                KeyUse::Same => Outcome::InLog,
                KeyUse::Other => Outcome::KeyReused,
                KeyUse::New => {
                    if let Some(key) = &command.key {
                        here.remember(key);
                    }
                    batch.decide_one(book, command)
                }
            };
            batch.outcomes.push(outcome);
        }
        batch
    }

    fn decide_one(&mut self, book: &mut Book, command: &Command) -> Outcome {
        let from = self.drafts.len();
        let events = match book.execute(command, self.first + from as i64) {
            Ok(events) => events,
            Err(refusal) => return Outcome::Refused(refusal),
        };
        for event in events {
            let key = command.key.filter(|_| self.drafts.len() == from);
            self.drafts.push(Draft::new(command.id, key, &command.metadata, event));
        }
        Outcome::Appended { from, to: self.drafts.len() }
    }

    /// Whether an answer depends on nothing that will be written: then only the head vouches for it.
    pub(crate) fn refuses_without_a_trace(&self) -> bool {
        self.drafts.is_empty() && self.outcomes.iter().any(|outcome| matches!(outcome, Outcome::Refused(_)))
    }

    /// What each caller is told, in the order of the commands; `commit` holds the drafts.
    pub(crate) fn answers(self, commit: Option<Commit>) -> impl Iterator<Item = Result<Decided, CommandError>> {
        let mut events = commit.map(|commit| commit.events).unwrap_or_default().into_iter();
        self.outcomes.into_iter().map(move |outcome| match outcome {
            Outcome::Appended { from, to } => Ok(Decided::Appended(events.by_ref().take(to - from).collect())),
            Outcome::InLog => Ok(Decided::InLog),
            Outcome::KeyReused => Err(CommandError::KeyReused),
            Outcome::Refused(refusal) => Err(CommandError::Refused(refusal)),
        })
    }
}
