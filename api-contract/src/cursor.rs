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
    pub fn open(&self, route: &str, partner: Option<PartnerId>, filters: &str, cursor: &str) -> Result<String, Problem> {
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
