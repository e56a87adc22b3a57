//! Many transfers in one request: too many, too large, one of them wrong.

use serde_json::{Value, json};

use crate::system::{System, fresh_key};
use crate::table::{Case, case, refused, taken};
use crate::wire::Request;

pub(crate) fn table(system: &System) -> Vec<Case> {
    let request = || Request::post("/v1/transactions/batch").bearer(&system.partner).key(fresh_key());
    let batch = |atomic: bool, items: Vec<Value>| request().json(&json!({"atomic": atomic, "transactions": items}));
    let good = || system.transfer_body();
    let with = |name: &str, value: Value| {
        let mut item = good();
        item[name] = value;
        item
    };
    let poor =
        || json!({"fromWalletId": system.bob, "toWalletId": system.alice, "amount": "999999.00", "currency": "EUR"});
    let padded = |length: usize| {
        let body = json!({"atomic": true, "transactions": [good()]}).to_string();
        let padding = " ".repeat(length - body.len());
        request().body(format!("{body}{padding}"))
    };
    let invalid = |pointer: &str| refused(422, "invalid-field").at(pointer);
    vec![
        case("8 1 MiB", padded(1_048_576), taken(201).moving_money()),
        case("8 1 MiB and a byte", padded(1_048_577), refused(413, "payload-too-large")),
        case(
            "27 1,001 transfers",
            batch(false, vec![json!({}); 1_001]),
            refused(422, "too-many-items").at("/transactions"),
        ),
        case(
            "27 60,000 items that are none",
            batch(false, vec![json!(0); 60_000]),
            refused(422, "too-many-items").at("/transactions"),
        ),
        case("no transfers", batch(false, Vec::new()), invalid("/transactions")),
        case("no key", batch(true, vec![good()]).without("Idempotency-Key"), refused(400, "idempotency-key-missing")),
        case("atomic or not is not said", request().json(&json!({"transactions": [good()]})), invalid("/atomic")),
        case(
            "atomic as a text",
            request().json(&json!({"atomic": "true", "transactions": [good()]})),
            invalid("/atomic"),
        ),
        case("atomic as a number", request().json(&json!({"atomic": 1, "transactions": [good()]})), invalid("/atomic")),
        case(
            "transfers as an object",
            request().json(&json!({"atomic": true, "transactions": {"0": good()}})),
            invalid("/transactions"),
        ),
        case(
            "a transfer as an array",
            batch(true, vec![good(), json!([system.alice, system.bob, "0.01", "EUR", null, null, null, null])]),
            invalid("/transactions/1"),
        ),
        case(
            "an unknown field in an item",
            batch(true, vec![good(), with("admin", json!(true))]),
            refused(422, "unknown-field").at("/transactions/1/admin"),
        ),
        case(
            "a number for an amount in an item",
            batch(false, vec![good(), with("amount", json!(1))]),
            refused(422, "amount-format").at("/transactions/1/amount"),
        ),
        case(
            "a third decimal in an item",
            batch(false, vec![good(), with("amount", json!("0.001"))]),
            refused(422, "amount-precision").at("/transactions/1/amount"),
        ),
        case(
            "a wallet to itself in an item",
            batch(false, vec![good(), with("toWalletId", json!(system.alice))]),
            taken(201).moving_money().contains("/problems/same-wallet"),
        ),
        case(
            "a NUL in an item",
            batch(false, vec![good(), with("reference", json!("\u{0}"))]),
            refused(422, "invalid-character").at("/transactions/1/reference"),
        ),
        case(
            "metadata too large in an item",
            batch(false, vec![good(), with("metadata", json!({"a": "v".repeat(513)}))]),
            refused(422, "metadata-too-large"),
        ),
        case(
            "atomic, and one too poor",
            batch(true, vec![good(), poor()]),
            refused(422, "insufficient-funds").at("/transactions/1"),
        ),
        case(
            "not atomic, and one too poor",
            batch(false, vec![good(), poor()]),
            taken(201).moving_money().contains("insufficient-funds"),
        ),
        case(
            "a user who owns none of it",
            batch(true, vec![good()]).header("X-User-ID", "mallory"),
            refused(422, "wallet-not-owned"),
        ),
    ]
}
