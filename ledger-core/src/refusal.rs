//! Why the ledger says no. A refusal is an answer: named for its reason, carrying its numbers.
//!
//! `code` is the problem slug that API.md lists; `api-contract` turns it into a status and a page. Refusals
//! found before the ledger is asked (shapes, formats, scopes) are not here.

use serde::{Deserialize, Serialize};

use crate::{Amount, Balance, Currency, TransactionStatus};

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("no such wallet")]
    WalletNotFound,
    #[error("no such transaction")]
    TransactionNotFound,
    #[error("no such partner")]
    PartnerNotFound,
    #[error("the partner is suspended")]
    PartnerSuspended,
    #[error("the partner is suspended already")]
    PartnerIsSuspended,
    #[error("the partner is not suspended")]
    PartnerNotSuspended,
    #[error("the wallet belongs to another user")]
    WalletNotOwned,
    #[error("the wallet is frozen")]
    WalletFrozen,
    #[error("the wallet is closed")]
    WalletClosed,
    #[error("the wallet holds {balance}")]
    WalletNotEmpty { balance: Balance },
    #[error("money is still expected in the wallet: a pending transaction has not ended")]
    MoneyExpected,
    #[error("the wallet is not frozen")]
    WalletNotFrozen,
    #[error("the transaction has ended as {status}")]
    TransactionEnded { status: TransactionStatus },
    #[error("available {available} does not cover {requested}")]
    InsufficientFunds { available: Balance, requested: Amount },
    #[error("the wallet is in {wallet}, the amount in {requested}")]
    CurrencyMismatch { wallet: Currency, requested: Currency },
    #[error("{currency} is not enabled for the partner")]
    CurrencyNotEnabled { currency: Currency },
    #[error("money cannot move from a wallet to itself")]
    SameWallet,
    #[error("the balance would pass what a wallet may hold")]
    BalanceLimitExceeded,
    #[error("asked for {expected} {currency}, reported {reported} {reported_currency}")]
    SettlementMismatch { expected: Amount, currency: Currency, reported: Amount, reported_currency: Currency },
}

impl Refusal {
    /// The problem slug, without `/problems/`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::WalletNotFound => "wallet-not-found",
            Self::TransactionNotFound => "transaction-not-found",
            Self::PartnerNotFound => "partner-not-found",
            Self::PartnerSuspended => "partner-suspended",
            Self::WalletNotOwned => "wallet-not-owned",
            Self::WalletFrozen => "wallet-frozen",
            Self::WalletClosed => "wallet-closed",
            Self::WalletNotEmpty { .. } | Self::MoneyExpected => "wallet-not-empty",
            Self::WalletNotFrozen
            | Self::TransactionEnded { .. }
            | Self::PartnerIsSuspended
            | Self::PartnerNotSuspended => "invalid-transition",
            Self::InsufficientFunds { .. } => "insufficient-funds",
            Self::CurrencyMismatch { .. } => "currency-mismatch",
            Self::CurrencyNotEnabled { .. } => "currency-not-enabled",
            Self::SameWallet => "same-wallet",
            Self::BalanceLimitExceeded => "balance-limit-exceeded",
            Self::SettlementMismatch { .. } => "callback-mismatch",
        }
    }
}

/// A refusal or a provider's no, as history and the API keep it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// A problem slug, or the provider's word for it.
    pub code: String,
    pub detail: String,
}

impl From<&Refusal> for Failure {
    fn from(refusal: &Refusal) -> Self {
        Self { code: refusal.code().to_owned(), detail: refusal.to_string() }
    }
}
