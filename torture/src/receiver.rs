//! A partner's receiver: keeps every webhook as it came, checks its signature, and sometimes fails.
//!
//! Left out: what should have come (`check.rs`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::random::Random;

/// Of a hundred webhooks so many are answered 500, whatever they are.
const FAILURES: u64 = 7;

/// What has come under one webhook id.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Received {
    /// Each different body once; there must be one.
    pub(crate) bodies: Vec<String>,
    /// How often it was taken with a 2xx.
    pub(crate) taken: u32,
    /// How often its signature did not fit.
    pub(crate) unsigned: u32,
}

pub(crate) struct Receiver {
    pub(crate) url: String,
    shared: Arc<Shared>,
    serving: tokio::task::JoinHandle<()>,
}

struct Shared {
    inner: Mutex<Inner>,
}

struct Inner {
    secret: String,
    received: BTreeMap<String, Received>,
    random: Random,
    trap: Option<oneshot::Sender<oneshot::Sender<()>>>,
}

impl Receiver {
    pub(crate) async fn start(seed: u64) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("listening for webhooks")?;
        let url = format!("http://{}/hooks", listener.local_addr()?);
        let random = Random::of(seed, "receiver");
        let inner = Inner { secret: String::new(), received: BTreeMap::new(), random, trap: None };
        let shared = Arc::new(Shared { inner: Mutex::new(inner) });
        let router = Router::new().route("/hooks", post(receive)).with_state(shared.clone());
        let serving = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "the receiver has ended");
            }
        });
        Ok(Self { url, shared, serving })
    }

    /// The secret that was shown when the endpoint was registered.
    pub(crate) fn knows(&self, secret: &str) {
        self.shared.lock().secret = secret.to_owned();
    }

    /// Waits for the next webhook and keeps it without an answer until what is returned is dropped.
    pub(crate) async fn catch(&self, patience: Duration) -> Option<oneshot::Sender<()>> {
        let (caught, held) = oneshot::channel();
        self.shared.lock().trap = Some(caught);
        let held = timeout(patience, held).await;
        self.shared.lock().trap = None;
        held.ok()?.ok()
    }

    pub(crate) fn received(&self) -> BTreeMap<String, Received> {
        self.shared.lock().received.clone()
    }

    pub(crate) fn has_taken(&self, id: &str) -> bool {
        self.shared.lock().received.get(id).is_some_and(|received| 0 < received.taken)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn receive(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let id = headers.get("webhook-id").and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
    let body = String::from_utf8_lossy(&body).into_owned();
    let (trap, fails) = {
        let mut inner = shared.lock();
        let signed = is_signed(&inner.secret, &headers, body.as_bytes());
        let fails = inner.random.percent(FAILURES);
        let trap = inner.trap.take();
        let received = inner.received.entry(id.clone()).or_default();
        received.unsigned += u32::from(!signed);
        if !received.bodies.contains(&body) {
            received.bodies.push(body);
        }
        (trap, fails)
    };
    if let Some(trap) = trap {
        let (release, released) = oneshot::channel();
        if trap.send(release).is_ok() {
            released.await.ok(); // dropped is released
        }
    }
    if fails {
        return StatusCode::INTERNAL_SERVER_ERROR;
    }
    if let Some(received) = shared.lock().received.get_mut(&id) {
        received.taken += 1;
    }
    StatusCode::NO_CONTENT
}

fn is_signed(secret: &str, headers: &HeaderMap, body: &[u8]) -> bool {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("HMAC takes a key of any length");
    mac.update(body);
    let hex = mac.finalize().into_bytes().iter().fold("sha256=".to_owned(), |hex, byte| format!("{hex}{byte:02x}"));
    headers.get("x-daybook-signature").is_some_and(|signature| signature.as_bytes() == hex.as_bytes())
}
