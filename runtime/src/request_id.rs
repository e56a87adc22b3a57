//! A name for every request: taken from the client or minted, echoed, logged, and at hand for handlers.
//!
//! [`track`] is a middleware for a whole router:
//! `router.layer(axum::middleware::from_fn(runtime::request_id::track))`. It writes one log line per
//! request. Queries, bodies and credentials are never logged, and a path only as the route's
//! pattern: what clients put into paths is theirs.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{FromRequestParts, MatchedPath, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;
use uuid::Uuid;

use crate::{metrics, trace};

pub const HEADER: HeaderName = HeaderName::from_static("x-request-id");
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

const LENGTH_MAX: usize = 128;

/// The request's name: the client's own (1–128 visible ASCII characters), else `req_<uuidv7>`. Handlers take it as an extractor or from the extensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId(Arc<str>);

/// The W3C trace context that what follows from this request belongs to; to be stored with events and sent on. The
/// request's own span, if it is sampled here; else what the client sent, if that is well formed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traceparent(pub Option<String>);

/// Names the request, logs and traces it, and sets `X-Request-ID` and `traceparent` on the answer.
pub async fn track(mut request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let id = RequestId::of(request.extensions().get(), request.headers());
    let sent = Traceparent::of(request.headers());
    let method = request.method().clone();
    let path = request.extensions().get::<MatchedPath>().cloned();
    let served = trace::serve(&method, path.as_ref().map(MatchedPath::as_str), sent.0.as_deref(), &id);
    let traceparent = served.as_ref().map_or(sent, |served| Traceparent(Some(served.traceparent())));
    request.extensions_mut().insert(id.clone());
    request.extensions_mut().insert(traceparent.clone());

    let span = tracing::info_span!("request", request.id = %id);
    let mut response = next.run(request).instrument(span).await;

    response.headers_mut().insert(HEADER, id.header());
    if let Some(value) = traceparent.0.as_deref().and_then(|value| HeaderValue::from_str(value).ok()) {
        response.headers_mut().insert(TRACEPARENT, value);
    }
    if let Some(served) = served {
        served.answered(response.status());
    }
    let path = path.as_ref().map_or("unmatched", MatchedPath::as_str);
    log(method.as_str(), path, response.status(), begun, &id);
    response
}

impl RequestId {
    pub fn mint() -> Self {
        Self(format!("req_{}", Uuid::now_v7()).into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name already given to this request, else the client's, else a new one.
    pub(crate) fn of(given: Option<&Self>, headers: &HeaderMap) -> Self {
        given.cloned().or_else(|| Self::sent(headers)).unwrap_or_else(Self::mint)
    }

    fn sent(headers: &HeaderMap) -> Option<Self> {
        let value = single(headers, &HEADER)?;
        let fits = (1..=LENGTH_MAX).contains(&value.len()) && value.bytes().all(|byte| byte.is_ascii_graphic());
        fits.then(|| Self(value.into()))
    }

    pub(crate) fn header(&self) -> HeaderValue {
        HeaderValue::from_str(&self.0).expect("visible ASCII is a header value")
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<S: Sync> FromRequestParts<S> for RequestId {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        let id = Self::of(parts.extensions.get(), &parts.headers);
        parts.extensions.insert(id.clone()); // asked twice, it is the same
        Ok(id)
    }
}

impl Traceparent {
    fn of(headers: &HeaderMap) -> Self {
        Self(single(headers, &TRACEPARENT).and_then(trace::parse).map(|context| trace::text(&context)))
    }
}

impl<S: Sync> FromRequestParts<S> for Traceparent {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        Ok(parts.extensions.get().cloned().unwrap_or_else(|| Self::of(&parts.headers)))
    }
}

/// The one log line of a request, and its place in the metrics. Also used for a request that never reached a router.
pub(crate) fn log(method: &str, path: &str, status: StatusCode, begun: Instant, id: &RequestId) {
    let took = begun.elapsed();
    metrics::record(method, path, status, took);
    let duration_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    tracing::info!(method, path, status = status.as_u16(), duration_ms, request.id = %id, "request");
}

/// The header's value when it is there exactly once and ASCII.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?;
    values.next().is_none().then(|| value.to_str().ok()).flatten()
}
