//! Access: which clients there are, what tokens they hold, and which of these are good no longer.
//!
//! Every service has one. Tokens are verified from memory: the public keys, the tokens verified before, and
//! what was revoked early. A task of its own reads each second what has changed; when it could not for
//! some seconds, a verification reads it first, and where that fails too nobody is let in. So a logout, a suspension
//! or a rotated secret is in force everywhere within five seconds, whatever breaks.
//!
//! A login begins a family of tokens, which ends as one. All families of a client end when its generation does: every token
//! names the one in which it was issued, and the next begins with an event of the log, or when the operator revokes all.
//!
//! Left out: who may be a client (command-api decides; `clients.rs` writes it down).

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hmac::digest::CtOutput;
use serde::Serialize;
use sha2::{Digest, Sha256};
use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;
use time::OffsetDateTime;
use tokio::sync::Mutex;
use utoipa::ToSchema;
use uuid::Uuid;

use ledger_core::{ClientId, PartnerId};

use crate::attempts::{Attempts, Counted, TooMany};
use crate::audit::Act;
use crate::client::Origin;
use crate::pool::{STATEMENT_TIME, pool_options, within_bounds};
use crate::rate::{Rates, Told};
use crate::signing::{self, JsonWebKeys, Keys};
use crate::token::{self, Unverified, Verified};
use crate::{Client, Problem, Seal, SealError, Secret, secret};

/// Issues and verifies tokens. Cheap to clone; all clones share what they know.
#[derive(Clone)]
pub struct Access(Arc<Shared>);

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
    #[error("there is no signing key, although one was made just now")]
    NoSigningKey,
    #[error("there is a client with this id already")]
    ClientExists,
}

struct Shared {
    pool: PgPool,
    keys: Keys,
    tokens: RwLock<HashMap<[u8; 32], Known>>,
    revoked: RwLock<Revoked>,
    /// Held while a verification reads what has changed; when one last failed to.
    reading: Mutex<Option<Instant>>,
    rates: Rates,
    attempts: Attempts,
}

/// A token that was verified before.
#[derive(Clone)]
struct Known {
    verified: Arc<Verified>,
    kid: Uuid,
}

/// What ended early, as far as it is known here.
struct Revoked {
    /// And when; forgotten once no access token of theirs can be good.
    families: HashMap<Uuid, OffsetDateTime>,
    /// The generation that began when all earlier ones ended, and when.
    clients: HashMap<Uuid, (i64, OffsetDateTime)>,
    /// The newest revocation read; later reads begin a little before it.
    newest: OffsetDateTime,
    /// When they were last read.
    read_at: Instant,
}

/// Connections: logins and the reading of what has changed; verifying needs none.
const CONNECTIONS: u32 = 4;

/// How long a refresh token is good for, in seconds.
const REFRESH_LIFETIME: i64 = 30 * 24 * 60 * 60;

/// Verified tokens to remember.
const TOKENS_MAX: usize = 20_000;

const CHANGES_EVERY: Duration = Duration::from_secs(1);

/// Knowledge older than this is not relied on.
const CHANGES_AGE_MAX: Duration = Duration::from_secs(4);

const STATEMENT_MILLIS: &str = "2000"; // STATEMENT_TIME, for Postgres

/// A transaction may commit a revocation this long after the moment that it wrote down.
const REVOCATION_OVERLAP: time::Duration = time::Duration::seconds(30);

/// How long a revocation is remembered here: the lifetime of an access token, twice, for clocks differ.
const REVOCATION_MATTERS: time::Duration = time::Duration::seconds(2 * token::LIFETIME);

const CLEAR_EVERY: Duration = Duration::from_secs(300);

impl Access {
    /// Connects as the role `daybook_access`, and makes the first signing key if there is none yet.
    pub async fn connect(database_url: &str, seal: Seal) -> Result<Self, AccessError> {
        let options = PgConnectOptions::from_str(database_url)?.application_name("daybook_access").options([
            ("role", "daybook_access"),
            ("jit", "off"),
            ("statement_timeout", STATEMENT_MILLIS),
        ]);
        let pool = pool_options(CONNECTIONS).connect_with(options).await?;
        let shared = Arc::new(Shared {
            keys: Keys::new(pool.clone(), seal),
            pool,
            tokens: RwLock::default(),
            revoked: RwLock::new(Revoked {
                families: HashMap::new(),
                clients: HashMap::new(),
                newest: OffsetDateTime::UNIX_EPOCH,
                read_at: Instant::now(),
            }),
            reading: Mutex::new(None),
            rates: Rates::default(),
            attempts: Attempts::default(),
        });
        shared.keys.make_first().await?;
        shared.read_changes().await?;
        let watched = Arc::downgrade(&shared);
        tokio::spawn(async move {
            let mut cleared = Instant::now();
            loop {
                tokio::time::sleep(CHANGES_EVERY).await;
                let Some(shared) = watched.upgrade() else { return }; // the service has ended
                shared.look_after(&mut cleared).await;
            }
        });
        Ok(Self(shared))
    }

    /// A login over HTTP: [`Access::issue`], unless too many secrets were wrong, and written down.
    pub async fn log_in(&self, client_id: &str, secret: &Secret, origin: &Origin) -> Result<TokenPair, Problem> {
        let client = client_id.parse::<ClientId>().ok();
        if let Some(client) = client {
            self.0.attempts.check(client.uuid(), origin.peer).map_err(too_many_attempts)?;
        }
        let issued = self.issue(client_id, secret).await;
        match (&issued, client) {
            (Ok(_), Some(client)) => {
                self.0.attempts.succeeded(client.uuid(), origin.peer);
                within_bounds(Act::new("login").by(client).origin(origin).record(&self.0.pool)).await?;
            }
            (Err(problem), _) if problem.slug() == "invalid-client" => {
                self.0.failed(client, origin, "a client's secret").await?;
            }
            _ => {}
        }
        issued
    }

    /// A token pair for a client that knows its secret. An unknown client and a wrong secret look alike.
    pub async fn issue(&self, client_id: &str, secret: &Secret) -> Result<TokenPair, Problem> {
        within_bounds(self.issue_proven(client_id, secret)).await
    }

    async fn issue_proven(&self, client_id: &str, secret: &Secret) -> Result<TokenPair, Problem> {
        // Whatever is wrong, the same work is done: one look-up, one hash, one comparison.
        let id = client_id.parse::<ClientId>().map_or_else(|_| Uuid::nil(), ClientId::uuid);
        let client = ClientRow::of(id, &self.0.pool).await?;
        let stored = client.as_ref().and_then(ClientRow::secret_hash);
        // This comparison takes as long wherever the difference is.
        let proven = CtOutput::<Sha256>::new(stored.unwrap_or_default().into()) == CtOutput::new(secret.hash().into());
        let client = client.filter(|_| proven && stored.is_some()).ok_or_else(|| Problem::of("invalid-client"))?;
        if client.suspended {
            return Err(Problem::of("partner-suspended")); // only who has proven itself is told
        }
        let key = self.0.keys.signing().await.map_err(unusable)?;
        let mut connection = self.0.pool.acquire().await?;
        self.0.issue(&mut connection, &key, &client, Uuid::now_v7()).await
    }

    /// The next pair for a refresh token. A token that comes a second time ends its family.
    pub async fn refresh(&self, refresh_token: &Secret, origin: &Origin) -> Result<TokenPair, Problem> {
        within_bounds(self.rotate(refresh_token, origin)).await
    }

    async fn rotate(&self, refresh_token: &Secret, origin: &Origin) -> Result<TokenPair, Problem> {
        let key = self.0.keys.signing().await.map_err(unusable)?;
        let mut tx = self.0.pool.begin().await?;
        // The lock makes two refreshes with one token follow each other: the second one finds it used.
        let found: Option<RefreshRow> = sqlx::query_as(
            "select family, client_id, generation, used_at is not null as used, expires_at <= now() as expired,
                    exists (select from access.revocations r where r.family = t.family) as ended
             from access.refresh_tokens t where token_hash = $1 for update",
        )
        .bind(refresh_token.hash().as_slice())
        .fetch_optional(&mut *tx)
        .await?;
        let Some(found) = found else {
            drop(tx); // the record below may want its connection
            self.0.failed(None, origin, "a refresh token").await?;
            return Err(Problem::of("token-invalid").detail("there is no such refresh token"));
        };
        let (family, client_id) = (found.family, ClientId::from_uuid(found.client_id));
        if found.used {
            // Once: however often it comes again, neither the record nor the log grows with it.
            if revoke(&mut tx, family).await? {
                Act::new("refresh-token-copied").by(client_id).origin(origin).record(&mut *tx).await?;
                tracing::warn!(client.id = %client_id, "a refresh token came twice: its family is revoked");
            }
            tx.commit().await?;
            self.0.remember_revoked(family);
            return Err(Problem::of("token-revoked").detail("this refresh token was used before"));
        }
        if found.ended {
            return Err(Problem::of("token-revoked"));
        }
        if found.expired {
            return Err(Problem::of("token-expired"));
        }
        let client = ClientRow::of(found.client_id, &mut *tx).await?;
        let in_force = |client: &ClientRow| !client.suspended && client.generation == found.generation;
        let client = client.filter(in_force).ok_or_else(|| Problem::of("token-revoked"))?;
        sqlx::query("update access.refresh_tokens set used_at = now() where token_hash = $1")
            .bind(refresh_token.hash().as_slice())
            .execute(&mut *tx)
            .await?;
        let pair = self.0.issue(&mut tx, &key, &client, family).await?;
        tx.commit().await?;
        Ok(pair)
    }

    /// Ends all tokens of the login that the caller's token comes from.
    pub async fn logout(&self, client: &Client) -> Result<(), Problem> {
        let ended = async {
            let mut tx = self.0.pool.begin().await?;
            if revoke(&mut tx, client.family).await? {
                Act::new("logout").by(client.id).origin(&client.origin()).record(&mut *tx).await?;
            }
            tx.commit().await
        };
        within_bounds(ended).await?;
        self.0.remember_revoked(client.family);
        Ok(())
    }

    /// Writes down what somebody did.
    pub async fn record(&self, act: Act) -> Result<(), AccessError> {
        within_bounds(async { Ok(act.record(&self.0.pool).await?) }).await
    }

    /// The keys that verify tokens, now or soon.
    pub fn published_keys(&self) -> JsonWebKeys {
        self.0.keys.published()
    }

    /// Whether the database answers: for readiness.
    pub async fn ping(&self) -> Result<(), AccessError> {
        sqlx::query("select 1").execute(&self.0.pool).await?;
        Ok(())
    }

    /// Reads now what has changed, so that it is in force here without delay.
    pub(crate) async fn read_changes(&self) -> Result<(), AccessError> {
        Ok(self.0.read_changes().await?)
    }

    pub(crate) fn pool(&self) -> &PgPool {
        &self.0.pool
    }

    /// Whom an access token speaks for.
    pub(crate) async fn verify(&self, token: &str) -> Result<Arc<Verified>, Problem> {
        let now = now();
        let hash: [u8; 32] = Sha256::digest(token).into();
        let known = self.0.tokens.read().unwrap_or_else(PoisonError::into_inner).get(&hash).cloned();
        let verified = match known {
            Some(Known { verified, kid }) => {
                verified.check_time(now)?;
                self.0.keys.check(kid)?;
                verified
            }
            None => {
                let unverified = Unverified::parse(token)?;
                let (kid, key) = self.0.keys.public_key(&unverified.key_id).await?;
                let verified = Arc::new(unverified.verify(&key, now)?);
                self.0.remember(hash, Known { verified: verified.clone(), kid }, now);
                verified
            }
        };
        self.0.check_revoked(&verified).await?;
        Ok(verified)
    }

    /// Counts the request against its partner's limit. The operator's clients have none.
    pub(crate) fn admit(&self, verified: &Verified, told: Option<&Told>) -> Result<(), Problem> {
        verified.partner.map_or(Ok(()), |partner| self.0.rates.admit(partner, told))
    }
}

#[derive(sqlx::FromRow)]
struct ClientRow {
    id: Uuid,
    partner_id: Option<Uuid>,
    scopes: Vec<String>,
    secret_hash: Option<Vec<u8>>,
    suspended: bool,
    generation: i64,
}

#[derive(sqlx::FromRow)]
struct RefreshRow {
    family: Uuid,
    client_id: Uuid,
    generation: i64,
    used: bool,
    expired: bool,
    ended: bool,
}

impl ClientRow {
    async fn of(id: Uuid, executor: impl sqlx::PgExecutor<'_>) -> Result<Option<Self>, sqlx::Error> {
        let client = sqlx::query_as(
            "select id, partner_id, scopes, secret_hash, suspended, generation from access.clients where id = $1",
        );
        client.bind(id).fetch_optional(executor).await
    }

    /// `None`: no secret is the right one.
    fn secret_hash(&self) -> Option<[u8; 32]> {
        self.secret_hash.as_deref().map(|hash| hash.try_into().expect("the table checks the length"))
    }
}

fn unusable(error: AccessError) -> Problem {
    match error {
        AccessError::Storage(error) => error.into(),
        other => Problem::internal(&other),
    }
}

fn too_many_attempts(wait: Duration) -> Problem {
    let seconds = u32::try_from(wait.as_secs().saturating_add(1)).unwrap_or(u32::MAX);
    Problem::of("rate-limited").detail("too many secrets were wrong").retry_after(seconds)
}

/// Ends a family, for as long as one of its tokens could still be good. Repeating it changes nothing, and answers false.
async fn revoke(connection: &mut sqlx::PgConnection, family: Uuid) -> Result<bool, sqlx::Error> {
    let revoked = sqlx::query(
        "insert into access.revocations (family, expires_at) values ($1, now() + make_interval(secs => $2))
         on conflict (family) do nothing",
    )
    .bind(family)
    .bind(f64::from(u32::try_from(REFRESH_LIFETIME + token::LIFETIME).expect("a month is not so long")))
    .execute(connection)
    .await?;
    Ok(revoked.rows_affected() != 0)
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
        key: &signing::SigningKey,
        client: &ClientRow,
        family: Uuid,
    ) -> Result<TokenPair, Problem> {
        let scopes = client.scopes.join(" ").parse().map_err(|error| Problem::internal(&error))?;
        let now = now();
        let about = Verified {
            client: ClientId::from_uuid(client.id),
            partner: client.partner_id.map(PartnerId::from_uuid),
            scopes,
            family,
            generation: client.generation,
            expires_at: now + token::LIFETIME,
        };
        let access_token = Secret::new(token::sign(&key.kid.to_string(), &key.pair, &about, now));
        let refresh_token = Secret::mint("dbr_");
        sqlx::query(
            "insert into access.refresh_tokens (token_hash, family, client_id, generation, expires_at)
             values ($1, $2, $3, $4, now() + make_interval(secs => $5))",
        )
        .bind(refresh_token.hash().as_slice())
        .bind(family)
        .bind(client.id)
        .bind(client.generation)
        .bind(f64::from(u32::try_from(REFRESH_LIFETIME).expect("a month is not so long")))
        .execute(connection)
        .await?;
        Ok(TokenPair { access_token, token_type: "Bearer", expires_in: token::LIFETIME, refresh_token })
    }

    /// Something secret was wrong. That there were too many is written down once, and refuses what is wrong after it.
    async fn failed(&self, client: Option<ClientId>, origin: &Origin, what: &str) -> Result<(), Problem> {
        let Counted { too_many, wait } = self.attempts.failed(client.map(ClientId::uuid), origin.peer);
        if let Some(too_many) = too_many {
            let client = client.filter(|_| too_many == TooMany::OfClient); // as it says of itself
            tracing::warn!(client.id = client.map(tracing::field::display), "too many secrets were wrong");
            let mut act = Act::new("logins-failing").origin(origin).with("wrong", what);
            if let Some(client) = client {
                act = act.by(client);
            }
            if let Err(error) = within_bounds(act.record(&self.pool)).await {
                tracing::warn!(%error, "that logins fail was not written down");
            }
        }
        wait.map_or(Ok(()), |wait| Err(too_many_attempts(wait)))
    }

    fn remember(&self, hash: [u8; 32], token: Known, now: i64) {
        let mut tokens = self.tokens.write().unwrap_or_else(PoisonError::into_inner);
        if TOKENS_MAX <= tokens.len() {
            tokens.retain(|_, known| known.verified.check_time(now).is_ok());
        }
        if TOKENS_MAX <= tokens.len() {
            tokens.clear(); // each is verified again when it comes: dear once, and bounded
        }
        tokens.insert(hash, token);
    }

    async fn check_revoked(&self, token: &Verified) -> Result<(), Problem> {
        if CHANGES_AGE_MAX < self.changes_age() {
            let asked = Instant::now();
            let mut failed = self.reading.lock().await;
            if CHANGES_AGE_MAX < self.changes_age() {
                // Those who waited while one of them tried share its failure: each trying in turn would make a queue
                // of their waits, as long as the outage lets it grow.
                if failed.is_some_and(|at| asked <= at) {
                    return Err(Problem::of("storage-unavailable"));
                }
                if let Err(error) = self.read_changes().await {
                    *failed = Some(Instant::now());
                    return Err(error.into());
                }
            }
        }
        let revoked = self.revoked.read().unwrap_or_else(PoisonError::into_inner);
        let of_client = revoked.clients.get(&token.client.uuid());
        let ended = of_client.is_some_and(|(generation, _)| token.generation < *generation);
        if ended || revoked.families.contains_key(&token.family) {
            return Err(Problem::of("token-revoked"));
        }
        Ok(())
    }

    fn changes_age(&self) -> Duration {
        self.revoked.read().unwrap_or_else(PoisonError::into_inner).read_at.elapsed()
    }

    fn remember_revoked(&self, family: Uuid) {
        let at = OffsetDateTime::now_utc();
        self.revoked.write().unwrap_or_else(PoisonError::into_inner).families.insert(family, at);
    }

    /// Reads what was revoked since the last time, and a little before: a revocation becomes visible after the
    /// moment that it wrote down. And the keys and limits, of which there are few.
    async fn read_changes(&self) -> Result<(), sqlx::Error> {
        let begun = Instant::now();
        let read = async {
            self.keys.read().await?;
            self.rates.read(&self.pool).await?;
            self.read_revocations().await
        };
        tokio::time::timeout(STATEMENT_TIME, read).await.map_err(|_| sqlx::Error::PoolTimedOut)??;
        self.revoked.write().unwrap_or_else(PoisonError::into_inner).read_at = begun;
        Ok(())
    }

    async fn read_revocations(&self) -> Result<(), sqlx::Error> {
        let since = self.revoked.read().unwrap_or_else(PoisonError::into_inner).newest - REVOCATION_OVERLAP;
        // A family has no generation, a client has one.
        let rows: Vec<(Uuid, Option<i64>, OffsetDateTime)> = sqlx::query_as(
            "select family, null::bigint, revoked_at from access.revocations
             where $1 <= revoked_at and now() - make_interval(secs => $2) < revoked_at
             union all
             select id, generation, revoked_at from access.clients
             where $1 <= revoked_at and now() - make_interval(secs => $2) < revoked_at",
        )
        .bind(since)
        .bind(REVOCATION_MATTERS.as_seconds_f64())
        .fetch_all(&self.pool)
        .await?;
        let mut revoked = self.revoked.write().unwrap_or_else(PoisonError::into_inner);
        for (id, generation, at) in rows {
            match generation {
                None => _ = revoked.families.insert(id, at),
                Some(generation) => _ = revoked.clients.insert(id, (generation, at)),
            }
            revoked.newest = revoked.newest.max(at);
        }
        Ok(())
    }

    /// What the task of every service does each second, and now and then.
    async fn look_after(&self, cleared: &mut Instant) {
        if let Err(error) = self.read_changes().await {
            tracing::warn!(%error, "revocations could not be read");
        }
        if CLEAR_EVERY <= cleared.elapsed() {
            *cleared = Instant::now();
            if let Err(error) = within_bounds(self.clear()).await {
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
        self.keys.retire().await?;
        let oldest = OffsetDateTime::now_utc() - REVOCATION_MATTERS;
        let mut revoked = self.revoked.write().unwrap_or_else(PoisonError::into_inner);
        revoked.families.retain(|_, at| oldest < *at);
        revoked.clients.retain(|_, (_, at)| oldest < *at);
        Ok(())
    }
}
