//! The way back into the ledger: commands over HTTP, like anyone's, as a client of our own.
//!
//! Whoever issues a command says under which key. An answer that did not come, or that says "not now", is
//! [`Reply::Unknown`], and the same command must be issued again under the same key; nothing here repeats it.

use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::Settings;
use crate::call::{NoAnswer, call, client, traced};

/// A token is not used in the last tenth of its life, nor in its last minute.
const RENEW_BEFORE: Duration = Duration::from_secs(60);

pub(crate) struct Commands {
    http: Client,
    url: String,
    client_id: String,
    client_secret: String,
    token: Mutex<Option<Token>>, // held while one is fetched: all who wait then share it
}

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// It is in the log.
    Done,
    /// The ledger has refused it, and will say the same under this key for ever.
    Refused { code: String, detail: String },
    /// It may have happened, or was not tried. Holds why, and how long to wait at least.
    Unknown { why: String, wait: Duration },
}

#[derive(Clone)]
struct Token {
    access: String,
    renew_at: Instant,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Credentials<'a> {
    client_id: &'a str,
    client_secret: &'a str,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TokenAnswer {
    access_token: String,
    expires_in: u64,
}

impl Commands {
    pub(crate) fn new(settings: &Settings) -> reqwest::Result<Self> {
        Ok(Self {
            http: client(settings.times.call_time)?,
            url: settings.command_url.trim_end_matches('/').to_owned(),
            client_id: settings.client_id.clone(),
            client_secret: settings.client_secret.clone(),
            token: Mutex::new(None),
        })
    }

    /// Issues a command once; a token that is no longer good is renewed first.
    pub(crate) async fn issue(&self, path: &str, key: &str, traceparent: Option<&str>, body: &impl Serialize) -> Reply {
        match self.try_issue(path, key, traceparent, body).await {
            Ok(reply) => reply,
            Err(NoAnswer(why)) => Reply::Unknown { why, wait: Duration::ZERO },
        }
    }

    async fn try_issue(
        &self,
        path: &str,
        key: &str,
        traceparent: Option<&str>,
        body: &impl Serialize,
    ) -> Result<Reply, NoAnswer> {
        let mut refused = None;
        loop {
            let token = self.token(refused.as_deref()).await?;
            let mut request = self.http.post(format!("{}{path}", self.url)).bearer_auth(&token).json(body);
            request = request.header("idempotency-key", key);
            let answer = call(traced(request, traceparent)).await?;
            if answer.status == StatusCode::UNAUTHORIZED && refused.is_none() {
                refused = Some(token);
                continue;
            }
            let said = answer.said();
            let wait = answer.retry_after.unwrap_or(Duration::ZERO);
            return Ok(match (answer.status, said.code()) {
                (status, _) if status.is_success() => Reply::Done,
                // These answers are stored for the key, the exceptions aside: no route of that name, or the first call still under way.
                (StatusCode::NOT_FOUND | StatusCode::CONFLICT | StatusCode::UNPROCESSABLE_ENTITY, code)
                    if !matches!(code, "" | "not-found" | "idempotency-in-flight") =>
                {
                    Reply::Refused { code: code.to_owned(), detail: said.quote() }
                }
                (status, _) => Reply::Unknown { why: format!("{status}: {}", said.quote()), wait },
            });
        }
    }

    /// A token that is good as far as we know, and is not the one that was just refused.
    async fn token(&self, refused: Option<&str>) -> Result<String, NoAnswer> {
        let mut held = self.token.lock().await;
        if let Some(token) = held.as_ref()
            && Instant::now() < token.renew_at
            && refused != Some(token.access.as_str())
        {
            return Ok(token.access.clone());
        }
        *held = None;
        let credentials = Credentials { client_id: &self.client_id, client_secret: &self.client_secret };
        let answer = call(self.http.post(format!("{}/v1/auth/token", self.url)).json(&credentials)).await?;
        if answer.status != StatusCode::OK {
            return Err(NoAnswer(format!("no token: {}: {}", answer.status, answer.said().quote())));
        }
        let given: TokenAnswer = answer.read()?;
        let life = Duration::from_secs(given.expires_in);
        let renew_at = Instant::now() + life.saturating_sub(RENEW_BEFORE.max(life / 10));
        *held = Some(Token { access: given.access_token.clone(), renew_at });
        Ok(given.access_token)
    }
}
