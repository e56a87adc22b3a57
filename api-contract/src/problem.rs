//! Problems (RFC 9457): one table of everything that can be answered instead of what was asked for.
//!
//! A problem is made from its slug and told what it is about; `layer` adds where it happened. What clients
//! wrote is repeated in pointers only, at most [`ECHO_MAX`] characters of it. Faults of ours are logged in
//! full here, once, and answered bare.

use std::fmt;

use axum::Router;
use axum::extract::Path;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use ledger_core::Refusal;

/// No more of a client's input than this is repeated to it.
pub(crate) const ECHO_MAX: usize = 64;

const CONTENT_TYPE: HeaderValue = HeaderValue::from_static("application/problem+json");

/// An answer that is not what was asked for, and why.
#[derive(Clone)]
pub struct Problem(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: &'static Kind,
    /// Where it is not the table's.
    status: Option<StatusCode>,
    detail: Option<String>,
    errors: Vec<At>,
    members: Map<String, Value>,
    retry_after: Option<u32>,
    request_id: Option<String>,
    instance: Option<String>,
}

#[derive(Clone, Serialize)]
struct At {
    pointer: String,
    detail: String,
}

/// A row of the table below.
struct Kind {
    status: u16,
    slug: &'static str,
    title: &'static str,
    meaning: &'static str,
    remedy: &'static str,
}

impl Problem {
    /// The problem with this slug of the table.
    ///
    /// # Panics
    /// When the table has no such slug: slugs are written in code, never read from outside.
    pub fn of(slug: &'static str) -> Self {
        Self::new(kind(slug).unwrap_or_else(|| panic!("problem.rs has no row for {slug}")))
    }

    /// The problem that a failure of history names; `refused` for a word that is a provider's and not ours.
    pub fn from_code(code: &str) -> Self {
        Self::new(kind(code).unwrap_or_else(|| kind("refused").expect("the table has it")))
    }

    /// A fault of ours or of what we stand on: logged here in full, answered bare.
    pub fn storage(error: &(dyn std::error::Error + 'static)) -> Self {
        tracing::error!(error = %chain(error), "the storage failed a request");
        Self::of("storage-unavailable")
    }

    /// A fault of ours that no repetition will cure: logged here in full, answered bare.
    pub fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        tracing::error!(error = %chain(error), "a request met a fault of ours");
        Self::of("internal-error")
    }

    /// What is wrong this time, in a sentence of ours.
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.0.detail = Some(detail.into());
        self
    }

    /// Where in the body it is wrong: a JSON pointer, or `/name` for a query parameter.
    pub fn at(mut self, pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        self.0.detail.get_or_insert_with(|| detail.clone());
        self.0.errors.push(At { pointer: pointer.into(), detail });
        self
    }

    /// The same problem inside a larger body: every pointer is put below `prefix`, which alone is the pointer if there was none.
    pub fn below(mut self, prefix: &str) -> Self {
        if self.0.errors.is_empty() {
            let detail = self.0.detail.clone().unwrap_or_else(|| self.0.kind.title.to_owned());
            return self.at(prefix, detail);
        }
        for error in &mut self.0.errors {
            error.pointer.insert_str(0, prefix);
        }
        self
    }

    /// A member of its own, such as `transactionId`.
    pub fn member(mut self, name: &str, value: impl Serialize) -> Self {
        let value = serde_json::to_value(value).expect("members are ids, numbers and texts");
        self.0.members.insert(name.to_owned(), value);
        self
    }

    /// Another status than the table's, for what is a part of a larger request: a wallet that a batch names and that does
    /// not exist does not make the batch's own path not found.
    pub fn with_status(mut self, status: StatusCode) -> Self {
        self.0.status = Some(status);
        self
    }

    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.0.retry_after = Some(seconds);
        self
    }

    /// The request that the answer is about, when that is not the present one: a replay repeats the first one's.
    pub fn request_id(mut self, id: &str) -> Self {
        self.0.request_id = Some(id.to_owned());
        self
    }

    pub fn status(&self) -> StatusCode {
        let of_kind = || StatusCode::from_u16(self.0.kind.status).expect("the table's statuses are statuses");
        self.0.status.unwrap_or_else(of_kind)
    }

    pub fn slug(&self) -> &'static str {
        self.0.kind.slug
    }

    /// The document as it stands in a larger answer, such as an item of a batch.
    pub fn document(&self) -> Value {
        let mut fields = Map::new();
        fields.insert("type".into(), format!("/problems/{}", self.0.kind.slug).into());
        fields.insert("title".into(), self.0.kind.title.into());
        fields.insert("status".into(), self.status().as_u16().into());
        fields.insert("detail".into(), self.0.detail.as_deref().unwrap_or(self.0.kind.meaning).into());
        if let Some(instance) = &self.0.instance {
            fields.insert("instance".into(), instance.as_str().into());
        }
        if let Some(id) = &self.0.request_id {
            fields.insert("requestId".into(), id.as_str().into());
        }
        fields.extend(self.0.members.clone());
        if !self.0.errors.is_empty() {
            let errors = serde_json::to_value(&self.0.errors).expect("two texts each");
            fields.insert("errors".into(), errors);
        }
        Value::Object(fields)
    }

    /// Fills in where it happened. A request id that was set already stays.
    pub(crate) fn happened(mut self, instance: String, request_id: &str) -> Self {
        self.0.instance = Some(instance);
        self.0.request_id.get_or_insert_with(|| request_id.to_owned());
        self
    }

    fn new(kind: &'static Kind) -> Self {
        Self(Box::new(Inner {
            kind,
            status: None,
            detail: None,
            errors: Vec::new(),
            members: Map::new(),
            retry_after: None,
            request_id: None,
            instance: None,
        }))
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = (self.status(), self.document().to_string()).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, CONTENT_TYPE);
        let again = match self.0.kind.slug {
            "idempotency-in-flight" => Some(1),
            _ if matches!(self.0.kind.status, 429 | 503) => Some(1),
            _ => None,
        };
        if let Some(seconds) = self.0.retry_after.or(again) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.0.kind.status == 401 {
            let invalid = self.0.kind.slug.starts_with("token-");
            let challenge = if invalid { "Bearer error=\"invalid_token\"" } else { "Bearer" };
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        if self.0.kind.status == 413 {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close")); // the rest of the body is not read
        }
        response.extensions_mut().insert(self); // for `layer`, which knows where it happened
        response
    }
}

impl From<&Refusal> for Problem {
    fn from(refusal: &Refusal) -> Self {
        Self::from_code(refusal.code()).detail(refusal.to_string())
    }
}

impl From<sqlx::Error> for Problem {
    fn from(error: sqlx::Error) -> Self {
        Self::storage(&error)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.kind.slug, self.0.detail.as_deref().unwrap_or(self.0.kind.meaning))
    }
}

impl fmt::Debug for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.document())
    }
}

impl std::error::Error for Problem {}

/// `GET /problems/{slug}`: what a problem means and what to do, for people.
pub fn problem_pages() -> Router {
    async fn page(Path(slug): Path<String>) -> Response {
        let Some(kind) = kind(&slug) else { return Problem::of("not-found").into_response() };
        let policy = format!(
            "default-src 'none'; style-src 'sha256-{}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            STANDARD.encode(Sha256::digest(STYLE))
        );
        let headers = [
            (header::CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
            (header::CONTENT_SECURITY_POLICY, policy),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
            (header::REFERRER_POLICY, "no-referrer".to_owned()),
            (header::CACHE_CONTROL, "public, max-age=3600".to_owned()),
        ];
        (headers, kind.page()).into_response()
    }
    Router::new().route("/problems/{slug}", get(page))
}

const STYLE: &str = "body{max-width:40rem;margin:3rem auto;padding:0 1rem;font:1.1rem/1.6 system-ui,sans-serif;color:#1b1b1b;background:#fff}\
code{background:#eee;padding:0 .25em}h1{line-height:1.2}@media(prefers-color-scheme:dark){body{color:#eee;background:#161616}code{background:#333}}";

impl Kind {
    fn page(&self) -> String {
        let status = StatusCode::from_u16(self.status).expect("the table's statuses are statuses");
        let [title, slug, meaning, remedy] = [self.title, self.slug, self.meaning, self.remedy].map(escape);
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
             <title>{title} · Daybook</title><style>{STYLE}</style></head>\n<body><main>\n<h1>{title}</h1>\n\
             <p>HTTP status {status}, type <code>/problems/{slug}</code></p>\n<h2>What it means</h2>\n<p>{meaning}</p>\n\
             <h2>What to do</h2>\n<p>{remedy}</p>\n</main></body></html>\n"
        )
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").replace('\'', "&#39;")
}

/// The error and everything beneath it, for our own log.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

fn kind(slug: &str) -> Option<&'static Kind> {
    TABLE.iter().find(|kind| kind.slug == slug)
}

/// The slug of the table that equals this text.
pub(crate) fn known_slug(text: &str) -> Option<&'static str> {
    kind(text).map(|kind| kind.slug)
}

macro_rules! table {
    ($($status:literal { $($slug:literal, $title:literal: $meaning:literal $remedy:literal)* })*) => {
        &[$($(Kind { status: $status, slug: $slug, title: $title, meaning: $meaning, remedy: $remedy },)*)*]
    };
}

/// Every problem: slug, title, what it means, what to do. A slug that is written here never changes.
#[rustfmt::skip]
static TABLE: &[Kind] = table! {
    400 {
        "malformed-request", "Malformed request":
            "What arrived is not a well-formed HTTP request."
            "Send the request with an ordinary HTTP/1.1 client."
        "malformed-json", "Malformed JSON":
            "The body is not one JSON text in UTF-8: it is empty, cut off, followed by something else, nested too deep, or not JSON at all."
            "Serialize the body with a JSON library. NaN, Infinity, a byte order mark and unpaired surrogates are not JSON."
        "duplicate-field", "Duplicate field":
            "An object in the body has the same key twice, so it could be read in two ways."
            "Send each key once."
        "invalid-id", "Invalid id":
            "An id is not of its kind's form: its prefix, then a UUID in lower case with hyphens, such as wal_0192f0c1-2d3e-7abc-8def-0123456789ab."
            "Send the id exactly as an answer of ours gave it."
        "cursor-invalid", "Invalid cursor":
            "The cursor was not given out for this list with these filters and this caller, or it was changed."
            "Use nextCursor of the page before, with the same filters; or start again without a cursor."
        "idempotency-key-missing", "Idempotency key missing":
            "This call can move money, so it must carry an Idempotency-Key: without one, repeating it after a lost answer would move the money twice."
            "Send a new random key, such as a UUID, for each new intention, and the same key whenever you repeat it."
        "idempotency-key-invalid", "Invalid idempotency key":
            "The Idempotency-Key is empty, longer than 255 characters, has other characters than visible ASCII, or was sent twice."
            "Send one header with 1 to 255 visible ASCII characters."
    }
    401 {
        "unauthenticated", "Not authenticated":
            "The request carries no bearer token."
            "Get an access token at POST /v1/auth/token and send it as Authorization: Bearer <accessToken>."
        "token-invalid", "Invalid token":
            "The token was not issued by this server, or was changed."
            "Get a new access token at POST /v1/auth/token."
        "token-expired", "Token expired":
            "The token was good, and its time is over."
            "Get a new pair at POST /v1/auth/refresh, or at POST /v1/auth/token."
        "token-revoked", "Token revoked":
            "The token was withdrawn: its client logged out, was disabled, or a refresh token of its family was used twice."
            "Get a new access token at POST /v1/auth/token. If you did not log out, somebody else may hold your refresh token."
        "invalid-client", "Invalid client":
            "There is no client with this id and secret."
            "Check both. A lost secret cannot be shown again; an administrator can give the client a new one."
        "signature-invalid", "Invalid signature":
            "The signature does not belong to this body and timestamp."
            "Sign the timestamp, a full stop and the raw body with the shared secret: HMAC-SHA256, in lower-case hex."
        "timestamp-out-of-tolerance", "Timestamp out of tolerance":
            "The signed timestamp is more than 300 seconds away from this server's clock."
            "Sign at the moment of sending, and keep the clock right."
    }
    403 {
        "insufficient-scope", "Insufficient scope":
            "The token is good, but its scopes do not allow this call."
            "Use a client that has the scope. Partners' clients never have administrative scopes."
        "wallet-not-owned", "Wallet of another user":
            "X-User-ID names an end user, and the paying wallet belongs to another one."
            "Spend from a wallet of that user, or leave X-User-ID out where the partner itself acts."
        "partner-suspended", "Partner suspended":
            "The partner is suspended: it gets no tokens, and nothing that it asks for is done. What was pending still ends."
            "Talk to the operator of this ledger."
    }
    404 {
        "not-found", "Not found":
            "There is nothing here, or nothing that you may know of."
            "Check the path against /docs."
        "wallet-not-found", "Wallet not found":
            "No wallet with this id is visible to you."
            "Check the id, and that the wallet is of your own partner."
        "transaction-not-found", "Transaction not found":
            "No transaction with this id is visible to you."
            "Check the id, and that the transaction is of your own partner."
        "partner-not-found", "Partner not found":
            "No partner with this id is visible to you."
            "Check the id, and that the client belongs to a registered partner."
        "hold-not-found", "Hold not found":
            "No hold with this id is visible to you."
            "Check the id."
        "webhook-not-found", "Webhook not found":
            "No webhook endpoint with this id is visible to you."
            "Check the id; a deleted endpoint is gone."
        "delivery-not-found", "Delivery not found":
            "No delivery with this id is visible to you."
            "Check the id."
        "payment-not-found", "Payment not found":
            "No payment with this token is known."
            "Check the token."
    }
    405 {
        "method-not-allowed", "Method not allowed":
            "The path exists, the method does not."
            "The Allow header lists the methods of this path."
    }
    406 {
        "not-acceptable", "Not acceptable":
            "The Accept header excludes everything that this path can answer."
            "Accept application/json, or leave the header out."
    }
    408 {
        "request-timeout", "Request timeout":
            "The request did not arrive in time."
            "Send it again, faster."
    }
    409 {
        "idempotency-in-flight", "First request still in flight":
            "A request with the same Idempotency-Key is being executed at this moment."
            "Repeat it with the same key after the time that Retry-After names."
        "wallet-frozen", "Wallet frozen":
            "The wallet is frozen: nothing goes out, nothing comes in."
            "Unfreeze it first, or use another wallet."
        "wallet-closed", "Wallet closed":
            "The wallet is closed, for good."
            "Use another wallet."
        "wallet-not-empty", "Wallet not empty":
            "The wallet holds money, has an open hold, or money is still expected in it."
            "Move the balance away and let what is pending end; then close the wallet."
        "hold-closed", "Hold ended":
            "The hold was captured, released or has expired."
            "Make a new hold."
        "already-refunded", "Already refunded":
            "Refunds of this transaction have reached its amount."
            "Nothing is left to refund."
        "invalid-transition", "Invalid transition":
            "What was asked for cannot follow the present state."
            "Read the resource again: it has moved on."
        "callback-conflict", "Conflicting callback":
            "The payment was reported already, with another outcome. The first report stands."
            "Reconcile: both sides must find out which report is right."
    }
    413 {
        "payload-too-large", "Payload too large":
            "The body is larger than this path takes: 64 KiB, and 1 MiB for batches."
            "Send less at once."
    }
    414 {
        "uri-too-long", "URI too long":
            "Path and query together are too long."
            "Shorten the query."
    }
    415 {
        "unsupported-media-type", "Unsupported media type":
            "The body must be application/json in UTF-8."
            "Send Content-Type: application/json."
        "unsupported-encoding", "Unsupported encoding":
            "Bodies are read as they are: compressed ones are not taken."
            "Send the body without a Content-Encoding."
    }
    422 {
        "unknown-field", "Unknown field":
            "The body or the query has a name that is not known here. It is refused, for it may be a misspelt one that matters."
            "Check the name against /docs, upper and lower case included."
        "invalid-field", "Invalid field":
            "A field is missing, null, of the wrong type, or outside of what it may hold."
            "errors[] points to it."
        "invalid-character", "Invalid character":
            "A text has characters that must not appear in it: control characters, overrides of the writing direction, or code points that are no characters."
            "Send plain text. Descriptions and metadata values may have line breaks and tabs."
        "metadata-too-large", "Metadata too large":
            "Metadata may be nested 5 deep and have 50 keys in all, keys of 64 bytes and texts of 512 bytes."
            "Keep large things elsewhere, and their reference in the metadata."
        "amount-format", "Not an amount":
            "An amount is a decimal string in major units, such as \"10.50\": digits, and at most one point with digits on both sides. JSON numbers are refused, for many programs read them as floats."
            "Send a string, without signs, spaces, exponents, separators of thousands or leading zeros."
        "amount-not-positive", "Amount not positive":
            "The amount is zero or less."
            "Send an amount above zero. Where money flows is said by other fields, not by a sign."
        "amount-precision", "Too many decimal places":
            "The amount has more decimal places than its currency. It is not rounded."
            "Send at most the currency's minor digits: two for EUR, none for JPY, three for KWD."
        "amount-out-of-range", "Amount out of range":
            "The amount has more than 18 digits."
            "Send a smaller amount."
        "balance-limit-exceeded", "Balance limit exceeded":
            "The wallet would hold more than a wallet can."
            "Use another wallet."
        "currency-unknown", "Unknown currency":
            "The currency is not an ISO 4217 code of money in upper case."
            "Send a code such as EUR."
        "currency-mismatch", "Currency mismatch":
            "The amount's currency is not the wallet's."
            "Send the wallet's currency. Nothing is converted here."
        "currency-not-enabled", "Currency not enabled":
            "The partner is not enabled for this currency."
            "Use a currency that the partner was registered with."
        "same-wallet", "Same wallet":
            "Money cannot move from a wallet to itself."
            "Name two different wallets."
        "unbalanced", "Unbalanced":
            "The entries do not sum to zero."
            "Make debits and credits equal, in each currency."
        "too-many-items", "Too many items":
            "The list has more items than one request may carry."
            "Send several requests."
        "insufficient-funds", "Insufficient funds":
            "What the wallet has available does not cover the amount."
            "Fund the wallet, or ask for less."
        "hold-exceeded", "Hold exceeded":
            "The amount is more than what is held."
            "Capture at most what is held."
        "idempotency-key-reused", "Idempotency key reused":
            "The key was used before, by the same client, for another request: another method, path, user or body."
            "Use a new key for a new intention. A key is kept for ever."
        "limit-out-of-range", "Limit out of range":
            "The limit is not a whole number from 1 to 100."
            "Send a limit in that range and follow nextCursor."
        "time-format", "Not a time":
            "A time is written in RFC 3339, such as 2026-11-20T10:00:00Z."
            "Send date, time and offset."
        "time-range-invalid", "Invalid time":
            "The time lies where it may not: in the future, or an end before its beginning."
            "Send a time that has passed, and ranges in order."
        "range-too-wide", "Range too wide":
            "The range asks for more than one request may read."
            "Ask for a narrower range."
        "position-unknown", "Unknown position":
            "There is no such position in the log: it is not a whole number from 0, or it is beyond the head."
            "Use a Ledger-Position that an answer of this server carried."
        "webhook-url-forbidden", "Webhook URL forbidden":
            "Webhooks go to public https addresses only."
            "Register an https URL with a public host, without user and password."
        "callback-mismatch", "Callback mismatch":
            "What was reported is not the amount and currency that was asked for. Nothing was posted."
            "Reconcile: both sides must find out what was paid."
        "refused", "Refused":
            "The request was understood and refused."
            "detail says why."
    }
    429 {
        "rate-limited", "Rate limited":
            "More requests were sent than are allowed. This one was not executed."
            "Wait for as long as Retry-After says."
    }
    431 {
        "headers-too-large", "Headers too large":
            "The request has too many headers, or too large ones."
            "Send fewer and smaller headers."
    }
    500 {
        "internal-error", "Internal error":
            "This is a fault of the server. Whether anything was executed is not said by this answer."
            "Repeat the request with the same Idempotency-Key, and tell the operator the requestId if it persists."
    }
    503 {
        "overloaded", "Overloaded":
            "The server has more work than it takes on. The request was not executed."
            "Repeat it after the time that Retry-After names."
        "outcome-unknown", "Outcome unknown":
            "The request may have been executed: the storage stayed away before it could be known."
            "Repeat it with the same Idempotency-Key until there is a definite answer. It will be executed once."
        "projection-behind", "View behind":
            "The view has not reached the position that was asked for in time."
            "Repeat the request; the view is catching up."
        "storage-unavailable", "Storage unavailable":
            "The storage cannot be reached at the moment. Nothing was executed."
            "Repeat the request after the time that Retry-After names."
        "query-timeout", "Query timeout":
            "The query took longer than it may."
            "Ask for a narrower range."
    }
};

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_slug_stands_once_and_says_what_it_means_in_sentences() {
        let slugs: HashSet<_> = TABLE.iter().map(|kind| kind.slug).collect();
        assert_eq!(slugs.len(), TABLE.len());
        for kind in TABLE {
            assert!(StatusCode::from_u16(kind.status).is_ok_and(|status| !status.is_success()), "{}", kind.slug);
            assert!(kind.meaning.ends_with('.') && kind.remedy.ends_with('.'), "{}", kind.slug);
        }
    }

    #[test]
    fn every_refusal_of_the_ledger_has_its_problem() {
        let eur = "EUR".parse().unwrap();
        let amount: ledger_core::Amount = "1.00".parse().unwrap();
        let balance = ledger_core::Balance::zero(eur);
        for (refusal, status) in [
            (Refusal::WalletNotFound, 404),
            (Refusal::TransactionNotFound, 404),
            (Refusal::PartnerNotFound, 404),
            (Refusal::PartnerSuspended, 403),
            (Refusal::PartnerIsSuspended, 409),
            (Refusal::PartnerNotSuspended, 409),
            (Refusal::WalletNotOwned, 403),
            (Refusal::WalletFrozen, 409),
            (Refusal::WalletClosed, 409),
            (Refusal::WalletNotEmpty { balance }, 409),
            (Refusal::MoneyExpected, 409),
            (Refusal::WalletNotFrozen, 409),
            (Refusal::TransactionEnded { status: ledger_core::TransactionStatus::Success }, 409),
            (Refusal::InsufficientFunds { available: balance, requested: amount }, 422),
            (Refusal::CurrencyMismatch { wallet: eur, requested: eur }, 422),
            (Refusal::CurrencyNotEnabled { currency: eur }, 422),
            (Refusal::SameWallet, 422),
            (Refusal::BalanceLimitExceeded, 422),
            (
                Refusal::SettlementMismatch {
                    expected: amount,
                    currency: eur,
                    reported: amount,
                    reported_currency: eur,
                },
                422,
            ),
        ] {
            let problem = Problem::from(&refusal);
            assert_eq!((problem.slug(), problem.status().as_u16()), (refusal.code(), status));
        }
        assert_eq!(Problem::from_code("card_declined").slug(), "refused", "a provider's word");
    }

    #[test]
    fn an_item_of_a_batch_is_pointed_at() {
        let pointers = |problem: Problem| problem.below("/transactions/1").document()["errors"].clone();
        assert_eq!(pointers(Problem::of("same-wallet"))[0]["pointer"], "/transactions/1");
        assert_eq!(pointers(Problem::of("amount-format").at("/amount", "no"))[0]["pointer"], "/transactions/1/amount");
    }

    #[test]
    fn a_fault_of_ours_is_answered_without_a_word_about_it() {
        let problem = Problem::from(sqlx::Error::Protocol("relation \"access.clients\" does not exist".to_owned()));
        assert_eq!(problem.slug(), "storage-unavailable");
        assert!(!problem.document().to_string().contains("access.clients"));
    }
}
