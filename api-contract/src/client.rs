//! The caller: who holds the token, what it may do, and for whom it speaks.
//!
//! Asking for a [`Client`] is what closes a route: its token is verified, then its partner's limit is looked at, then the
//! scope that [`crate::ROUTES`] names.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{FromRef, FromRequestParts, MatchedPath};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, header};
use runtime::http::Peer;
use runtime::request_id::{RequestId, Traceparent};
use serde::Serialize;
use uuid::Uuid;

use ledger_core::{Caller, ClientId, PartnerId};

use crate::rate::Told;
use crate::routes::{self, Entrance};
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
    pub request_id: RequestId,
    pub traceparent: Option<String>,
    /// Where the call came from, as far as our socket can tell.
    pub peer: Option<IpAddr>,
    /// The tokens that come from one login, and end together.
    pub(crate) family: Uuid,
}

/// Where a call comes from: what is written down of those who have no token yet.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// Of the socket; behind a proxy the proxy's, since anybody can send a header.
    pub peer: Option<IpAddr>,
    pub request_id: String,
}

impl Client {
    fn require(&self, scope: Scope) -> Result<(), Problem> {
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

    pub fn origin(&self) -> Origin {
        Origin { peer: self.peer, request_id: self.request_id.to_string() }
    }

    /// What the events of this call say about it: a flat JSON object of strings. Of an operator's call also where it came
    /// from, for that is a privileged act; where partners call from is theirs, and the log keeps everything for ever.
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
            #[serde(skip_serializing_if = "Option::is_none")]
            peer: Option<IpAddr>,
        }
        let about = About {
            client_id: self.id,
            request_id: self.request_id.as_str(),
            traceparent: self.traceparent.as_deref(),
            user_id: self.user.as_deref(),
            peer: self.peer.filter(|_| self.is_admin()),
        };
        serde_json::to_string(&about).expect("a few texts").into()
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
        // Leaving is not counted: whoever has copied the token could use the limit up, and keep it from being ended.
        if route(parts) != "/v1/auth/logout" {
            access.admit(&verified, parts.extensions.get::<Told>())?;
        }
        let user = user(&parts.headers)?;
        let Ok(request_id) = RequestId::from_request_parts(parts, state).await;
        let peer = peer(parts, state).await;
        let Ok(Traceparent(traceparent)) = Traceparent::from_request_parts(parts, state).await;
        let Verified { client: id, partner, scopes, family, .. } = *verified;
        let client = Self { id, partner, scopes, user, request_id, traceparent, peer, family };
        client.may_enter(parts)?;
        Ok(client)
    }
}

impl Client {
    /// Whether the route is open to this caller. One that nobody has put into the table is open to none.
    fn may_enter(&self, parts: &Parts) -> Result<(), Problem> {
        let path = route(parts);
        match routes::entrance(&parts.method, path) {
            Some(Entrance::Public | Entrance::AnyClient) => Ok(()),
            Some(Entrance::Holders(scope)) => self.require(scope),
            None => {
                tracing::error!(method = %parts.method, path, "a route stands in no table of scopes");
                Err(Problem::of("insufficient-scope").detail("this route is open to nobody"))
            }
        }
    }
}

/// The route's path, as axum writes it.
fn route(parts: &Parts) -> &str {
    parts.extensions.get::<MatchedPath>().map_or("", MatchedPath::as_str)
}

impl<S: Sync> FromRequestParts<S> for Origin {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Infallible> {
        let peer = peer(parts, state).await;
        let Ok(request_id) = RequestId::from_request_parts(parts, state).await;
        Ok(Self { peer, request_id: request_id.to_string() })
    }
}

async fn peer<S: Sync>(parts: &mut Parts, state: &S) -> Option<IpAddr> {
    let Ok(Peer(peer)) = Peer::from_request_parts(parts, state).await;
    peer.map(|peer| peer.ip().to_canonical())
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
