//! Telling the merchant: signed callbacks, repeated until taken, within bounds.
//!
//! A bank tells at least once. Copies, delays and silence on request are here too, since a real
//! bank does all of them without being asked.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::future::join_all;
use hmac::{Hmac, Mac};
use reqwest::redirect::Policy;
use reqwest::{Client, StatusCode};
use runtime::shutdown::Shutdown;
use serde_json::json;
use sha2::Sha256;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::sleep;

use crate::book::Payment;

pub(crate) const COPIES_MAX: u32 = 10;
pub(crate) const DELAY_MAX: Duration = Duration::from_secs(60);

/// Callbacks that are under way, waiting for their next attempt included. More are refused before anything is done.
const CALLBACKS_MAX: u32 = 10_000;
const SENDING_MAX: usize = 64;
const SEND_TIME: Duration = Duration::from_secs(10);
/// After 1, 2, 4, … 64 seconds: eight attempts in two minutes.
const ATTEMPTS_MAX: u32 = 8;

/// How a payment's end is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) copies: u32,
    pub(crate) delay: Duration,
    pub(crate) delay_each: Duration,
}

pub(crate) struct Callbacks {
    client: Client,
    secret: Arc<str>,
    under_way: Arc<Semaphore>,
    sending: Semaphore,
    shutdown: Shutdown,
}

/// The right to send some callbacks.
pub(crate) struct Slots {
    _held: Option<OwnedSemaphorePermit>,
}

impl Plan {
    pub(crate) const ONCE: Self = Self { copies: 1, delay: Duration::ZERO, delay_each: Duration::ZERO };
    pub(crate) const SILENCE: Self = Self { copies: 0, ..Self::ONCE };
}

impl Callbacks {
    pub(crate) fn new(secret: &str, shutdown: Shutdown) -> anyhow::Result<Self> {
        // No redirects: a signed word is for the address it was meant for. No proxy from the environment.
        let client = Client::builder().timeout(SEND_TIME).redirect(Policy::none()).no_proxy().build()?;
        let under_way = Arc::new(Semaphore::new(CALLBACKS_MAX as usize));
        Ok(Self { client, secret: secret.into(), under_way, sending: Semaphore::new(SENDING_MAX), shutdown })
    }

    /// `None` when too many are under way.
    pub(crate) fn slots(&self, plan: Plan) -> Option<Slots> {
        match plan.copies {
            0 => Some(Slots { _held: None }),
            copies => {
                self.under_way.clone().try_acquire_many_owned(copies).ok().map(|permit| Slots { _held: Some(permit) })
            }
        }
    }

    /// Sends all copies. True when the matter is closed; false when a stop came first.
    pub(crate) async fn send(&self, payment: &Payment, plan: Plan, slots: Slots) -> bool {
        let copies = (0..plan.copies).map(|n| async move {
            sleep(plan.delay + plan.delay_each * n).await;
            self.send_one(payment).await;
        });
        let closed = tokio::select! {
            () = self.shutdown.requested() => false,
            _ = join_all(copies) => true,
        };
        drop(slots);
        closed
    }

    /// Returns when nothing is under way any more. After a stop that is at once.
    pub(crate) async fn idle(&self) {
        let _all = self.under_way.acquire_many(CALLBACKS_MAX).await;
    }

    async fn send_one(&self, payment: &Payment) {
        let reference = payment.reference.as_deref(); // not the token: whoever reads that can pay
        for attempt in 1..=ATTEMPTS_MAX {
            let verdict = self.attempt(payment).await;
            tracing::info!(payment.reference = reference, attempt, ?verdict, "callback");
            match verdict {
                Verdict::Taken | Verdict::Refused(_) => return,
                Verdict::Again(_) if attempt < ATTEMPTS_MAX => sleep(Duration::from_secs(1 << (attempt - 1))).await,
                Verdict::Again(_) => {}
            }
        }
        tracing::warn!(payment.reference = reference, attempts = ATTEMPTS_MAX, "the merchant was not reached");
    }

    async fn attempt(&self, payment: &Payment) -> Verdict {
        let _turn = self.sending.acquire().await;
        let registration = &payment.registration;
        let body = json!({
            "token": registration.token,
            "status": payment.status,
            "amount": registration.amount,
            "currency": registration.currency,
            "bankReference": payment.reference,
        })
        .to_string();
        let timestamp = unix_seconds();
        let request = self
            .client
            .post(&registration.callback_url)
            .header("content-type", "application/json")
            .header("x-bank-timestamp", timestamp)
            .header("x-bank-signature", sign(&self.secret, timestamp, &body))
            .body(body);
        match request.send().await.map(|response| response.status()) {
            Ok(status) if status.is_success() => Verdict::Taken,
            Ok(status @ (StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)) => {
                Verdict::Again(status.to_string())
            }
            Ok(status) if status.is_client_error() => Verdict::Refused(status),
            Ok(status) => Verdict::Again(status.to_string()),
            Err(error) => Verdict::Again(error.without_url().to_string()),
        }
    }
}

#[derive(Debug)]
#[expect(dead_code, reason = "the reasons are for the log")]
enum Verdict {
    Taken,
    Refused(StatusCode),
    Again(String),
}

/// `sha256=` and the hex of HMAC-SHA256 over `timestamp.body`.
fn sign(secret: &str, timestamp: u64, body: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("HMAC takes a key of any length");
    mac.update(format!("{timestamp}.{body}").as_bytes());
    mac.finalize().into_bytes().iter().fold("sha256=".to_owned(), |hex, byte| format!("{hex}{byte:02x}"))
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970").as_secs()
}
