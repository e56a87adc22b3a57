//! The bank's doors: for merchants (with the API key), for payers (with the token), and its own health.
//!
//! What comes in is checked here, once; behind the doors everything is known to be well formed.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use reqwest::Url;
use runtime::health::Health;
use runtime::http::problem;
use runtime::request_id::{self, RequestId};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::bank::{Bank, BankError};
use crate::book::{BookError, Outcome, Payment, Registration, Status};
use crate::callback::{COPIES_MAX, DELAY_MAX, Plan};
use crate::journal::JournalError;
use crate::money::Minor;
use crate::page;

const TOKEN_MAX: usize = 128;
const URL_MAX: usize = 2048;
const DESCRIPTION_MAX: usize = 500;
const CHECK_TIME: Duration = Duration::from_secs(2);

#[derive(Clone)]
pub(crate) struct Doors {
    bank: Arc<Bank>,
    api_key: Arc<[u8]>, // hashed: comparing it takes the same time whatever is sent
}

pub(crate) fn router(bank: Arc<Bank>, api_key: &str) -> Router {
    let doors = Doors { bank: bank.clone(), api_key: Sha256::digest(api_key).to_vec().into() };
    let merchants = Router::new()
        .route("/bank/payments", routing::post(register))
        .route("/bank/payments/{token}", routing::get(payment))
        .route("/bank/payments/{token}/cancel", routing::post(cancel))
        .route("/bank/ledger", routing::get(ledger))
        .route_layer(middleware::from_fn_with_state(doors.clone(), require_key));
    let payers = Router::new()
        .route("/bank/pay/{token}", routing::get(pay_page).post(pay))
        .route("/bank/simulate", routing::post(simulate))
        .route("/bank/style.css", routing::get(async || ([(header::CONTENT_TYPE, "text/css")], page::STYLE)));
    let health = Health::new().check("journal", CHECK_TIME, move || {
        let bank = bank.clone();
        async move { bank.check().await }
    });
    Router::new()
        .merge(merchants)
        .merge(payers)
        .with_state(doors)
        .merge(health.router())
        .layer(middleware::from_fn(complete))
        .layer(middleware::from_fn(request_id::track))
}

/// `POST /bank/payments`
async fn register(State(doors): State<Doors>, Body(registration): Body<Registration>) -> Result<Response, Refused> {
    check(&registration)?;
    let (payment, new) = doors.bank.register(registration).await?;
    let status = if new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(status_of(&payment))).into_response())
}

/// `GET /bank/payments/{token}`
async fn payment(State(doors): State<Doors>, Path(token): Path<String>) -> Result<Json<Value>, Refused> {
    Ok(Json(status_of(&doors.bank.payment(&token).await?)))
}

/// `POST /bank/payments/{token}/cancel`
async fn cancel(State(doors): State<Doors>, Path(token): Path<String>) -> Result<Json<Value>, Refused> {
    Ok(Json(status_of(&doors.bank.cancel(&token).await?)))
}

/// `GET /bank/ledger`
async fn ledger(State(doors): State<Doors>) -> Result<Json<Value>, Refused> {
    let collected = doors.bank.collected().await?;
    let rows: Vec<Value> = collected
        .iter()
        .map(|(currency, collected)| {
            json!({ "currency": currency, "collected": currency.format(collected.total), "payments": collected.payments })
        })
        .collect();
    Ok(Json(json!({ "currencies": rows })))
}

/// `GET /bank/pay/{token}`
async fn pay_page(State(doors): State<Doors>, Path(token): Path<String>) -> Result<Response, Refused> {
    Ok(page::show(StatusCode::OK, &doors.bank.find(&token).await?))
}

/// `POST /bank/pay/{token}`: the page's two buttons.
async fn pay(State(doors): State<Doors>, Path(token): Path<String>, form: Bytes) -> Result<Response, Refused> {
    let outcome = match &form[..] {
        b"outcome=success" => Outcome::Success,
        b"outcome=failure" => Outcome::Failure,
        _ => return Err(Refused::Field("the form says `outcome=success` or `outcome=failure`")),
    };
    match doors.bank.end(&token, outcome, Plan::ONCE, false).await {
        Ok(payment) => Ok(page::show(StatusCode::OK, &payment)),
        // The payer pressed the other button before, or the merchant was faster: the page says which.
        Err(BankError::Book(BookError::Ended(_))) => {
            Ok(page::show(StatusCode::CONFLICT, &doors.bank.payment(&token).await?))
        }
        Err(error) => Err(error.into()),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Simulation {
    token: String,
    outcome: Outcome,
    #[serde(default)]
    callback: CallbackWish,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
struct CallbackWish {
    copies: Option<u32>,
    delay_ms: u64,
    delay_each_ms: u64,
    drop: bool,
}

/// `POST /bank/simulate`: the page's scripted twin, which can also misbehave.
async fn simulate(State(doors): State<Doors>, Body(simulation): Body<Simulation>) -> Result<Json<Value>, Refused> {
    let wish = simulation.callback;
    let (delay, delay_each) = (Duration::from_millis(wish.delay_ms), Duration::from_millis(wish.delay_each_ms));
    if !(1..=COPIES_MAX).contains(&wish.copies.unwrap_or(1)) {
        return Err(Refused::Field("`copies` is 1 to 10"));
    }
    if DELAY_MAX < delay || DELAY_MAX < delay_each {
        return Err(Refused::Field("`delayMs` and `delayEachMs` are 0 to 60000"));
    }
    let plan = match wish.copies {
        _ if wish.drop => Plan::SILENCE,
        copies => Plan { copies: copies.unwrap_or(1), delay, delay_each },
    };
    // Without a number of copies a repetition tells nobody again.
    let bank = &doors.bank;
    let payment = bank.end(&simulation.token, simulation.outcome, plan, wish.copies.is_some()).await?;
    Ok(Json(status_of(&payment)))
}

fn status_of(payment: &Payment) -> Value {
    json!({
        "token": payment.registration.token,
        "status": payment.status,
        "amount": payment.registration.amount,
        "currency": payment.registration.currency,
        "bankReference": payment.reference,
    })
}

fn check(registration: &Registration) -> Result<(), Refused> {
    let Registration { token, amount, currency, callback_url, return_url, description } = registration;
    let unreserved = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    if !(1..=TOKEN_MAX).contains(&token.len()) || !token.bytes().all(unreserved) {
        return Err(Refused::Field("`token` is 1 to 128 letters, digits, `-`, `.`, `_` or `~`"));
    }
    if Minor::parse(amount, currency).is_none() {
        return Err(Refused::Field("`amount` is a positive decimal with at most the currency's digits"));
    }
    // Other schemes would run in the payer's browser (`javascript:`) or mean nothing.
    let web =
        |url: &str| url.len() <= URL_MAX && Url::parse(url).is_ok_and(|url| matches!(url.scheme(), "http" | "https"));
    if !web(callback_url) || !return_url.as_deref().is_none_or(web) {
        return Err(Refused::Field("`callbackUrl` and `returnUrl` are http or https"));
    }
    if description.as_ref().is_some_and(|description| DESCRIPTION_MAX < description.len()) {
        return Err(Refused::Field("`description` has at most 500 bytes"));
    }
    Ok(())
}

async fn require_key(State(doors): State<Doors>, request: Request, next: Next) -> Response {
    let sent = request
        .headers()
        .get(header::AUTHORIZATION)
        .map(HeaderValue::as_bytes)
        .and_then(|sent| sent.strip_prefix(b"Bearer "));
    if sent.is_some_and(|sent| Sha256::digest(sent)[..] == doors.api_key[..]) {
        return next.run(request).await;
    }
    Refused::Key.into_response()
}

/// A refusal is made where neither path nor name of the request is at hand; here both are.
async fn complete(id: RequestId, request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let mut response = next.run(request).await;
    let Some((status, slug, title, detail)) = response.extensions_mut().remove::<Row>() else { return response };
    let mut response = problem(status, slug, title, detail, Some(&path), Some(&id));
    let headers = response.headers_mut();
    if status == StatusCode::UNAUTHORIZED {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// A JSON body.
struct Body<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Refused;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refused> {
        if !is_json(request.headers()) {
            return Err(Refused::NotJson);
        }
        let bytes = Bytes::from_request(request, state).await.map_err(|_| Refused::Json)?; // the server knows better why
        serde_json::from_slice(&bytes).map(Self).map_err(|error| match error.classify() {
            serde_json::error::Category::Data => {
                Refused::Field("a field is unknown, missing, twice there or of the wrong kind")
            }
            _ => Refused::Json,
        })
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

/// Everything for which the bank says no.
enum Refused {
    Bank(BankError),
    Field(&'static str),
    Json,
    NotJson,
    Key,
}

impl From<BankError> for Refused {
    fn from(error: BankError) -> Self {
        Self::Bank(error)
    }
}

/// Status, slug, title, detail.
type Row = (StatusCode, &'static str, &'static str, &'static str);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let row = self.row();
        let mut response = row.0.into_response();
        response.extensions_mut().insert(row);
        response
    }
}

impl Refused {
    /// The table.
    fn row(&self) -> Row {
        use BankError as B;
        use StatusCode as S;
        match self {
            Self::Bank(B::Book(BookError::NotFound)) => {
                (S::NOT_FOUND, "payment-not-found", "Payment not found", "The bank knows no payment with this token.")
            }
            Self::Bank(B::Book(BookError::Exists)) => {
                (S::CONFLICT, "payment-exists", "Payment exists", "The token was registered with other content.")
            }
            Self::Bank(B::Book(BookError::Ended(Status::Cancelled))) => {
                (S::CONFLICT, "payment-ended", "Payment ended", "The merchant cancelled this payment.")
            }
            Self::Bank(B::Book(BookError::Ended(_))) => {
                (S::CONFLICT, "payment-ended", "Payment ended", "The payment ended with the other outcome.")
            }
            Self::Bank(B::Book(BookError::Full) | B::Journal(JournalError::Overloaded) | B::TooManyCallbacks) => {
                (S::SERVICE_UNAVAILABLE, "overloaded", "Overloaded", "Nothing was done. Try again later.")
            }
            Self::Bank(B::Journal(JournalError::Lost) | B::Interrupted) => (
                S::SERVICE_UNAVAILABLE,
                "outcome-unknown",
                "Outcome unknown",
                "It may have been done. Ask for the payment.",
            ),
            Self::Field(detail) => (S::UNPROCESSABLE_ENTITY, "invalid-field", "Invalid field", detail),
            Self::Json => (S::BAD_REQUEST, "malformed-json", "Malformed JSON", "The body is not a JSON document."),
            Self::NotJson => (
                S::UNSUPPORTED_MEDIA_TYPE,
                "unsupported-media-type",
                "Unsupported media type",
                "The body must be `application/json`.",
            ),
            Self::Key => (
                S::UNAUTHORIZED,
                "unauthenticated",
                "Unauthenticated",
                "This door is for merchants with the bank's API key.",
            ),
        }
    }
}
