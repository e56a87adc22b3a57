//! Idempotency keys: how a repetition of a request is known as one.
//!
//! Whether a key was used before is the ledger's to know; here it is only read and hashed, together with
//! what it was used for.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Method, Uri};
use sha2::{Digest, Sha256};
use uuid::{Uuid, Variant};

use ledger_core::{ClientId, Key};

use crate::{CanonicalBody, Client, Problem};

pub(crate) const HEADER: HeaderName = HeaderName::from_static("idempotency-key");

const LENGTH_MAX: usize = 255;

/// `Idempotency-Key` where the call may do without.
#[derive(Clone, Debug)]
pub struct OptionalKey(Option<RequiredKey>);

/// `Idempotency-Key` where money can move. It remembers the request that it came with.
#[derive(Clone, Debug)]
pub struct RequiredKey {
    key: HeaderValue, // visible ASCII
    method: Method,
    uri: Uri, // the whole: our routers are merged, never nested, or it would be cut short
}

impl OptionalKey {
    pub fn of(&self, client: &Client, body: &CanonicalBody) -> Option<Key> {
        self.0.as_ref().map(|key| key.of(client, body))
    }
}

impl RequiredKey {
    /// The key as the ledger keeps it, bound to this request.
    pub fn of(&self, client: &Client, body: &CanonicalBody) -> Key {
        key(client, self.key.as_bytes(), &self.method, self.uri.path(), body)
    }
}

/// The key of a client and what it is used for: method, path, `X-User-ID` and canonical body. The key itself is in that too: of
/// two keys with one hash, should anybody ever find such, the second is refused as reused and not answered as done.
pub fn key(client: &Client, key: impl AsRef<[u8]>, method: &Method, path: &str, body: &CanonicalBody) -> Key {
    let mut request = Sha256::new();
    let user = client.user.as_deref().unwrap_or_default(); // a user's name is never empty
    for part in [key.as_ref(), method.as_str().as_bytes(), path.as_bytes(), user.as_bytes(), body.bytes()] {
        let length = u64::try_from(part.len()).expect("a length fits in 64 bits");
        request.update(length.to_be_bytes()); // so that no two requests run together into the same bytes
        request.update(part);
    }
    Key { hash: key_hash(client.id, key), request: request.finalize().into() }
}

/// Under which the log keeps a client's key: SHA-256(client id ‖ 0 ‖ key), cut to 16 bytes; the id as its text. If the key is
/// a UUID of version 7 or ends in one, that one's time takes the place of the first six bytes: keys that are made one after
/// the other then lie beside each other in the index (ADR 28). Once a log exists, this never changes: a key that got
/// another hash would be a new one.
pub fn key_hash(client: ClientId, key: impl AsRef<[u8]>) -> [u8; 16] {
    let key = key.as_ref();
    let hash = Sha256::new().chain_update(client.to_string()).chain_update([0]).chain_update(key).finalize();
    let mut cut = [0; 16];
    cut.copy_from_slice(&hash[..16]);
    if let Some(time) = time_in(key) {
        cut[..6].copy_from_slice(&time);
    }
    cut
}

/// Milliseconds since 1970, big-endian, as they stand in the UUIDv7 at the end of a key (RFC 9562, section 5.7).
fn time_in(key: &[u8]) -> Option<[u8; 6]> {
    let uuid = Uuid::try_parse_ascii(key.last_chunk::<36>()?).ok()?; // of this length only with its four hyphens
    let version_7 = uuid.get_variant() == Variant::RFC4122 && uuid.get_version_num() == 7;
    version_7.then(|| uuid.as_bytes().first_chunk().copied())?
}

fn read(parts: &Parts) -> Result<Option<RequiredKey>, Problem> {
    let invalid = || Problem::of("idempotency-key-invalid");
    let mut values = parts.headers.get_all(HEADER).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(invalid().detail("the header was sent twice"));
    }
    let fits = (1..=LENGTH_MAX).contains(&value.len()) && value.as_bytes().iter().all(u8::is_ascii_graphic);
    let key = fits.then(|| value.clone()).ok_or_else(invalid)?;
    Ok(Some(RequiredKey { key, method: parts.method.clone(), uri: parts.uri.clone() }))
}

impl<S: Send + Sync> FromRequestParts<S> for OptionalKey {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        read(parts).map(Self)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for RequiredKey {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        read(parts)?.ok_or_else(|| Problem::of("idempotency-key-missing"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use runtime::request_id::RequestId;

    use super::*;
    use crate::Scopes;

    fn client(number: u128, user: Option<&str>) -> Client {
        Client {
            id: ClientId::from_uuid(Uuid::from_u128(number)),
            partner: None,
            scopes: Scopes::PARTNER,
            user: user.map(Arc::from),
            request_id: RequestId::mint(),
            traceparent: None,
            peer: None,
            family: Uuid::nil(),
        }
    }

    #[test]
    fn a_key_is_the_clients_own_and_bound_to_method_path_user_and_body() {
        let (body, _) = crate::json::read::<serde_json::Value>(br#"{"a":1}"#).map(|(_, body)| (body, ())).unwrap();
        let first = key(&client(1, None), "k", &Method::POST, "/a", &body);
        assert_eq!(first, key(&client(1, None), "k", &Method::POST, "/a", &body));

        for other in [
            key(&client(1, Some("u")), "k", &Method::POST, "/a", &body),
            key(&client(1, None), "k", &Method::PATCH, "/a", &body),
            key(&client(1, None), "k", &Method::POST, "/b", &body),
            key(&client(1, None), "k", &Method::POST, "/a", &CanonicalBody::EMPTY),
        ] {
            assert_eq!(other.hash, first.hash);
            assert_ne!(other.request, first.request);
        }
        assert_ne!(key(&client(2, None), "k", &Method::POST, "/a", &body).hash, first.hash);
        let other = key(&client(1, None), "l", &Method::POST, "/a", &body);
        assert!(other.hash != first.hash && other.request != first.request);
    }

    #[test]
    fn the_hash_of_a_key_is_that_of_the_test_vectors() {
        let all: serde_json::Value = serde_json::from_str(include_str!("../../docs/test-vectors.json")).unwrap();
        let vectors = all["keyHash"].as_array().unwrap();
        assert!(6 <= vectors.len());
        for vector in vectors {
            let hash = key_hash(vector["clientId"].as_str().unwrap().parse().unwrap(), vector["key"].as_str().unwrap());
            assert_eq!(hash.map(|byte| format!("{byte:02x}")).concat(), vector["keyHash"], "{vector}");
        }
    }

    #[test]
    fn keys_that_end_in_a_time_are_in_its_order_and_still_all_different() {
        let client = ClientId::from_uuid(Uuid::from_u128(1));
        let at = |millis, random| uuid::Builder::from_unix_timestamp_millis(millis, &[random; 10]).into_uuid();
        let keys = (0..200).flat_map(|number: u64| {
            let uuid = at(1_764_435_600_000 + number / 2, u8::try_from(number).unwrap());
            [uuid.to_string(), format!("order:{uuid}"), uuid.to_string().to_uppercase()]
        });
        let hashes: Vec<_> = keys.map(|key| key_hash(client, key)).collect();
        assert!(hashes.is_sorted_by_key(|hash| <[u8; 6]>::try_from(&hash[..6]).unwrap()));
        assert_eq!(hashes.iter().collect::<std::collections::HashSet<_>>().len(), hashes.len());
        let another = key_hash(ClientId::from_uuid(Uuid::from_u128(2)), at(1_764_435_600_000, 0).to_string());
        assert!(another[..6] == hashes[0][..6] && another != hashes[0], "a key is its client's own");
    }
}
