//! The history: what clients wanted, what they were told, and what they read. It is the only thing that is believed.
//!
//! Every call is written down before it is sent and again when it is answered, in memory and line by line in a file.
//! Left out: whether it was right (`check.rs`).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::watch;
use uuid::Uuid;

use crate::money::Money;

/// What a client wants of the ledger, under one key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Intent {
    OpenWallet {
        user: String,
        currency: String,
    },
    Transfer {
        from: String,
        to: String,
        money: Money,
    },
    /// One command that makes all of them, or each for itself.
    Batch {
        atomic: bool,
        transfers: Vec<Transfer>,
    },
    Adjust {
        wallet: String,
        credit: bool,
        money: Money,
    },
    TopUp {
        wallet: String,
        money: Money,
    },
    Freeze {
        wallet: String,
    },
    Unfreeze {
        wallet: String,
    },
}

/// An item of a batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Transfer {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) money: Money,
}

/// One key, what it was for, and everything that was said about it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Call {
    pub(crate) number: u64,
    /// Unique among all runs. The key; and it stands in the request, so that the log shows whose doing an event is.
    pub(crate) marker: String,
    pub(crate) as_admin: bool,
    pub(crate) intent: Intent,
    pub(crate) attempts: Vec<Attempt>,
    /// Given up when all that it had been told was that it was not executed. Then it must stay so.
    pub(crate) abandoned: bool,
}

/// One time that the request was sent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Attempt {
    pub(crate) sent_ms: u64,
    /// `None` while nobody knows.
    pub(crate) outcome: Option<Outcome>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    /// Nothing of the request got through: it was not even sent.
    NotSent,
    /// The connection broke, or no answer came in time.
    NoAnswer(String),
    Answered(Answer),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Of a problem: the last part of its type.
    pub(crate) slug: Option<String>,
    pub(crate) position: Option<i64>,
    pub(crate) replayed: bool,
    pub(crate) body: String,
}

/// What an answer says about the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Done,
    /// The ledger decided against it, for ever.
    Refused,
    /// It was not executed, and may be tried again.
    NotExecuted,
    /// It may have been executed.
    Unknown,
    /// What no client should ever be told.
    Unclear,
}

/// The payer's decision about a top-up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Payment {
    pub(crate) transaction: String,
    pub(crate) pays: bool,
    /// The bank has said that it has taken the decision.
    pub(crate) taken: bool,
}

/// A balance as it was shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Read {
    pub(crate) wallet: String,
    pub(crate) min_position: i64,
    pub(crate) position: i64,
    pub(crate) balance: String,
}

/// Everything that clients know.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Known {
    pub(crate) calls: Vec<Call>,
    pub(crate) payments: BTreeMap<String, Payment>,
    pub(crate) reads: Vec<Read>,
    /// Things that were answered 201 and then 404.
    pub(crate) missing: Vec<String>,
    /// Another request under a used key, and what was answered instead of a refusal.
    pub(crate) mixed_up: Vec<String>,
}

pub(crate) struct History {
    begin: Instant,
    run: String,
    inner: Mutex<Inner>,
    /// When the call was sent that was acknowledged last, of those that had not been acknowledged before.
    acknowledged: watch::Sender<Option<Instant>>,
}

struct Inner {
    known: Known,
    file: File,
}

impl History {
    pub(crate) fn begin(file: &Path, run: &str) -> anyhow::Result<Self> {
        let file = File::create(file).with_context(|| format!("creating {}", file.display()))?;
        Ok(Self {
            begin: Instant::now(),
            run: run.to_owned(),
            inner: Mutex::new(Inner { known: Known::default(), file }),
            acknowledged: watch::Sender::new(None),
        })
    }

    /// A new intent. It is nothing yet that anybody was asked for.
    pub(crate) fn intend(&self, intent: Intent, as_admin: bool) -> u64 {
        let mut inner = self.lock();
        let number = inner.known.calls.len() as u64;
        let mut marker = format!("{}-{number}", self.run);
        if number.is_multiple_of(2) {
            marker = format!("{marker}-{}", Uuid::now_v7()); // its time is in its hash then
        }
        inner.write(&json!({"call": number, "marker": marker, "intent": intent}));
        inner.known.calls.push(Call { number, marker, as_admin, intent, attempts: Vec::new(), abandoned: false });
        number
    }

    /// The request is about to be sent. Answers which attempt this is.
    pub(crate) fn sent(&self, call: u64) -> (Call, usize) {
        let sent_ms = self.now_ms();
        let mut inner = self.lock();
        inner.write(&json!({"call": call, "sent": sent_ms}));
        let call = inner.call(call);
        call.attempts.push(Attempt { sent_ms, outcome: None });
        (call.clone(), call.attempts.len() - 1)
    }

    /// What came of an attempt; `sent` if it went to the first process, whose recovery is measured by it.
    pub(crate) fn answered(&self, call: u64, attempt: usize, sent: Option<Instant>, outcome: Outcome) {
        let mut inner = self.lock();
        inner.write(&json!({"call": call, "attempt": attempt, "outcome": outcome}));
        let call = inner.call(call);
        let settled_before = call.settled().is_some();
        call.attempts[attempt].outcome = Some(outcome);
        if let Some(sent) = sent
            && !settled_before
            && call.settled().is_some()
        {
            self.acknowledged.send_if_modified(|last| {
                let later = last.is_none_or(|last| last < sent);
                if later {
                    *last = Some(sent);
                }
                later
            });
        }
    }

    pub(crate) fn abandon(&self, call: u64) {
        let mut inner = self.lock();
        inner.write(&json!({"call": call, "abandoned": true}));
        inner.call(call).abandoned = true;
    }

    /// Before the bank is told.
    pub(crate) fn pays(&self, token: &str, transaction: &str, pays: bool) {
        let mut inner = self.lock();
        inner.write(&json!({"token": token, "transaction": transaction, "pays": pays}));
        let payment = Payment { transaction: transaction.to_owned(), pays, taken: false };
        inner.known.payments.insert(token.to_owned(), payment);
    }

    pub(crate) fn bank_has_taken(&self, token: &str) {
        let mut inner = self.lock();
        inner.write(&json!({"token": token, "taken": true}));
        if let Some(payment) = inner.known.payments.get_mut(token) {
            payment.taken = true;
        }
    }

    pub(crate) fn read(&self, read: Read) {
        let mut inner = self.lock();
        inner.write(&json!({"read": read}));
        inner.known.reads.push(read);
    }

    pub(crate) fn missing(&self, what: String) {
        let mut inner = self.lock();
        inner.write(&json!({"missing": what}));
        inner.known.missing.push(what);
    }

    pub(crate) fn mixed_up(&self, what: String) {
        let mut inner = self.lock();
        inner.write(&json!({"mixedUp": what}));
        inner.known.mixed_up.push(what);
    }

    pub(crate) fn known(&self) -> Known {
        self.lock().known.clone()
    }

    pub(crate) fn with<T>(&self, look: impl FnOnce(&Known) -> T) -> T {
        look(&self.lock().known)
    }

    /// Waits until a call that was sent after this moment has got its answer.
    pub(crate) async fn acknowledged_after(&self, moment: Instant) {
        let mut acknowledged = self.acknowledged.subscribe();
        let waited = acknowledged.wait_for(|last| last.is_some_and(|last| moment < last)).await;
        waited.expect("the sender lives in the history, which lives in its caller");
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn write(&mut self, line: &serde_json::Value) {
        // What cannot be written is in memory all the same; the file is for whoever looks for the cause later.
        writeln!(self.file, "{line}").ok();
    }

    fn call(&mut self, number: u64) -> &mut Call {
        let place = usize::try_from(number).expect("a call's number is its place");
        &mut self.known.calls[place]
    }
}

impl Call {
    /// The first answer that ends the matter.
    pub(crate) fn settled(&self) -> Option<&Answer> {
        self.answers().find(|answer| matches!(answer.verdict(), Verdict::Done | Verdict::Refused))
    }

    pub(crate) fn answers(&self) -> impl Iterator<Item = &Answer> {
        self.attempts.iter().filter_map(|attempt| match &attempt.outcome {
            Some(Outcome::Answered(answer)) => Some(answer),
            _ => None,
        })
    }

    /// Whether it may have been executed by an attempt of which nobody told us the outcome.
    pub(crate) fn may_have_happened(&self) -> bool {
        self.attempts.iter().any(|attempt| match &attempt.outcome {
            None | Some(Outcome::NoAnswer(_)) => true,
            Some(Outcome::NotSent) => false,
            Some(Outcome::Answered(answer)) => answer.verdict() != Verdict::NotExecuted,
        })
    }
}

impl Answer {
    pub(crate) fn verdict(&self) -> Verdict {
        match (self.status, self.slug.as_deref()) {
            (200..=299, _) => Verdict::Done,
            (503, Some("overloaded" | "storage-unavailable")) | (401 | 429, _) => Verdict::NotExecuted,
            // The other one with this key may be at work.
            (409, Some("idempotency-in-flight")) | (503, Some("outcome-unknown")) | (408, _) => Verdict::Unknown,
            (400..=499, Some(_)) => Verdict::Refused,
            _ => Verdict::Unclear,
        }
    }
}
