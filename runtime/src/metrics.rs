//! `/metrics`: what the process has counted, in the text format of Prometheus; `docs/metrics.md` says what each means.
//!
//! Every room registers what it counts in the process' own registry, and this gathers all of it: one process, one page.
//! Here are the metrics of HTTP itself, of the process and of its start. Requests are counted where they are logged, so
//! what the server itself refuses is in it too. Counting is a look into the thread's own table and a few atomic
//! additions.
//!
//! What must be asked of somebody (how long a queue in a database is) is a *sample*: taken when `/metrics` is asked for,
//! at most once a second, one at a time, beside the answer. An answer waits for it a moment only and otherwise shows the
//! one before; `daybook_sample_age_seconds` tells how old that is.
//!
//! # Why a client cannot make series
//! Labels come from bounded sets: a route's pattern, never a path, and the methods that HTTP knows.
//!
//! Left out: the clients, and everything about single requests; logs and events tell that.

use std::cell::RefCell;
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::future::join_all;
use prometheus::{
    GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, TextEncoder, register_gauge_vec,
    register_histogram_vec, register_int_counter_vec, register_int_gauge_vec,
};
use tokio::sync::watch;
use tokio::time::{timeout, timeout_at};

use crate::refusal::Refusal;

mod process;

/// Measures the parts of the process' start.
#[derive(Debug)]
pub struct Start(Instant);

impl Start {
    pub fn begin() -> Self {
        Self(Instant::now())
    }

    /// This part is over, and the next one begins.
    pub fn done(&mut self, phase: &'static str) {
        METRICS.start.with_label_values(&[phase]).set(self.0.elapsed().as_secs_f64());
        self.0 = Instant::now();
    }
}

/// One request has been answered.
pub(crate) fn record(method: &str, route: &str, status: StatusCode, took: Duration) {
    let method = METHODS.into_iter().find(|known| *known == method).unwrap_or("other");
    let status = status.as_u16();
    let took = took.as_secs_f64();
    // A thread that is ending has no table any more; what it still answers goes uncounted.
    _ = ANSWERED.try_with(|answered| {
        let mut answered = answered.borrow_mut();
        if let Some(known) = answered.get(route).and_then(|of_route| find(of_route, method, status)) {
            known.count(took);
            return;
        }
        let new = Answered::new(route, method, status);
        new.count(took);
        answered.entry(route.into()).or_default().push(new);
    });
}

/// A client has been refused before there was a request: of what it wanted nothing is known, and it took no time.
pub(crate) fn refused(refusal: &Refusal) {
    record("", "refused", refusal.status(), Duration::ZERO);
}

/// A figure that must be asked for. See the head of this file.
#[derive(Clone)]
pub(crate) struct Sample(Arc<Sampled>);

type Taking = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

struct Sampled {
    name: &'static str,
    take: Box<dyn Fn() -> Taking + Send + Sync>,
    /// Longer than this it is given up.
    limit: Duration,
    state: Mutex<State>,
}

struct State {
    begun: Option<Instant>,
    /// Tells when the one under way has ended; none is, if the sender is gone.
    ended: Option<watch::Receiver<()>>,
    /// When the figures shown were taken; before the first, when it was decided to take them.
    taken: Instant,
    failing: bool,
}

/// A sample this young is not taken again.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);

/// How long all samples together may hold up an answer.
const SAMPLES_WAIT: Duration = Duration::from_millis(500);

impl Sample {
    /// `take` asks, and sets gauges.
    pub(crate) fn new(name: &'static str, limit: Duration, take: impl Fn() -> Taking + Send + Sync + 'static) -> Self {
        let state = State { begun: None, ended: None, taken: Instant::now(), failing: false };
        Self(Arc::new(Sampled { name, take: Box::new(take), limit, state: Mutex::new(state) }))
    }

    /// Begins to take it, if it is time and none is under way; the end of the one under way.
    fn begin(&self) -> Option<watch::Receiver<()>> {
        let mut state = self.0.lock();
        if let Some(ended) = state.ended.clone().filter(|ended| ended.has_changed().is_ok()) {
            return Some(ended);
        }
        if state.begun.is_some_and(|begun| begun.elapsed() < SAMPLE_EVERY) {
            return None;
        }
        let (under_way, ended) = watch::channel(());
        state.begun = Some(Instant::now());
        state.ended = Some(ended.clone());
        let sampled = self.0.clone();
        tokio::spawn(async move {
            let begun = Instant::now();
            let taken = timeout(sampled.limit, (sampled.take)()).await;
            sampled.took(begun, taken.unwrap_or_else(|_| Err("no answer in time".to_owned())));
            drop(under_way); // also when it panics
        });
        Some(ended)
    }

    fn show_age(&self) {
        METRICS.sample_age.with_label_values(&[self.0.name]).set(self.0.lock().taken.elapsed().as_secs_f64());
    }
}

impl Sampled {
    fn took(&self, begun: Instant, taken: Result<(), String>) {
        let mut state = self.lock();
        match taken {
            Ok(()) => (state.taken, state.failing) = (begun, false),
            Err(error) => {
                if !std::mem::replace(&mut state.failing, true) {
                    tracing::warn!(sample = self.name, error, "a sample for the metrics could not be taken");
                }
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner) // nothing is left half-changed
    }
}

/// `GET /metrics`
pub(crate) async fn show(samples: Arc<[Sample]>) -> Response {
    let until = tokio::time::Instant::now() + SAMPLES_WAIT;
    let under_way: Vec<_> = samples.iter().filter_map(Sample::begin).collect();
    join_all(under_way.into_iter().map(|mut ended| async move {
        _ = timeout_at(until, ended.changed()).await; // an error says that it has ended
    }))
    .await;
    samples.iter().for_each(Sample::show_age);
    LazyLock::force(&METRICS);
    match TextEncoder::new().encode_to_string(&prometheus::gather()) {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "the metrics could not be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// Whether one of the things that readiness depends on was as it must be.
pub(crate) fn checked(check: &'static str, ok: bool) {
    METRICS.checks.with_label_values(&[check]).set(ok.into());
}

struct Metrics {
    requests: IntCounterVec,
    seconds: HistogramVec,
    start: GaugeVec,
    checks: IntGaugeVec,
    sample_age: GaugeVec,
}

static METRICS: LazyLock<Metrics> = LazyLock::new(|| {
    let known = "each name is registered once, here";
    let build = register_int_gauge_vec!("daybook_build_info", "What runs here. Always 1.", &["version", "profile"]);
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    build.expect(known).with_label_values(&[env!("CARGO_PKG_VERSION"), profile]).set(1);
    process::register();
    Metrics {
        requests: register_int_counter_vec!(
            "daybook_http_requests_total",
            "Requests answered, also those that the server itself refused.",
            &["route", "method", "status"]
        )
        .expect(known),
        seconds: register_histogram_vec!(
            "daybook_http_request_seconds",
            "From a request's head to its answer's, in seconds.",
            &["route", "method", "status_class"],
            BOUNDS.to_vec()
        )
        .expect(known),
        start: register_gauge_vec!(
            "daybook_start_seconds",
            "What each part of the process' start took, in seconds.",
            &["phase"]
        )
        .expect(known),
        checks: register_int_gauge_vec!(
            "daybook_ready_check",
            "1 if what readiness depends on was as it must be when it was last looked at, else 0.",
            &["check"]
        )
        .expect(known),
        sample_age: register_gauge_vec!(
            "daybook_sample_age_seconds",
            "How old the figures are that had to be asked for, in seconds.",
            &["sample"]
        )
        .expect(known),
    }
});

const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];

/// In seconds.
const BOUNDS: [f64; 15] =
    [0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0];

thread_local! {
    /// The handles of what this thread has answered, by route: as many as there are routes, methods and statuses.
    static ANSWERED: RefCell<HashMap<Box<str>, Vec<Answered>>> = RefCell::default();
}

struct Answered {
    method: &'static str,
    status: u16,
    requests: IntCounter,
    seconds: Histogram,
}

impl Answered {
    fn new(route: &str, method: &'static str, status: u16) -> Self {
        let class = match status {
            100..200 => "1xx",
            200..300 => "2xx",
            300..400 => "3xx",
            400..500 => "4xx",
            _ => "5xx",
        };
        Self {
            method,
            status,
            requests: METRICS.requests.with_label_values(&[route, method, &status.to_string()]),
            seconds: METRICS.seconds.with_label_values(&[route, method, class]),
        }
    }

    fn count(&self, seconds: f64) {
        self.requests.inc();
        self.seconds.observe(seconds);
    }
}

fn find<'a>(of_route: &'a [Answered], method: &str, status: u16) -> Option<&'a Answered> {
    of_route.iter().find(|known| known.status == status && known.method == method)
}
