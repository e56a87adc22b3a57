//! Access tokens: JWTs signed with Ed25519, made and read here.
//!
//! # Why not a JWT library
//! We are the only issuer and the only reader, with one algorithm. A library's choices (algorithms, key
//! formats, header fields, optional claims) are what forgeries are made of, and `jsonwebtoken` would need a
//! cryptography provider of our own for ring, installed process-wide. So the header has exactly three fields
//! with fixed values, all claims are required, and everything else is no token of ours.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::signature::{ED25519, Ed25519KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use ledger_core::{ClientId, PartnerId};

use crate::{Problem, Scopes};

/// How long an access token is good for, in seconds.
pub(crate) const LIFETIME: i64 = 60 * 60;

/// How far the clocks of our machines may be apart, in seconds.
const LEEWAY: i64 = 2;

/// Longer than any token of ours.
const LENGTH_MAX: usize = 4096;

const ALGORITHM: &str = "EdDSA";
const TYPE: &str = "at+jwt";
const ISSUER: &str = "daybook";
const AUDIENCE: &str = "daybook-api";

/// What a token says, once it is believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verified {
    pub(crate) client: ClientId,
    pub(crate) partner: Option<PartnerId>,
    pub(crate) scopes: Scopes,
    /// The login that it comes from.
    pub(crate) family: Uuid,
    /// Seconds since 1970.
    pub(crate) expires_at: i64,
}

/// A key that has signed tokens, by its public half.
pub(crate) type PublicKey = [u8; 32];

/// A token taken apart; nothing in it is believed yet but that it has the shape of ours.
pub(crate) struct Unverified<'t> {
    /// Which key is said to have signed it.
    pub(crate) key_id: String,
    signed: &'t str,
    claims: &'t str,
    signature: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)] // `jwk`, `jku`, `x5u`, `crit` and whatever will be invented
struct Header {
    alg: String,
    typ: String,
    kid: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Claims {
    iss: String,
    aud: String,
    sub: ClientId,
    #[serde(skip_serializing_if = "Option::is_none")]
    partner: Option<PartnerId>,
    scope: String,
    jti: Uuid,
    fam: Uuid,
    iat: i64,
    nbf: i64,
    exp: i64,
}

/// Signs a token for what is to be verified again later.
pub(crate) fn sign(key_id: &str, key: &Ed25519KeyPair, about: &Verified, now: i64) -> String {
    let header = Header { alg: ALGORITHM.into(), typ: TYPE.into(), kid: key_id.into() };
    let claims = Claims {
        iss: ISSUER.into(),
        aud: AUDIENCE.into(),
        sub: about.client,
        partner: about.partner,
        scope: about.scopes.to_string(),
        jti: Uuid::now_v7(),
        fam: about.family,
        iat: now,
        nbf: now,
        exp: about.expires_at,
    };
    let mut token = format!("{}.{}", encode(&header), encode(&claims));
    let signature = URL_SAFE_NO_PAD.encode(key.sign(token.as_bytes()));
    token.push('.');
    token.push_str(&signature);
    token
}

fn encode(part: &impl Serialize) -> String {
    URL_SAFE_NO_PAD.encode(serde_json::to_vec(part).expect("texts and numbers"))
}

impl<'t> Unverified<'t> {
    /// `unauthenticated` for what is no JWT at all; `token-invalid` for one that is not ours.
    pub(crate) fn parse(token: &'t str) -> Result<Self, Problem> {
        let garbage = || Problem::of("unauthenticated").detail("this is no access token");
        if LENGTH_MAX < token.len() {
            return Err(garbage());
        }
        let (signed, signature) = token.rsplit_once('.').ok_or_else(garbage)?;
        let (header, claims) = signed.split_once('.').filter(|(_, claims)| !claims.contains('.')).ok_or_else(garbage)?;
        let header = URL_SAFE_NO_PAD.decode(header).map_err(|_| garbage())?;
        serde_json::from_slice::<serde_json::Map<_, _>>(&header).map_err(|_| garbage())?;

        let header: Header = serde_json::from_slice(&header).map_err(|_| invalid())?;
        if header.alg != ALGORITHM || header.typ != TYPE {
            return Err(invalid());
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| invalid())?;
        Ok(Self { key_id: header.kid, signed, claims, signature })
    }

    /// Believes the token if this key has signed it, it is meant for us, and its time is now.
    pub(crate) fn verify(&self, key: &PublicKey, now: i64) -> Result<Verified, Problem> {
        let key = UnparsedPublicKey::new(&ED25519, key);
        key.verify(self.signed.as_bytes(), &self.signature).map_err(|_| invalid())?;

        let claims = URL_SAFE_NO_PAD.decode(self.claims).map_err(|_| invalid())?;
        let claims: Claims = serde_json::from_slice(&claims).map_err(|_| invalid())?;
        let early = [claims.nbf, claims.iat].into_iter().any(|from| now.saturating_add(LEEWAY) < from);
        if claims.iss != ISSUER || claims.aud != AUDIENCE || early {
            return Err(invalid());
        }
        let scopes = claims.scope.parse().map_err(|_| invalid())?;
        let verified = Verified {
            client: claims.sub,
            partner: claims.partner,
            scopes,
            family: claims.fam,
            expires_at: claims.exp,
        };
        verified.check_time(now)?;
        Ok(verified)
    }
}

impl Verified {
    pub(crate) fn check_time(&self, now: i64) -> Result<(), Problem> {
        if now < self.expires_at.saturating_add(LEEWAY) { Ok(()) } else { Err(Problem::of("token-expired")) }
    }
}

pub(crate) fn invalid() -> Problem {
    Problem::of("token-invalid")
}
