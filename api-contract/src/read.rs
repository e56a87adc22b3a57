//! Reading: how fresh an answer is, how fresh it must be, and how long a list may be.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::{IntoResponseParts, ResponseParts};
use serde::de::{Deserialize, Deserializer, Visitor};
use tokio::sync::watch;
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};

use crate::Problem;
use crate::reader::refuse;

pub const LEDGER_POSITION: HeaderName = HeaderName::from_static("ledger-position");

/// The position that an answer reflects. In a response it becomes the header `Ledger-Position`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position(pub i64);

/// `?minPosition=`: the answer must reflect at least this position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MinPosition(pub i64);

/// `?waitMs=`: how long the caller will wait, at most half a minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitMs(pub u64);

/// `?limit=`: how many items a page has, 1 to 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit(u8);

/// How fresh an answer must be, and how long that may take. Made from `minPosition` and `waitMs` of a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freshness {
    pub min_position: Option<i64>,
    pub wait_ms: u64,
}

impl Limit {
    pub const MAX: u8 = 100;

    pub fn get(self) -> usize {
        usize::from(self.0)
    }
}

impl Default for Limit {
    fn default() -> Self {
        Self(20)
    }
}

impl WaitMs {
    const MAX: u64 = 30_000;

    pub fn duration(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

impl Default for WaitMs {
    fn default() -> Self {
        Self(2_000)
    }
}

impl Freshness {
    pub fn new(min_position: Option<MinPosition>, wait: Option<WaitMs>) -> Self {
        Self { min_position: min_position.map(|position| position.0), wait_ms: wait.unwrap_or_default().0 }
    }

    /// Waits until the view, whose position is `seen`, has come far enough. `head` is asked for the log's head
    /// only when it has not: beyond the head there is nothing to wait for.
    pub async fn wait<F>(&self, seen: &mut watch::Receiver<i64>, head: impl FnOnce() -> F) -> Result<(), Problem>
    where
        F: Future<Output = Result<i64, Problem>>,
    {
        let Some(wanted) = self.min_position.filter(|wanted| *seen.borrow() < *wanted) else { return Ok(()) };
        if head().await? < wanted {
            return Err(Problem::of("position-unknown").at("/minPosition", "this position is beyond the head"));
        }
        let reached = seen.wait_for(|position| wanted <= *position);
        match tokio::time::timeout(Duration::from_millis(self.wait_ms), reached).await {
            Ok(Ok(_)) => Ok(()),
            // Late, or the view has stopped: either way it is not there yet.
            Ok(Err(_)) | Err(_) => Err(Problem::of("projection-behind")),
        }
    }
}

impl IntoResponseParts for Position {
    type Error = std::convert::Infallible;

    fn into_response_parts(self, mut parts: ResponseParts) -> Result<ResponseParts, Self::Error> {
        parts.headers_mut().insert(LEDGER_POSITION, HeaderValue::from(self.0));
        Ok(parts)
    }
}

macro_rules! parameter {
    ($name:ident, $number:ty, $range:expr, $slug:literal, $detail:literal) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Read;
                impl Visitor<'_> for Read {
                    type Value = $name;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str($detail)
                    }

                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$name, E> {
                        // Digits only: no sign, no point, no exponent.
                        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
                        let number = text.parse::<$number>().ok().filter(|number| digits && $range.contains(number));
                        number.map($name).ok_or_else(|| refuse($slug, concat!("expected ", $detail)))
                    }
                }
                deserializer.deserialize_str(Read)
            }
        }

        impl utoipa::PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                ObjectBuilder::new().schema_type(Type::Integer).description(Some($detail)).into()
            }
        }

        impl utoipa::ToSchema for $name {}
    };
}

parameter!(Limit, u8, (1..=Limit::MAX), "limit-out-of-range", "a whole number from 1 to 100");
parameter!(MinPosition, i64, (0..=i64::MAX), "position-unknown", "a position of the log, a whole number from 0");
parameter!(WaitMs, u64, (0..=WaitMs::MAX), "invalid-field", "milliseconds, a whole number from 0 to 30000");
