//! One attempt: a POST to the partner, and what came of it.
//!
//! The receiver is a stranger: it may be slow, endless, absent, redirecting or pointing back at us. An attempt
//! takes at most [`DEADLINE`] from the name's look-up to the end of the answer, uses a connection of its own,
//! follows no redirect, goes through no proxy, and keeps at most [`ANSWER_MAX`] bytes of the answer, as they
//! came. Whatever happens is an outcome; nothing here is an error.

use std::error::Error;
use std::io;
use std::time::Duration;

use ledger_core::{DeliveryId, EventId};
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode, Url, redirect, retry};
use runtime::trace::{self, Span, SpanKind};
use time::macros::format_description;
use time::{OffsetDateTime, PrimitiveDateTime};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::signature::SigningSecret;
use crate::target::{BlockedAddress, CheckedResolver, Reach, Target};

/// For the whole attempt.
pub(crate) const DEADLINE: Duration = Duration::from_secs(15);

/// How much of an answer is kept.
pub(crate) const ANSWER_MAX: usize = 16 * 1024;

/// What went wrong is told in at most so many characters.
const DETAIL_MAX: usize = 300;

/// No receiver makes us wait longer.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(6 * 60 * 60);

/// What came of an attempt. These words are stored and shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Answered with 2xx.
    Delivered,
    /// Answered with something else.
    Status,
    /// Answered with 3xx, which is not followed.
    Redirect,
    /// No answer within the deadline.
    Timeout,
    /// No connection: the name is unknown, or nobody listens.
    Connect,
    /// The certificate or the handshake was refused.
    Tls,
    /// The target is not a public address; nothing was opened.
    BlockedAddress,
    /// Connected and sent, but the connection ended without an answer in HTTP.
    NoAnswer,
    /// We could not send: the endpoint's secret does not open with our key.
    NotSigned,
}

/// Shown while an attempt is under way.
pub(crate) const IN_FLIGHT: &str = "in-flight";

/// Of an attempt that was under way when its dispatcher ended: nobody knows what came of it.
pub(crate) const UNKNOWN: &str = "unknown";

/// A delivery whose turn it is; ours until its lease ends.
#[derive(Debug)]
pub(crate) struct Due {
    pub(crate) delivery: Uuid,
    pub(crate) endpoint: Uuid,
    pub(crate) event_id: Uuid,
    pub(crate) event_type: String,
    pub(crate) url: String,
    /// `None` if it could not be opened.
    pub(crate) secret: Option<SigningSecret>,
    pub(crate) body: String,
    /// The attempt's number, from 1.
    pub(crate) number: i32,
    /// The attempt's number in its schedule, from 1.
    pub(crate) round: i32,
    pub(crate) possible_duplicate: bool,
    /// Of the request that led to it.
    pub(crate) traceparent: Option<String>,
}

/// An attempt that has ended.
#[derive(Debug)]
pub(crate) struct Attempted {
    pub(crate) outcome: Outcome,
    pub(crate) status: Option<StatusCode>,
    pub(crate) latency: Duration,
    pub(crate) answer: Option<Answer>,
    pub(crate) detail: Option<String>,
    /// The receiver asks for a pause, with 429.
    pub(crate) pause: Option<Duration>,
}

/// The beginning of an answer's body.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) body: Vec<u8>,
    pub(crate) truncated: bool,
}

/// Sends deliveries.
#[derive(Clone, Debug)]
pub(crate) struct Sender {
    client: Client,
    reach: Reach,
}

impl Outcome {
    pub(crate) const ALL: [Self; 9] = [
        Self::Delivered,
        Self::Status,
        Self::Redirect,
        Self::Timeout,
        Self::Connect,
        Self::Tls,
        Self::BlockedAddress,
        Self::NoAnswer,
        Self::NotSigned,
    ];

    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Status => "status",
            Self::Redirect => "redirect",
            Self::Timeout => "timeout",
            Self::Connect => "connect",
            Self::Tls => "tls",
            Self::BlockedAddress => "blocked-address",
            Self::NoAnswer => "no-answer",
            Self::NotSigned => "not-signed",
        }
    }

    /// Whether the receiver may have taken the delivery without our learning of it.
    pub(crate) const fn may_have_arrived(self) -> bool {
        matches!(self, Self::Timeout | Self::NoAnswer)
    }
}

impl Sender {
    pub(crate) fn new(reach: Reach) -> Result<Self, reqwest::Error> {
        // Fails only where a process-wide provider is installed already, which is then used.
        rustls::crypto::ring::default_provider().install_default().ok();
        let builder = || {
            Client::builder()
                .redirect(redirect::Policy::none())
                .retry(retry::never())
                .no_proxy()
                .referer(false)
                .http1_only()
                .pool_max_idle_per_host(0) // each attempt resolves, checks and connects anew
                .dns_resolver(CheckedResolver(reach))
                .user_agent(concat!("Daybook/", env!("CARGO_PKG_VERSION")))
        };
        let client = builder().build().or_else(|error| {
            tracing::warn!(%error, "this machine has no certificates of authorities: no https delivery will succeed");
            builder().tls_certs_only([]).build()
        })?;
        Ok(Self { client, reach })
    }

    /// Sends once. Always answers, within [`DEADLINE`].
    pub(crate) async fn send(&self, due: &Due) -> Attempted {
        let begun = Instant::now();
        let span = trace::child("deliver", SpanKind::Client, due.traceparent.as_deref());
        let traceparent = span.as_ref().map(Span::traceparent).or_else(|| due.traceparent.clone());
        let mut attempted = self.attempt(due, traceparent.as_deref(), begun + DEADLINE).await;
        attempted.latency = begun.elapsed();
        if let Some(span) = span {
            attempted.describe(due, span);
        }
        attempted
    }

    async fn attempt(&self, due: &Due, traceparent: Option<&str>, deadline: Instant) -> Attempted {
        let Some(secret) = &due.secret else {
            return Attempted::failed(Outcome::NotSigned, None);
        };
        let target = match Target::parse(&due.url, self.reach) {
            Ok(target) => target,
            Err(forbidden) => return Attempted::failed(Outcome::BlockedAddress, Some(forbidden.to_string())),
        };
        let (event, delivery) = (EventId::from_uuid(due.event_id), DeliveryId::from_uuid(due.delivery));
        let event_id = event.to_string();
        let timestamp = OffsetDateTime::now_utc().unix_timestamp();
        let mut request = self
            .client
            .post(target.url().clone())
            .header("content-type", "application/json")
            .header("x-daybook-event", &due.event_type)
            .header("x-daybook-signature", secret.sign_body(&due.body))
            .header("x-daybook-delivery", delivery.to_string())
            .header("x-daybook-attempt", due.number)
            .header("webhook-id", &event_id)
            .header("webhook-timestamp", timestamp)
            .header("webhook-signature", secret.sign_message(&event_id, timestamp, &due.body));
        if due.possible_duplicate {
            request = request.header("x-daybook-possible-duplicate", "true");
        }
        if let Some(traceparent) = traceparent {
            request = request.header("traceparent", traceparent);
        }
        match timeout_at(deadline, request.body(due.body.clone()).send()).await {
            Ok(Ok(response)) => Attempted::answered(response, deadline).await,
            Ok(Err(error)) => Attempted::broken(&error),
            Err(_) => {
                let detail = format!("no answer within {} s", DEADLINE.as_secs());
                Attempted::failed(Outcome::Timeout, Some(detail))
            }
        }
    }
}

impl Attempted {
    /// Of the URL only the host: partners put secrets into paths.
    fn describe(&self, due: &Due, mut span: Span) {
        span.set("http.request.method", "POST");
        if let Ok(url) = Url::parse(&due.url) {
            span.set("server.address", url.host_str().unwrap_or_default().to_owned());
            span.set("server.port", i64::from(url.port_or_known_default().unwrap_or_default()));
        }
        span.set("http.request.resend_count", i64::from(due.number) - 1);
        span.set("daybook.delivery.id", DeliveryId::from_uuid(due.delivery).to_string());
        span.set("daybook.event.type", due.event_type.clone());
        if let Some(status) = self.status {
            span.set("http.response.status_code", i64::from(status.as_u16()));
        }
        if self.outcome != Outcome::Delivered {
            span.failed(self.outcome.word());
        }
        span.end();
    }

    fn failed(outcome: Outcome, detail: Option<String>) -> Self {
        Self { outcome, status: None, latency: Duration::ZERO, answer: None, detail, pause: None }
    }

    async fn answered(response: Response, deadline: Instant) -> Self {
        let status = response.status();
        let outcome = match status {
            status if status.is_success() => Outcome::Delivered,
            status if status.is_redirection() => Outcome::Redirect,
            _ => Outcome::Status,
        };
        let pause = (status == StatusCode::TOO_MANY_REQUESTS).then(|| retry_after(response.headers())).flatten();
        // The status was the answer; a body that does not end changes nothing about it.
        let answer = Some(Answer::read(response, deadline).await);
        Self { outcome, status: Some(status), latency: Duration::ZERO, answer, detail: None, pause }
    }

    fn broken(error: &reqwest::Error) -> Self {
        let causes = || std::iter::successors(error.source(), |&cause| cause.source());
        let outcome = if causes().any(|cause| cause.is::<BlockedAddress>()) {
            Outcome::BlockedAddress
        } else if causes().any(is_tls) {
            Outcome::Tls
        } else if error.is_connect() {
            Outcome::Connect
        } else {
            Outcome::NoAnswer
        };
        // The innermost cause says most; the outer ones repeat the URL.
        let detail = causes().last().map_or_else(|| error.to_string(), ToString::to_string);
        Self::failed(outcome, Some(detail.chars().take(DETAIL_MAX).collect()))
    }
}

fn is_tls(cause: &(dyn Error + 'static)) -> bool {
    // What an `io::Error` wraps is not its source but itself, and it may wrap another one.
    let inner = cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    cause.is::<rustls::Error>() || inner.is_some_and(|inner| is_tls(inner))
}

impl Answer {
    async fn read(mut response: Response, deadline: Instant) -> Self {
        let mut body = Vec::new();
        loop {
            match timeout_at(deadline, response.chunk()).await {
                Ok(Ok(Some(chunk))) if ANSWER_MAX < body.len() + chunk.len() => {
                    body.extend_from_slice(&chunk[..ANSWER_MAX - body.len()]);
                    return Self { body, truncated: true };
                }
                Ok(Ok(Some(chunk))) => body.extend_from_slice(&chunk),
                Ok(Ok(None)) => return Self { body, truncated: false },
                Ok(Err(_)) | Err(_) => return Self { body, truncated: true }, // broken off, or too slow
            }
        }
    }
}

/// Seconds or a date. What is absurd is cut or ignored.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let pause = if let Ok(seconds) = value.parse::<u64>() {
        Duration::from_secs(seconds)
    } else {
        let date =
            format_description!("[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT");
        let until = PrimitiveDateTime::parse(value, date).ok()?.assume_utc();
        (until - OffsetDateTime::now_utc()).try_into().ok()?
    };
    Some(pause.min(RETRY_AFTER_MAX)).filter(|pause| !pause.is_zero())
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    fn asked(value: &'static str) -> Option<Duration> {
        retry_after(&HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static(value))]))
    }

    #[tokio::test]
    async fn a_name_that_turns_out_to_lead_inside_is_blocked_and_no_socket_is_opened() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        // The name was public when it was registered; now it resolves to this machine.
        let sender = Sender { reach: Reach::Local, ..Sender::new(Reach::Public).unwrap() };
        let due = Due {
            delivery: Uuid::now_v7(),
            endpoint: Uuid::now_v7(),
            event_id: Uuid::now_v7(),
            event_type: "wallet.opened".to_owned(),
            url: format!("http://localhost:{}/", listener.local_addr().unwrap().port()),
            secret: Some(SigningSecret::mint()),
            body: "{}".to_owned(),
            number: 1,
            round: 1,
            possible_duplicate: false,
            traceparent: None,
        };
        assert_eq!(sender.send(&due).await.outcome, Outcome::BlockedAddress);
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "somebody connected");
    }

    #[test]
    fn a_pause_is_taken_in_seconds_or_as_a_date_and_nothing_absurd_is() {
        assert_eq!(asked("120"), Some(Duration::from_secs(120)));
        assert_eq!(asked("99999999999"), Some(RETRY_AFTER_MAX));
        assert_eq!(asked("Fri, 31 Dec 9999 23:59:59 GMT"), Some(RETRY_AFTER_MAX));
        for nothing in ["0", "-5", "soon", "", "1.5", "Wed, 21 Oct 2015 07:28:00 GMT", "99999999999999999999999999"] {
            assert_eq!(asked(nothing), None, "{nothing}");
        }
    }
}
