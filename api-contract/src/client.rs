//! The caller: who holds the token, what it may do, and for whom it speaks.

use std::sync::Arc;

use axum::extract::{FromRef, FromRequestParts};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, header};
use runtime::request_id::{RequestId, Traceparent};
use serde::Serialize;
use uuid::Uuid;

use ledger_core::{Caller, ClientId, PartnerId};

use crate::token::Verified;
use crate::{Access, Problem, Scope, Scopes, UserId};

const USER_ID: HeaderName = HeaderName::from_static("x-user-id");

/// An authenticated client: an extractor for every state from which [`Access`] can be had.
#[derive(Clone, Debug)]
pub struct Client {
    pub id: ClientId,
    pub partner: Option<PartnerId>,
    pub scopes: Scopes,
    /// `X-User-ID`: the partner's end user on whose behalf the call is made.
    pub user: Option<Arc<str>>,
    pub request_id: String,
    pub traceparent: Option<String>,
    /// The tokens that come from one login, and end together.
    pub(crate) family: Uuid,
}

impl Client {
    pub fn require(&self, scope: Scope) -> Result<(), Problem> {
        if self.scopes.allow(scope) {
            Ok(())
        } else {
            Err(Problem::of("insufficient-scope").detail(format!("this call needs the scope {}", scope.name())))
        }
    }

    pub fn is_admin(&self) -> bool {
        self.scopes.allow(Scope::Admin)
    }

    /// The partner whose client this is; a client of the operator's has none.
    pub fn partner(&self) -> Result<PartnerId, Problem> {
        self.partner.ok_or_else(|| Problem::of("insufficient-scope").detail("this call is for partners' clients"))
    }

    /// On whose behalf the ledger is asked.
    pub fn caller(&self) -> Caller {
        if self.is_admin() {
            return Caller::Admin;
        }
        match self.partner {
            Some(partner) => Caller::Partner { partner, user: self.user.clone() },
            None if self.scopes.allow(Scope::Workflow) => Caller::Workflow,
            // Nobody's client sees nothing: no partner has the nil id.
            None => Caller::Partner { partner: PartnerId::from_uuid(Uuid::nil()), user: None },
        }
    }

    /// What the events of this call say about it: a flat JSON object of strings.
    pub fn metadata(&self) -> Arc<str> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct About<'c> {
            client_id: ClientId,
            request_id: &'c str,
            #[serde(skip_serializing_if = "Option::is_none")]
            traceparent: Option<&'c str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            user_id: Option<&'c str>,
        }
        let about = About {
            client_id: self.id,
            request_id: &self.request_id,
            traceparent: self.traceparent.as_deref(),
            user_id: self.user.as_deref(),
        };
        serde_json::to_string(&about).expect("four texts").into()
    }

    fn new(verified: &Verified, user: Option<Arc<str>>, request_id: String, traceparent: Option<String>) -> Self {
        let Verified { client: id, partner, scopes, family, .. } = *verified;
        Self { id, partner, scopes, user, request_id, traceparent, family }
    }
}

impl<S> FromRequestParts<S> for Client
where
    S: Send + Sync,
    Access: FromRef<S>,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let access = Access::from_ref(state);
        let verified = access.verify(bearer(&parts.headers)?).await?;
        let user = user(&parts.headers)?;
        let Ok(request_id) = RequestId::from_request_parts(parts, state).await;
        let Ok(Traceparent(traceparent)) = Traceparent::from_request_parts(parts, state).await;
        Ok(Self::new(&verified, user, request_id.to_string(), traceparent))
    }
}

/// The token of the one `Authorization: Bearer …`.
fn bearer(headers: &HeaderMap) -> Result<&str, Problem> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let single = values.next().filter(|_| values.next().is_none()).and_then(|value| value.to_str().ok());
    single
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| token.trim())
        .filter(|token| !token.is_empty())
        .ok_or_else(|| Problem::of("unauthenticated"))
}

fn user(headers: &HeaderMap) -> Result<Option<Arc<str>>, Problem> {
    let mut values = headers.get_all(USER_ID).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Problem::of("invalid-field").detail("X-User-ID was sent twice"));
    }
    // Names are not always ASCII; header values are bytes, and these must be UTF-8.
    let text = std::str::from_utf8(value.as_bytes())
        .map_err(|_| Problem::of("invalid-character").detail("X-User-ID is not UTF-8"))?;
    let user = UserId::parse(text).map_err(|problem| {
        problem.detail("X-User-ID has 1 to 128 characters, none of them a control character or the like")
    })?;
    Ok(Some(user.as_str().into()))
}
