//! The partners' receiver: takes every webhook, checks its signature, and remembers what it was told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use hmac::{Hmac, Mac};
use serde_json::Value;
use sha2::Sha256;
use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

pub(crate) struct Receiver {
    url: String,
    shared: Shared,
    serving: AbortHandle,
}

type Shared = Arc<Mutex<Vec<Told>>>;

/// What one partner was told.
#[derive(Default)]
struct Told {
    secret: String,
    /// By the webhook's id: the same one may come twice.
    by_id: BTreeMap<String, Webhook>,
    forged: u64,
}

struct Webhook {
    event: String,
    sequence: u64,
    about: String,
}

impl Receiver {
    pub(crate) async fn start(partners: usize) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("listening for webhooks")?;
        let url = format!("http://{}/hooks", listener.local_addr()?);
        let shared: Shared = Arc::new(Mutex::new((0..partners).map(|_| Told::default()).collect()));
        let router = Router::new().route("/hooks/{partner}", post(receive)).with_state(shared.clone());
        let serving = tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Self { url, shared, serving: serving.abort_handle() })
    }

    pub(crate) fn url_of(&self, partner: usize) -> String {
        format!("{}/{partner}", self.url)
    }

    /// The secret that was shown when the endpoint was registered.
    pub(crate) fn knows(&self, partner: usize, secret: &str) {
        lock(&self.shared)[partner].secret = secret.to_owned();
    }

    pub(crate) fn count(&self) -> usize {
        lock(&self.shared).iter().map(|told| told.by_id.len()).sum()
    }

    /// Until so many have come, or no more time is left.
    pub(crate) async fn until(&self, wanted: u64, time: Duration) {
        let began = Instant::now();
        while u64::try_from(self.count()).unwrap_or(u64::MAX) < wanted && began.elapsed() < time {
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// How many of each type, and everything that is wrong with them. `completed` are the transactions that were done.
    pub(crate) fn outcome(&self, partner: usize, completed: &BTreeSet<String>) -> (BTreeMap<String, u64>, Vec<String>) {
        let told = &lock(&self.shared)[partner];
        let (mut counts, mut faults) = (BTreeMap::new(), Vec::new());
        let mut sequences = BTreeSet::new();
        let mut told_of = BTreeSet::new();
        for webhook in told.by_id.values() {
            *counts.entry(webhook.event.clone()).or_default() += 1;
            sequences.insert(webhook.sequence);
            if webhook.event == "transaction.completed" {
                told_of.insert(webhook.about.clone());
            }
        }
        if 0 < told.forged {
            faults.push(format!("{} had no signature of ours", told.forged));
        }
        let numbers = u64::try_from(told.by_id.len()).unwrap_or(u64::MAX);
        if sequences != (1..=numbers).collect() {
            faults.push(format!("{numbers} came, and their sequence has gaps or repetitions"));
        }
        faults.extend(completed.difference(&told_of).map(|id| format!("{id} was done, and no webhook said so")));
        faults.extend(told_of.difference(completed).map(|id| format!("{id} was told of, and is not of this demo")));
        (counts, faults)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, Vec<Told>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner) // what was told stands there whole
}

async fn receive(
    State(shared): State<Shared>,
    Path(partner): Path<usize>,
    headers: HeaderMap,
    body: Bytes,
) -> StatusCode {
    let mut all = lock(&shared);
    let Some(told) = all.get_mut(partner) else { return StatusCode::NOT_FOUND };
    if !is_genuine(&told.secret, &headers, &body) {
        told.forged += 1;
        return StatusCode::UNAUTHORIZED;
    }
    let Ok(body) = serde_json::from_slice::<Value>(&body) else { return StatusCode::BAD_REQUEST };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let webhook = Webhook {
        event: text(&body["eventType"]),
        sequence: body["sequence"].as_u64().unwrap_or(0),
        about: text(&body["data"]["id"]),
    };
    told.by_id.insert(text(&body["eventId"]), webhook);
    StatusCode::NO_CONTENT
}

fn is_genuine(secret: &str, headers: &HeaderMap, body: &[u8]) -> bool {
    let signature = headers.get("x-daybook-signature").and_then(|header| header.to_str().ok());
    let Some(hex) = signature.and_then(|signature| signature.strip_prefix("sha256=")) else { return false };
    let byte = |at: usize| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok();
    let Some(signature) = (0..hex.len()).step_by(2).map(byte).collect::<Option<Vec<_>>>() else { return false };
    let mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("HMAC takes keys of any length");
    !secret.is_empty() && mac.chain_update(body).verify_slice(&signature).is_ok()
}
