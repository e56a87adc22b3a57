//! `POST /v1/auth…`: a client's secret becomes tokens, and tokens become newer ones or nothing.
//!
//! Thin over [`api_contract::Access`], which keeps clients, families of tokens and revocations.

use api_contract::{Client, Json, Problem, Secret, TokenPair};
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
/// The access token is good for an hour, restarts included.
#[utoipa::path(
    post,
    path = "/v1/auth/token",
    operation_id = "getToken",
    tag = "auth",
    request_body = Credentials,
    responses((status = 200, description = "A pair of tokens.", body = TokenPair)),
    extensions(("x-problems" = json!(["invalid-client", "storage-unavailable"]))),
)]
pub(crate) async fn token(
    State(commands): State<Commands>,
    Json(request, _): Json<Credentials>,
) -> Result<Tokens, Problem> {
    commands.access.issue(&request.client_id, &request.client_secret).await.map(Tokens)
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
    extensions(("x-problems" = json!(["token-invalid", "token-expired", "token-revoked", "storage-unavailable"]))),
)]
pub(crate) async fn refresh(
    State(commands): State<Commands>,
    Json(request, _): Json<Refresh>,
) -> Result<Tokens, Problem> {
    commands.access.refresh(&request.refresh_token).await.map(Tokens)
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
    commands.access.logout(&client).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl IntoResponse for Tokens {
    fn into_response(self) -> Response {
        ([(header::CACHE_CONTROL, "no-store")], axum::Json(self.0)).into_response()
    }
}
