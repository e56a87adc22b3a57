//! Access: which clients there are, what tokens they hold, and which of these are good no longer.
//!
//! Every service has one. Tokens are verified from memory: the public keys, the tokens verified before, and
//! the families revoked early. A task of its own reads new revocations every second; when it could not for
//! some seconds, a verification reads them first, and where that fails too nobody is let in. So a logout is
//! in force everywhere within five seconds, whatever breaks.
//!
//! Left out: who may be a client (command-api decides), and limits of rate.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hmac::digest::CtOutput;
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde::Serialize;
use sha2::{Digest, Sha256};
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use time::OffsetDateTime;
use tokio::sync::Mutex;
use utoipa::ToSchema;
use uuid::Uuid;

use ledger_core::{ClientId, PartnerId};

use crate::token::{self, PublicKey, Unverified, Verified};
use crate::{Client, Problem, Scopes, Seal, SealError, Secret, secret};

/// Issues and verifies tokens. Cheap to clone; all clones share what they know.
#[derive(Clone)]
pub struct Access(Arc<Shared>);

/// A client to be made. Id and secret come from the caller, who shows or keeps the secret.
#[derive(Clone, Debug)]
pub struct NewClient {
    pub id: ClientId,
    pub partner: Option<PartnerId>,
    pub secret: Secret,
    pub scopes: Scopes,
}

/// What a login gives.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenPair {
    #[serde(serialize_with = "secret::reveal")]
    pub access_token: Secret,
    /// Always `Bearer`.
    #[schema(value_type = String, example = "Bearer")]
    pub token_type: &'static str,
    /// Seconds for which the access token is good.
    pub expires_in: i64,
    /// Good once, for the next pair.
    #[serde(serialize_with = "secret::reveal")]
    pub refresh_token: Secret,
}

#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error("the schema access: {0}")]
    Storage(#[from] sqlx::Error),
    #[error("signing key {key}: {source}")]
    SigningKey { key: Uuid, source: SealError },
    #[error("signing key {0}: not an Ed25519 key")]
    NotAKey(Uuid),
    #[error("there is a client with this id already")]
    ClientExists,
}

struct Shared {
    pool: PgPool,
    seal: Seal,
    /// The key that signs, once this service has had to sign.
    signing: OnceLock<(Uuid, Ed25519KeyPair)>,
    keys: RwLock<HashMap<Uuid, PublicKey>>,
    /// When the keys were last read because a token named one that is not there.
    keys_sought: Mutex<Option<Instant>>,
    tokens: RwLock<HashMap<[u8; 32], Arc<Verified>>>,
    revoked: RwLock<Revoked>,
    /// Held while a verification reads revocations; when one last failed to.
    reading: Mutex<Option<Instant>>,
}

/// The families that ended early, as far as they are known here.
struct Revoked {
    /// And when; forgotten once no access token of theirs can be good.
    families: HashMap<Uuid, OffsetDateTime>,
    /// The newest revocation read; later reads begin a little before it.
    newest: OffsetDateTime,
    /// When they were last read.
    read_at: Instant,
}

/// Connections: logins and the reading of revocations; verifying needs none.
const CONNECTIONS: u32 = 4;

/// How long a refresh token is good for, in seconds.
const REFRESH_LIFETIME: i64 = 30 * 24 * 60 * 60;

/// Verified tokens to remember.
const TOKENS_MAX: usize = 20_000;

const REVOCATIONS_EVERY: Duration = Duration::from_secs(1);

/// Knowledge of revocations older than this is not relied on.
const REVOCATIONS_AGE_MAX: Duration = Duration::from_secs(4);

/// A statement about tokens that takes longer has failed.
const STATEMENT_TIME: Duration = Duration::from_secs(2);
const STATEMENT_MILLIS: &str = "2000"; // the same, for Postgres

/// A transaction may commit a revocation this long after the moment that it wrote down.
const REVOCATION_OVERLAP: time::Duration = time::Duration::seconds(30);

/// How long a revocation is remembered here: the lifetime of an access token, twice, for clocks differ.
const REVOCATION_MATTERS: time::Duration = time::Duration::seconds(2 * token::LIFETIME);

/// How often unknown keys make us look for new ones.
const KEYS_SOUGHT_EVERY: Duration = Duration::from_secs(1);

const CLEAR_EVERY: Duration = Duration::from_secs(300);

impl Access {
    /// Connects as the role `daybook_access`, and makes the first signing key if there is none yet.
    pub async fn connect(database_url: &str, seal: Seal) -> Result<Self, AccessError> {
        let options = PgConnectOptions::from_str(database_url)?.application_name("daybook_access").options([
            ("role", "daybook_access"),
            ("jit", "off"),
            ("statement_timeout", STATEMENT_MILLIS),
        ]);
        let pool = PgPoolOptions::new()
            .max_connections(CONNECTIONS)
            .acquire_timeout(STATEMENT_TIME)
            .connect_with(options)
            .await?;
        make_first_key(&pool, &seal).await?;
        let shared = Arc::new(Shared {
            pool,
            seal,
            signing: OnceLock::new(),
            keys: RwLock::default(),
            keys_sought: Mutex::new(None),
            tokens: RwLock::default(),
            revoked: RwLock::new(Revoked {
                families: HashMap::new(),
                newest: OffsetDateTime::UNIX_EPOCH,
                read_at: Instant::now(),
            }),
            reading: Mutex::new(None),
        });
        shared.read_keys().await?;
        shared.read_revocations().await?;
        let watched = Arc::downgrade(&shared);
        tokio::spawn(async move {
            let mut cleared = Instant::now();
            loop {
                tokio::time::sleep(REVOCATIONS_EVERY).await;
                let Some(shared) = watched.upgrade() else { return }; // the service has ended
                shared.look_after(&mut cleared).await;
            }
        });
        Ok(Self(shared))
    }

    /// A token pair for a client that knows its secret. An unknown client and a wrong secret look alike.
    pub async fn issue(&self, client_id: &str, secret: &Secret) -> Result<TokenPair, Problem> {
        // Whatever is wrong, the same work is done: one look-up, one hash, one comparison.
        let id = client_id.parse::<ClientId>().map_or_else(|_| Uuid::nil(), ClientId::uuid);
        let client: Option<ClientRow> = sqlx::query_as(
            "select id, partner_id, scopes, secret_hash from access.clients where id = $1 and disabled_at is null",
        )
        .bind(id)
        .fetch_optional(&self.0.pool)
        .await?;
        let stored = client.as_ref().map_or([0; 32], |client| client.secret_hash());
        // This comparison takes as long wherever the difference is.
        let proven = CtOutput::<Sha256>::new(stored.into()) == CtOutput::new(secret.hash().into());
        let client = client.filter(|_| proven).ok_or_else(|| Problem::of("invalid-client"))?;
        let mut connection = self.0.pool.acquire().await?;
        self.0.issue(&mut connection, &client, Uuid::now_v7()).await
    }

    /// The next pair for a refresh token. A token that comes a second time ends its family.
    pub async fn refresh(&self, refresh_token: &Secret) -> Result<TokenPair, Problem> {
        let mut tx = self.0.pool.begin().await?;
        // The lock makes two refreshes with one token follow each other: the second one finds it used.
        let found: Option<(Uuid, Uuid, bool, bool)> = sqlx::query_as(
            "select family, client_id, used_at is not null, expires_at <= now()
             from access.refresh_tokens where token_hash = $1 for update",
        )
        .bind(refresh_token.hash().as_slice())
        .fetch_optional(&mut *tx)
        .await?;
        let Some((family, client_id, used, expired)) = found else {
            return Err(Problem::of("token-invalid").detail("there is no such refresh token"));
        };
        if used {
            revoke(&mut tx, family).await?;
            tx.commit().await?;
            self.0.remember_revoked(family);
            tracing::warn!(client.id = %ClientId::from_uuid(client_id), "a refresh token came twice: its family is revoked");
            return Err(Problem::of("token-revoked").detail("this refresh token was used before"));
        }
        let ended: bool = sqlx::query_scalar("select exists (select from access.revocations where family = $1)")
            .bind(family)
            .fetch_one(&mut *tx)
            .await?;
        if ended {
            return Err(Problem::of("token-revoked"));
        }
        if expired {
            return Err(Problem::of("token-expired"));
        }
        let client: Option<ClientRow> = sqlx::query_as(
            "select id, partner_id, scopes, secret_hash from access.clients where id = $1 and disabled_at is null",
        )
        .bind(client_id)
        .fetch_optional(&mut *tx)
        .await?;
        let client = client.ok_or_else(|| Problem::of("token-revoked"))?;
        sqlx::query("update access.refresh_tokens set used_at = now() where token_hash = $1")
            .bind(refresh_token.hash().as_slice())
            .execute(&mut *tx)
            .await?;
        let pair = self.0.issue(&mut tx, &client, family).await?;
        tx.commit().await?;
        Ok(pair)
    }

    /// Ends all tokens of the login that the caller's token comes from.
    pub async fn logout(&self, client: &Client) -> Result<(), Problem> {
        let mut connection = self.0.pool.acquire().await?;
        revoke(&mut connection, client.family).await?;
        self.0.remember_revoked(client.family);
        Ok(())
    }

    /// A client that there was not.
    pub async fn create_client(&self, client: NewClient) -> Result<(), AccessError> {
        let created = sqlx::query(
            "insert into access.clients (id, partner_id, secret_hash, scopes) values ($1, $2, $3, $4) on conflict (id) do nothing",
        );
        let done = bind(created, &client).execute(&self.0.pool).await?;
        if done.rows_affected() == 1 { Ok(()) } else { Err(AccessError::ClientExists) }
    }

    /// A client that there shall be, with exactly this secret and these scopes. Repeating it changes nothing.
    pub async fn ensure_client(&self, client: NewClient) -> Result<(), AccessError> {
        let ensured = sqlx::query(
            "insert into access.clients as known (id, partner_id, secret_hash, scopes) values ($1, $2, $3, $4)
             on conflict (id) do update
             set partner_id = excluded.partner_id, secret_hash = excluded.secret_hash, scopes = excluded.scopes
             where (known.partner_id, known.secret_hash, known.scopes)
                   is distinct from (excluded.partner_id, excluded.secret_hash, excluded.scopes)",
        );
        bind(ensured, &client).execute(&self.0.pool).await?;
        Ok(())
    }

    /// Removes a client that turned out to be nobody's, and has never had a token.
    pub async fn remove_client(&self, id: ClientId) -> Result<(), AccessError> {
        sqlx::query("delete from access.clients where id = $1").bind(id.uuid()).execute(&self.0.pool).await?;
        Ok(())
    }

    /// Whether the database answers: for readiness.
    pub async fn ping(&self) -> Result<(), AccessError> {
        sqlx::query("select 1").execute(&self.0.pool).await?;
        Ok(())
    }

    /// Whom an access token speaks for.
    pub(crate) async fn verify(&self, token: &str) -> Result<Arc<Verified>, Problem> {
        let now = now();
        let hash: [u8; 32] = Sha256::digest(token).into();
        let known = self.0.tokens.read().unwrap_or_else(PoisonError::into_inner).get(&hash).cloned();
        let verified = match known {
            Some(verified) => {
                verified.check_time(now)?;
                verified
            }
            None => {
                let unverified = Unverified::parse(token)?;
                let key = self.0.public_key(&unverified.key_id).await?;
                let verified = Arc::new(unverified.verify(&key, now)?);
                self.0.remember(hash, verified.clone(), now);
                verified
            }
        };
        self.0.check_revoked(verified.family).await?;
        Ok(verified)
    }
}

#[derive(sqlx::FromRow)]
struct ClientRow {
    id: Uuid,
    partner_id: Option<Uuid>,
    scopes: Vec<String>,
    secret_hash: Vec<u8>,
}

impl ClientRow {
    fn secret_hash(&self) -> [u8; 32] {
        self.secret_hash.as_slice().try_into().expect("the table checks the length")
    }
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments>;

fn bind<'q>(query: Query<'q>, client: &NewClient) -> Query<'q> {
    query
        .bind(client.id.uuid())
        .bind(client.partner.map(PartnerId::uuid))
        .bind(client.secret.hash().to_vec())
        .bind(client.scopes.iter().map(|scope| scope.name().to_owned()).collect::<Vec<_>>())
}

/// Ends a family, for as long as one of its tokens could still be good. Repeating it changes nothing.
async fn revoke(connection: &mut sqlx::PgConnection, family: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into access.revocations (family, expires_at) values ($1, now() + make_interval(secs => $2))
         on conflict (family) do nothing",
    )
    .bind(family)
    .bind(f64::from(u32::try_from(REFRESH_LIFETIME + token::LIFETIME).expect("a month is not so long")))
    .execute(connection)
    .await?;
    Ok(())
}

/// Several services may start at once on a new database: one of them makes the key, the others wait and find it.
async fn make_first_key(pool: &PgPool, seal: &Seal) -> Result<(), AccessError> {
    const LOCK: i64 = 0x6461_7962_6F6F_6B31; // any number that nobody else takes
    let mut tx = pool.begin().await?;
    sqlx::query("select pg_advisory_xact_lock($1)").bind(LOCK).execute(&mut *tx).await?;
    let any: bool = sqlx::query_scalar("select exists (select from access.signing_keys)").fetch_one(&mut *tx).await?;
    if !any {
        let kid = Uuid::now_v7();
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("the system has randomness");
        let key = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).expect("it was made just now");
        sqlx::query("insert into access.signing_keys (kid, public_key, sealed_private_key) values ($1, $2, $3)")
            .bind(kid)
            .bind(key.public_key().as_ref())
            .bind(seal.seal(&place_of(kid), pkcs8.as_ref()))
            .execute(&mut *tx)
            .await?;
        tracing::info!(%kid, "made the first signing key");
    }
    tx.commit().await?;
    Ok(())
}

/// What a sealed private key is sealed for.
fn place_of(kid: Uuid) -> String {
    format!("access.signing_keys/{kid}")
}

/// Seconds since 1970.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is after 1970");
    i64::try_from(since.as_secs()).expect("the clock is before the end of time")
}

impl Shared {
    /// A pair for a client that has proven itself, and the row of its refresh token.
    async fn issue(
        &self,
        connection: &mut sqlx::PgConnection,
        client: &ClientRow,
        family: Uuid,
    ) -> Result<TokenPair, Problem> {
        let (kid, key) = self.signing_key(connection).await.map_err(|error| Problem::internal(&error))?;
        let scopes = client.scopes.join(" ").parse().map_err(|error| Problem::internal(&error))?;
        let now = now();
        let about = Verified {
            client: ClientId::from_uuid(client.id),
            partner: client.partner_id.map(PartnerId::from_uuid),
            scopes,
            family,
            expires_at: now + token::LIFETIME,
        };
        let access_token = Secret::new(token::sign(&kid.to_string(), key, &about, now));
        let refresh_token = Secret::mint("dbr_");
        sqlx::query("insert into access.refresh_tokens (token_hash, family, client_id, expires_at) values ($1, $2, $3, now() + make_interval(secs => $4))")
            .bind(refresh_token.hash().as_slice())
            .bind(family)
            .bind(client.id)
            .bind(f64::from(u32::try_from(REFRESH_LIFETIME).expect("a month is not so long")))
            .execute(connection)
            .await?;
        Ok(TokenPair { access_token, token_type: "Bearer", expires_in: token::LIFETIME, refresh_token })
    }

    /// The newest key with its private half, opened when it is first needed: services that issue nothing never hold it.
    async fn signing_key(&self, connection: &mut sqlx::PgConnection) -> Result<&(Uuid, Ed25519KeyPair), AccessError> {
        if let Some(key) = self.signing.get() {
            return Ok(key);
        }
        let (kid, sealed): (Uuid, Vec<u8>) = sqlx::query_as(
            "select kid, sealed_private_key from access.signing_keys order by created_at desc, kid desc limit 1",
        )
        .fetch_one(connection)
        .await?;
        let pkcs8 =
            self.seal.open(&place_of(kid), &sealed).map_err(|source| AccessError::SigningKey { key: kid, source })?;
        let key = Ed25519KeyPair::from_pkcs8(&pkcs8).map_err(|_| AccessError::NotAKey(kid))?;
        Ok(self.signing.get_or_init(|| (kid, key)))
    }

    /// The public key with this id. One that is not known may be new: another service may have made it.
    async fn public_key(&self, kid: &str) -> Result<PublicKey, Problem> {
        let kid = kid.parse::<Uuid>().ok().filter(|uuid| uuid.to_string() == kid).ok_or_else(token::invalid)?;
        if let Some(key) = self.known_key(kid) {
            return Ok(key);
        }
        let mut sought = self.keys_sought.lock().await;
        if sought.is_none_or(|at| KEYS_SOUGHT_EVERY <= at.elapsed()) {
            let read = self.read_keys().await;
            *sought = Some(Instant::now()); // after the reading, however long it took: those who waited do not try again
            read?;
        }
        self.known_key(kid).ok_or_else(token::invalid)
    }

    fn known_key(&self, kid: Uuid) -> Option<PublicKey> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).get(&kid).copied()
    }

    async fn read_keys(&self) -> Result<(), sqlx::Error> {
        let rows: Vec<(Uuid, Vec<u8>)> =
            sqlx::query_as("select kid, public_key from access.signing_keys").fetch_all(&self.pool).await?;
        let keys = rows.into_iter().map(|(kid, key)| (kid, key.try_into().expect("the table checks the length")));
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys.collect();
        Ok(())
    }

    fn remember(&self, hash: [u8; 32], verified: Arc<Verified>, now: i64) {
        let mut tokens = self.tokens.write().unwrap_or_else(PoisonError::into_inner);
        if TOKENS_MAX <= tokens.len() {
            tokens.retain(|_, known| known.check_time(now).is_ok());
        }
        if TOKENS_MAX <= tokens.len() {
            tokens.clear(); // each is verified again when it comes: dear once, and bounded
        }
        tokens.insert(hash, verified);
    }

    async fn check_revoked(&self, family: Uuid) -> Result<(), Problem> {
        if REVOCATIONS_AGE_MAX < self.revocations_age() {
            let asked = Instant::now();
            let mut failed = self.reading.lock().await;
            if REVOCATIONS_AGE_MAX < self.revocations_age() {
                // Those who waited while one of them tried share its failure: each trying in turn would make a queue
                // of their waits, as long as the outage lets it grow.
                if failed.is_some_and(|at| asked <= at) {
                    return Err(Problem::of("storage-unavailable"));
                }
                if let Err(error) = self.read_revocations().await {
                    *failed = Some(Instant::now());
                    return Err(error.into());
                }
            }
        }
        let revoked = self.revoked.read().unwrap_or_else(PoisonError::into_inner).families.contains_key(&family);
        if revoked { Err(Problem::of("token-revoked")) } else { Ok(()) }
    }

    fn revocations_age(&self) -> Duration {
        self.revoked.read().unwrap_or_else(PoisonError::into_inner).read_at.elapsed()
    }

    fn remember_revoked(&self, family: Uuid) {
        let at = OffsetDateTime::now_utc();
        self.revoked.write().unwrap_or_else(PoisonError::into_inner).families.insert(family, at);
    }

    /// Reads what was revoked since the last time, and a little before: a revocation becomes visible after the
    /// moment that it wrote down.
    async fn read_revocations(&self) -> Result<(), sqlx::Error> {
        let begun = Instant::now();
        let since = self.revoked.read().unwrap_or_else(PoisonError::into_inner).newest - REVOCATION_OVERLAP;
        let read = sqlx::query_as(
            "select family, revoked_at from access.revocations
             where $1 <= revoked_at and now() - make_interval(secs => $2) < revoked_at",
        )
        .bind(since)
        .bind(REVOCATION_MATTERS.as_seconds_f64())
        .fetch_all(&self.pool);
        let rows: Vec<(Uuid, OffsetDateTime)> =
            tokio::time::timeout(STATEMENT_TIME, read).await.map_err(|_| sqlx::Error::PoolTimedOut)??;
        let mut revoked = self.revoked.write().unwrap_or_else(PoisonError::into_inner);
        for (family, at) in rows {
            revoked.families.insert(family, at);
            revoked.newest = revoked.newest.max(at);
        }
        revoked.read_at = begun;
        Ok(())
    }

    /// What the task of every service does each second, and now and then.
    async fn look_after(&self, cleared: &mut Instant) {
        if let Err(error) = self.read_revocations().await {
            tracing::warn!(%error, "revocations could not be read");
        }
        if CLEAR_EVERY <= cleared.elapsed() {
            *cleared = Instant::now();
            if let Err(error) = self.clear().await {
                tracing::warn!(%error, "what has expired could not be cleared");
            }
        }
    }

    /// Forgets what has expired, here and in the database, a bounded number of rows at a time.
    async fn clear(&self) -> Result<(), sqlx::Error> {
        for statement in [
            "delete from access.refresh_tokens where token_hash in
             (select token_hash from access.refresh_tokens where expires_at < now() limit 10000 for update skip locked)",
            "delete from access.revocations where family in
             (select family from access.revocations where expires_at < now() limit 10000 for update skip locked)",
        ] {
            sqlx::query(statement).execute(&self.pool).await?;
        }
        let oldest = OffsetDateTime::now_utc() - REVOCATION_MATTERS;
        self.revoked.write().unwrap_or_else(PoisonError::into_inner).families.retain(|_, at| oldest < *at);
        Ok(())
    }
}
