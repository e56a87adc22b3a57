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

pub(crate) const ALGORITHM: &str = "EdDSA";
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
    /// Of the client, when the token was issued: a later one ends it.
    pub(crate) generation: i64,
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
    r#gen: i64,
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
        r#gen: about.generation,
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
        let (header, claims) =
            signed.split_once('.').filter(|(_, claims)| !claims.contains('.')).ok_or_else(garbage)?;
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
            generation: claims.r#gen,
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

#[cfg(test)]
mod tests {
    use hmac::{Hmac, Mac};
    use ring::signature::KeyPair;
    use serde_json::{Value, json};

    use super::*;

    const NOW: i64 = 1_800_000_000;

    struct Issuer {
        key: Ed25519KeyPair,
    }

    impl Issuer {
        fn new() -> Self {
            let pkcs8 = Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).unwrap();
            Self { key: Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).unwrap() }
        }

        fn public(&self) -> PublicKey {
            self.key.public_key().as_ref().try_into().unwrap()
        }

        /// A token with any header and claims, properly signed.
        fn sign(&self, header: &Value, claims: &Value) -> String {
            let signed = format!("{}.{}", encode(header), encode(claims));
            let signature = URL_SAFE_NO_PAD.encode(self.key.sign(signed.as_bytes()));
            format!("{signed}.{signature}")
        }

        fn read(&self, token: &str) -> Result<Verified, &'static str> {
            let read = Unverified::parse(token).and_then(|token| token.verify(&self.public(), NOW));
            read.map_err(|problem| problem.slug())
        }
    }

    fn about() -> Verified {
        Verified {
            client: ClientId::from_uuid(Uuid::from_u128(1)),
            partner: Some(PartnerId::from_uuid(Uuid::from_u128(2))),
            scopes: Scopes::PARTNER,
            family: Uuid::from_u128(3),
            generation: 7,
            expires_at: NOW + LIFETIME,
        }
    }

    fn header() -> Value {
        json!({ "alg": "EdDSA", "typ": "at+jwt", "kid": Uuid::from_u128(4) })
    }

    fn claims() -> Value {
        json!({
            "iss": "daybook", "aud": "daybook-api", "sub": about().client, "partner": about().partner,
            "scope": about().scopes.to_string(), "jti": Uuid::from_u128(5), "fam": about().family, "gen": 7,
            "iat": NOW, "nbf": NOW, "exp": NOW + LIFETIME,
        })
    }

    fn with(mut object: Value, name: &str, value: Value) -> Value {
        object[name] = value;
        object
    }

    fn without(mut object: Value, name: &str) -> Value {
        object.as_object_mut().unwrap().remove(name);
        object
    }

    #[test]
    fn a_token_says_again_what_it_was_signed_for() {
        let issuer = Issuer::new();
        let token = sign("4", &issuer.key, &about(), NOW);
        assert_eq!(Unverified::parse(&token).unwrap().key_id, "4");
        assert_eq!(issuer.read(&token), Ok(about()));
        assert_eq!(
            issuer.read(&issuer.sign(&header(), &claims())),
            Ok(about()),
            "the forgeries below differ in one thing each"
        );
    }

    #[test]
    fn another_algorithm_or_header_field_is_no_token_of_ours() {
        let issuer = Issuer::new();
        for alg in ["none", "nOnE", "NONE", "HS256", "RS256", "ES256", "eddsa", "Ed25519", ""] {
            assert_eq!(
                issuer.read(&issuer.sign(&with(header(), "alg", alg.into()), &claims())),
                Err("token-invalid"),
                "{alg}"
            );
        }
        for typ in ["JWT", "at+JWT", "", "dpop+jwt"] {
            assert_eq!(
                issuer.read(&issuer.sign(&with(header(), "typ", typ.into()), &claims())),
                Err("token-invalid"),
                "{typ}"
            );
        }
        for field in ["jku", "jwk", "x5u", "x5c", "crit", "b64", "cty"] {
            let header = with(header(), field, json!("https://example.com/keys"));
            assert_eq!(issuer.read(&issuer.sign(&header, &claims())), Err("token-invalid"), "{field}");
        }
        for field in ["alg", "typ", "kid"] {
            assert_eq!(
                issuer.read(&issuer.sign(&without(header(), field), &claims())),
                Err("token-invalid"),
                "no {field}"
            );
        }
    }

    #[test]
    fn a_signature_by_anything_but_our_private_key_is_refused() {
        let issuer = Issuer::new();
        let token = issuer.sign(&header(), &claims());
        let (signed, signature) = token.rsplit_once('.').unwrap();
        assert_eq!(issuer.read(&format!("{signed}.")), Err("token-invalid"), "no signature");
        assert_eq!(issuer.read(&Issuer::new().sign(&header(), &claims())), Err("token-invalid"), "another key's");

        // The classic: the public key, which everybody may know, taken for an HMAC secret.
        let signed = format!("{}.{}", encode(&with(header(), "alg", "HS256".into())), encode(&claims()));
        let mut mac = Hmac::<sha2::Sha256>::new_from_slice(&issuer.public()).unwrap();
        mac.update(signed.as_bytes());
        let forged = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()));
        assert_eq!(issuer.read(&forged), Err("token-invalid"));

        let admin = with(claims(), "scope", "admin".into());
        assert_eq!(issuer.read(&format!("{}.{}.{signature}", encode(&header()), encode(&admin))), Err("token-invalid"));
    }

    #[test]
    fn wrong_or_missing_claims_are_refused_even_when_signed() {
        let issuer = Issuer::new();
        for claim in ["iss", "aud", "sub", "scope", "jti", "fam", "gen", "iat", "nbf", "exp"] {
            assert_eq!(
                issuer.read(&issuer.sign(&header(), &without(claims(), claim))),
                Err("token-invalid"),
                "no {claim}"
            );
        }
        for (claim, value) in [
            ("iss", json!("someone")),
            ("aud", json!("elsewhere")),
            ("aud", json!(["daybook-api"])),
            ("sub", json!("cli_1")),
            ("scope", json!("root")),
            ("exp", json!("tomorrow")),
            ("exp", json!(1.8e9)),
            ("nbf", json!(NOW + LEEWAY + 1)),
            ("iat", json!(NOW + LEEWAY + 1)),
            ("role", json!("admin")),
        ] {
            assert_eq!(
                issuer.read(&issuer.sign(&header(), &with(claims(), claim, value.clone()))),
                Err("token-invalid"),
                "{claim}: {value}"
            );
        }
        assert_eq!(
            issuer.read(&issuer.sign(&header(), &with(claims(), "exp", json!(NOW - LEEWAY)))),
            Err("token-expired")
        );
        assert!(
            issuer.read(&issuer.sign(&header(), &with(claims(), "nbf", json!(NOW + LEEWAY)))).is_ok(),
            "clocks may differ a little"
        );
    }

    #[test]
    fn what_is_no_jwt_at_all_counts_as_no_token() {
        let issuer = Issuer::new();
        let long = "a".repeat(LENGTH_MAX + 1);
        for garbage in ["", "garbage", "a.b", "a.b.c", "a.b.c.d", "..", "e30", "Ünï.cö.dé", "W10.e30.AA", &long] {
            assert_eq!(issuer.read(garbage), Err("unauthenticated"), "{garbage}");
        }
    }
}
