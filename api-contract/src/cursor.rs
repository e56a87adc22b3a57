//! Cursors: where the next page begins, given to the client to keep and signed so that it stays ours.
//!
//! A cursor is bound to its route, caller and filters: it continues the list that it came from, and no other.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use serde::Serialize;
use sha2::Sha256;

use ledger_core::PartnerId;

use crate::{Problem, Seal};

/// The first byte of a cursor. A change of its form takes the next one, and old cursors are invalid.
const VERSION: u8 = 1;

const MAC_BYTES: usize = 16;
const TEXT_BYTES_MAX: usize = 1024;

/// Signs cursors. All services that have the same seal understand each other's.
#[derive(Clone)]
pub struct CursorKey(Hmac<Sha256>);

/// A page of a list.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Page<T> {
    pub data: Vec<T>,
    pub has_more: bool,
    /// For the next page; null on the last one.
    #[schema(required)]
    pub next_cursor: Option<String>,
}

impl CursorKey {
    pub fn new(seal: &Seal) -> Self {
        Self(Hmac::new_from_slice(&seal.derive("cursor")).expect("HMAC takes a key of any length"))
    }

    /// A cursor after the item whose key is `last`. `filters` is any text that equal filters share and others do not.
    pub fn seal(&self, route: &str, partner: Option<PartnerId>, filters: &str, last: &str) -> String {
        let mut bytes = Vec::with_capacity(1 + last.len() + MAC_BYTES);
        bytes.push(VERSION);
        bytes.extend_from_slice(last.as_bytes());
        let mac = self.mac(route, partner, filters, last.as_bytes()).finalize().into_bytes();
        bytes.extend_from_slice(&mac[..MAC_BYTES]);
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// The key of the last item, if the cursor was given out for this very list.
    pub fn open(
        &self,
        route: &str,
        partner: Option<PartnerId>,
        filters: &str,
        cursor: &str,
    ) -> Result<String, Problem> {
        self.read(route, partner, filters, cursor).ok_or_else(|| Problem::of("cursor-invalid"))
    }

    fn read(&self, route: &str, partner: Option<PartnerId>, filters: &str, cursor: &str) -> Option<String> {
        if TEXT_BYTES_MAX < cursor.len() {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(cursor).ok()?;
        let (&VERSION, rest) = bytes.split_first()? else { return None };
        let (last, mac) = rest.split_at_checked(rest.len().checked_sub(MAC_BYTES)?)?;
        self.mac(route, partner, filters, last).verify_truncated_left(mac).ok()?;
        String::from_utf8(last.to_vec()).ok()
    }

    fn mac(&self, route: &str, partner: Option<PartnerId>, filters: &str, last: &[u8]) -> Hmac<Sha256> {
        let partner = partner.map(|id| *id.uuid().as_bytes());
        let partner = partner.as_ref().map_or(&[][..], |id| &id[..]);
        let mut mac = self.0.clone();
        mac.update(&[VERSION]);
        for part in [route.as_bytes(), partner, filters.as_bytes(), last] {
            let length = u64::try_from(part.len()).expect("a length fits in 64 bits");
            mac.update(&length.to_be_bytes());
            mac.update(part);
        }
        mac
    }
}

impl<T> Page<T> {
    /// From one item more than was asked for: whether there is more is known without counting.
    pub fn new(mut data: Vec<T>, limit: usize, cursor: impl FnOnce(&T) -> String) -> Self {
        let has_more = limit < data.len();
        data.truncate(limit);
        let next_cursor = if has_more { data.last().map(cursor) } else { None };
        Self { data, has_more, next_cursor }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn key() -> CursorKey {
        CursorKey::new(&Seal::from_key([7; 32]))
    }

    fn partner(number: u128) -> Option<PartnerId> {
        Some(PartnerId::from_uuid(Uuid::from_u128(number)))
    }

    #[test]
    fn a_cursor_continues_the_list_that_it_came_from_and_no_other() {
        let cursor = key().seal("/v1/wallets", partner(1), "status=ACTIVE", "wal_1");
        assert_eq!(key().open("/v1/wallets", partner(1), "status=ACTIVE", &cursor).unwrap(), "wal_1");
        for (route, owner, filters) in [
            ("/v1/webhooks", partner(1), "status=ACTIVE"),
            ("/v1/wallets", partner(2), "status=ACTIVE"),
            ("/v1/wallets", None, "status=ACTIVE"),
            ("/v1/wallets", partner(1), ""),
            ("/v1/walletss", partner(1), "tatus=ACTIVE"),
        ] {
            assert_eq!(key().open(route, owner, filters, &cursor).unwrap_err().slug(), "cursor-invalid");
        }
        let other = CursorKey::new(&Seal::from_key([8; 32]));
        assert_eq!(
            other.open("/v1/wallets", partner(1), "status=ACTIVE", &cursor).unwrap_err().slug(),
            "cursor-invalid"
        );
    }

    #[test]
    fn a_cursor_of_another_version_or_cut_short_is_refused() {
        let cursor = key().seal("/r", None, "", "1");
        let bytes = URL_SAFE_NO_PAD.decode(&cursor).unwrap();
        let mut older = bytes.clone();
        older[0] = 0;
        let cuts = (0..bytes.len()).map(|end| bytes[..end].to_vec());
        for wrong in cuts.chain([older]) {
            assert!(key().open("/r", None, "", &URL_SAFE_NO_PAD.encode(wrong)).is_err());
        }
        for junk in ["", "!", "junk", "====", &"A".repeat(2_000), &format!("{cursor}=")] {
            assert!(key().open("/r", None, "", junk).is_err(), "{junk}");
        }
    }

    #[test]
    fn a_page_has_a_cursor_exactly_when_there_is_more() {
        let more = Page::new(vec![1, 2, 3], 2, |last| last.to_string());
        assert_eq!((more.data, more.has_more, more.next_cursor), (vec![1, 2], true, Some("2".to_owned())));
        let last = Page::new(vec![1, 2], 2, |last| last.to_string());
        assert_eq!((last.data, last.has_more, last.next_cursor), (vec![1, 2], false, None));
    }

    proptest! {
        #[test]
        fn no_flipped_bit_goes_unnoticed(last in "[a-z0-9_]{0,40}", place in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut bytes = URL_SAFE_NO_PAD.decode(key().seal("/r", None, "", &last)).unwrap();
            let place = place.index(bytes.len());
            bytes[place] ^= 1 << bit;
            prop_assert!(key().open("/r", None, "", &URL_SAFE_NO_PAD.encode(bytes)).is_err());
        }

        #[test]
        fn any_text_is_refused_without_a_panic(cursor in ".{0,80}") {
            prop_assert!(key().open("/r", None, "", &cursor).is_err());
        }
    }
}
