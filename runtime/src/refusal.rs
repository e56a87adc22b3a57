//! What the server itself refuses, as RFC 9457 problems: one table, and the two ways to say it.
//!
//! Most refusals leave as ordinary responses. Some happen where there is no request yet (a head that
//! does not end, one connection too many); those are written to the socket as bytes. Refusals of a
//! service's own rules are that service's: it has its own table and uses [`problem`].

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use serde_json::{Map, Value};

use crate::request_id::{self, RequestId};

/// No more of a client's input than this is repeated to it.
const ECHO_MAX: usize = 64;

const CONTENT_TYPE: &str = "application/problem+json";

/// Seconds, for whoever was too many.
const RETRY_AFTER: &str = "1";

/// A problem document as an answer. `instance` is the request's path, without its query; an empty `slug` means that the status says it all (`about:blank`).
pub fn problem(
    status: StatusCode,
    slug: &str,
    title: &str,
    detail: &str,
    instance: Option<&str>,
    request_id: Option<&RequestId>,
) -> Response {
    let body = document(status, slug, title, detail, instance, request_id);
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
    if let Some(id) = request_id {
        response.headers_mut().insert(request_id::HEADER, id.header());
    }
    response
}

/// Every reason for which the server refuses a request before, or instead of, a handler's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Malformed,
    SlowHead,
    SlowBody,
    PayloadTooLarge {
        bytes_max: usize,
    },
    UriTooLong {
        bytes_max: usize,
    },
    HeadersTooLarge {
        count_max: usize,
        bytes_max: usize,
    },
    UnsupportedEncoding,
    Overloaded,
    Panicked,
    /// A handler or the router said a status and nothing else.
    Bare(StatusCode),
}

impl Refusal {
    pub(crate) fn status(&self) -> StatusCode {
        self.row().0
    }

    pub(crate) fn response(&self, instance: &str, id: &RequestId) -> Response {
        let (status, slug, title, detail) = self.row();
        let mut response = problem(status, slug, title, &detail, Some(instance), Some(id));
        if *self == Self::Overloaded {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
        }
        response
    }

    /// The same for a socket: a whole HTTP/1.1 response that ends the connection.
    pub(crate) fn bytes(&self, id: &RequestId) -> Vec<u8> {
        let (status, slug, title, detail) = self.row();
        let body = document(status, slug, title, &detail, None, Some(id));
        let retry = if *self == Self::Overloaded { format!("retry-after: {RETRY_AFTER}\r\n") } else { String::new() };
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-type: {CONTENT_TYPE}\r\ncontent-length: {}\r\nconnection: close\r\n{retry}{}: {id}\r\n\r\n",
            body.len(),
            request_id::HEADER,
        );
        [head.into_bytes(), body].concat()
    }

    /// The table: status, slug, title, detail.
    fn row(&self) -> (StatusCode, &'static str, &'static str, String) {
        use StatusCode as S;
        match self {
            Self::Malformed => (
                S::BAD_REQUEST,
                "malformed-request",
                "Malformed request",
                "This is not a well-formed HTTP/1.1 request.".into(),
            ),
            Self::SlowHead => (
                S::REQUEST_TIMEOUT,
                "request-timeout",
                "Request timeout",
                "The request's header did not arrive in time.".into(),
            ),
            Self::SlowBody => (
                S::REQUEST_TIMEOUT,
                "request-timeout",
                "Request timeout",
                "The request's body did not arrive in time.".into(),
            ),
            Self::PayloadTooLarge { bytes_max } => (
                S::PAYLOAD_TOO_LARGE,
                "payload-too-large",
                "Payload too large",
                format!("A body has at most {bytes_max} bytes here."),
            ),
            Self::UriTooLong { bytes_max } => (
                S::URI_TOO_LONG,
                "uri-too-long",
                "URI too long",
                format!("Path and query have at most {bytes_max} bytes together."),
            ),
            Self::HeadersTooLarge { count_max, bytes_max } => (
                S::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "headers-too-large",
                "Headers too large",
                format!("A request has at most {count_max} headers and {bytes_max} bytes of them."),
            ),
            Self::UnsupportedEncoding => (
                S::UNSUPPORTED_MEDIA_TYPE,
                "unsupported-encoding",
                "Unsupported encoding",
                "Bodies are read as they are: no content coding, no transfer coding but chunked.".into(),
            ),
            Self::Overloaded => (
                S::SERVICE_UNAVAILABLE,
                "overloaded",
                "Overloaded",
                "The server has more to do than it can. Nothing was executed.".into(),
            ),
            Self::Panicked => (
                S::INTERNAL_SERVER_ERROR,
                "",
                "Internal Server Error",
                "This is a fault of the server. Whether anything was executed is unknown.".into(),
            ),
            Self::Bare(status) => bare(*status),
        }
    }
}

fn bare(status: StatusCode) -> (StatusCode, &'static str, &'static str, String) {
    let (slug, title, detail) = match status {
        StatusCode::BAD_REQUEST => ("malformed-request", "Malformed request", "The request could not be read."),
        StatusCode::NOT_FOUND => ("not-found", "Not found", "There is nothing here."),
        StatusCode::METHOD_NOT_ALLOWED => {
            ("method-not-allowed", "Method not allowed", "The `Allow` header lists the methods of this path.")
        }
        StatusCode::PAYLOAD_TOO_LARGE => {
            ("payload-too-large", "Payload too large", "The body is larger than this path takes.")
        }
        StatusCode::UNSUPPORTED_MEDIA_TYPE => {
            ("unsupported-media-type", "Unsupported media type", "The body must be `application/json`.")
        }
        StatusCode::UNPROCESSABLE_ENTITY => {
            ("invalid-field", "Invalid field", "The body does not have the fields that this path takes.")
        }
        other => ("", other.canonical_reason().unwrap_or("Error"), "The status says all there is to say."),
    };
    (status, slug, title, detail.into())
}

fn document(
    status: StatusCode,
    slug: &str,
    title: &str,
    detail: &str,
    instance: Option<&str>,
    id: Option<&RequestId>,
) -> Vec<u8> {
    let mut fields = Map::new();
    let kind = if slug.is_empty() { "about:blank".into() } else { format!("/problems/{slug}") };
    fields.insert("type".into(), kind.into());
    fields.insert("title".into(), title.into());
    fields.insert("status".into(), status.as_u16().into());
    fields.insert("detail".into(), detail.into());
    if let Some(instance) = instance {
        fields.insert("instance".into(), instance.chars().take(ECHO_MAX).collect::<String>().into());
    }
    if let Some(id) = id {
        fields.insert("requestId".into(), id.as_str().into());
    }
    Value::Object(fields).to_string().into_bytes()
}
