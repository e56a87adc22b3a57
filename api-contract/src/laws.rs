//! Laws of what clients give back to us, for any bytes at all. Each is stated once: the tests below run it for a moment, the
//! targets in `fuzz/` for as long as one likes. A law panics where it does not hold.
//!
//! Compiled for tests and for fuzzing alone.
#![expect(clippy::missing_panics_doc, reason = "a law that is broken says so by panicking")]

use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::signature::{Ed25519KeyPair, KeyPair};
use uuid::Uuid;

use ledger_core::{ClientId, PartnerId};

use crate::token::{self, LIFETIME, PublicKey, Unverified, Verified};
use crate::{CursorKey, Scopes, Seal};

/// A cursor opens as what it was sealed for and there alone; with any letter changed, cut off or added it is refused, and so
/// is every text that we have not sealed.
///
/// A place and a letter to change there; the rest, at each NUL: route, filters, last key, and a text to try as a cursor.
pub fn cursor(bytes: &[u8]) {
    let [place, letter, rest @ ..] = bytes else { return };
    let Ok(rest) = std::str::from_utf8(rest) else { return };
    let mut parts = rest.splitn(4, '\0');
    let mut next = || parts.next().unwrap_or_default();
    let (route, filters, last, text) = (next(), next(), next(), next());
    let key = CursorKey::new(&Seal::from_key([7; 32]));
    let (mine, theirs) =
        (Some(PartnerId::from_uuid(Uuid::from_u128(1))), Some(PartnerId::from_uuid(Uuid::from_u128(2))));
    let sealed = key.seal(route, mine, filters, last);
    let opens = |partner, route: &str, filters: &str, cursor: &str| key.open(route, partner, filters, cursor).ok();

    if sealed.len() <= 1024 {
        assert_eq!(opens(mine, route, filters, &sealed).as_deref(), Some(last));
    }
    assert_eq!(opens(theirs, route, filters, &sealed), None, "another partner's");
    assert_eq!(opens(None, route, filters, &sealed), None, "the operator's");
    assert_eq!(opens(mine, &format!("{route}x"), filters, &sealed), None, "another route's");
    assert_eq!(opens(mine, route, &format!("{filters}x"), &sealed), None, "another filter's");
    if let Some(first) = filters.chars().next() {
        let (route, filters) = (format!("{route}{first}"), &filters[first.len_utf8()..]);
        assert_eq!(opens(mine, &route, filters, &sealed), None, "the same letters, shared out otherwise");
    }
    let letter = char::from(letter & 0x7F);
    let mut changed: Vec<char> = sealed.chars().collect();
    let place = usize::from(*place) % changed.len();
    if changed[place] != letter {
        changed[place] = letter;
        assert_eq!(
            opens(mine, route, filters, &changed.iter().collect::<String>()),
            None,
            "letter {place} of {sealed}"
        );
    }
    assert_eq!(opens(mine, route, filters, &sealed[..sealed.len() - 1]), None, "cut short");
    assert_eq!(opens(mine, route, filters, &format!("{sealed}{letter}")), None, "and {letter:?} more");
    if text != sealed {
        assert_eq!(opens(mine, route, filters, text), None, "{text:?} was never sealed");
    }
}

/// Of all texts exactly the one that our key has signed is believed, and as what it was signed for.
///
/// The bytes are a text; claims under our header and a signature of ours; a header over them; and a place and a letter that
/// are changed in a good token.
pub fn token(bytes: &[u8]) {
    const NOW: i64 = 1_800_000_000;
    static SIGNED: LazyLock<(PublicKey, Verified, String)> = LazyLock::new(|| {
        let key = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).expect("32 bytes are a seed");
        let public = key.public_key().as_ref().try_into().expect("a public key has 32 bytes");
        let about = Verified {
            client: ClientId::from_uuid(Uuid::from_u128(1)),
            partner: Some(PartnerId::from_uuid(Uuid::from_u128(2))),
            scopes: Scopes::PARTNER,
            family: Uuid::from_u128(3),
            generation: 4,
            expires_at: NOW + LIFETIME,
        };
        let token = token::sign("5", &key, &about, NOW);
        (public, about, token)
    });
    let (key, about, good) = &*SIGNED;
    let believed = |token: &str| Unverified::parse(token).and_then(|token| token.verify(key, NOW)).ok();
    assert_eq!(believed(good).as_ref(), Some(about));

    let parts: Vec<&str> = good.split('.').collect();
    let [header, claims, signature] = parts[..] else { panic!("a token has three parts") };
    let encoded = URL_SAFE_NO_PAD.encode(bytes);
    let mut forgeries = vec![
        format!("{header}.{encoded}.{signature}"),
        format!("{encoded}.{claims}.{signature}"),
        format!("{header}.{claims}.{encoded}"),
    ];
    forgeries.extend(std::str::from_utf8(bytes).map(str::to_owned));
    if let [place, letter, rest @ ..] = bytes {
        let mut changed: Vec<char> = good.chars().collect();
        let place = (usize::from(*place) << 2 | rest.len() & 3) % changed.len();
        changed[place] = char::from(letter & 0x7F);
        forgeries.push(changed.into_iter().collect());
    }
    for forgery in forgeries.iter().filter(|forgery| *forgery != good) {
        assert_eq!(believed(forgery), None, "believed: {forgery}");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn cursors_keep_their_law(place in any::<u8>(), letter in any::<u8>(), rest in "[a-z/{}]{0,12}\0[a-z=]{0,8}\0[a-z0-9_]{0,40}\0.{0,60}|.{0,40}") {
            cursor(&[&[place, letter], rest.as_bytes()].concat());
        }

        #[test]
        fn tokens_keep_their_law(bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..100),
            "\\{\"(alg|typ|kid|iss|scope)\":\"[a-zA-Z+:]{0,12}\"\\}".prop_map(String::into_bytes),
            "[A-Za-z0-9_-]{0,40}\\.[A-Za-z0-9_-]{0,40}\\.[A-Za-z0-9_-]{0,90}".prop_map(String::into_bytes),
        ]) {
            token(&bytes);
        }
    }
}
