//! `POST /v1/transactions…`: money moves, or begins to.
//!
//! Ids are minted here, and everything that a look at the request can tell is refused here. Whether the wallets
//! exist, whose they are and what they hold is the ledger's to know.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use api_contract::{
    AmountText, CurrencyText, FreeText, Json, Metadata, Path, Problem, Secret, Text, TransactionBody, effective_at,
    money,
};
use axum::extract::State;
use ledger_core::{
    Action, Direction, Event, Failure, Instruction, Payment, Timestamp, TransactionEvent, TransactionId,
    TransactionKind, WalletId,
};
use serde::{Deserialize, Serialize};
use url::{Host, Url};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::Commands;
use crate::answer::{Answer, Done, Refused};
use crate::call::{Adjusting, Call, Ending, MovingMoney};

/// Money to be moved from one wallet to another, at once.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({
    "fromWalletId": "wal_0192f0c1-2d3e-7abc-8def-0123456789ab",
    "toWalletId": "wal_0192f0c1-2d3e-7abc-8def-0123456789ac",
    "amount": "10.50",
    "currency": "EUR",
    "reference": "order-1042",
}))]
pub(crate) struct Transfer {
    #[schema(value_type = String)]
    from_wallet_id: WalletId,
    #[schema(value_type = String)]
    to_wallet_id: WalletId,
    amount: AmountText,
    currency: CurrencyText,
    /// Your name for it; transactions can be found by it.
    reference: Option<Text<1, 128>>,
    description: Option<FreeText<1, 512>>,
    metadata: Option<Metadata>,
    /// When it counts in business, if that was before now.
    #[schema(value_type = Option<String>, format = DateTime)]
    effective_at: Option<Timestamp>,
}

/// Money to be moved between a wallet and the system's adjustments wallet.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({
    "walletId": "wal_0192f0c1-2d3e-7abc-8def-0123456789ab",
    "direction": "CREDIT",
    "amount": "100.00",
    "currency": "EUR",
    "reason": "opening balance",
}))]
pub(crate) struct Adjustment {
    #[schema(value_type = String)]
    wallet_id: WalletId,
    /// Seen from the wallet: `CREDIT` adds to it, `DEBIT` takes from it.
    #[schema(value_type = String, pattern = "^(CREDIT|DEBIT)$")]
    direction: Direction,
    amount: AmountText,
    currency: CurrencyText,
    /// Becomes the transaction's description.
    reason: FreeText<1, 512>,
}

/// Money to be asked of the bank.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({
    "walletId": "wal_0192f0c1-2d3e-7abc-8def-0123456789ab",
    "amount": "25.00",
    "currency": "EUR",
    "returnUrl": "https://shop.example/paid",
}))]
pub(crate) struct TopUp {
    #[schema(value_type = String)]
    wallet_id: WalletId,
    amount: AmountText,
    currency: CurrencyText,
    /// Where the payer goes after paying: an https URL, or http to the payer's own machine.
    return_url: Option<Text<1, 2048>>,
    reference: Option<Text<1, 128>>,
    metadata: Option<Metadata>,
}

/// A top-up that has begun, and where to pay.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = PendingTopUp)]
pub(crate) struct PendingTopUp {
    #[serde(flatten)]
    transaction: TransactionBody,
    /// Names the payment at the bank.
    token: String,
    /// The bank's page for the payer.
    redirect_url: String,
}

/// What the outside has paid.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({ "amount": "25.00", "currency": "EUR", "bankReference": "bnk-77" }))]
pub(crate) struct Settlement {
    amount: AmountText,
    currency: CurrencyText,
    /// The outside's own name for the payment.
    bank_reference: Text<1, 128>,
}

/// Why the outside did not do it.
#[derive(Deserialize, ToSchema)]
#[schema(as = FailureReport, example = json!({ "code": "declined", "detail": "the payer's bank declined" }))]
pub(crate) struct FailureReport {
    /// A problem slug, or the provider's word.
    code: Text<1, 64>,
    detail: FreeText<1, 512>,
}

/// Nothing.
#[derive(Deserialize, ToSchema)]
#[schema(as = Nothing, example = json!({}))]
pub(crate) struct Nothing {}

const RETURN_URL_BYTES_MAX: usize = 2048;

/// Transfer money
///
/// At once, all or nothing. Both wallets must be your own partner's and hold the amount's currency. A refusal that the
/// ledger decided is final for its key, and can be read as a `FAILED` transaction: the problem carries its `transactionId`.
#[utoipa::path(
    post,
    path = "/v1/transactions/transfer",
    operation_id = "transfer",
    tag = "transactions",
    security(("bearer" = ["transactions:write"])),
    params(Call<MovingMoney>),
    request_body = Transfer,
    responses((status = 201, description = "The money has moved.", body = TransactionBody)),
    extensions(("x-problems" = json!([
        "wallet-not-found", "wallet-not-owned", "wallet-frozen", "wallet-closed", "insufficient-funds", "currency-mismatch",
        "currency-unknown", "same-wallet", "balance-limit-exceeded", "amount-format", "amount-not-positive",
        "amount-precision", "amount-out-of-range", "metadata-too-large", "time-format", "time-range-invalid",
    ]))),
)]
pub(crate) async fn transfer(
    State(commands): State<Commands>,
    call: Call<MovingMoney>,
    Json(request, body): Json<Transfer>,
) -> Result<Answer<TransactionBody>, Refused> {
    if request.from_wallet_id == request.to_wallet_id {
        return Err(Problem::of("same-wallet").at("/toWalletId", "this is the paying wallet").into());
    }
    let instruction = request.instruction(&call, now())?;
    let action = Action::Transfer { transaction: mint(), instruction: Arc::new(instruction) };
    let done = commands.execute(call.command(action, &body)).await?;
    let transaction = seen_by(&call, &done)?;
    Ok(Answer::created(done.recorded, location(&transaction), transaction))
}

/// Adjust a wallet
///
/// Moves money between the wallet and the system's adjustments wallet: the way to fund a wallet without a bank.
#[utoipa::path(
    post,
    path = "/v1/transactions/adjustment",
    operation_id = "adjust",
    tag = "transactions",
    security(("bearer" = ["admin"])),
    params(Call<Adjusting>),
    request_body = Adjustment,
    responses((status = 201, description = "The money has moved.", body = TransactionBody)),
    extensions(("x-problems" = json!([
        "wallet-not-found", "wallet-frozen", "wallet-closed", "insufficient-funds", "currency-mismatch", "currency-unknown",
        "balance-limit-exceeded", "amount-format", "amount-not-positive", "amount-precision", "amount-out-of-range",
    ]))),
)]
pub(crate) async fn adjustment(
    State(commands): State<Commands>,
    call: Call<Adjusting>,
    Json(request, body): Json<Adjustment>,
) -> Result<Answer<TransactionBody>, Refused> {
    let money = money(&request.amount, &request.currency)?;
    let instruction = Instruction {
        direction: Some(request.direction),
        description: Some(request.reason.into()),
        ..instruction(TransactionKind::Adjustment, &call, request.wallet_id, money)
    };
    let action = Action::Adjust { transaction: mint(), instruction: Arc::new(instruction) };
    let done = commands.execute(call.command(action, &body)).await?;
    let transaction = seen_by(&call, &done)?;
    Ok(Answer::created(done.recorded, location(&transaction), transaction))
}

/// Top a wallet up
///
/// Asks the bank for money. The transaction is `PENDING`; send the payer to `redirectUrl`. It ends as `SUCCESS`, `FAILED`
/// or `EXPIRED`: read it again at `Location`, or register a webhook.
#[utoipa::path(
    post,
    path = "/v1/transactions/top-up",
    operation_id = "topUp",
    tag = "transactions",
    security(("bearer" = ["transactions:write"])),
    params(Call<MovingMoney>),
    request_body = TopUp,
    responses((status = 202, description = "It has begun.", body = PendingTopUp)),
    extensions(("x-problems" = json!([
        "wallet-not-found", "wallet-frozen", "wallet-closed", "currency-mismatch", "currency-unknown",
        "balance-limit-exceeded", "amount-format", "amount-not-positive", "amount-precision", "amount-out-of-range",
        "metadata-too-large",
    ]))),
)]
pub(crate) async fn top_up(
    State(commands): State<Commands>,
    call: Call<MovingMoney>,
    Json(request, body): Json<TopUp>,
) -> Result<Answer<PendingTopUp>, Refused> {
    let money = money(&request.amount, &request.currency)?;
    let return_url = request.return_url.as_deref().map(return_url).transpose()?;
    let instruction = Instruction {
        reference: request.reference.map(String::from),
        metadata: request.metadata.unwrap_or_default().into_inner(),
        ..instruction(TransactionKind::TopUp, &call, request.wallet_id, money)
    };
    let token = Secret::mint("pay_").reveal().to_owned(); // whoever has it may pay, and learns nothing else
    let redirect_url = format!("{}/bank/pay/{token}", commands.0.settings.bank_url.trim_end_matches('/'));
    let payment = Payment { token, redirect_url, return_url };
    let action = Action::RequestTopUp { transaction: mint(), instruction: Arc::new(instruction), payment };
    let done = commands.execute(call.command(action, &body)).await?;
    let body = PendingTopUp::of(&call, &done)?;
    Ok(Answer::accepted(done.recorded, location(&body.transaction), body))
}

/// Settle a pending transaction
///
/// The outside has done its part: exactly the money that was asked for is posted.
#[utoipa::path(
    post,
    path = "/v1/transactions/{id}/settle",
    operation_id = "settleTransaction",
    tag = "workflows",
    security(("bearer" = ["workflow"])),
    params(("id" = String, Path, description = "The transaction."), Call<Ending>),
    request_body = Settlement,
    responses((status = 200, description = "The transaction, `SUCCESS`.", body = TransactionBody)),
    extensions(("x-problems" = json!([
        "transaction-not-found", "invalid-transition", "callback-mismatch", "wallet-frozen", "wallet-closed",
        "balance-limit-exceeded", "currency-unknown", "amount-format", "amount-not-positive", "amount-precision",
        "amount-out-of-range",
    ]))),
)]
pub(crate) async fn settle(
    State(commands): State<Commands>,
    call: Call<Ending>,
    Path(transaction): Path<TransactionId>,
    Json(request, body): Json<Settlement>,
) -> Result<Answer<TransactionBody>, Refused> {
    let money = money(&request.amount, &request.currency)?;
    let provider_reference = request.bank_reference.into();
    let action = Action::Settle { transaction, money, provider_reference };
    let done = commands.execute(call.command(action, &body)).await?;
    Ok(Answer::ok(done.recorded, seen_by(&call, &done)?))
}

/// Fail a pending transaction
///
/// The outside has definitely not done it. No money moves.
#[utoipa::path(
    post,
    path = "/v1/transactions/{id}/fail",
    operation_id = "failTransaction",
    tag = "workflows",
    security(("bearer" = ["workflow"])),
    params(("id" = String, Path, description = "The transaction."), Call<Ending>),
    request_body = FailureReport,
    responses((status = 200, description = "The transaction, `FAILED`.", body = TransactionBody)),
    extensions(("x-problems" = json!(["transaction-not-found", "invalid-transition"]))),
)]
pub(crate) async fn fail(
    State(commands): State<Commands>,
    call: Call<Ending>,
    Path(transaction): Path<TransactionId>,
    Json(request, body): Json<FailureReport>,
) -> Result<Answer<TransactionBody>, Refused> {
    let failure = Failure { code: request.code.into(), detail: request.detail.into() };
    let done = commands.execute(call.command(Action::Fail { transaction, failure }, &body)).await?;
    Ok(Answer::ok(done.recorded, seen_by(&call, &done)?))
}

/// Expire a pending transaction
///
/// Nothing was heard within the limit. No money moves.
#[utoipa::path(
    post,
    path = "/v1/transactions/{id}/expire",
    operation_id = "expireTransaction",
    tag = "workflows",
    security(("bearer" = ["workflow"])),
    params(("id" = String, Path, description = "The transaction."), Call<Ending>),
    request_body = Nothing,
    responses((status = 200, description = "The transaction, `EXPIRED`.", body = TransactionBody)),
    extensions(("x-problems" = json!(["transaction-not-found", "invalid-transition"]))),
)]
pub(crate) async fn expire(
    State(commands): State<Commands>,
    call: Call<Ending>,
    Path(transaction): Path<TransactionId>,
    Json(Nothing {}, body): Json<Nothing>,
) -> Result<Answer<TransactionBody>, Refused> {
    let done = commands.execute(call.command(Action::Expire { transaction }, &body)).await?;
    Ok(Answer::ok(done.recorded, seen_by(&call, &done)?))
}

impl Transfer {
    /// What is asked for, or the first thing that is wrong with its form.
    pub(crate) fn instruction<D>(self, call: &Call<D>, now: Timestamp) -> Result<Instruction, Problem> {
        let money = money(&self.amount, &self.currency)?;
        Ok(Instruction {
            to_wallet_id: Some(self.to_wallet_id),
            reference: self.reference.map(String::from),
            description: self.description.map(String::from),
            metadata: self.metadata.unwrap_or_default().into_inner(),
            effective_at: effective_at(self.effective_at, now)?,
            ..instruction(TransactionKind::Transfer, call, self.from_wallet_id, money)
        })
    }
}

impl PendingTopUp {
    fn of<D>(call: &Call<D>, done: &Done) -> Result<Self, Problem> {
        let payment = done.stream().iter().find_map(|happened| match &happened.event {
            Event::Transaction(_, TransactionEvent::Requested { payment, .. }) => Some(payment.clone()),
            _ => None,
        });
        let Payment { token, redirect_url, .. } = payment.expect("a top-up that was not refused was requested");
        Ok(Self { transaction: seen_by(call, done)?, token, redirect_url })
    }
}

/// What every kind of transaction says about itself; the rest is the kind's own.
fn instruction<D>(
    kind: TransactionKind,
    call: &Call<D>,
    wallet_id: WalletId,
    money: ledger_core::Money,
) -> Instruction {
    Instruction {
        kind,
        partner_id: call.client.partner,
        user_id: call.client.user.clone(),
        wallet_id,
        to_wallet_id: None,
        direction: None,
        amount: money.amount(),
        currency: money.currency(),
        reference: None,
        description: None,
        metadata: ledger_core::Metadata::new(),
        effective_at: None,
    }
}

/// What the system's own wallets hold is for the operator's eyes only.
fn seen_by<D>(call: &Call<D>, done: &Done) -> Result<TransactionBody, Problem> {
    let transaction = done.transaction()?;
    Ok(if call.client.is_admin() { transaction } else { transaction.for_partner() })
}

pub(crate) fn mint() -> TransactionId {
    TransactionId::from_uuid(Uuid::now_v7())
}

fn location(transaction: &TransactionBody) -> String {
    format!("/v1/transactions/{}", transaction.id)
}

pub(crate) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros())
        .ok()
        .and_then(|micros| Timestamp::from_micros(micros).ok())
        .unwrap_or(Timestamp::EPOCH)
}

/// A place in the web that a payer's browser can be sent to.
fn return_url(text: &str) -> Result<String, Problem> {
    let refused = |detail: &str| Problem::of("invalid-field").at("/returnUrl", detail);
    if RETURN_URL_BYTES_MAX < text.len() {
        return Err(refused("a URL has at most 2048 bytes"));
    }
    let url = Url::parse(text).map_err(|_| refused("expected an absolute URL"))?;
    let loopback = match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    };
    if url.scheme() != "https" && !(url.scheme() == "http" && loopback) {
        return Err(refused("expected https, or http to localhost"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(refused("a URL with credentials is refused"));
    }
    // As a browser understands it: what was sloppily written is stored in the form that cannot be read in two ways.
    Ok(url.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_return_url_leads_to_the_web_or_to_the_payers_own_machine() {
        for good in
            ["https://shop.example/paid?id=1", "http://localhost:3000/", "http://127.0.0.1/", "http://[::1]:80/x"]
        {
            assert!(return_url(good).is_ok(), "{good}");
        }
        assert_eq!(return_url("https:\\\\shop.example\\paid").unwrap(), "https://shop.example/paid");
        for bad in [
            "",
            "/paid",
            "shop.example",
            "http://shop.example/",
            "http://localhost.shop.example/",
            "javascript:alert(1)",
            "data:text/html,x",
            "file:///etc/passwd",
            "https://user@shop.example/",
            "https://user:password@shop.example/",
            &format!("https://shop.example/{}", "x".repeat(RETURN_URL_BYTES_MAX)),
        ] {
            assert_eq!(return_url(bad).unwrap_err().slug(), "invalid-field", "{bad}");
        }
    }
}
