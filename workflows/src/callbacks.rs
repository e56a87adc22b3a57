//! `/v1/callbacks/*`: the outside's word, as it comes in.
//!
//! First the signature, over the bytes as they came and before anything of ours is read; then the body, as
//! strictly as any other; then the callback is stored, and only then is anything made of it. A callback that
//! is answered 200 is never lost: its command is issued at once if that can be, and later if not.

use std::sync::Arc;
use std::time::Duration;

use api_contract::{AmountText, BODY_BYTES_MAX, CurrencyText, Json, Problem, Text, money};
use axum::body::{Body, HttpBody};
use axum::extract::{FromRequest, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::time::{Instant, sleep, timeout};
use utoipa::ToSchema;

use crate::bank::{NotTheBank, Word, signed_at, verify};
use crate::follow::checkpoint;
use crate::top_up::{Callback, TopUps, Verdict};

/// A payment may have been decided before we saw that it was asked for: so long we wait to see it.
const CATCH_UP: Duration = Duration::from_secs(2);
const CATCH_UP_LOOK: Duration = Duration::from_millis(20);

/// So long the bank waits for the command that its word becomes.
const COMMAND: Duration = Duration::from_secs(3);

#[derive(Clone)]
pub(crate) struct Callbacks {
    pub(crate) top_ups: Arc<TopUps>,
    pub(crate) secret: Arc<str>,
}

/// The bank's word about a payment.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct BankCallback {
    token: Text<1, 128>,
    status: BankStatus,
    amount: AmountText,
    currency: CurrencyText,
    /// The bank's name for the payer's decision; the same callback again has the same.
    bank_reference: Text<1, 128>,
}

#[derive(Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
enum BankStatus {
    Success,
    Failure,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct CallbackTaken {
    status: Taken,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
enum Taken {
    /// The word counts, now or since before.
    Accepted,
    /// No such payment is known. Kept, and looked at again should it appear.
    Quarantined,
}

/// The bank's word about a payment
///
/// Signed: `X-Bank-Signature` is `sha256=` and the lower-case hex of HMAC-SHA256, keyed with the secret shared with the
/// bank, over `X-Bank-Timestamp`, a full stop and the body's bytes. The same callback again has no second effect; a
/// reference that comes again with other content is `callback-conflict`, a word against what is known `invalid-transition`.
/// A callback refused as `callback-mismatch` leaves its reference free: corrected, it may come again under the same one.
#[utoipa::path(
    post,
    path = "/v1/callbacks/bank",
    operation_id = "takeBankCallback",
    tag = "callbacks",
    params(
        ("X-Bank-Timestamp" = i64, Header, description = "Unix seconds, at most 300 from ours."),
        ("X-Bank-Signature" = String, Header, description = "`sha256=<hex>`"),
    ),
    request_body = BankCallback,
    responses(
        (status = 200, description = "The word counts, now or since before.", body = CallbackTaken),
        (status = 202, description = "No such payment is known. Kept, and looked at again should it appear.", body = CallbackTaken),
    ),
    extensions(("x-problems" = json!([
        "signature-invalid", "timestamp-out-of-tolerance", "callback-conflict", "invalid-transition", "callback-mismatch",
        "currency-unknown", "amount-format", "amount-not-positive", "amount-precision", "amount-out-of-range",
        "storage-unavailable",
    ]))),
)]
pub(crate) async fn bank(State(callbacks): State<Callbacks>, request: Request) -> Result<Response, Problem> {
    let signed_at = signed_at(request.headers())?;
    let (parts, body) = request.into_parts();
    let bytes = read(body).await?;
    verify(&parts.headers, &callbacks.secret, signed_at, &bytes)?;
    let Json(word, _) =
        Json::<BankCallback>::from_request(Request::from_parts(parts, Body::from(bytes.clone())), &()).await?;
    let callback = word.callback(signed_at, bytes)?;
    // On its own: a bank that hangs up must not interrupt what its word sets going.
    let taken = tokio::spawn(async move { callbacks.take(callback).await });
    taken.await.map_err(|error| Problem::internal(&error))?
}

impl Callbacks {
    async fn take(self, callback: Callback) -> Result<Response, Problem> {
        self.catch_up(&callback.token).await?;
        let (status, body) = match self.top_ups.take_callback(&callback).await? {
            Verdict::Accepted(transaction) => {
                let top_ups = self.top_ups.clone();
                let step = tokio::spawn(async move { top_ups.take_step_of(transaction).await });
                timeout(COMMAND, step).await.ok(); // later is as good: the word is stored
                (StatusCode::OK, Taken::Accepted)
            }
            Verdict::Known => (StatusCode::OK, Taken::Accepted),
            Verdict::Quarantined => (StatusCode::ACCEPTED, Taken::Quarantined),
            Verdict::Mismatch => {
                return Err(
                    Problem::of("callback-mismatch").detail("amount or currency differ from what was asked for")
                );
            }
            Verdict::Contrary => {
                return Err(Problem::of("invalid-transition").detail("the payment has ended otherwise"));
            }
            Verdict::Second => {
                return Err(
                    Problem::of("callback-conflict").detail("the payment was decided under another bankReference")
                );
            }
            Verdict::Conflict => {
                return Err(Problem::of("callback-conflict")
                    .detail("this bankReference stands for another callback or payment"));
            }
        };
        Ok((status, axum::Json(CallbackTaken { status: body })).into_response())
    }

    /// Waits until what the log held on arrival has been followed, if the payment is not known yet.
    async fn catch_up(&self, token: &str) -> Result<(), Problem> {
        if self.top_ups.knows(token).await? {
            return Ok(());
        }
        let until = Instant::now() + CATCH_UP;
        let head = self.top_ups.log().head().await.map_err(|error| Problem::storage(&error))?.commit;
        while Instant::now() < until && checkpoint(self.top_ups.pool()).await? < head {
            sleep(CATCH_UP_LOOK).await;
        }
        Ok(())
    }
}

impl BankCallback {
    fn callback(self, signed_at: u64, body: Vec<u8>) -> Result<Callback, Problem> {
        let word = match self.status {
            BankStatus::Success => Word::Success,
            BankStatus::Failure => Word::Failure,
        };
        let signed_at = i64::try_from(signed_at).ok().and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok());
        Ok(Callback {
            word,
            money: money(&self.amount, &self.currency)?,
            token: self.token.into(),
            bank_reference: self.bank_reference.into(),
            signed_at: signed_at.ok_or_else(|| Problem::of("timestamp-out-of-tolerance"))?,
            body,
        })
    }
}

async fn read(body: Body) -> Result<Vec<u8>, Problem> {
    let too_large =
        || Problem::of("payload-too-large").detail(format!("a body has at most {BODY_BYTES_MAX} bytes here"));
    if u64::try_from(BODY_BYTES_MAX).is_ok_and(|max| max < body.size_hint().lower()) {
        return Err(too_large());
    }
    match Limited::new(body, BODY_BYTES_MAX).collect().await {
        Ok(collected) => Ok(collected.to_bytes().to_vec()),
        Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
        Err(_) => Err(Problem::of("malformed-json").detail("the body broke off")),
    }
}

impl From<NotTheBank> for Problem {
    fn from(why: NotTheBank) -> Self {
        Problem::of(match why {
            NotTheBank::Signature => "signature-invalid",
            NotTheBank::Timestamp => "timestamp-out-of-tolerance",
        })
    }
}
