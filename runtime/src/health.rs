//! `/healthz` and `/readyz`: is the process alive, and can it do its work? `/metrics`: what has it done?
//!
//! Each check has a name and a time limit. What a failed check found goes to the log and not into
//! the answer, for anyone may ask. Checks run at most a few times a second however often they are
//! asked for, so that asking cannot become a load on what is checked.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use futures::future::join_all;
use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::metrics::{self, Sample};

/// An answer this young is given again.
const FRESH: Duration = Duration::from_millis(250);

/// For all checks, each of which has a limit of its own.
const READINESS_LIMIT: Duration = Duration::from_secs(30);

/// Where an operator's programs look; they are let in when nobody else is.
pub(crate) const PATHS: [&str; 3] = ["/healthz", "/readyz", "/metrics"];

/// What must hold for a service to be ready.
#[derive(Default)]
pub struct Health {
    checks: Vec<Check>,
    samples: Vec<Sample>,
}

impl Health {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a check, run whenever readiness is asked for; one that takes longer than `limit` has failed.
    #[must_use]
    pub fn check<F, E>(
        mut self,
        name: &'static str,
        limit: Duration,
        check: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: fmt::Display,
    {
        let run = Box::new(move || -> Verdict {
            let checking = check();
            Box::pin(async move { checking.await.map_err(|error| error.to_string()) })
        });
        self.checks.push(Check { name, limit, run });
        self
    }

    /// Adds figures that must be asked for, such as the length of a queue in a database: `take` asks and sets gauges, when
    /// `/metrics` is asked for, but not more often than once a second, and only once at a time.
    #[must_use]
    pub fn sample<F, E>(
        mut self,
        name: &'static str,
        limit: Duration,
        take: impl Fn() -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: fmt::Display,
    {
        self.samples.push(Sample::new(name, limit, move || {
            let taking = take();
            Box::pin(async move { taking.await.map_err(|error| error.to_string()) })
        }));
        self
    }

    /// `GET /healthz`, `GET /readyz` and `GET /metrics`; merge it into the service's router.
    pub fn router(self) -> Router {
        let asked = Arc::new(Asked { checks: self.checks, last: Mutex::new(None) });
        let readiness = asked.clone();
        let checks = Sample::new("readiness", READINESS_LIMIT, move || {
            let asked = readiness.clone();
            Box::pin(async move {
                asked.look().await;
                Ok(())
            })
        });
        let samples: Arc<[Sample]> = self.samples.into_iter().chain([checks]).collect();
        Router::new()
            .route("/healthz", routing::get(alive))
            .route("/readyz", routing::get(ready))
            .route("/metrics", routing::get(move || metrics::show(samples.clone())))
            .with_state(asked)
    }
}

type Verdict = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

struct Check {
    name: &'static str,
    limit: Duration,
    run: Box<dyn Fn() -> Verdict + Send + Sync>,
}

struct Asked {
    checks: Vec<Check>,
    last: Mutex<Option<(Instant, bool, Value)>>, // held while the checks run: all who ask meanwhile share the answer
}

async fn alive() -> Response {
    Json(json!({ "status": "alive" })).into_response()
}

async fn ready(State(asked): State<Arc<Asked>>) -> Response {
    let (ready, body) = asked.look().await;
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(body)).into_response()
}

impl Asked {
    /// Runs all checks, or answers what they found a moment ago.
    async fn look(&self) -> (bool, Value) {
        let mut last = self.last.lock().await;
        if let Some((at, ready, body)) = &*last
            && at.elapsed() < FRESH
        {
            return (*ready, body.clone());
        }
        let results = join_all(self.checks.iter().map(Check::run)).await;
        let ready = results.iter().all(|(passed, _)| *passed);
        let results: Vec<Value> = results.into_iter().map(|(_, result)| result).collect();
        let body = json!({ "status": if ready { "ready" } else { "not-ready" }, "checks": results });
        *last = Some((Instant::now(), ready, body.clone()));
        (ready, body)
    }
}

impl Check {
    async fn run(&self) -> (bool, Value) {
        let begun = Instant::now();
        let status = match tokio::time::timeout(self.limit, (self.run)()).await {
            Ok(Ok(())) => "ok",
            Ok(Err(error)) => {
                tracing::warn!(check = self.name, error, "not ready");
                "failed"
            }
            Err(_) => {
                tracing::warn!(check = self.name, limit = ?self.limit, "not ready: no answer in time");
                "timed-out"
            }
        };
        metrics::checked(self.name, status == "ok");
        let duration_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        (status == "ok", json!({ "name": self.name, "status": status, "durationMs": duration_ms }))
    }
}
