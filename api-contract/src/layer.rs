//! What goes around every service's routes: request ids, and problems wherever something is refused.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::Router;
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::Route;
use runtime::request_id::{RequestId, Tracked};
use tower::{Layer, Service};

use crate::Problem;
use crate::problem::ECHO_MAX;
use crate::rate::Told;

/// Puts the shared conventions around a service's routes. Every answer has `X-Request-ID`; every refusal is a
/// problem that says where it happened; 404, 405 (with `Allow`) and 406 are problems too.
pub fn layer(router: Router) -> Router {
    router.layer(Conventions)
}

/// One layer and one boxed future for all of it: functions as middleware would copy the route, the request and what is
/// within them for each of them.
#[derive(Clone)]
struct Conventions;

#[derive(Clone)]
struct Presented(Route);

impl Layer<Route> for Conventions {
    type Service = Presented;

    fn layer(&self, route: Route) -> Presented {
        Presented(route)
    }
}

impl Service<Request> for Presented {
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        <Route as Service<Request>>::poll_ready(&mut self.0, cx)
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        let tracked = Tracked::begin(&mut request);
        let told = Told::default();
        request.extensions_mut().insert(told.clone());
        let asked = Asked::of(&request);
        let routed = asked.can_be_answered().then(|| self.0.call(request));
        let id = tracked.id().clone();
        let presented = async move {
            let response = match routed {
                Some(routed) => routed.await.unwrap_or_else(|never| match never {}),
                None => Problem::of("not-acceptable").into_response(),
            };
            let mut response = asked.present(response, &id);
            told.write(response.headers_mut());
            response
        };
        let answered = tracked.answer(presented);
        Box::pin(async move { Ok(answered.await) })
    }
}

/// What must be known of a request when its answer is presented.
struct Asked {
    matched: bool,
    uri: Uri,
    accepted: Accepted,
    reads: bool,
}

impl Asked {
    fn of(request: &Request) -> Self {
        Self {
            matched: request.extensions().get::<MatchedPath>().is_some(),
            uri: request.uri().clone(), // cheap: shared bytes
            accepted: Accepted::of(request.headers()),
            reads: matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS),
        }
    }

    /// A command must not be executed for an answer that nobody takes; a read can be looked at afterwards.
    fn can_be_answered(&self) -> bool {
        !self.matched || self.reads || self.accepted.takes("application/json")
    }

    fn present(&self, mut response: Response, id: &RequestId) -> Response {
        if self.reads && response.status().is_success() && !self.accepted.takes(content_type(&response)) {
            response = Problem::of("not-acceptable").into_response();
        }
        let Some(problem) = response.extensions_mut().remove::<Problem>().or_else(|| problem_of(&response)) else {
            return response;
        };
        let mut presented = problem.happened(instance(self.uri.path(), self.matched), id.as_str()).into_response();
        for (name, value) in response.headers() {
            if !DESCRIBES_BODY.contains(name) {
                presented.headers_mut().insert(name.clone(), value.clone()); // `Allow`, `Retry-After`, …
            }
        }
        presented
    }
}

const DESCRIBES_BODY: [HeaderName; 2] = [header::CONTENT_TYPE, header::CONTENT_LENGTH];

/// The path, with as much of it as may be repeated. What our own routes fix is not input.
fn instance(path: &str, matched: bool) -> String {
    if matched {
        let cut = |segment: &str| segment.chars().take(ECHO_MAX).collect::<String>();
        path.split('/').map(cut).collect::<Vec<_>>().join("/")
    } else {
        path.chars().take(ECHO_MAX).collect()
    }
}

fn content_type(response: &Response) -> &str {
    response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// For an error that the framework gave, in plain text or without a body.
fn problem_of(response: &Response) -> Option<Problem> {
    let status = response.status();
    let bare = content_type(response).is_empty() || content_type(response).starts_with("text/plain");
    if !bare || !(status.is_client_error() || status.is_server_error()) {
        return None;
    }
    Some(Problem::of(match status {
        StatusCode::BAD_REQUEST => "malformed-request",
        StatusCode::UNAUTHORIZED => "unauthenticated",
        StatusCode::FORBIDDEN => "insufficient-scope",
        StatusCode::NOT_FOUND => "not-found",
        StatusCode::METHOD_NOT_ALLOWED => "method-not-allowed",
        StatusCode::NOT_ACCEPTABLE => "not-acceptable",
        StatusCode::REQUEST_TIMEOUT => "request-timeout",
        StatusCode::PAYLOAD_TOO_LARGE => "payload-too-large",
        StatusCode::URI_TOO_LONG => "uri-too-long",
        StatusCode::UNSUPPORTED_MEDIA_TYPE => "unsupported-media-type",
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => "headers-too-large",
        StatusCode::TOO_MANY_REQUESTS => "rate-limited",
        StatusCode::SERVICE_UNAVAILABLE => "storage-unavailable",
        other if other.is_client_error() => "refused",
        _ => "internal-error",
    }))
}

/// What the `Accept` headers let through: type, subtype, and whether they are wanted.
struct Accepted(Vec<(String, bool)>);

impl Accepted {
    fn of(headers: &HeaderMap) -> Self {
        let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let ranges = values.flat_map(|value| value.split(',')).filter_map(|range| {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().filter(|kind| kind.contains('/'))?;
            let unwanted = parts.any(|parameter| {
                let quality = parameter.strip_prefix("q=").or_else(|| parameter.strip_prefix("Q="));
                quality.is_some_and(|q| q.starts_with('0') && q.bytes().all(|byte| matches!(byte, b'0' | b'.')))
            });
            Some((kind.to_ascii_lowercase(), !unwanted))
        });
        Self(ranges.collect())
    }

    /// The most specific range that covers the type decides. Without a header everything is taken.
    fn takes(&self, content_type: &str) -> bool {
        let kind = content_type.split(';').next().unwrap_or_default().trim();
        if self.0.is_empty() || kind.is_empty() {
            return true;
        }
        let family = kind.split('/').next().unwrap_or_default();
        let wanted = |range: &str| self.0.iter().find(|(taken, _)| taken == range).map(|(_, wanted)| *wanted);
        wanted(kind).or_else(|| wanted(&format!("{family}/*"))).or_else(|| wanted("*/*")).unwrap_or(false)
    }
}
