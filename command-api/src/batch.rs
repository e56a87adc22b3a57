//! `POST /v1/transactions/batch`: up to a thousand transfers in one command, each for itself or all or none.
//!
//! What is wrong in the form of one item refuses the whole request here, before anything is written. What the ledger
//! refuses is an item's own affair, or the whole batch's if it is atomic.

use std::fmt;
use std::sync::Arc;

use api_contract::{JsonMax, Problem, refuse};
use axum::extract::State;
use ledger_core::{Action, Event, TransactionEvent, TransactionId};
use ledger_engine::Happened;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Commands;
use crate::answer::{self, Answer, Refused};
use crate::call::{Call, MovingMoney};
use crate::openapi::ProblemDocument;
use crate::transactions::{Transfer, mint, now};

/// Transfers to be made one after another.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({
    "atomic": false,
    "transactions": [
        {
            "fromWalletId": "wal_0192f0c1-2d3e-7abc-8def-0123456789ab",
            "toWalletId": "wal_0192f0c1-2d3e-7abc-8def-0123456789ac",
            "amount": "10.50",
            "currency": "EUR",
            "reference": "salary-1",
        },
        {
            "fromWalletId": "wal_0192f0c1-2d3e-7abc-8def-0123456789ab",
            "toWalletId": "wal_0192f0c1-2d3e-7abc-8def-0123456789ad",
            "amount": "12.00",
            "currency": "EUR",
            "reference": "salary-2",
        },
    ],
}))]
pub(crate) struct Batch {
    /// All of them or, if the ledger refuses one, none. Otherwise each for itself.
    atomic: bool,
    #[schema(value_type = Vec<Transfer>, min_items = 1, max_items = 1000)]
    transactions: Transfers,
}

/// One item at least, and no more than [`ITEMS_MAX`]: counted before any of them is read.
struct Transfers(Vec<Transfer>);

/// What became of the items, in their order.
#[derive(Serialize, ToSchema)]
#[schema(as = BatchResults, example = json!({
    "results": [
        { "reference": "salary-1", "status": "SUCCESS", "transactionId": "txn_0192f0c1-2d3e-7abc-8def-0123456789ab" },
        {
            "reference": "salary-2",
            "status": "FAILED",
            "transactionId": "txn_0192f0c1-2d3e-7abc-8def-0123456789ac",
            "problem": {
                "type": "/problems/insufficient-funds",
                "title": "Insufficient funds",
                "status": 422,
                "detail": "available 9.50 does not cover 12.00",
            },
        },
    ],
}))]
pub(crate) struct Results {
    results: Vec<ItemResult>,
}

/// What became of one item.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = BatchResult)]
struct ItemResult {
    /// The item's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    reference: Option<String>,
    #[schema(value_type = String, pattern = "^(SUCCESS|FAILED)$")]
    status: &'static str,
    /// A refused one can be read as well, as a `FAILED` transaction.
    #[schema(value_type = String)]
    transaction_id: TransactionId,
    /// Why it was refused: what a single transfer would have been answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<ProblemDocument>)]
    problem: Option<serde_json::Value>,
}

const ITEMS_MAX: usize = 1_000;
const BODY_BYTES_MAX: usize = 1024 * 1024;

/// Transfer money many times
///
/// Up to 1,000 transfers in one request of at most 1 MiB, made one after another: a later one may spend what an earlier one
/// brought. One `Idempotency-Key` stands for all of them. An item that is malformed refuses the whole request, with a
/// pointer such as `/transactions/7/amount`, and nothing is executed.
///
/// With `atomic: false` each item is for itself: the answer is 201 and says of each what became of it. With `atomic: true`
/// all are made, or none: then the answer is 422, its type is that of the first refused item and its pointer names that
/// item (`/transactions/1`). No transaction comes of it, and the refusal is final for the key.
#[utoipa::path(
    post,
    path = "/v1/transactions/batch",
    operation_id = "transferBatch",
    tag = "transactions",
    security(("bearer" = ["transactions:write"])),
    params(Call<MovingMoney>),
    request_body = Batch,
    responses((status = 201, description = "What became of each item.", body = Results)),
    extensions(("x-problems" = json!([
        "too-many-items", "insufficient-funds", "currency-mismatch", "currency-unknown", "same-wallet",
        "balance-limit-exceeded", "amount-format", "amount-not-positive", "amount-precision", "amount-out-of-range",
        "metadata-too-large", "time-format", "time-range-invalid", "invalid-id", "partner-suspended",
    ]))),
)]
pub(crate) async fn batch(
    State(commands): State<Commands>,
    call: Call<MovingMoney>,
    JsonMax(Batch { atomic, transactions }, body): JsonMax<Batch, BODY_BYTES_MAX>,
) -> Result<Answer<Results>, Refused> {
    let now = now();
    let transfer = |(item, transfer): (usize, Transfer)| match transfer.instruction(&call, now) {
        Ok(instruction) => Ok((mint(), Arc::new(instruction))),
        Err(problem) => Err(problem.below(&format!("/transactions/{item}"))),
    };
    let transfers = transactions.0.into_iter().enumerate().map(transfer).collect::<Result<_, Problem>>()?;
    let done = commands.execute_each(call.command(Action::Batch { atomic, transfers }, &body)).await?;
    let results = done.events()?.into_iter().map(ItemResult::of).collect::<Result<_, _>>()?;
    Ok(Answer::created_several(done.recorded, Results { results }))
}

impl ItemResult {
    fn of(happened: Happened) -> Result<Self, Problem> {
        let (transaction_id, instruction, failure) = match happened.event {
            Event::Transaction(id, TransactionEvent::Posted { instruction, .. }) => (id, instruction, None),
            Event::Transaction(id, TransactionEvent::Declined { instruction, failure }) => {
                (id, instruction, Some(failure))
            }
            _ => return Err(answer::other_stream()),
        };
        Ok(Self {
            reference: instruction.reference.clone(),
            status: if failure.is_none() { "SUCCESS" } else { "FAILED" },
            transaction_id,
            problem: failure.map(|failure| answer::problem(&failure).document()),
        })
    }
}

impl<'de> Deserialize<'de> for Transfers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Transfers;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of 1 to {ITEMS_MAX} transfers")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Transfers, A::Error> {
                let count = items.size_hint().expect("a body is read into memory before it is looked at");
                if ITEMS_MAX < count {
                    return Err(refuse("too-many-items", &format!("at most {ITEMS_MAX} transfers, not {count}")));
                }
                let mut transfers = Vec::with_capacity(count);
                while let Some(transfer) = items.next_element()? {
                    transfers.push(transfer);
                }
                if transfers.is_empty() {
                    return Err(refuse("invalid-field", "at least one transfer"));
                }
                Ok(Transfers(transfers))
            }
        }
        deserializer.deserialize_seq(Read)
    }
}
