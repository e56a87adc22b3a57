//! `/metrics`: what was answered and how long it took, in the text format of Prometheus.
//!
//! Counted where requests are logged, so what the server itself refuses is in it too. Labels come from bounded sets: a
//! route's pattern, never a path, and the methods that HTTP knows. Otherwise a client could make series without end.
//!
//! Left out: the clients, and everything about single requests; logs and events tell that.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

/// One request has been answered.
pub(crate) fn record(method: &str, route: &str, status: StatusCode, took: Duration) {
    let method = METHODS.into_iter().find(|known| *known == method).unwrap_or("other");
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    let answered = seen.entry((route.to_owned(), method)).or_default();
    *answered.statuses.entry(status.as_u16()).or_default() += 1;
    answered.count += 1;
    answered.micros = answered.micros.saturating_add(micros);
    for (within, (_, bound)) in answered.within.iter_mut().zip(BOUNDS) {
        *within += u64::from(micros <= bound);
    }
}

/// `GET /metrics`
pub(crate) async fn show() -> Response {
    let text = text(&SEEN.lock().unwrap_or_else(PoisonError::into_inner));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];

/// Seconds as they are written, and microseconds as they are compared.
const BOUNDS: [(&str, u64); 11] = [
    ("0.001", 1_000),
    ("0.0025", 2_500),
    ("0.005", 5_000),
    ("0.01", 10_000),
    ("0.025", 25_000),
    ("0.05", 50_000),
    ("0.1", 100_000),
    ("0.5", 500_000),
    ("1", 1_000_000),
    ("5", 5_000_000),
    ("30", 30_000_000),
];

/// By route and method. The process has one, as it has one log.
static SEEN: Mutex<Seen> = Mutex::new(BTreeMap::new());

type Seen = BTreeMap<(String, &'static str), Answered>;

#[derive(Default)]
struct Answered {
    statuses: BTreeMap<u16, u64>,
    count: u64,
    micros: u64,
    /// How many took at most as long as each bound says.
    within: [u64; BOUNDS.len()],
}

fn text(seen: &Seen) -> String {
    let mut text = String::from(
        "# HELP http_server_requests_total Requests answered.\n# TYPE http_server_requests_total counter\n",
    );
    for ((route, method), answered) in seen {
        for (status, count) in &answered.statuses {
            let labels = format_args!(r#"route="{route}",method="{method}",status="{status}""#);
            add(&mut text, format_args!("http_server_requests_total{{{labels}}} {count}"));
        }
    }
    text.push_str(
        "# HELP http_server_request_duration_seconds From a request's head to its answer's.\n\
         # TYPE http_server_request_duration_seconds histogram\n",
    );
    for ((route, method), Answered { count, micros, within, .. }) in seen {
        let name = "http_server_request_duration_seconds";
        let labels = format_args!(r#"route="{route}",method="{method}""#);
        for (count, (bound, _)) in within.iter().zip(BOUNDS) {
            add(&mut text, format_args!(r#"{name}_bucket{{{labels},le="{bound}"}} {count}"#));
        }
        add(&mut text, format_args!(r#"{name}_bucket{{{labels},le="+Inf"}} {count}"#));
        add(&mut text, format_args!("{name}_sum{{{labels}}} {}.{:06}", micros / 1_000_000, micros % 1_000_000));
        add(&mut text, format_args!("{name}_count{{{labels}}} {count}"));
    }
    text
}

fn add(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("a String takes everything");
}
