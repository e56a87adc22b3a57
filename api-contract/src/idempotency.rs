//! Idempotency keys: how a repetition of a request is known as one.
//!
//! Whether a key was used before is the ledger's to know; here it is only read and hashed, together with
//! what it was used for.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Method, Uri};
use sha2::{Digest, Sha256};

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

/// The key of a client and what it is used for: method, path, `X-User-ID` and canonical body.
pub fn key(client: &Client, key: impl AsRef<[u8]>, method: &Method, path: &str, body: &CanonicalBody) -> Key {
    let mut request = Sha256::new();
    let user = client.user.as_deref().unwrap_or_default(); // a user's name is never empty
    for part in [method.as_str().as_bytes(), path.as_bytes(), user.as_bytes(), body.bytes()] {
        let length = u64::try_from(part.len()).expect("a length fits in 64 bits");
        request.update(length.to_be_bytes()); // so that no two requests run together into the same bytes
        request.update(part);
    }
    Key { hash: key_hash(client.id, key), request: request.finalize().into() }
}

/// Under which the log keeps a client's key: SHA-256(client id ‖ 0 ‖ key), cut to 16 bytes; the id as its text.
pub fn key_hash(client: ClientId, key: impl AsRef<[u8]>) -> [u8; 16] {
    let hash = Sha256::new().chain_update(client.to_string()).chain_update([0]).chain_update(key).finalize();
    let mut cut = [0; 16];
    cut.copy_from_slice(&hash[..16]);
    cut
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
    use uuid::Uuid;

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
        assert_ne!(key(&client(1, None), "l", &Method::POST, "/a", &body).hash, first.hash);
    }

    #[test]
    fn the_hash_of_a_key_is_as_written_in_the_contract() {
        // printf 'cli_00000000-0000-0000-0000-000000000001\0order-1' | sha256sum | cut -c1-32
        let hash = key_hash(ClientId::from_uuid(Uuid::from_u128(1)), "order-1");
        assert_eq!(hash.map(|byte| format!("{byte:02x}")).concat(), "24e2e553d81649e33a70861271faa45e");
    }
}
