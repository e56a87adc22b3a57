//! One call over HTTP, within limits of time and size. The bank and the ledger are both called through here.
//!
//! An answer that did not arrive whole is [`NoAnswer`]: what was asked for may or may not have happened.

use std::time::Duration;

use reqwest::header::RETRY_AFTER;
use reqwest::redirect::Policy;
use reqwest::{Client, RequestBuilder, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// More of an answer is not read.
const BODY_MAX: usize = 64 * 1024;

/// No more of a foreign word is kept or logged than this many characters.
const QUOTE_MAX: usize = 200;

/// A whole answer, whatever it says.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) retry_after: Option<Duration>,
    body: Vec<u8>,
}

/// The call has no known outcome. Holds why, for the log.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct NoAnswer(pub(crate) String);

/// What a problem document says.
#[derive(Default, Deserialize)]
pub(crate) struct Said {
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    detail: String,
}

/// A client whose calls end in time. It follows no redirect, for what we send is meant for one address, and uses no proxy
/// that an environment happens to name.
pub(crate) fn client(call_time: Duration) -> reqwest::Result<Client> {
    Client::builder().timeout(call_time).redirect(Policy::none()).no_proxy().build()
}

/// The call as part of the trace that it belongs to, if there is one.
pub(crate) fn traced(request: RequestBuilder, traceparent: Option<&str>) -> RequestBuilder {
    match traceparent {
        Some(traceparent) => request.header("traceparent", traceparent),
        None => request,
    }
}

pub(crate) async fn call(request: RequestBuilder) -> Result<Answer, NoAnswer> {
    let mut response = request.send().await?;
    let status = response.status();
    let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let mut body = Vec::new();
    while let Some(part) = response.chunk().await? {
        if BODY_MAX < body.len() + part.len() {
            return Err(NoAnswer(format!("{status} with a body of more than {BODY_MAX} bytes")));
        }
        body.extend_from_slice(&part);
    }
    Ok(Answer { status, retry_after: seconds.map(Duration::from_secs), body })
}

impl Answer {
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Result<T, NoAnswer> {
        serde_json::from_slice(&self.body)
            .map_err(|error| NoAnswer(format!("{} with a body that is none: {error}", self.status)))
    }

    /// The problem that it describes; an empty one if it describes none.
    pub(crate) fn said(&self) -> Said {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

impl Said {
    /// The problem's slug.
    pub(crate) fn code(&self) -> &str {
        self.kind.rsplit('/').next().unwrap_or_default()
    }

    pub(crate) fn quote(&self) -> String {
        format!("{}: {}", self.code(), self.detail)
            .chars()
            .filter(|letter| !letter.is_control())
            .take(QUOTE_MAX)
            .collect()
    }
}

impl From<reqwest::Error> for NoAnswer {
    fn from(error: reqwest::Error) -> Self {
        let kind = if error.is_timeout() { "no answer in time" } else { "no whole answer" };
        Self(format!("{kind}: {}", error.without_url())) // an address may hold a token
    }
}
