//! A transaction: what was asked for, and what became of it.
//!
//! A movement of money is one event here, carrying all its entries, balanced by itself. Done at once it is
//! `TransactionPosted`; what waits for the outside is `TransactionRequested` and later settled, failed or
//! expired; what the ledger refused is `TransactionDeclined` and has moved nothing.

use std::fmt;
use std::sync::Arc;

use cqrs_es::event_sink::EventSink;
use cqrs_es::{Aggregate, DomainEvent};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};

use crate::{
    Amount, Balance, Book, Caller, Currency, Failure, Metadata, Money, PartnerId, Refusal, Timestamp, WalletId,
    WalletKind,
};

/// A transaction at one position of the log. `Default` is one that nobody has asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Transaction {
    /// How many events its stream has.
    pub sequence: i64,
    pub state: TransactionState,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum TransactionState {
    #[default]
    New,
    /// The outside has been asked, or is about to be.
    Pending(Arc<Instruction>),
    Ended(TransactionStatus),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TransactionKind {
    Transfer,
    Adjustment,
    TopUp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TransactionStatus {
    Pending,
    Success,
    Failed,
    Expired,
}

/// Seen from the wallet: a credit adds to what it holds, a debit takes from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Direction {
    Debit,
    Credit,
}

/// What a client asked for, as it asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Instruction {
    #[serde(rename = "type")]
    pub kind: TransactionKind,
    /// The partner who sees the transaction; none only where an operator's instruction was declined.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partner_id: Option<PartnerId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<Arc<str>>,
    /// The wallet that the transaction is about: the paying one of a transfer.
    pub wallet_id: WalletId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_wallet_id: Option<WalletId>,
    /// Of an adjustment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direction: Option<Direction>,
    pub amount: Amount,
    pub currency: Currency,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    #[serde(default, skip_serializing_if = "Metadata::is_empty")]
    pub metadata: Metadata,
    /// When it counts in business, if that is not when the log took it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effective_at: Option<Timestamp>,
}

/// Where the payer of a top-up goes to pay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Payment {
    /// Names the payment at the bank.
    pub token: String,
    pub redirect_url: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub return_url: Option<String>,
}

/// What one wallet gives or gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    pub wallet_id: WalletId,
    pub direction: Direction,
    pub amount: Amount,
    pub balance_after: Balance,
    pub wallet_version: i64,
}

/// Entries of one currency whose debits equal their credits. Nothing else can be built or read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Entry>")]
pub struct Entries(Arc<[Entry]>);

#[derive(Clone, Debug, PartialEq)]
pub enum TransactionCommand {
    Transfer {
        caller: Caller,
        instruction: Arc<Instruction>,
    },
    Adjust {
        caller: Caller,
        instruction: Arc<Instruction>,
    },
    Request {
        caller: Caller,
        instruction: Arc<Instruction>,
        payment: Payment,
    },
    /// The outside has done its part: exactly this money, under this reference of its own.
    Settle {
        money: Money,
        provider_reference: String,
    },
    Fail {
        failure: Failure,
    },
    Expire,
}

/// What has happened to a transaction. This is history: add variants, never edit or reuse one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all_fields = "camelCase")]
pub enum TransactionEvent {
    #[serde(rename = "TransactionPosted")]
    Posted { instruction: Arc<Instruction>, entries: Entries },
    #[serde(rename = "TransactionRequested")]
    Requested { instruction: Arc<Instruction>, payment: Payment },
    #[serde(rename = "TransactionSettled")]
    Settled { wallet_id: WalletId, currency: Currency, entries: Entries, provider_reference: String },
    #[serde(rename = "TransactionFailed")]
    Failed { wallet_id: WalletId, failure: Failure },
    #[serde(rename = "TransactionExpired")]
    Expired { wallet_id: WalletId },
    #[serde(rename = "TransactionDeclined")]
    Declined { instruction: Arc<Instruction>, failure: Failure },
}

impl Transaction {
    /// Every rule of a transaction. `book` is all that it may look at.
    pub fn decide(&self, command: TransactionCommand, book: &Book) -> Result<TransactionEvent, Refusal> {
        use TransactionState::{Ended, New, Pending};
        use {TransactionCommand as Command, TransactionEvent as Event};
        match (&self.state, command) {
            (New, Command::Transfer { caller, instruction }) => {
                let to = instruction.to_wallet_id.expect("a transfer names both wallets");
                let entries = transfer(book, &caller, &instruction, to)?;
                Ok(Event::Posted { instruction: with_partner(instruction, book), entries })
            }
            (New, Command::Adjust { caller, instruction }) => {
                let direction = instruction.direction.expect("an adjustment has a direction");
                let wallet = book.wallet(instruction.wallet_id).ok_or(Refusal::WalletNotFound)?;
                wallet.seen_by(&caller)?;
                let other = WalletId::system(WalletKind::Adjustments, instruction.currency);
                let (from, to) = match direction {
                    Direction::Credit => (other, instruction.wallet_id),
                    Direction::Debit => (instruction.wallet_id, other),
                };
                let entries = book.entries(from, to, instruction.money())?;
                Ok(Event::Posted { instruction: with_partner(instruction, book), entries })
            }
            (New, Command::Request { caller, instruction, payment }) => {
                let wallet = book.wallet(instruction.wallet_id).ok_or(Refusal::WalletNotFound)?;
                let opened = wallet.seen_by(&caller)?;
                if opened.currency != instruction.currency {
                    return Err(Refusal::CurrencyMismatch { wallet: opened.currency, requested: instruction.currency });
                }
                wallet.usable()?;
                opened.balance.plus(instruction.amount).ok_or(Refusal::BalanceLimitExceeded)?;
                Ok(Event::Requested { instruction: with_partner(instruction, book), payment })
            }
            (Pending(instruction), Command::Settle { money, provider_reference }) => {
                if money != instruction.money() {
                    return Err(Refusal::SettlementMismatch {
                        expected: instruction.amount,
                        currency: instruction.currency,
                        reported: money.amount(),
                        reported_currency: money.currency(),
                    });
                }
                let bank = WalletId::system(WalletKind::Bank, money.currency());
                let wallet_id = instruction.wallet_id;
                let entries = book.entries(bank, wallet_id, money)?;
                Ok(Event::Settled { wallet_id, currency: money.currency(), entries, provider_reference })
            }
            (Pending(instruction), Command::Fail { failure }) => {
                Ok(Event::Failed { wallet_id: instruction.wallet_id, failure })
            }
            (Pending(instruction), Command::Expire) => Ok(Event::Expired { wallet_id: instruction.wallet_id }),
            (New, Command::Settle { .. } | Command::Fail { .. } | Command::Expire) => Err(Refusal::TransactionNotFound),
            (Ended(status), Command::Settle { .. } | Command::Fail { .. } | Command::Expire) => {
                Err(Refusal::TransactionEnded { status: *status })
            }
            (Pending(_) | Ended(_), Command::Transfer { .. } | Command::Adjust { .. } | Command::Request { .. }) => {
                unreachable!("transaction ids are minted once")
            }
        }
    }

    /// What is pending, if anything is.
    pub fn pending(&self) -> Option<&Instruction> {
        match &self.state {
            TransactionState::Pending(instruction) => Some(instruction),
            TransactionState::New | TransactionState::Ended(_) => None,
        }
    }
}

/// A client's transfer: both wallets must be the caller's to see, and the paying one its to spend from.
fn transfer(book: &Book, caller: &Caller, instruction: &Instruction, to: WalletId) -> Result<Entries, Refusal> {
    let from = instruction.wallet_id;
    if from == to {
        return Err(Refusal::SameWallet);
    }
    let paying = book.wallet(from).ok_or(Refusal::WalletNotFound)?.seen_by(caller)?;
    book.wallet(to).ok_or(Refusal::WalletNotFound)?.seen_by(caller)?;
    // Who names an end user acts for that one alone, the operator too.
    let user = match caller {
        Caller::Partner { user, .. } => user.as_ref(),
        Caller::Admin | Caller::Workflow => instruction.user_id.as_ref(),
    };
    if user.is_some() && paying.user.as_ref() != user {
        return Err(Refusal::WalletNotOwned);
    }
    book.entries(from, to, instruction.money())
}

/// An operator's instruction, which comes without a partner, is the business of the partner whose wallet it is about.
fn with_partner(instruction: Arc<Instruction>, book: &Book) -> Arc<Instruction> {
    if instruction.partner_id.is_some() {
        return instruction;
    }
    let opened = book.wallet(instruction.wallet_id).and_then(|wallet| wallet.opened.as_ref());
    let partner_id = opened.and_then(|opened| opened.partner);
    Arc::new(Instruction { partner_id, ..Arc::unwrap_or_clone(instruction) })
}

impl Instruction {
    pub fn money(&self) -> Money {
        Money::from_parts(self.amount, self.currency)
    }
}

impl Entries {
    /// `None` when the sums differ.
    pub fn balanced(entries: Vec<Entry>) -> Option<Self> {
        let mut sum = Decimal::ZERO;
        for entry in &entries {
            sum = match entry.direction {
                Direction::Credit => sum.checked_add(entry.amount.decimal())?,
                Direction::Debit => sum.checked_sub(entry.amount.decimal())?,
            };
        }
        (sum.is_zero() && !entries.is_empty()).then(|| Self(entries.into()))
    }

    pub fn iter(&self) -> std::slice::Iter<'_, Entry> {
        self.0.iter()
    }
}

impl<'a> IntoIterator for &'a Entries {
    type Item = &'a Entry;
    type IntoIter = std::slice::Iter<'a, Entry>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl TryFrom<Vec<Entry>> for Entries {
    type Error = &'static str;

    fn try_from(entries: Vec<Entry>) -> Result<Self, Self::Error> {
        Self::balanced(entries).ok_or("debits and credits differ")
    }
}

impl Aggregate for Transaction {
    const TYPE: &'static str = "transaction";
    type Command = TransactionCommand;
    type Event = TransactionEvent;
    type Error = Refusal;
    type Services = Book;

    async fn handle(
        &mut self,
        command: TransactionCommand,
        book: &Book,
        sink: &EventSink<Self>,
    ) -> Result<(), Refusal> {
        let event = self.decide(command, book)?;
        sink.write(event, self).await;
        Ok(())
    }

    fn apply(&mut self, event: TransactionEvent) {
        self.sequence = self.sequence.saturating_add(1);
        self.state = match event {
            TransactionEvent::Requested { instruction, .. } => TransactionState::Pending(instruction),
            TransactionEvent::Posted { .. } | TransactionEvent::Settled { .. } => {
                TransactionState::Ended(TransactionStatus::Success)
            }
            TransactionEvent::Failed { .. } | TransactionEvent::Declined { .. } => {
                TransactionState::Ended(TransactionStatus::Failed)
            }
            TransactionEvent::Expired { .. } => TransactionState::Ended(TransactionStatus::Expired),
        };
    }
}

impl TransactionEvent {
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Posted { .. } => "TransactionPosted",
            Self::Requested { .. } => "TransactionRequested",
            Self::Settled { .. } => "TransactionSettled",
            Self::Failed { .. } => "TransactionFailed",
            Self::Expired { .. } => "TransactionExpired",
            Self::Declined { .. } => "TransactionDeclined",
        }
    }

    /// The wallet in which, from this event on, money is expected, or no longer is.
    pub(crate) fn expecting(&self) -> Option<WalletId> {
        match self {
            Self::Requested { instruction, .. } => Some(instruction.wallet_id),
            Self::Settled { wallet_id, .. } | Self::Failed { wallet_id, .. } | Self::Expired { wallet_id } => {
                Some(*wallet_id)
            }
            Self::Posted { .. } | Self::Declined { .. } => None,
        }
    }

    /// Whether it ends what was pending.
    pub(crate) const fn ends(&self) -> bool {
        matches!(self, Self::Settled { .. } | Self::Failed { .. } | Self::Expired { .. })
    }

    /// The entries of an event that moves money.
    pub const fn entries(&self) -> Option<&Entries> {
        match self {
            Self::Posted { entries, .. } | Self::Settled { entries, .. } => Some(entries),
            Self::Requested { .. } | Self::Failed { .. } | Self::Expired { .. } | Self::Declined { .. } => None,
        }
    }
}

impl DomainEvent for TransactionEvent {
    fn event_type(&self) -> String {
        self.name().to_owned()
    }

    fn event_version(&self) -> String {
        crate::event::VERSION.to_owned()
    }
}

impl TransactionKind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Transfer => "TRANSFER",
            Self::Adjustment => "ADJUSTMENT",
            Self::TopUp => "TOP_UP",
        }
    }
}

impl TransactionStatus {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Success => "SUCCESS",
            Self::Failed => "FAILED",
            Self::Expired => "EXPIRED",
        }
    }
}

impl fmt::Display for TransactionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
