//! What an event says, as far as an auditor cares. Read from the stored text; names are those of the log.
//!
//! A payload is an object with one key, the event's type. A type that is not here is a finding, not something
//! to skip: it may move money.

use serde::Deserialize;

#[derive(Debug, Deserialize)]
pub(crate) enum Payload {
    PartnerRegistered {},
    PartnerSuspended {},
    PartnerResumed {},
    PartnerSecretRotated {},
    WalletOpened(WalletOpened),
    WalletFrozen(WalletChanged),
    WalletUnfrozen(WalletChanged),
    WalletClosed(WalletChanged),
    TransactionPosted(TransactionPosted),
    TransactionRequested(TransactionRequested),
    TransactionSettled(TransactionSettled),
    TransactionFailed(TransactionEnded),
    TransactionExpired(TransactionEnded),
    TransactionDeclined(TransactionRequested),
    CommandDeclined {},
    BatchDeclined {},
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct WalletOpened {
    pub(crate) kind: Kind,
    pub(crate) partner_id: Option<String>,
    pub(crate) currency: String,
    pub(crate) wallet_version: i64,
    pub(crate) balance_after: String,
}

/// What a wallet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum Kind {
    Customer,
    Settlement,
    Adjustments,
    Bank,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct WalletChanged {
    pub(crate) wallet_version: i64,
    pub(crate) balance_after: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct TransactionPosted {
    pub(crate) instruction: Instruction,
    pub(crate) entries: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct TransactionRequested {
    pub(crate) instruction: Instruction,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TransactionSettled {
    pub(crate) wallet_id: String,
    pub(crate) currency: String,
    pub(crate) entries: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TransactionEnded {
    pub(crate) wallet_id: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Instruction {
    #[serde(rename = "type")]
    pub(crate) kind: InstructionKind,
    pub(crate) partner_id: Option<String>,
    pub(crate) user_id: Option<String>,
    pub(crate) wallet_id: String,
    pub(crate) to_wallet_id: Option<String>,
    pub(crate) direction: Option<Direction>,
    pub(crate) amount: String,
    pub(crate) currency: String,
    pub(crate) reference: Option<String>,
    pub(crate) effective_at: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum InstructionKind {
    Transfer,
    Adjustment,
    TopUp,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Entry {
    pub(crate) wallet_id: String,
    pub(crate) direction: Direction,
    pub(crate) amount: String,
    pub(crate) balance_after: String,
    pub(crate) wallet_version: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum Direction {
    Debit,
    Credit,
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Customer => "CUSTOMER",
            Self::Settlement => "SETTLEMENT",
            Self::Adjustments => "ADJUSTMENTS",
            Self::Bank => "BANK",
        }
    }
}

impl Payload {
    /// The payload's only key.
    pub(crate) const fn event_type(&self) -> &'static str {
        match self {
            Self::PartnerRegistered {} => "PartnerRegistered",
            Self::PartnerSuspended {} => "PartnerSuspended",
            Self::PartnerResumed {} => "PartnerResumed",
            Self::PartnerSecretRotated {} => "PartnerSecretRotated",
            Self::WalletOpened(_) => "WalletOpened",
            Self::WalletFrozen(_) => "WalletFrozen",
            Self::WalletUnfrozen(_) => "WalletUnfrozen",
            Self::WalletClosed(_) => "WalletClosed",
            Self::TransactionPosted(_) => "TransactionPosted",
            Self::TransactionRequested(_) => "TransactionRequested",
            Self::TransactionSettled(_) => "TransactionSettled",
            Self::TransactionFailed(_) => "TransactionFailed",
            Self::TransactionExpired(_) => "TransactionExpired",
            Self::TransactionDeclined(_) => "TransactionDeclined",
            Self::CommandDeclined {} => "CommandDeclined",
            Self::BatchDeclined {} => "BatchDeclined",
        }
    }
}
