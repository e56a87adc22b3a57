//! What several HTTP services share, so that all doors of Daybook speak alike.
//!
//! A request passes through here twice: on its way in it is read strictly ([`Json`], [`Path`], [`Query`]),
//! its caller is known by its token ([`Client`]) and its repetition by its key ([`RequiredKey`]); on its way
//! out it is a body of API.md ([`TransactionBody`], [`WalletBody`]) or a [`Problem`]. [`layer`] goes around
//! every service's routes.
//!
//! Left out: routes (each service has its own), decisions (ledger-core), limits of connections and of slow
//! clients (runtime). The schema `access` is kept here, for whoever answers a call must know the caller.

mod access;
mod attempts;
mod audit;
mod body;
mod client;
mod clients;
mod cursor;
mod desk;
mod idempotency;
mod json;
#[cfg(any(test, fuzzing))]
pub mod laws;
mod layer;
mod metadata;
mod money;
mod pool;
mod problem;
mod rate;
mod read;
mod reader;
mod routes;
mod scope;
mod seal;
mod secret;
mod signing;
mod text;
mod token;
mod uri;

pub use access::{Access, AccessError, TokenPair};
pub use audit::{Act, RecordedAct};
pub use body::{EntryBody, TransactionBody, WalletBody};
pub use client::{Client, Origin};
pub use clients::{NewClient, PartnerChange};
pub use cursor::{CursorKey, Page};
pub use desk::Desk;
pub use idempotency::{OptionalKey, RequiredKey, key, key_hash};
pub use json::{BODY_BYTES_MAX, CanonicalBody, Json, JsonMax};
pub use layer::layer;
pub use metadata::Metadata;
pub use money::{AmountText, CurrencyText, effective_at, money};
pub use problem::{Problem, problem_pages};
pub use rate::{NoRateLimit, RateLimit};
pub use read::{Freshness, LEDGER_POSITION, Limit, MinPosition, Position, WaitMs};
pub use reader::refuse;
pub use routes::{Entrance, ROUTES, Route};
pub use scope::{Scope, Scopes};
pub use seal::{KeyFileError, Seal, SealError};
pub use secret::Secret;
pub use signing::{JsonWebKey, JsonWebKeys};
pub use text::{FreeText, Text, UserId};
pub use uri::{Path, Query};
