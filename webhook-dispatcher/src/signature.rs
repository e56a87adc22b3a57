//! What proves to a receiver that a delivery is ours: a secret of the endpoint's own, and two signatures.
//!
//! `X-Daybook-Signature` is the scheme of the code hosts: the key is the secret as shown, the message the body.
//! `webhook-signature` is Standard Webhooks: the key is what the secret's Base64 stands for, the message binds
//! id and time too, so a receiver can refuse what is old.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac};
use ring::rand::{SecureRandom, SystemRandom};
use sha2::Sha256;

const PREFIX: &str = "whsec_";

/// An endpoint's secret: `whsec_` and the Base64 of its bytes. It is shown once and kept sealed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct SigningSecret(String);

/// Not `whsec_` and Base64.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("not a webhook secret")]
pub(crate) struct InvalidSecret;

impl SigningSecret {
    /// 256 random bits.
    pub(crate) fn mint() -> Self {
        let mut bytes = [0; 32];
        SystemRandom::new().fill(&mut bytes).expect("the system has randomness");
        Self(format!("{PREFIX}{}", STANDARD.encode(bytes)))
    }

    pub(crate) fn parse(text: &str) -> Result<Self, InvalidSecret> {
        let bytes = text.strip_prefix(PREFIX).and_then(|text| STANDARD.decode(text).ok());
        bytes.map(|_| Self(text.to_owned())).ok_or(InvalidSecret)
    }

    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }

    /// The value of `X-Daybook-Signature`.
    pub(crate) fn sign_body(&self, body: &str) -> String {
        let mac = hmac(self.0.as_bytes()).chain_update(body).finalize().into_bytes();
        let hex: String = mac.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("sha256={hex}")
    }

    /// The value of `webhook-signature`.
    pub(crate) fn sign_message(&self, id: &str, timestamp: i64, body: &str) -> String {
        let key = STANDARD.decode(&self.0[PREFIX.len()..]).expect("checked when it was parsed or minted");
        let mac = hmac(&key).chain_update(format!("{id}.{timestamp}.")).chain_update(body).finalize().into_bytes();
        format!("v1,{}", STANDARD.encode(mac))
    }
}

fn hmac(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of any length")
}

impl std::fmt::Debug for SigningSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SigningSecret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_signatures_are_those_of_the_published_vector() {
        let secret = SigningSecret::parse("whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD").unwrap();
        let id = "0192f0c1-2d3e-7abc-8def-0123456789ab";
        let body = r#"{"eventId":"0192f0c1-2d3e-7abc-8def-0123456789ab","eventType":"transaction.completed","data":{"transactionId":"tx_1","amount":"12500","currency":"USD"}}"#;
        assert_eq!(secret.sign_message(id, 1_732_132_800, body), "v1,dh4ExB1Avhxlq/yd54HQHYdZUIw8KUciXYeg4UnAVEA=");
        assert_eq!(secret.sign_body(body), "sha256=82f53559e8d1c7ef8abb6f97395608bd55edb20de1ae641197f8a95cade24d86");
    }

    #[test]
    fn a_minted_secret_reads_back_and_no_two_are_equal() {
        let secret = SigningSecret::mint();
        assert_eq!(SigningSecret::parse(secret.reveal()).unwrap(), secret);
        assert_ne!(SigningSecret::mint(), secret);
        assert!(SigningSecret::parse("C2FVsBQIhrscChlQIMV+b5sSYspob7oD").is_err());
        assert!(SigningSecret::parse("whsec_not Base64").is_err());
    }
}
