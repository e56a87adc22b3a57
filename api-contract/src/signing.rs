//! The keys that sign access tokens: made, published, used, and retired once the last token they signed has expired.
//!
//! A key is replaced when its time has come (`replace_at`: by schedule, or because the operator has moved it). The next
//! one is published a while before it signs, so that every service and every reader of `/.well-known/jwks.json` knows it
//! by then. Which key signs is asked at every login, by the database's clock alone: no two services disagree.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde::Serialize;
use sqlx::{PgConnection, PgPool};
use tokio::sync::Mutex;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::audit::Act;
use crate::pool::within_bounds;
use crate::token::{self, PublicKey};
use crate::{AccessError, Problem, Seal};

/// The public halves, as RFC 7517 writes them.
#[derive(Debug, Serialize, ToSchema)]
pub struct JsonWebKeys {
    keys: Vec<JsonWebKey>,
}

/// RFC 8037: an Ed25519 key.
#[derive(Debug, Serialize, ToSchema)]
pub struct JsonWebKey {
    kty: &'static str,
    crv: &'static str,
    alg: &'static str,
    r#use: &'static str,
    /// As the tokens' headers name it.
    #[schema(value_type = String)]
    kid: Uuid,
    /// The key itself, in base64url.
    x: String,
}

/// The keys as one service knows them.
pub(crate) struct Keys {
    pool: PgPool,
    seal: Seal,
    /// The key that has signed last here, opened when it is first needed: services that issue nothing never hold one.
    signing: RwLock<Option<Arc<SigningKey>>>,
    known: RwLock<HashMap<Uuid, Standing>>,
    /// When keys were last read because a token named one that is not there.
    sought: Mutex<Option<Instant>>,
}

pub(crate) struct SigningKey {
    pub(crate) kid: Uuid,
    pub(crate) pair: Ed25519KeyPair,
}

#[derive(Clone, Copy)]
enum Standing {
    Good(PublicKey),
    /// It was ours. Nothing that it has signed is good any more.
    Retired,
}

/// For how long a key signs, in seconds: thirty days.
const SIGNS_FOR: f64 = 2_592_000.0;

/// How long a key is known before it signs, in seconds.
const PUBLISHED_FOR: f64 = 60.0;

/// How long after its last signature a key must verify, in seconds: the lifetime of a token, and some more, for clocks differ.
const VERIFIES_FOR: f64 = 3_660.0;
const _: () = assert!(token::LIFETIME + 60 == 3_660);

/// How often unknown keys make us look for new ones.
const SOUGHT_EVERY: Duration = Duration::from_secs(1);

impl Keys {
    pub(crate) fn new(pool: PgPool, seal: Seal) -> Self {
        Self { pool, seal, signing: RwLock::default(), known: RwLock::default(), sought: Mutex::new(None) }
    }

    /// The key that signs now. Makes the next one when it is time for that, and the first one when there is none.
    pub(crate) async fn signing(&self) -> Result<Arc<SigningKey>, AccessError> {
        let current = match self.current().await? {
            Some(current) => current,
            None => {
                self.make_first().await?;
                self.current().await?.ok_or(AccessError::NoSigningKey)?
            }
        };
        let held = self.signing.read().unwrap_or_else(PoisonError::into_inner).clone();
        let key = match held.filter(|held| held.kid == current.kid) {
            Some(held) => held,
            None => {
                let kid = current.kid;
                let sealed = current.sealed.unwrap_or_default();
                let pkcs8 = self.seal.open(&place_of(kid), &sealed);
                let pkcs8 = pkcs8.map_err(|source| AccessError::SigningKey { key: kid, source })?;
                let pair = Ed25519KeyPair::from_pkcs8(&pkcs8).map_err(|_| AccessError::NotAKey(kid))?;
                let key = Arc::new(SigningKey { kid, pair });
                *self.signing.write().unwrap_or_else(PoisonError::into_inner) = Some(key.clone());
                key
            }
        };
        // Only who could open the present key makes the next one: with another seal nobody else could use it.
        if current.due {
            self.make_if_due().await?;
        }
        Ok(key)
    }

    async fn current(&self) -> Result<Option<Current>, AccessError> {
        let current = sqlx::query_as(
            "select kid, sealed_private_key as sealed, replace_at <= now() as due from access.signing_keys
             where retired_at is null and signs_from <= now() order by signs_from desc, kid desc limit 1",
        );
        Ok(current.fetch_optional(&self.pool).await?)
    }

    /// Makes a key if none signs.
    pub(crate) async fn make_first(&self) -> Result<(), AccessError> {
        if self.current().await?.is_none() { self.make_if_due().await } else { Ok(()) }
    }

    /// Makes a key unless there is one whose time to be replaced has not come. Several services may want to at once: one of
    /// them makes it, the others wait and find it.
    async fn make_if_due(&self) -> Result<(), AccessError> {
        const LOCK: i64 = 0x6461_7962_6F6F_6B31; // any number that nobody else takes
        let mut tx = self.pool.begin().await?;
        sqlx::query("select pg_advisory_xact_lock($1)").bind(LOCK).execute(&mut *tx).await?;
        // In a statement of its own, so that it sees what was committed while this one waited.
        let (fresh, signing): (bool, bool) = sqlx::query_as(
            "select exists (select from access.signing_keys where retired_at is null and now() < replace_at),
                    exists (select from access.signing_keys where retired_at is null and signs_from <= now())",
        )
        .fetch_one(&mut *tx)
        .await?;
        if fresh {
            return Ok(());
        }
        let kid = Uuid::now_v7();
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("the system has randomness");
        let pair = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).expect("it was made just now");
        sqlx::query(
            "insert into access.signing_keys (kid, public_key, sealed_private_key, signs_from, replace_at)
             values ($1, $2, $3, now() + make_interval(secs => $4), now() + make_interval(secs => $5))",
        )
        .bind(kid)
        .bind(pair.public_key().as_ref())
        .bind(self.seal.seal(&place_of(kid), pkcs8.as_ref()))
        .bind(if signing { PUBLISHED_FOR } else { 0.0 }) // without another one that signs until then, nobody could log in
        .bind(SIGNS_FOR)
        .execute(&mut *tx)
        .await?;
        Act::new("key-made").with("kid", kid).record(&mut *tx).await?;
        tx.commit().await?;
        tracing::info!(%kid, "made a signing key");
        Ok(())
    }

    /// The public key with this id. One that is not known may be new: another service may have made it.
    pub(crate) async fn public_key(&self, kid: &str) -> Result<(Uuid, PublicKey), Problem> {
        let kid = kid.parse::<Uuid>().ok().filter(|uuid| uuid.to_string() == kid).ok_or_else(token::invalid)?;
        if self.standing(kid).is_none() {
            let mut sought = self.sought.lock().await;
            if self.standing(kid).is_none() && sought.is_none_or(|at| SOUGHT_EVERY <= at.elapsed()) {
                let read = within_bounds(self.read()).await;
                *sought = Some(Instant::now()); // after the reading, however long it took: those who waited do not try again
                read?;
            }
        }
        match self.standing(kid) {
            Some(Standing::Good(key)) => Ok((kid, key)),
            Some(Standing::Retired) => Err(retired()),
            None => Err(token::invalid()),
        }
    }

    /// Whether what was believed because of this key may still be.
    pub(crate) fn check(&self, kid: Uuid) -> Result<(), Problem> {
        match self.standing(kid) {
            Some(Standing::Good(_)) => Ok(()),
            Some(Standing::Retired) | None => Err(retired()),
        }
    }

    fn standing(&self, kid: Uuid) -> Option<Standing> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).get(&kid).copied()
    }

    pub(crate) async fn read(&self) -> Result<(), sqlx::Error> {
        let rows: Vec<(Uuid, Vec<u8>, bool)> = sqlx::query_as(&format!(
            "select kid, public_key, retired_at is not null or {OUTLIVED} from access.signing_keys k"
        ))
        .bind(VERIFIES_FOR)
        .fetch_all(&self.pool)
        .await?;
        let known = rows.into_iter().map(|(kid, key, retired)| {
            let key = key.try_into().expect("the table checks the length");
            (kid, if retired { Standing::Retired } else { Standing::Good(key) })
        });
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = known.collect();
        Ok(())
    }

    /// Writes down which keys have outlived their last token, and forgets their private halves.
    pub(crate) async fn retire(&self) -> Result<(), sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        let retired: Vec<Uuid> = sqlx::query_scalar(&format!(
            "update access.signing_keys k set retired_at = now(), sealed_private_key = null
             where retired_at is null and {OUTLIVED} returning kid"
        ))
        .bind(VERIFIES_FOR)
        .fetch_all(&mut *tx)
        .await?;
        for kid in retired {
            Act::new("key-retired").with("kid", kid).record(&mut *tx).await?;
        }
        tx.commit().await
    }

    pub(crate) fn published(&self) -> JsonWebKeys {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let mut keys: Vec<_> = known
            .iter()
            .filter_map(|(kid, standing)| match standing {
                Standing::Good(key) => Some(JsonWebKey {
                    kty: "OKP",
                    crv: "Ed25519",
                    alg: token::ALGORITHM,
                    r#use: "sig",
                    kid: *kid,
                    x: URL_SAFE_NO_PAD.encode(key),
                }),
                Standing::Retired => None,
            })
            .collect();
        keys.sort_by_key(|key| key.kid);
        JsonWebKeys { keys }
    }
}

/// Whether a later key has been signing for so long that no token of key `k` can be good.
const OUTLIVED: &str = "exists (select from access.signing_keys later
    where k.signs_from < later.signs_from and later.signs_from < now() - make_interval(secs => $1))";

#[derive(sqlx::FromRow)]
struct Current {
    kid: Uuid,
    sealed: Option<Vec<u8>>,
    due: bool,
}

/// What a sealed private key is sealed for.
fn place_of(kid: Uuid) -> String {
    format!("access.signing_keys/{kid}")
}

fn retired() -> Problem {
    Problem::of("token-revoked").detail("the key that signed this token is not used any more")
}

/// The operator wants another key: now the next one is due, and is made at the next login. With `at_once` no token that
/// was signed so far is good any longer, and no refresh token either: the key's thief may have got some with it.
pub(crate) async fn replace(connection: &mut PgConnection, at_once: bool) -> Result<(), sqlx::Error> {
    let statement = if at_once {
        "update access.signing_keys set retired_at = now(), sealed_private_key = null where retired_at is null"
    } else {
        "update access.signing_keys set replace_at = now() where retired_at is null and now() < replace_at"
    };
    sqlx::query(statement).execute(&mut *connection).await?;
    if at_once {
        let families = "update access.clients set generation = generation + 1, revoked_at = clock_timestamp()";
        sqlx::query(families).execute(&mut *connection).await?;
    }
    Act::new("key-replacement").with("atOnce", at_once).record(connection).await
}
