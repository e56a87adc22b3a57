//! `POST /v1/wallets…`: a wallet's life.

use api_contract::{CurrencyText, FreeText, Json, Metadata, Path, UserId, WalletBody};
use axum::extract::State;
use ledger_core::{Action, WalletId};
use serde::Deserialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::Commands;
use crate::answer::{Answer, Refused};
use crate::call::{Call, KeepingWallets};

/// A customer's wallet to be opened.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({ "userId": "user-1", "currency": "EUR", "metadata": { "tier": "basic" } }))]
pub(crate) struct OpenWallet {
    /// Your name for the end user whose wallet it is.
    user_id: UserId,
    currency: CurrencyText,
    metadata: Option<Metadata>,
}

/// Why a wallet is frozen, unfrozen or closed.
#[derive(Deserialize, ToSchema)]
#[schema(example = json!({ "reason": "card reported stolen" }))]
pub(crate) struct Reason {
    reason: FreeText<1, 512>,
}

/// Open a customer wallet
///
/// In a currency that the partner was registered with. It is empty, and active at once.
#[utoipa::path(
    post,
    path = "/v1/wallets",
    operation_id = "openWallet",
    tag = "wallets",
    security(("bearer" = ["wallets:write"])),
    params(Call<KeepingWallets>),
    request_body = OpenWallet,
    responses((status = 201, description = "The wallet.", body = WalletBody)),
    extensions(("x-problems" = json!(["currency-unknown", "currency-not-enabled", "metadata-too-large", "partner-not-found"]))),
)]
pub(crate) async fn open(
    State(commands): State<Commands>,
    call: Call<KeepingWallets>,
    Json(request, body): Json<OpenWallet>,
) -> Result<Answer<WalletBody>, Refused> {
    call.client.partner()?;
    let action = Action::OpenWallet {
        wallet: WalletId::from_uuid(Uuid::now_v7()),
        user: request.user_id.as_str().into(),
        currency: request.currency.currency()?,
        metadata: request.metadata.unwrap_or_default().into_inner(),
    };
    let done = commands.execute(call.command(action, &body)).await?;
    let wallet = done.wallet()?;
    Ok(Answer::created(done.recorded, format!("/v1/wallets/{}", wallet.id), wallet))
}

/// Freeze a wallet
///
/// Nothing goes out and nothing comes in until it is unfrozen.
#[utoipa::path(
    post,
    path = "/v1/wallets/{id}/freeze",
    operation_id = "freezeWallet",
    tag = "wallets",
    security(("bearer" = ["wallets:write"])),
    params(("id" = String, Path, description = "The wallet."), Call<KeepingWallets>),
    request_body = Reason,
    responses((status = 200, description = "The wallet, frozen.", body = WalletBody)),
    extensions(("x-problems" = json!(["wallet-not-found", "wallet-frozen", "wallet-closed"]))),
)]
pub(crate) async fn freeze(
    State(commands): State<Commands>,
    call: Call<KeepingWallets>,
    Path(wallet): Path<WalletId>,
    Json(Reason { reason }, body): Json<Reason>,
) -> Result<Answer<WalletBody>, Refused> {
    let action = Action::FreezeWallet { wallet, reason: reason.into() };
    let done = commands.execute(call.command(action, &body)).await?;
    Ok(Answer::ok(done.recorded, done.wallet()?))
}

/// Unfreeze a wallet
#[utoipa::path(
    post,
    path = "/v1/wallets/{id}/unfreeze",
    operation_id = "unfreezeWallet",
    tag = "wallets",
    security(("bearer" = ["wallets:write"])),
    params(("id" = String, Path, description = "The wallet."), Call<KeepingWallets>),
    request_body = Reason,
    responses((status = 200, description = "The wallet, active again.", body = WalletBody)),
    extensions(("x-problems" = json!(["wallet-not-found", "wallet-closed", "invalid-transition"]))),
)]
pub(crate) async fn unfreeze(
    State(commands): State<Commands>,
    call: Call<KeepingWallets>,
    Path(wallet): Path<WalletId>,
    Json(Reason { reason }, body): Json<Reason>,
) -> Result<Answer<WalletBody>, Refused> {
    let action = Action::UnfreezeWallet { wallet, reason: reason.into() };
    let done = commands.execute(call.command(action, &body)).await?;
    Ok(Answer::ok(done.recorded, done.wallet()?))
}

/// Close a wallet
///
/// For good. It must be empty, and nothing may be pending for it.
#[utoipa::path(
    post,
    path = "/v1/wallets/{id}/close",
    operation_id = "closeWallet",
    tag = "wallets",
    security(("bearer" = ["wallets:write"])),
    params(("id" = String, Path, description = "The wallet."), Call<KeepingWallets>),
    request_body = Reason,
    responses((status = 200, description = "The wallet, closed.", body = WalletBody)),
    extensions(("x-problems" = json!(["wallet-not-found", "wallet-closed", "wallet-not-empty"]))),
)]
pub(crate) async fn close(
    State(commands): State<Commands>,
    call: Call<KeepingWallets>,
    Path(wallet): Path<WalletId>,
    Json(Reason { reason }, body): Json<Reason>,
) -> Result<Answer<WalletBody>, Refused> {
    let action = Action::CloseWallet { wallet, reason: reason.into() };
    let done = commands.execute(call.command(action, &body)).await?;
    Ok(Answer::ok(done.recorded, done.wallet()?))
}
