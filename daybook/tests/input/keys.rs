//! Idempotency keys: missing, malformed, used again, used for something else.

use serde_json::json;

use crate::system::{System, fresh_key};
use crate::table::{Case, case, refused, taken};
use crate::wire::Request;

pub(crate) fn table(system: &System) -> Vec<Case> {
    let missing = || refused(400, "idempotency-key-missing");
    let invalid = || refused(400, "idempotency-key-invalid");
    let reused = || refused(422, "idempotency-key-reused");
    let replayed = |status: u16| taken(status).header("idempotent-replayed", "true");
    let first = || taken(201).moving_money().no_header("idempotent-replayed");
    let body = system.transfer_body();
    let transfer = |key: &str| Request::post("/v1/transactions/transfer").bearer(&system.partner).key(key).json(&body);
    let other = |key: &str, field: &str, value: &str| {
        let mut body = body.clone();
        body[field] = json!(value);
        Request::post("/v1/transactions/transfer").bearer(&system.partner).key(key).json(&body)
    };
    let adjust =
        json!({"walletId": system.alice, "direction": "CREDIT", "amount": "0.01", "currency": "EUR", "reason": "r"});
    let adjustment =
        |key: &str| Request::post("/v1/transactions/adjustment").bearer(&system.admin).key(key).json(&adjust);
    let top_up = json!({"walletId": system.alice, "amount": "0.01", "currency": "EUR"});
    let top_up = Request::post("/v1/transactions/top-up").bearer(&system.partner).json(&top_up);
    let wallet = |body: &str| Request::post("/v1/wallets").bearer(&system.partner).key("input-wallet").body(body);
    let poor =
        json!({"fromWalletId": system.bob, "toWalletId": system.alice, "amount": "999999.00", "currency": "EUR"});
    let poor = |key: &str| Request::post("/v1/transactions/transfer").bearer(&system.partner).key(key).json(&poor);
    let reordered = format!(
        "\n{{ \"currency\" : \"EUR\",\t\"amount\":\"0.01\",\"toWalletId\":\"{}\",\r\n\"fromWalletId\":\"\\u0077{}\" }} ",
        system.bob,
        system.alice.strip_prefix('w').unwrap()
    );
    let longest = "k".repeat(255);
    vec![
        case("34 a transfer without a key", system.transfer().without("Idempotency-Key"), missing()),
        case("34 an adjustment without a key", adjustment("k").without("Idempotency-Key"), missing()),
        case("34 a top-up without a key", top_up.clone(), missing()),
        case(
            "34 a key by another name",
            system.transfer().without("Idempotency-Key").header("Idempotency_Key", "k"),
            missing(),
        ),
        case("35 an empty key", system.transfer().key(""), invalid()),
        case("35 a key of blanks", system.transfer().key("   "), invalid()),
        case("35 a key with a blank in it", system.transfer().key("a b"), invalid()),
        case("35 a key of 256 characters", system.transfer().key("k".repeat(256)), invalid()),
        case("35 a key of 255 characters", transfer(&longest), first()),
        case("35 a key that is not ASCII", system.transfer().key("schlüssel"), invalid()),
        case("35 a key in Latin-1", system.transfer().key(b"schl\xfcssel"), invalid()),
        case("35 a key with a tab in it", system.transfer().key("a\tb"), invalid()),
        case("35 two keys", system.transfer().header("Idempotency-Key", "another"), invalid()),
        case("35 the same key twice", system.transfer().key("twice").header("Idempotency-Key", "twice"), invalid()),
        case("35 a key that would be SQL", transfer("';drop/**/table/**/ledger.events;--"), first()),
        case("36 the same again", transfer("input-36"), first())
            .then(transfer("input-36"), replayed(201))
            .then(transfer("input-36").body(&reordered), replayed(201))
            .then(
                transfer("input-36")
                    .header("X-Request-ID", "other")
                    .with("Content-Type", "application/json; charset=utf-8"),
                replayed(201),
            ),
        case(
            "36 a refusal again",
            poor("input-36-poor"),
            refused(422, "insufficient-funds").no_header("idempotent-replayed"),
        )
        .then(poor("input-36-poor"), refused(422, "insufficient-funds").header("idempotent-replayed", "true")),
        case("36 a key is nobody's in capitals", transfer("input-36-case"), first())
            .then(transfer("INPUT-36-CASE"), first()),
        case("37 another amount", transfer("input-37"), first())
            .then(other("input-37", "amount", "0.02"), reused())
            .then(other("input-37", "amount", "0.010"), refused(422, "amount-precision"))
            .then(other("input-37", "reference", "r"), reused())
            .then(transfer("input-37").header("X-User-ID", "alice"), reused())
            .then(top_up.key("input-37"), reused())
            .then(transfer("input-37"), replayed(201)),
        case("37 after a refusal", poor("input-37-poor"), refused(422, "insufficient-funds"))
            .then(transfer("input-37-poor"), reused()),
        case(
            "37 a request that was never read keeps no key",
            transfer("input-37-bad").body("{"),
            refused(400, "malformed-json"),
        )
        .then(other("input-37-bad", "amount", "x"), refused(422, "amount-format"))
        .then(transfer("input-37-bad"), first()),
        case("39 another client's", transfer("input-39"), first()).then(adjustment("input-39"), first()),
        case("41 a repetition after no answer", transfer("input-41"), first())
            .then(transfer("input-41"), replayed(201)),
        case("a key where none is needed", wallet(r#"{"userId":"k","currency":"EUR"}"#), taken(201))
            .then(wallet(r#"{"currency":"EUR","userId":"k"}"#), replayed(201))
            .then(wallet(r#"{"currency":"USD","userId":"k"}"#), reused()),
        case("a key on a read", system.get("/v1/wallets").key(fresh_key()), taken(200)),
    ]
}
