//! A wallet: who it is for, whether it may be used, and what it holds.
//!
//! Its own stream tells its life (opened, frozen, closed). What it holds follows from the entries of
//! transactions, which the [`Book`] folds in: a movement of money is one event in its transaction's stream.

use std::sync::Arc;

use cqrs_es::event_sink::EventSink;
use cqrs_es::{Aggregate, DomainEvent};
use serde::{Deserialize, Serialize};

use crate::{Balance, Book, Caller, Currency, Entry, Metadata, PartnerId, Refusal};

/// A wallet at one position of the log. `Default` is a wallet that has not been opened.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Wallet {
    /// How many events its own stream has.
    pub sequence: i64,
    /// Counts everything that changes the wallet: entries, holds, life events.
    pub version: i64,
    pub opened: Option<Opened>,
    pub status: WalletStatus,
    /// Pending transactions that may still bring money in.
    pub expected: u32,
}

/// What opening fixes, and the balance that there is only since then.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Opened {
    pub kind: WalletKind,
    pub partner: Option<PartnerId>,
    pub user: Option<Arc<str>>,
    pub currency: Currency,
    pub balance: Balance,
}

/// What a wallet is for, which decides its floor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum WalletKind {
    /// An end user's. Never below zero.
    Customer,
    /// A partner's own. Never below zero.
    Settlement,
    /// The system's other side of adjustments. No floor.
    Adjustments,
    /// The system's other side of money at the bank. No floor.
    Bank,
}

impl WalletKind {
    /// The system's own wallets, of which each currency in use has one.
    pub const SYSTEM: [WalletKind; 2] = [WalletKind::Adjustments, WalletKind::Bank];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Customer => "CUSTOMER",
            Self::Settlement => "SETTLEMENT",
            Self::Adjustments => "ADJUSTMENTS",
            Self::Bank => "BANK",
        }
    }

    pub const fn has_floor(self) -> bool {
        matches!(self, Self::Customer | Self::Settlement)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum WalletStatus {
    #[default]
    Active,
    /// Nothing goes out, nothing comes in.
    Frozen,
    /// For good.
    Closed,
}

#[derive(Clone, Debug, PartialEq)]
pub enum WalletCommand {
    Open {
        kind: WalletKind,
        partner: Option<PartnerId>,
        user: Option<Arc<str>>,
        currency: Currency,
        metadata: Metadata,
    },
    Freeze {
        caller: Caller,
        reason: String,
    },
    Unfreeze {
        caller: Caller,
        reason: String,
    },
    Close {
        caller: Caller,
        reason: String,
    },
}

/// What has happened to a wallet. This is history: add variants, never edit or reuse one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all_fields = "camelCase")]
pub enum WalletEvent {
    #[serde(rename = "WalletOpened")]
    Opened {
        kind: WalletKind,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        partner_id: Option<PartnerId>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user_id: Option<Arc<str>>,
        currency: Currency,
        #[serde(default, skip_serializing_if = "Metadata::is_empty")]
        metadata: Metadata,
        wallet_version: i64,
        balance_after: Balance,
    },
    #[serde(rename = "WalletFrozen")]
    Frozen { reason: String, wallet_version: i64, balance_after: Balance },
    #[serde(rename = "WalletUnfrozen")]
    Unfrozen { reason: String, wallet_version: i64, balance_after: Balance },
    #[serde(rename = "WalletClosed")]
    Closed { reason: String, wallet_version: i64, balance_after: Balance },
}

impl Wallet {
    /// Every rule of a wallet's life. `book` is all that it may look at.
    pub fn decide(&self, command: WalletCommand, book: &Book) -> Result<WalletEvent, Refusal> {
        use {WalletCommand as Command, WalletEvent as Event};
        let wallet_version = self.version.saturating_add(1);
        match command {
            Command::Open { kind, partner, user, currency, metadata } => {
                assert!(self.opened.is_none(), "wallet ids are minted once");
                if kind == WalletKind::Customer {
                    let partner = partner.and_then(|id| book.partner(id)).ok_or(Refusal::PartnerNotFound)?;
                    if !partner.currencies.contains(&currency) {
                        return Err(Refusal::CurrencyNotEnabled { currency });
                    }
                }
                let balance_after = Balance::zero(currency);
                Ok(Event::Opened {
                    kind,
                    partner_id: partner,
                    user_id: user,
                    currency,
                    metadata,
                    wallet_version,
                    balance_after,
                })
            }
            Command::Freeze { caller, reason } => {
                let balance_after = self.seen_by(&caller)?.balance;
                self.usable()?;
                Ok(Event::Frozen { reason, wallet_version, balance_after })
            }
            Command::Unfreeze { caller, reason } => {
                let balance_after = self.seen_by(&caller)?.balance;
                match self.status {
                    WalletStatus::Frozen => Ok(Event::Unfrozen { reason, wallet_version, balance_after }),
                    WalletStatus::Active => Err(Refusal::WalletNotFrozen),
                    WalletStatus::Closed => Err(Refusal::WalletClosed),
                }
            }
            Command::Close { caller, reason } => {
                let balance_after = self.seen_by(&caller)?.balance;
                match self.status {
                    WalletStatus::Closed => Err(Refusal::WalletClosed),
                    _ if !balance_after.is_zero() => Err(Refusal::WalletNotEmpty { balance: balance_after }),
                    _ if self.expected != 0 => Err(Refusal::MoneyExpected),
                    _ => Ok(Event::Closed { reason, wallet_version, balance_after }),
                }
            }
        }
    }

    /// The opened wallet, if there is one and the caller may know of it. System wallets are nobody's.
    pub fn seen_by(&self, caller: &Caller) -> Result<&Opened, Refusal> {
        let opened = self.opened.as_ref().ok_or(Refusal::WalletNotFound)?;
        let theirs = match caller {
            Caller::Partner { partner, .. } => opened.partner == Some(*partner),
            Caller::Admin | Caller::Workflow => opened.partner.is_some(),
        };
        if theirs { Ok(opened) } else { Err(Refusal::WalletNotFound) }
    }

    /// Whether money may move in or out.
    pub fn usable(&self) -> Result<(), Refusal> {
        match self.status {
            WalletStatus::Active => Ok(()),
            WalletStatus::Frozen => Err(Refusal::WalletFrozen),
            WalletStatus::Closed => Err(Refusal::WalletClosed),
        }
    }

    /// Folds one entry of a transaction in. An entry that is already in changes nothing; a gap is corrupt history.
    pub(crate) fn enter(&mut self, entry: &Entry) {
        if entry.wallet_version <= self.version {
            return;
        }
        assert_eq!(Some(entry.wallet_version), self.version.checked_add(1), "{}: a change is missing", entry.wallet_id);
        self.version = entry.wallet_version;
        self.opened.as_mut().expect("money enters opened wallets only").balance = entry.balance_after;
    }
}

impl Aggregate for Wallet {
    const TYPE: &'static str = "wallet";
    type Command = WalletCommand;
    type Event = WalletEvent;
    type Error = Refusal;
    type Services = Book;

    async fn handle(&mut self, command: WalletCommand, book: &Book, sink: &EventSink<Self>) -> Result<(), Refusal> {
        let event = self.decide(command, book)?;
        sink.write(event, self).await;
        Ok(())
    }

    fn apply(&mut self, event: WalletEvent) {
        self.sequence = self.sequence.saturating_add(1);
        self.version = event.wallet_version();
        match event {
            WalletEvent::Opened { kind, partner_id, user_id, currency, balance_after, .. } => {
                let partner = partner_id;
                self.opened = Some(Opened { kind, partner, user: user_id, currency, balance: balance_after });
            }
            WalletEvent::Frozen { .. } => self.status = WalletStatus::Frozen,
            WalletEvent::Unfrozen { .. } => self.status = WalletStatus::Active,
            WalletEvent::Closed { .. } => self.status = WalletStatus::Closed,
        }
    }
}

impl WalletEvent {
    pub const fn wallet_version(&self) -> i64 {
        match self {
            Self::Opened { wallet_version, .. }
            | Self::Frozen { wallet_version, .. }
            | Self::Unfrozen { wallet_version, .. }
            | Self::Closed { wallet_version, .. } => *wallet_version,
        }
    }

    pub const fn name(&self) -> &'static str {
        match self {
            Self::Opened { .. } => "WalletOpened",
            Self::Frozen { .. } => "WalletFrozen",
            Self::Unfrozen { .. } => "WalletUnfrozen",
            Self::Closed { .. } => "WalletClosed",
        }
    }
}

impl DomainEvent for WalletEvent {
    fn event_type(&self) -> String {
        self.name().to_owned()
    }

    fn event_version(&self) -> String {
        crate::event::VERSION.to_owned()
    }
}
