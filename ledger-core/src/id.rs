//! Ids: a type for each kind of thing, which say what they are when printed: `wal_0192f0c1-…`.
//!
//! Parsed once at the edge, in the one canonical spelling; minted at the edge too, as UUIDv7, so that what
//! is indexed arrives in the order of time. Nothing here mints.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::{Currency, WalletKind};

/// The text is not `<prefix>_<uuid>` in lower case with hyphens, or is the nil UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an id of the form {prefix}<uuid>")]
pub struct InvalidId {
    prefix: &'static str,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            pub const PREFIX: &'static str = $prefix;

            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            pub const fn uuid(self) -> Uuid {
                self.0
            }
        }

        impl $name {
            fn text(self, buffer: &mut [u8; TEXT_MAX]) -> &str {
                text(Self::PREFIX, self.0, buffer)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.text(&mut [0; TEXT_MAX]))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                parse(text, Self::PREFIX).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.text(&mut [0; TEXT_MAX]))
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                crate::text::from_text(deserializer)
            }
        }
    };
}

id!(
    /// A wallet. System wallets have a name-based UUIDv8, all others a UUIDv7.
    WalletId,
    "wal_"
);
id!(TransactionId, "txn_");
id!(PartnerId, "par_");
id!(
    /// One accepted command; its events are contiguous in the log.
    CommandId,
    "cmd_"
);
id!(
    /// An API client: who holds a token.
    ClientId,
    "cli_"
);
id!(RequestId, "req_");
id!(EventId, "evt_");
id!(WebhookId, "whk_");
id!(DeliveryId, "dlv_");
id!(
    /// A ledger: what its genesis commit binds. Written without a prefix in exports.
    LedgerId,
    ""
);

impl WalletId {
    /// The one wallet of the system with this job in this currency. The id follows from its name, so no
    /// registry of system wallets is needed to find it.
    pub fn system(kind: WalletKind, currency: Currency) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"daybook system wallet");
        hash.update(kind.name());
        hash.update(currency.code());
        Self(uuid_v8(&hash.finalize()))
    }

    /// Whether this is a system wallet's id: clients cannot mint these, and never see what such a wallet holds.
    pub fn is_system(self) -> bool {
        self.0.get_version_num() == 8
    }
}

impl EventId {
    /// An event's id follows from its content: the same after any rebuild.
    pub fn from_leaf(leaf: &[u8; 32]) -> Self {
        Self(uuid_v8(&Sha256::digest(leaf)))
    }

    /// The id under which a webhook reports the event as `event_type`.
    pub fn of_webhook(leaf: &[u8; 32], event_type: &str) -> Self {
        let mut hash = Sha256::new();
        hash.update(leaf);
        hash.update(event_type);
        Self(uuid_v8(&hash.finalize()))
    }
}

/// The first 16 bytes of a hash as a UUIDv8 (RFC 9562, section 5.8).
fn uuid_v8(hash: &[u8]) -> Uuid {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

/// A prefix of at most four letters, and a UUID with its hyphens.
const TEXT_MAX: usize = 40;

/// Written out in one piece: every event holds half a dozen ids.
fn text<'b>(prefix: &str, uuid: Uuid, buffer: &'b mut [u8; TEXT_MAX]) -> &'b str {
    buffer[..prefix.len()].copy_from_slice(prefix.as_bytes());
    let length = uuid.hyphenated().encode_lower(&mut buffer[prefix.len()..]).len();
    std::str::from_utf8(&buffer[..prefix.len().saturating_add(length)]).expect("prefixes and hex digits are ASCII")
}

fn parse(text: &str, prefix: &'static str) -> Result<Uuid, InvalidId> {
    let invalid = InvalidId { prefix };
    let rest = text.strip_prefix(prefix).ok_or(invalid)?;
    // `Uuid` also reads braces, URNs and bare digits: one spelling is enough, and makes text comparable.
    let canonical = rest.len() == 36 && rest.bytes().all(|b| !b.is_ascii_uppercase());
    let uuid = Uuid::try_parse(rest).map_err(|_| invalid)?;
    if canonical && !uuid.is_nil() { Ok(uuid) } else { Err(invalid) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_what_it_prints_and_nothing_else() {
        let text = "wal_0192f0c1-2d3e-7abc-8def-0123456789ab";
        assert_eq!(text.parse::<WalletId>().unwrap().to_string(), text);
        for wrong in [
            "",
            "wal_",
            "0192f0c1-2d3e-7abc-8def-0123456789ab",
            "txn_0192f0c1-2d3e-7abc-8def-0123456789ab",
            "wal_00000000-0000-0000-0000-000000000000",
            "wal_0192F0C1-2d3e-7abc-8def-0123456789ab",
            "wal_{0192f0c1-2d3e-7abc-8def-0123456789ab}",
            "wal_urn:uuid:0192f0c1-2d3e-7abc-8def-0123456789ab",
            "wal_0192f0c12d3e7abc8def0123456789ab",
            "wal_0192f0c1-2d3e-7abc-8def-0123456789ab ",
        ] {
            assert!(wrong.parse::<WalletId>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn system_wallets_differ_by_job_and_currency_and_are_known_by_their_id() {
        let eur: Currency = "EUR".parse().unwrap();
        let usd: Currency = "USD".parse().unwrap();
        let bank = WalletId::system(WalletKind::Bank, eur);
        assert!(bank.is_system());
        assert_eq!(bank, WalletId::system(WalletKind::Bank, eur));
        assert_ne!(bank, WalletId::system(WalletKind::Bank, usd));
        assert_ne!(bank, WalletId::system(WalletKind::Adjustments, eur));
    }
}
