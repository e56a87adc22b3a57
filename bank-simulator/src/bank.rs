//! The bank at work: book, journal and callbacks together.
//!
//! Every change is decided and applied under one lock, in the order in which it goes to the journal;
//! it is answered, and told to the merchant, only when the journal has it on disk. Reads wait for the
//! disk too: nobody is told what a crash could take back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use crate::book::{Book, BookError, Collected, Entry, Outcome, Payment, Registration};
use crate::callback::{Callbacks, Plan, Slots};
use crate::journal::{Journal, JournalError};
use crate::money::Currency;

/// A payer may be faster than the merchant's registration.
const UNKNOWN_TOKEN_WAIT: Duration = Duration::from_secs(5);

pub(crate) struct Bank {
    book: Mutex<Book>,
    journal: Journal,
    callbacks: Callbacks,
    registered: watch::Sender<()>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum BankError {
    #[error(transparent)]
    Book(#[from] BookError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("too many callbacks are under way")]
    TooManyCallbacks,
    #[error("the bank was stopped meanwhile")]
    Interrupted,
}

impl Bank {
    /// Opens for business, and tells what the last run still owed.
    pub(crate) fn open(journal: Journal, entries: &[Entry], callbacks: Callbacks) -> Arc<Self> {
        let mut book = Book::default();
        for entry in entries {
            book.apply(entry);
        }
        let owed: Vec<Payment> = book.callbacks_owed().cloned().collect();
        let bank = Arc::new(Self { book: Mutex::new(book), journal, callbacks, registered: watch::Sender::new(()) });
        if !owed.is_empty() {
            tracing::info!(callbacks = owed.len(), "telling what the last run still owed");
            for payment in owed {
                match bank.callbacks.slots(Plan::ONCE) {
                    Some(slots) => drop(tokio::spawn(bank.clone().tell(payment, Plan::ONCE, slots))),
                    None => tracing::warn!(payment.reference = payment.reference, "too many: the next run tells"),
                }
            }
        }
        bank
    }

    /// The payment, and whether it is new.
    pub(crate) async fn register(&self, registration: Registration) -> Result<(Payment, bool), BankError> {
        let token = registration.token.clone();
        let (payment, new) = self.change(&token, |book| book.register(registration)).await?;
        if new {
            self.registered.send_replace(());
        }
        Ok((payment, new))
    }

    pub(crate) async fn cancel(&self, token: &str) -> Result<Payment, BankError> {
        Ok(self.change(token, |book| book.cancel(token)).await?.0)
    }

    /// Ends a payment as the payer wishes, and tells the merchant by `plan`. A repetition tells only when `again` asks for it.
    /// Runs to its end even when whoever asked has left.
    pub(crate) async fn end(
        self: &Arc<Self>,
        token: &str,
        outcome: Outcome,
        plan: Plan,
        again: bool,
    ) -> Result<Payment, BankError> {
        self.find(token).await?;
        let (bank, token) = (self.clone(), token.to_owned());
        let ending = tokio::spawn(async move {
            let slots = bank.callbacks.slots(plan).ok_or(BankError::TooManyCallbacks)?;
            let (payment, new) = bank.change(&token, |book| book.end(&token, outcome, 0 < plan.copies)).await?;
            if 0 < plan.copies && (new || again) {
                tokio::spawn(bank.tell(payment.clone(), plan, slots));
            }
            Ok(payment)
        });
        ending.await.unwrap_or(Err(BankError::Interrupted))
    }

    pub(crate) async fn payment(&self, token: &str) -> Result<Payment, BankError> {
        let payment = self.book().payment(token).cloned().ok_or(BookError::NotFound)?;
        self.journal.place()?.write(None).confirmed().await?;
        Ok(payment)
    }

    /// Like [`Self::payment`], but waits a while for a token that it does not know yet.
    pub(crate) async fn find(&self, token: &str) -> Result<Payment, BankError> {
        let mut registered = self.registered.subscribe();
        let known = async {
            while self.book().payment(token).is_none() {
                if registered.changed().await.is_err() {
                    return; // the bank is gone, and so is the answer
                }
            }
        };
        let _ = timeout(UNKNOWN_TOKEN_WAIT, known).await; // known or not: the book says it now
        self.payment(token).await
    }

    pub(crate) async fn collected(&self) -> Result<BTreeMap<Currency, Collected>, BankError> {
        let collected = self.book().collected().clone();
        self.journal.place()?.write(None).confirmed().await?;
        Ok(collected)
    }

    /// Whether the bank can still keep what it is told.
    pub(crate) async fn check(&self) -> Result<(), JournalError> {
        match self.journal.place() {
            Err(JournalError::Overloaded) => Ok(()), // busy is not broken
            place => place?.write(None).confirmed().await,
        }
    }

    /// Waits for what is under way, after a stop.
    pub(crate) async fn close(&self) {
        self.callbacks.idle().await;
        if self.check().await.is_err() {
            tracing::error!("the journal's last lines are not on disk");
        }
    }

    /// Decides, applies and journals as one; the payment is as of then, and known to be on disk.
    async fn change(
        &self,
        token: &str,
        decide: impl FnOnce(&Book) -> Result<Option<Entry>, BookError>,
    ) -> Result<(Payment, bool), BankError> {
        let (payment, new, written) = {
            let mut book = self.book();
            let place = self.journal.place()?;
            let entry = decide(&book)?;
            if let Some(entry) = &entry {
                book.apply(entry);
            }
            let payment = book.payment(token).cloned().ok_or(BookError::NotFound)?;
            (payment, entry.is_some(), place.write(entry.as_ref()))
        };
        written.confirmed().await?;
        Ok((payment, new))
    }

    async fn tell(self: Arc<Self>, payment: Payment, plan: Plan, slots: Slots) {
        if !self.callbacks.send(&payment, plan, slots).await {
            return; // still owed: the next run tells
        }
        let token = payment.registration.token;
        let called = Entry::Called { token: token.clone() };
        if let Err(error) = self.change(&token, |_| Ok(Some(called))).await {
            tracing::warn!(payment.reference = payment.reference, %error, "told, but not noted: the next run tells again");
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner) // `apply` panics only before it changes anything
    }
}
