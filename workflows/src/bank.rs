//! The bank as we call it: register a payment, ask after it, cancel it. And its signature, as we check it.
//!
//! Registering is idempotent by token, cancelling is for good, and asking changes nothing. Left out: what
//! follows from the bank's word (`top_up.rs`).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::HeaderMap;
use hmac::{Hmac, Mac};
use ledger_core::{Currency, Money};
use reqwest::{Client, StatusCode};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use crate::Settings;
use crate::call::{NoAnswer, call, client, traced};

/// How far the bank's clock may be from ours.
const TOLERANCE_S: u64 = 300;

pub(crate) struct Bank {
    http: Client,
    url: String,
    api_key: String,
    callback_url: String,
}

/// What the bank says about a payment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It has the payment, and the payer has not decided.
    Pending,
    Decided {
        word: Word,
        reference: Option<String>,
    },
    /// It knows no such payment.
    NotKnown,
    /// It did not take the payment, or will not talk about it. Holds its reason.
    Refused(String),
    /// It speaks of other money than we asked for. Holds what it said.
    OtherMoney(String),
}

/// The bank's last word about a payment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    Success,
    Failure,
    Cancelled,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotTheBank {
    Signature,
    Timestamp,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Registration<'a> {
    token: &'a str,
    amount: String,
    currency: Currency,
    callback_url: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    return_url: Option<&'a str>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Payment {
    status: Status,
    amount: String,
    currency: String,
    bank_reference: Option<String>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Status {
    Pending,
    Success,
    Failure,
    Cancelled,
}

impl Bank {
    pub(crate) fn new(settings: &Settings) -> reqwest::Result<Self> {
        Ok(Self {
            http: client(settings.times.call_time)?,
            url: settings.bank_url.trim_end_matches('/').to_owned(),
            api_key: settings.bank_api_key.clone(),
            callback_url: settings.callback_url.clone(),
        })
    }

    /// Asks the bank to take a payment. The same again is the same payment.
    pub(crate) async fn register(
        &self,
        token: &str,
        money: Money,
        return_url: Option<&str>,
        traceparent: Option<&str>,
    ) -> Result<Standing, NoAnswer> {
        let registration = Registration {
            token,
            amount: money.amount().to_string(),
            currency: money.currency(),
            callback_url: &self.callback_url,
            return_url,
        };
        let request = self.http.post(format!("{}/bank/payments", self.url)).json(&registration);
        let answer = call(traced(request.bearer_auth(&self.api_key), traceparent)).await?;
        match answer.status {
            // One that was registered before may have been decided since.
            StatusCode::CREATED | StatusCode::OK => answer.read::<Payment>()?.standing(money),
            status if status.is_client_error() && definite(status) => {
                Ok(Standing::Refused(format!("{status}: {}", answer.said().quote())))
            }
            status => Err(NoAnswer(status.to_string())),
        }
    }

    pub(crate) async fn ask(&self, token: &str, money: Money, traceparent: Option<&str>) -> Result<Standing, NoAnswer> {
        let request = self.http.get(format!("{}/bank/payments/{token}", self.url));
        self.standing(traced(request, traceparent), money).await
    }

    /// After this the payer can no longer pay. A payment that is paid already stays so.
    pub(crate) async fn cancel(
        &self,
        token: &str,
        money: Money,
        traceparent: Option<&str>,
    ) -> Result<Standing, NoAnswer> {
        let request = self.http.post(format!("{}/bank/payments/{token}/cancel", self.url));
        self.standing(traced(request, traceparent), money).await
    }

    async fn standing(&self, request: reqwest::RequestBuilder, money: Money) -> Result<Standing, NoAnswer> {
        let answer = call(request.bearer_auth(&self.api_key)).await?;
        match answer.status {
            StatusCode::OK => answer.read::<Payment>()?.standing(money),
            StatusCode::NOT_FOUND if answer.said().code() == "payment-not-found" => Ok(Standing::NotKnown),
            status if status.is_client_error() && definite(status) => {
                Ok(Standing::Refused(format!("{status}: {}", answer.said().quote())))
            }
            status => Err(NoAnswer(status.to_string())),
        }
    }
}

/// A status that asks us to come back says nothing about the payment. Nor does a 404 in other words than the bank's:
/// whatever stands before a bank that is away says 404 too.
fn definite(status: StatusCode) -> bool {
    !matches!(
        status,
        StatusCode::NOT_FOUND | StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS
    )
}

impl Payment {
    fn standing(self, money: Money) -> Result<Standing, NoAnswer> {
        let said = self.currency.parse().ok().and_then(|currency| Money::parse(&self.amount, currency).ok());
        if said != Some(money) {
            let said: String = format!("{} {}", self.amount, self.currency).chars().take(64).collect();
            return Ok(Standing::OtherMoney(said));
        }
        let word = match self.status {
            Status::Pending => return Ok(Standing::Pending),
            Status::Success if self.bank_reference.is_none() => {
                return Err(NoAnswer("a success without the bank's reference".to_owned()));
            }
            Status::Success => Word::Success,
            Status::Failure => Word::Failure,
            Status::Cancelled => Word::Cancelled,
        };
        Ok(Standing::Decided { word, reference: self.bank_reference })
    }
}

impl Word {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failure => "failure",
            Self::Cancelled => "cancelled",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::Success, Self::Failure, Self::Cancelled].into_iter().find(|word| word.name() == name)
    }
}

/// The bank's clock, if the callback's time is near ours. Looks at nothing but the header: it comes before all work.
pub(crate) fn signed_at(headers: &HeaderMap) -> Result<u64, NotTheBank> {
    let at = single(headers, "x-bank-timestamp").filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    let at: u64 = at.and_then(|text| text.parse().ok()).ok_or(NotTheBank::Signature)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    if now.abs_diff(at) <= TOLERANCE_S { Ok(at) } else { Err(NotTheBank::Timestamp) }
}

/// Whether the bank signed these bytes at this time. Compares in constant time.
pub(crate) fn verify(headers: &HeaderMap, secret: &str, signed_at: u64, body: &[u8]) -> Result<(), NotTheBank> {
    let signature = single(headers, "x-bank-signature").and_then(|text| from_hex(text.strip_prefix("sha256=")?));
    let signature = signature.ok_or(NotTheBank::Signature)?;
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("HMAC takes a key of any length");
    mac.update(format!("{signed_at}.").as_bytes());
    mac.update(body);
    mac.verify_slice(&signature).map_err(|_| NotTheBank::Signature)
}

/// The header's value when it is there exactly once.
fn single<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(value)
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks_exact(2);
    if !pairs.remainder().is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    {
        return None;
    }
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn money(text: &str) -> Money {
        Money::parse(text, "EUR".parse().unwrap()).unwrap()
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn a_signature_holds_for_its_bytes_its_time_and_its_secret_only() {
        // echo -n '1732132800.{}' | openssl dgst -sha256 -hmac secret
        let signed =
            headers(&[("x-bank-signature", "sha256=557375ddf6d305378b9454172abe80b52dd0978f4e47da0a958a57f009d37cdb")]);
        assert_eq!(verify(&signed, "secret", 1_732_132_800, b"{}"), Ok(()));
        for (secret, at, body) in
            [("other", 1_732_132_800, &b"{}"[..]), ("secret", 1_732_132_801, b"{}"), ("secret", 1_732_132_800, b"{} ")]
        {
            assert_eq!(verify(&signed, secret, at, body), Err(NotTheBank::Signature));
        }
        for wrong in ["", "sha256=", "sha256=zz", "9e12", "sha1=9e12"] {
            let headers = headers(&[("x-bank-signature", wrong)]);
            assert_eq!(verify(&headers, "secret", 1_732_132_800, b"{}"), Err(NotTheBank::Signature), "{wrong}");
        }
        assert_eq!(verify(&HeaderMap::new(), "secret", 1_732_132_800, b"{}"), Err(NotTheBank::Signature));
    }

    #[test]
    fn a_time_too_far_from_ours_is_out_of_tolerance_on_either_side() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let check = |text: &str| signed_at(&headers(&[("x-bank-timestamp", text)]));
        assert_eq!(check(&(now - 290).to_string()), Ok(now - 290));
        assert_eq!(check(&(now + 290).to_string()), Ok(now + 290));
        assert_eq!(check(&(now - 310).to_string()), Err(NotTheBank::Timestamp));
        assert_eq!(check(&(now + 310).to_string()), Err(NotTheBank::Timestamp));
        for wrong in ["", "+1", "-1", "yesterday", "99999999999999999999999"] {
            assert_eq!(check(wrong), Err(NotTheBank::Signature), "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_404_that_is_not_the_banks_own_is_no_answer() {
        let _ = rustls::crypto::ring::default_provider().install_default(); // an error says that there is one already
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let proxy = axum::Router::new().fallback(|| async { (axum::http::StatusCode::NOT_FOUND, "no such backend") });
        tokio::spawn(async { axum::serve(listener, proxy).await });
        let http = client(Duration::from_secs(10)).unwrap();
        let bank = Bank { http, url, api_key: "key".to_owned(), callback_url: "http://us/".to_owned() };
        let money = money("10.50");
        let answers = [
            bank.register("token", money, None, None).await,
            bank.ask("token", money, None).await,
            bank.cancel("token", money, None).await,
        ];
        for answer in answers {
            assert!(answer.is_err(), "taken for the bank's word: {answer:?}");
        }
    }

    #[test]
    fn a_word_counts_only_for_the_money_that_was_asked_for() {
        let said = |status, amount: &str, reference: Option<&str>| {
            let (amount, currency) = (amount.to_owned(), "EUR".to_owned());
            Payment { status, amount, currency, bank_reference: reference.map(str::to_owned) }.standing(money("10.50"))
        };
        assert_eq!(said(Status::Pending, "10.5", None).unwrap(), Standing::Pending);
        let paid = Standing::Decided { word: Word::Success, reference: Some("B1".to_owned()) };
        assert_eq!(said(Status::Success, "10.50", Some("B1")).unwrap(), paid);
        assert_eq!(said(Status::Success, "10.51", Some("B1")).unwrap(), Standing::OtherMoney("10.51 EUR".to_owned()));
        assert!(said(Status::Success, "10.50", None).is_err(), "a success without a reference is no word");
    }
}
