//! The rules: what a wallet, a transaction and a partner may do, and every event that can happen to them.
//!
//! First room on the road: `ledger-engine` asks [`Book::decide`] here and appends what it answers; every
//! other room reads the events defined here. Pure: no IO, no clock, no minted ids, no floats, no unchecked
//! arithmetic, so any decision can be repeated from the log and comes out the same.
//!
//! Left out: storing (event-store), idempotency keys and batching (ledger-engine), HTTP shapes (api-contract).
#![deny(clippy::arithmetic_side_effects)]

mod book;
mod command;
mod currency;
mod event;
mod id;
#[cfg(any(test, fuzzing))]
pub mod laws;
mod money;
mod partner;
mod refusal;
mod shelf;
mod text;
mod timestamp;
mod transaction;
mod wallet;

pub use book::{Book, Mark, Missing, Pages};
pub use command::{Action, Caller, Command, CommandEvent, Key};
pub use currency::Currency;
pub use event::{CorruptEvent, Event, NewEvent, upcasters};
pub use id::{
    ClientId, CommandId, DeliveryId, EventId, InvalidId, LedgerId, PartnerId, RequestId, TransactionId, WalletId,
    WebhookId,
};
pub use money::{Amount, AmountError, Balance, Money};
pub use partner::{Partner, PartnerCommand, PartnerEvent};
pub use refusal::{Failure, Refusal};
pub use timestamp::{InvalidTimestamp, Timestamp};
pub use transaction::{
    Direction, Entries, Entry, Instruction, Payment, Transaction, TransactionCommand, TransactionEvent,
    TransactionKind, TransactionState, TransactionStatus,
};
pub use wallet::{Opened, Wallet, WalletCommand, WalletEvent, WalletKind, WalletStatus};

/// What a client attaches to a wallet or a transaction; the ledger carries it and never reads it.
pub type Metadata = serde_json::Map<String, serde_json::Value>;
