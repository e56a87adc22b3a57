//! What an event says, as far as an auditor cares. Read from the stored text; names are those of the log.
//!
//! A payload is an object with one key, the event's type. A type that is not here is a finding, not something
//! to skip: it may move money. Texts stay where they stand, unless they are written with escapes.

use std::borrow::Cow;
use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

#[derive(Debug, Deserialize)]
pub(crate) enum Payload<'a> {
    PartnerRegistered {},
    PartnerSuspended {},
    PartnerResumed {},
    PartnerSecretRotated {},
    WalletOpened(#[serde(borrow)] WalletOpened<'a>),
    WalletFrozen(#[serde(borrow)] WalletChanged<'a>),
    WalletUnfrozen(#[serde(borrow)] WalletChanged<'a>),
    WalletClosed(#[serde(borrow)] WalletChanged<'a>),
    TransactionPosted(#[serde(borrow)] TransactionPosted<'a>),
    TransactionRequested(#[serde(borrow)] TransactionRequested<'a>),
    TransactionSettled(#[serde(borrow)] TransactionSettled<'a>),
    TransactionFailed(#[serde(borrow)] TransactionEnded<'a>),
    TransactionExpired(#[serde(borrow)] TransactionEnded<'a>),
    TransactionDeclined(#[serde(borrow)] TransactionRequested<'a>),
    CommandDeclined {},
    BatchDeclined {},
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct WalletOpened<'a> {
    pub(crate) kind: Kind,
    #[serde(borrow)]
    pub(crate) partner_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(crate) currency: Cow<'a, str>,
    pub(crate) wallet_version: i64,
    #[serde(borrow)]
    pub(crate) balance_after: Cow<'a, str>,
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
pub(crate) struct WalletChanged<'a> {
    pub(crate) wallet_version: i64,
    #[serde(borrow)]
    pub(crate) balance_after: Cow<'a, str>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct TransactionPosted<'a> {
    #[serde(borrow)]
    pub(crate) instruction: Instruction<'a>,
    #[serde(borrow)]
    pub(crate) entries: Vec<Entry<'a>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct TransactionRequested<'a> {
    #[serde(borrow)]
    pub(crate) instruction: Instruction<'a>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TransactionSettled<'a> {
    #[serde(borrow)]
    pub(crate) wallet_id: Cow<'a, str>,
    #[serde(borrow)]
    pub(crate) currency: Cow<'a, str>,
    #[serde(borrow)]
    pub(crate) entries: Vec<Entry<'a>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TransactionEnded<'a> {
    #[serde(borrow)]
    pub(crate) wallet_id: Cow<'a, str>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Instruction<'a> {
    #[serde(rename = "type")]
    pub(crate) kind: InstructionKind,
    #[serde(borrow)]
    pub(crate) partner_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(crate) user_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(crate) wallet_id: Cow<'a, str>,
    #[serde(borrow)]
    pub(crate) to_wallet_id: Option<Cow<'a, str>>,
    pub(crate) direction: Option<Direction>,
    #[serde(borrow)]
    pub(crate) amount: Cow<'a, str>,
    #[serde(borrow)]
    pub(crate) currency: Cow<'a, str>,
    #[serde(borrow)]
    pub(crate) reference: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(crate) effective_at: Option<Cow<'a, str>>,
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
pub(crate) struct Entry<'a> {
    #[serde(borrow)]
    pub(crate) wallet_id: Cow<'a, str>,
    pub(crate) direction: Direction,
    #[serde(borrow)]
    pub(crate) amount: Cow<'a, str>,
    #[serde(borrow)]
    pub(crate) balance_after: Cow<'a, str>,
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

impl Instruction<'_> {
    /// To be kept.
    pub(crate) fn into_owned(self) -> Instruction<'static> {
        let owned = |text: Cow<'_, str>| Cow::Owned(text.into_owned());
        Instruction {
            kind: self.kind,
            partner_id: self.partner_id.map(owned),
            user_id: self.user_id.map(owned),
            wallet_id: owned(self.wallet_id),
            to_wallet_id: self.to_wallet_id.map(owned),
            direction: self.direction,
            amount: owned(self.amount),
            currency: owned(self.currency),
            reference: self.reference.map(owned),
            effective_at: self.effective_at.map(owned),
        }
    }
}

impl Payload<'_> {
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

/// An object whose values are strings, whatever they say.
pub(crate) struct FlatObject;

impl<'de> Deserialize<'de> for FlatObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FlatObject)
    }
}

impl<'de> Visitor<'de> for FlatObject {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        while map.next_entry::<AnyText, AnyText>()?.is_some() {}
        Ok(Self)
    }
}

struct AnyText;

impl<'de> Deserialize<'de> for AnyText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(AnyText)
    }
}

impl Visitor<'_> for AnyText {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(Self)
    }
}
