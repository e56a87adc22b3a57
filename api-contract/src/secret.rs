//! Secrets: client secrets, refresh tokens, access tokens. They are shown once, on purpose, and never by accident.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Deserializer, Serializer};
use sha2::{Digest, Sha256};
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};

/// A text that must not reach a log. It prints as `Secret(…)` and has no `Serialize`: whoever shows it says `reveal`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

/// Longer than any secret of ours, access tokens included.
const LENGTH_MAX: usize = 4096;

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// 256 random bits in base64url, after a prefix that says what they are.
    pub fn mint(prefix: &str) -> Self {
        Self(format!("{prefix}{}", URL_SAFE_NO_PAD.encode(random::<32>())))
    }

    /// A client's secret: `dbs_…`.
    pub fn mint_for_client() -> Self {
        Self::mint("dbs_")
    }

    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// What is stored in its place. A plain hash is enough: nobody can guess 256 random bits.
    pub(crate) fn hash(&self) -> [u8; 32] {
        Sha256::digest(&self.0).into()
    }
}

/// Bytes from the system's source of randomness.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).expect("the system has randomness");
    bytes
}

/// `#[serde(serialize_with = "secret::reveal")]`, in the few answers that show a secret.
pub(crate) fn reveal<S: Serializer>(secret: &Secret, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(secret.reveal())
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.len() <= LENGTH_MAX { Ok(Self(text)) } else { Err(serde::de::Error::custom("longer than any secret")) }
    }
}

impl utoipa::PartialSchema for Secret {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new().schema_type(Type::String).into()
    }
}

impl utoipa::ToSchema for Secret {}
