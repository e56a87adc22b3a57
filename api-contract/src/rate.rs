//! How many requests a partner may send, where the operator has set a limit. By default there is none.
//!
//! A limit of 100/s is a bucket of 100 requests that fills up again at 100 a second (governor's GCRA). Each process counts
//! for itself: behind several instances a partner may send so many to each. The headers are those of
//! draft-ietf-httpapi-ratelimit-headers-10, a work in progress: `RateLimit-Policy: "partner";q=100;w=1` and
//! `RateLimit: "partner";r=99;t=1`.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use governor::clock::{Clock, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use sqlx::postgres::PgExecutor;
use uuid::Uuid;

use ledger_core::PartnerId;

use crate::Problem;
use crate::audit::Act;

/// So many requests in so much time: `100/s`, `600/m`, `5000/h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    requests: NonZeroU32,
    seconds: NonZeroU32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a limit is a number of requests per second, minute or hour, such as 100/s, 600/m or 5000/h")]
pub struct NoRateLimit;

/// The limits as one service knows them, and how much each partner has left.
#[derive(Default)]
pub(crate) struct Rates {
    limits: RwLock<Limits>,
    /// One for each partner that has a limit and has called.
    buckets: Mutex<HashMap<PartnerId, Arc<Bucket>>>,
}

#[derive(Default)]
struct Limits {
    general: Option<RateLimit>,
    /// `None`: no limit, whatever the general one is.
    own: HashMap<PartnerId, Option<RateLimit>>,
}

struct Bucket {
    limit: RateLimit,
    limiter: RateLimiter<NotKeyed, InMemoryState, DefaultClock, StateInformationMiddleware>,
}

/// What the caller is told of its limit: filled in where the caller becomes known, read where the answer goes out.
#[derive(Clone, Default)]
pub(crate) struct Told(Arc<OnceLock<(RateLimit, u32)>>);

const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const STATE: HeaderName = HeaderName::from_static("ratelimit");

impl RateLimit {
    /// How long the bucket takes to get one more: never nothing, however high the limit.
    fn period(self) -> Duration {
        (Duration::from_secs(self.seconds.get().into()) / self.requests.get()).max(Duration::from_nanos(1))
    }
}

impl FromStr for RateLimit {
    type Err = NoRateLimit;

    fn from_str(text: &str) -> Result<Self, NoRateLimit> {
        let (requests, per) = text.split_once('/').ok_or(NoRateLimit)?;
        let seconds = match per {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return Err(NoRateLimit),
        };
        let requests = requests.parse::<u32>().ok().filter(|requests| *requests <= i32::MAX.unsigned_abs());
        let requests = requests.and_then(NonZeroU32::new).ok_or(NoRateLimit)?;
        Ok(Self { requests, seconds: NonZeroU32::new(seconds).ok_or(NoRateLimit)? })
    }
}

impl fmt::Display for RateLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.seconds.get() {
            1 => write!(f, "{}/s", self.requests),
            60 => write!(f, "{}/m", self.requests),
            3600 => write!(f, "{}/h", self.requests),
            seconds => write!(f, "{}/{seconds}s", self.requests),
        }
    }
}

impl Rates {
    /// Takes one request from what the partner has left.
    pub(crate) fn admit(&self, partner: PartnerId, told: Option<&Told>) -> Result<(), Problem> {
        let Some(limit) = self.limits.read().unwrap_or_else(PoisonError::into_inner).of(partner) else { return Ok(()) };
        let bucket = {
            let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
            let bucket = buckets.entry(partner).or_insert_with(|| Arc::new(Bucket::new(limit)));
            if bucket.limit != limit {
                *bucket = Arc::new(Bucket::new(limit));
            }
            bucket.clone()
        };
        let tell = |left| told.map(|told| told.0.set((limit, left)));
        match bucket.limiter.check() {
            Ok(state) => {
                tell(state.remaining_burst_capacity());
                Ok(())
            }
            Err(until) => {
                tell(0);
                let wait = until.wait_time_from(DefaultClock::default().now());
                let detail = format!("more than {limit} from this partner");
                Err(Problem::of("rate-limited").detail(detail).retry_after(whole_seconds(wait)))
            }
        }
    }

    pub(crate) async fn read(&self, executor: impl PgExecutor<'_>) -> Result<(), sqlx::Error> {
        let rows: Vec<(Option<Uuid>, Option<i32>, i32)> =
            sqlx::query_as("select partner_id, requests, seconds from access.rate_limits").fetch_all(executor).await?;
        let mut limits = Limits::default();
        for (partner, requests, seconds) in rows {
            let number = |number: i32| u32::try_from(number).ok().and_then(NonZeroU32::new);
            let limit = requests.and_then(number).zip(number(seconds));
            let limit = limit.map(|(requests, seconds)| RateLimit { requests, seconds });
            match partner {
                None => limits.general = limit,
                Some(partner) => _ = limits.own.insert(PartnerId::from_uuid(partner), limit),
            }
        }
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets.retain(|partner, _| limits.of(*partner).is_some());
        *self.limits.write().unwrap_or_else(PoisonError::into_inner) = limits;
        Ok(())
    }
}

/// Sets the limit of a partner, or of all that have none of their own. `None`: no limit.
pub(crate) async fn set(
    pool: &sqlx::PgPool,
    partner: Option<PartnerId>,
    limit: Option<RateLimit>,
) -> Result<(), sqlx::Error> {
    let mut tx = pool.begin().await?;
    sqlx::query(
        "insert into access.rate_limits (partner_id, requests, seconds) values ($1, $2, $3)
         on conflict (partner_id) do update set requests = excluded.requests, seconds = excluded.seconds",
    )
    .bind(partner.map(PartnerId::uuid))
    .bind(limit.map(|limit| i32::try_from(limit.requests.get()).unwrap_or(i32::MAX)))
    .bind(limit.map_or(1, |limit| i32::try_from(limit.seconds.get()).unwrap_or(i32::MAX)))
    .execute(&mut *tx)
    .await?;
    let whose = partner.map_or_else(|| "all".to_owned(), |partner| partner.to_string());
    let limit = limit.map_or_else(|| "none".to_owned(), |limit| limit.to_string());
    Act::new("rate-limit").with("partner", whose).with("limit", limit).record(&mut *tx).await?;
    tx.commit().await
}

impl Limits {
    fn of(&self, partner: PartnerId) -> Option<RateLimit> {
        self.own.get(&partner).copied().unwrap_or(self.general)
    }
}

impl Bucket {
    fn new(limit: RateLimit) -> Self {
        let quota = Quota::with_period(limit.period()).expect("a period above zero").allow_burst(limit.requests);
        Self { limit, limiter: RateLimiter::direct(quota).with_middleware() }
    }
}

impl Told {
    pub(crate) fn write(&self, headers: &mut HeaderMap) {
        let Some((limit, left)) = self.0.get() else { return };
        let full_again = whole_seconds(limit.period() * limit.requests.get().saturating_sub(*left));
        let policy = format!("\"partner\";q={};w={}", limit.requests, limit.seconds);
        for (name, value) in [(POLICY, policy), (STATE, format!("\"partner\";r={left};t={full_again}"))] {
            headers.insert(name, HeaderValue::from_str(&value).expect("numbers are visible ASCII"));
        }
    }
}

/// Rounded up: who waits for so long has waited long enough.
fn whole_seconds(time: Duration) -> u32 {
    let seconds = time.as_secs().saturating_add(u64::from(time.subsec_nanos() != 0));
    u32::try_from(seconds.max(1)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_reads_back_as_it_is_written_and_nothing_else_is_one() {
        for text in ["1/s", "100/s", "600/m", "5000/h", "2147483647/s"] {
            let limit = text.parse::<RateLimit>().unwrap();
            assert_eq!(limit.to_string(), text);
            assert!(Bucket::new(limit).limiter.check().is_ok(), "{text}");
        }
        for text in ["", "100", "0/s", "-1/s", "1/d", "1.5/s", "4294967296/s", "2147483648/s", "/s", "1/", "1/s/s"] {
            assert_eq!(text.parse::<RateLimit>(), Err(NoRateLimit), "{text}");
        }
    }
}
