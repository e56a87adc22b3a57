//! A name for every request: taken from the client or minted, echoed, logged, and at hand for handlers.
//!
//! [`track`] is a middleware for a whole router:
//! `router.layer(axum::middleware::from_fn(runtime::request_id::track))`. What it does is in [`Tracked`], for layers that
//! do more than that. It logs each request that failed or was slow; the others with `RUST_LOG=debug` alone, for a line
//! costs a good part of what it costs to answer, and the metrics count all of them. Queries, bodies and credentials are
//! never logged, and a path only as the route's pattern: what clients put into paths is theirs.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{FromRequestParts, MatchedPath, Request};
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use uuid::Uuid;

use crate::body::Fault;
use crate::http::Arrival;
use crate::refusal::Refusal;
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
    let tracked = Tracked::begin(&mut request);
    tracked.answer(next.run(request)).await
}

/// A request from its arrival to its answer.
pub struct Tracked {
    begun: Instant,
    id: RequestId,
    method: Method,
    path: Option<MatchedPath>,
    /// What the server found wrong with the body that the handler reads.
    fault: Option<Fault>,
    traceparent: Option<HeaderValue>,
    served: Option<trace::Span>,
}

impl Tracked {
    pub fn begin(request: &mut Request) -> Self {
        let begun = Instant::now();
        let id = RequestId::known(request.extensions()).unwrap_or_else(|| {
            let id = RequestId::of(request.headers());
            request.extensions_mut().insert(id.clone());
            id
        });
        let method = request.method().clone();
        let path = request.extensions().get::<MatchedPath>().cloned();
        let fault = request.extensions().get::<Arrival>().map(|arrival| arrival.fault.clone());
        let sent = Traceparent::of(request.headers());
        let served = trace::serve(&method, path.as_ref().map(MatchedPath::as_str), sent.0.as_deref(), &id);
        let traceparent = match &served {
            Some(served) => {
                let own = Traceparent(Some(served.traceparent()));
                request.extensions_mut().insert(own.clone());
                own
            }
            None => sent, // handlers read it from the head
        };
        let traceparent = traceparent.0.and_then(|value| HeaderValue::try_from(value).ok());
        Self { begun, id, method, path, fault, traceparent, served }
    }

    pub fn id(&self) -> &RequestId {
        &self.id
    }

    /// What is logged while the answer is made carries the request's name.
    pub fn answer(mut self, answering: impl Future<Output = Response>) -> impl Future<Output = Response> {
        let answering = CURRENT.scope(self.id.clone(), answering);
        async move {
            let mut response = answering.await;
            response.headers_mut().insert(HEADER, self.id.header());
            if let Some(value) = self.traceparent.take() {
                response.headers_mut().insert(TRACEPARENT, value);
            }
            self.ended(self.status(&response));
            response
        }
    }

    /// What the client is told: where the body was at fault, the server puts its own refusal in the place of the handler's.
    fn status(&self, response: &Response) -> StatusCode {
        let status = response.status();
        let fault = self.fault.as_ref().filter(|_| status.is_client_error() || status.is_server_error());
        fault.and_then(|fault| fault.get()).map_or(status, Refusal::status)
    }

    fn ended(&mut self, status: StatusCode) {
        if let Some(served) = self.served.take() {
            served.answered(status);
        }
        let path = self.path.as_ref().map_or("unmatched", MatchedPath::as_str);
        log(self.method.as_str(), path, status, self.begun, &self.id);
    }
}

impl Drop for Tracked {
    /// A handler that panics leaves no answer; the server makes one.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.ended(Refusal::Panicked.status());
        }
    }
}

tokio::task_local! {
    static CURRENT: RequestId;
}

/// The name of the request that this task is answering.
pub(crate) fn current() -> Option<RequestId> {
    CURRENT.try_with(RequestId::clone).ok()
}

impl RequestId {
    pub fn mint() -> Self {
        let mut text = *b"req_00000000-0000-0000-0000-000000000000";
        Uuid::now_v7().hyphenated().encode_lower(&mut text[4..]);
        Self(std::str::from_utf8(&text).expect("hex digits").into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The client's name for this request, else a new one.
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        Self::sent(headers).unwrap_or_else(Self::mint)
    }

    /// The name already given to this request: by the server, or by [`track`] where there is none around it.
    fn known(extensions: &Extensions) -> Option<Self> {
        extensions.get::<Arrival>().map(|arrival| &arrival.id).or_else(|| extensions.get()).cloned()
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
        Ok(Self::known(&parts.extensions).unwrap_or_else(|| {
            let id = Self::of(&parts.headers);
            parts.extensions.insert(id.clone()); // asked twice, it is the same
            id
        }))
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

/// The place of a request in the metrics, and its line of the log. Also used for a request that never reached a router.
pub(crate) fn log(method: &str, path: &str, status: StatusCode, begun: Instant, id: &RequestId) {
    let took = begun.elapsed();
    metrics::record(method, path, status, took);
    let duration_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    let status = status.as_u16();
    if 400 <= status || SLOW <= took {
        tracing::info!(method, path, status, duration_ms, request.id = %id, "request");
    } else {
        tracing::debug!(method, path, status, duration_ms, request.id = %id, "request");
    }
}

/// A request that takes so long is worth a line.
const SLOW: Duration = Duration::from_secs(1);

/// The header's value when it is there exactly once and ASCII.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?;
    values.next().is_none().then(|| value.to_str().ok()).flatten()
}
