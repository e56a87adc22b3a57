//! The bank's book: payments by token, and what was collected. Pure; every change is an [`Entry`].
//!
//! Deciding and applying are apart, so that the journal can be replayed through `apply` alone.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::money::{Currency, Minor};

/// The book lives in memory, so it ends somewhere.
const PAYMENTS_MAX: usize = 1_000_000;

/// What the bank is asked to collect. The amount stays the text it came as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Registration {
    pub(crate) token: String,
    pub(crate) amount: String,
    pub(crate) currency: Currency,
    pub(crate) callback_url: String,
    pub(crate) return_url: Option<String>,
    pub(crate) description: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Status {
    Pending,
    Success,
    Failure,
    Cancelled,
}

/// How a payer ends a payment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Outcome {
    Success,
    Failure,
}

#[derive(Clone, Debug)]
pub(crate) struct Payment {
    pub(crate) registration: Registration,
    pub(crate) status: Status,
    pub(crate) reference: Option<String>,
    /// The merchant was to be told and has not been yet, as far as the journal knows.
    pub(crate) callback_owed: bool,
}

/// Something that happened at the bank; a line of its journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub(crate) enum Entry {
    Registered(Registration),
    Ended {
        token: String,
        outcome: Outcome,
        reference: String,
        callback_owed: bool,
    },
    Cancelled {
        token: String,
    },
    /// The merchant has been told, or all attempts to do so were made.
    Called {
        token: String,
    },
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BookError {
    #[error("the bank knows no payment with this token")]
    NotFound,
    #[error("this token was registered with other content")]
    Exists,
    #[error("the payment has ended: {0:?}")]
    Ended(Status),
    #[error("the book is full")]
    Full,
}

/// What the bank collected in one currency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Collected {
    pub(crate) total: Minor,
    pub(crate) payments: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Book {
    payments: HashMap<String, Payment>,
    collected: BTreeMap<Currency, Collected>,
    ended: u64,
}

impl Book {
    pub(crate) fn payment(&self, token: &str) -> Option<&Payment> {
        self.payments.get(token)
    }

    pub(crate) fn collected(&self) -> &BTreeMap<Currency, Collected> {
        &self.collected
    }

    pub(crate) fn callbacks_owed(&self) -> impl Iterator<Item = &Payment> {
        self.payments.values().filter(|payment| payment.callback_owed)
    }

    /// `None` when the same was registered before.
    pub(crate) fn register(&self, registration: Registration) -> Result<Option<Entry>, BookError> {
        match self.payments.get(&registration.token) {
            Some(known) if known.registration == registration => Ok(None),
            Some(_) => Err(BookError::Exists),
            None if PAYMENTS_MAX <= self.payments.len() => Err(BookError::Full),
            None => Ok(Some(Entry::Registered(registration))),
        }
    }

    /// `None` when it has ended so before.
    pub(crate) fn end(&self, token: &str, outcome: Outcome, callback_owed: bool) -> Result<Option<Entry>, BookError> {
        match self.payments.get(token).ok_or(BookError::NotFound)?.status {
            Status::Pending => {
                let reference = format!("BNK{:010}", self.ended + 1);
                Ok(Some(Entry::Ended { token: token.to_owned(), outcome, reference, callback_owed }))
            }
            status if status == Status::from(outcome) => Ok(None),
            status => Err(BookError::Ended(status)),
        }
    }

    /// `None` when it has ended before, however it did: whoever cancels reads the status.
    pub(crate) fn cancel(&self, token: &str) -> Result<Option<Entry>, BookError> {
        let payment = self.payments.get(token).ok_or(BookError::NotFound)?;
        Ok((payment.status == Status::Pending).then(|| Entry::Cancelled { token: token.to_owned() }))
    }

    /// # Panics
    /// When the entry cannot follow what is in the book: then the journal is not this bank's.
    pub(crate) fn apply(&mut self, entry: &Entry) {
        match entry {
            Entry::Registered(registration) => {
                let payment = Payment {
                    registration: registration.clone(),
                    status: Status::Pending,
                    reference: None,
                    callback_owed: false,
                };
                assert!(!self.payments.contains_key(&registration.token), "a token is registered once");
                self.payments.insert(registration.token.clone(), payment);
            }
            Entry::Ended { token, outcome, reference, callback_owed } => {
                let payment = self.pending(token);
                payment.status = (*outcome).into();
                payment.reference = Some(reference.clone());
                payment.callback_owed = *callback_owed;
                let Registration { amount, currency, .. } = payment.registration.clone();
                self.ended += 1;
                if *outcome == Outcome::Success {
                    let amount =
                        Minor::parse(&amount, &currency).expect("an amount is checked before it is registered");
                    let collected = self.collected.entry(currency).or_default();
                    collected.total = collected.total.plus(amount);
                    collected.payments += 1;
                }
            }
            Entry::Cancelled { token } => self.pending(token).status = Status::Cancelled,
            Entry::Called { token } => {
                self.payments.get_mut(token).expect("only a registered payment is told about").callback_owed = false;
            }
        }
    }

    fn pending(&mut self, token: &str) -> &mut Payment {
        let payment = self.payments.get_mut(token).expect("only a registered payment ends");
        assert_eq!(payment.status, Status::Pending, "a payment ends once");
        payment
    }
}

impl From<Outcome> for Status {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Success => Self::Success,
            Outcome::Failure => Self::Failure,
        }
    }
}
