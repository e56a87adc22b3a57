//! `POST /v1/auth…`: a client's secret becomes tokens, and tokens become newer ones or nothing.
//!
//! Thin over [`api_contract::Access`], which keeps clients, families of tokens and revocations.

use api_contract::{Client, Json, JsonWebKeys, Origin, Problem, Secret, TokenPair};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::ToSchema;

use crate::Commands;

/// A client and the secret that it was given at its registration.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({ "clientId": "cli_0192f0c1-2d3e-7abc-8def-0123456789ab", "clientSecret": "dbs_…" }))]
pub(crate) struct Credentials {
    client_id: String,
    client_secret: Secret,
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Refresh {
    refresh_token: Secret,
}

/// Tokens are for nobody's cache.
pub(crate) struct Tokens(TokenPair);

/// Get tokens for a client
///
/// The access token is good for an hour, restarts included. After ten wrong secrets within a minute for one client from
/// one address, its logins from there are refused for the rest of that minute. After very many wrong ones for any client
/// from one address, further wrong ones are answered 429.
#[utoipa::path(
    post,
    path = "/v1/auth/token",
    operation_id = "getToken",
    tag = "auth",
    request_body = Credentials,
    responses((status = 200, description = "A pair of tokens.", body = TokenPair)),
    extensions(("x-problems" = json!([
        "invalid-client", "partner-suspended", "rate-limited", "storage-unavailable"
    ]))),
)]
pub(crate) async fn token(
    State(commands): State<Commands>,
    origin: Origin,
    Json(request, _): Json<Credentials>,
) -> Result<Tokens, Problem> {
    commands.0.access.log_in(&request.client_id, &request.client_secret, &origin).await.map(Tokens)
}

/// Get the next pair of tokens
///
/// A refresh token is good once. Used a second time, all tokens of its login are revoked: somebody else may hold it.
#[utoipa::path(
    post,
    path = "/v1/auth/refresh",
    operation_id = "refreshToken",
    tag = "auth",
    request_body = Refresh,
    responses((status = 200, description = "A new pair of tokens.", body = TokenPair)),
    extensions(("x-problems" = json!([
        "token-invalid", "token-expired", "token-revoked", "rate-limited", "storage-unavailable"
    ]))),
)]
pub(crate) async fn refresh(
    State(commands): State<Commands>,
    origin: Origin,
    Json(request, _): Json<Refresh>,
) -> Result<Tokens, Problem> {
    commands.0.access.refresh(&request.refresh_token, &origin).await.map(Tokens)
}

/// Log out
///
/// All tokens of this login are revoked, everywhere within five seconds. No body is needed.
#[utoipa::path(
    post,
    path = "/v1/auth/logout",
    operation_id = "logout",
    tag = "auth",
    security(("bearer" = [])),
    responses((status = 204, description = "The tokens are revoked.")),
    extensions(("x-problems" = json!(["storage-unavailable"]))),
)]
pub(crate) async fn logout(State(commands): State<Commands>, client: Client) -> Result<StatusCode, Problem> {
    commands.0.access.logout(&client).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The keys that sign access tokens
///
/// A JWK Set (RFC 7517) of Ed25519 keys. A key stands here a minute before it signs its first token, and until its last one
/// has expired. Look again when a token names a key that you do not know, but not more often than every few seconds.
#[utoipa::path(
    get,
    path = "/.well-known/jwks.json",
    operation_id = "getSigningKeys",
    tag = "auth",
    responses((status = 200, description = "The public keys.", body = JsonWebKeys)),
)]
pub(crate) async fn keys(State(commands): State<Commands>) -> impl IntoResponse {
    ([(header::CACHE_CONTROL, "public, max-age=30")], axum::Json(commands.0.access.published_keys()))
}

impl IntoResponse for Tokens {
    fn into_response(self) -> Response {
        ([(header::CACHE_CONTROL, "no-store")], axum::Json(self.0)).into_response()
    }
}
