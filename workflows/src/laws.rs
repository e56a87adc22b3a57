//! The law of the bank's signature, for any bytes at all. It is stated once: the test below runs it for a moment, a target in
//! `fuzz/` for as long as one likes. It panics where it does not hold.
//!
//! Compiled for tests and for fuzzing alone.
#![expect(clippy::missing_panics_doc, reason = "a law that is broken says so by panicking")]

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use sha2::{Digest, Sha256};

use crate::bank::{signed_at, verify};

const SIGNATURE: HeaderName = HeaderName::from_static("x-bank-signature");
const TIMESTAMP: HeaderName = HeaderName::from_static("x-bank-timestamp");

/// A callback counts with exactly its signature: not with a letter changed, not at another time, not twice. And a time is
/// nothing but digits.
///
/// A place and a letter to change there, the length of a header, the header, and a body.
pub fn signature(bytes: &[u8]) {
    let [place, letter, length, rest @ ..] = bytes else { return };
    let (header, body) = rest.split_at(rest.len().min(usize::from(*length)));
    let (secret, at) = ("dbc_a secret", 1_800_000_000);
    let exact = sign(secret, at, body);
    let counts = |values: &[&[u8]], at: u64, body: &[u8]| {
        let mut headers = HeaderMap::new();
        for value in values {
            let Ok(value) = HeaderValue::from_bytes(value) else { return false }; // hyper would not have let it in
            headers.append(SIGNATURE, value);
        }
        verify(&headers, secret, at, body).is_ok()
    };
    assert!(counts(&[exact.as_bytes()], at, body), "{exact} is the signature");
    assert_eq!(counts(&[header], at, body), header == exact.as_bytes(), "{}", String::from_utf8_lossy(header));
    let mut changed = exact.clone().into_bytes();
    let place = usize::from(*place) % changed.len();
    if changed[place] != *letter {
        changed[place] = *letter;
        assert!(!counts(&[&changed], at, body), "{}", String::from_utf8_lossy(&changed));
    }
    assert!(!counts(&[exact.as_bytes()], at + 1, body), "at another time");
    assert!(!counts(&[exact.as_bytes()], at, &[body, b" "].concat()), "for a longer body");
    assert!(!counts(&[exact.as_bytes(), exact.as_bytes()], at, body), "twice");
    assert!(!counts(&[], at, body), "without a signature");

    if let Ok(value) = HeaderValue::from_bytes(header) {
        let headers = HeaderMap::from_iter([(TIMESTAMP, value)]);
        if let Ok(at) = signed_at(&headers) {
            assert!(header.iter().all(u8::is_ascii_digit), "{at} from {}", String::from_utf8_lossy(header));
        }
    }
}

/// HMAC as RFC 2104 writes it down, so that a mistake in how we call the library shows.
fn sign(secret: &str, at: u64, body: &[u8]) -> String {
    let mut key = [0; 64];
    key[..secret.len()].copy_from_slice(secret.as_bytes());
    let message = [format!("{at}.").as_bytes(), body].concat();
    let inner = Sha256::new().chain_update(key.map(|byte| byte ^ 0x36)).chain_update(message).finalize();
    let outer = Sha256::new().chain_update(key.map(|byte| byte ^ 0x5C)).chain_update(inner).finalize();
    outer.iter().fold("sha256=".to_owned(), |hex, byte| format!("{hex}{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn signatures_keep_their_law(
            place in any::<u8>(), letter in any::<u8>(), header in "sha256=[0-9a-f]{60,68}|[0-9]{0,20}|.{0,20}", body in prop::collection::vec(any::<u8>(), 0..60),
        ) {
            let length = u8::try_from(header.len()).unwrap();
            signature(&[&[place, letter, length], header.as_bytes(), &body].concat());
        }
    }
}
