//! What is wrong in form is refused at the edge: with its own problem, at its place, and nothing is written.

use serde_json::{Value, json};

use crate::door::Door;
use crate::money::transfer;

#[tokio::test]
async fn a_malformed_transfer_is_refused_with_its_own_problem_and_nothing_is_written() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let future = "2999-01-01T00:00:00Z";
    let deep = json!({ "a": { "a": { "a": { "a": { "a": { "a": 1 } } } } } });
    let many = Value::from_iter((0..51).map(|place| (format!("k{place}"), json!(1))));
    let cases: Vec<(&str, Value, u16, &str)> = vec![
        ("amount", json!("0"), 422, "amount-not-positive"),
        ("amount", json!("0.00"), 422, "amount-not-positive"),
        ("amount", json!("-0"), 422, "amount-not-positive"),
        ("amount", json!("-1.00"), 422, "amount-not-positive"),
        ("amount", Value::Null, 422, "invalid-field"),
        ("amount", json!(1.5), 422, "amount-format"),
        ("amount", json!(10), 422, "amount-format"),
        ("amount", json!("1e3"), 422, "amount-format"),
        ("amount", json!("0x10"), 422, "amount-format"),
        ("amount", json!("NaN"), 422, "amount-format"),
        ("amount", json!(" 10"), 422, "amount-format"),
        ("amount", json!("+10"), 422, "amount-format"),
        ("amount", json!("1,000.00"), 422, "amount-format"),
        ("amount", json!("010"), 422, "amount-format"),
        ("amount", json!(".5"), 422, "amount-format"),
        ("amount", json!("5."), 422, "amount-format"),
        ("amount", json!("１０"), 422, "amount-format"),
        ("amount", json!(""), 422, "amount-format"),
        ("amount", json!("10.001"), 422, "amount-precision"),
        ("amount", json!("9223372036854775808"), 422, "amount-out-of-range"),
        ("amount", json!("9".repeat(40)), 422, "amount-out-of-range"),
        ("currency", json!("ZZZ"), 422, "currency-unknown"),
        ("currency", json!("eur"), 422, "currency-unknown"),
        ("currency", json!("€"), 422, "currency-unknown"),
        ("currency", json!("XXX"), 422, "currency-unknown"),
        ("currency", json!("EURO"), 422, "currency-unknown"),
        ("currency", json!(["EUR"]), 422, "invalid-field"),
        ("fromWalletId", json!("nonsense"), 400, "invalid-id"),
        ("fromWalletId", json!("wal_00000000-0000-0000-0000-000000000000"), 400, "invalid-id"),
        ("fromWalletId", json!("txn_0192f0c1-2d3e-7abc-8def-0123456789ab"), 400, "invalid-id"),
        ("fromWalletId", json!(7), 422, "invalid-field"),
        ("toWalletId", json!(alice), 422, "same-wallet"),
        ("reference", json!(""), 422, "invalid-field"),
        ("reference", json!("r".repeat(129)), 422, "invalid-field"),
        ("reference", json!("two\nlines"), 422, "invalid-character"),
        ("reference", json!("\u{202e}evil"), 422, "invalid-character"),
        ("description", json!("nul\u{0}"), 422, "invalid-character"),
        ("description", json!("d".repeat(513)), 422, "invalid-field"),
        ("metadata", deep, 422, "metadata-too-large"),
        ("metadata", many, 422, "metadata-too-large"),
        ("metadata", json!({ "k".repeat(65): 1 }), 422, "metadata-too-large"),
        ("metadata", json!({ "k": "v".repeat(513) }), 422, "metadata-too-large"),
        ("metadata", json!([]), 422, "invalid-field"),
        ("effectiveAt", json!(future), 422, "time-range-invalid"),
        ("effectiveAt", json!("yesterday"), 422, "time-format"),
        ("amout", json!("1.00"), 422, "unknown-field"),
    ];
    let before = door.head().await;
    for (field, value, status, slug) in cases {
        let mut body = transfer(&alice, &bob, "1.00");
        body[field] = value;
        let call = door.post("/v1/transactions/transfer").token(&partner.token).new_key();
        let problem = call.json(&body).await.problem(status, slug);
        assert_eq!(problem["errors"][0]["pointer"], format!("/{field}").as_str(), "{body}: {problem}");
    }
    let whole: [(&str, u16, &str); 9] = [
        ("", 400, "malformed-json"),
        ("{", 400, "malformed-json"),
        ("{}x", 400, "malformed-json"),
        ("{\"amount\": NaN}", 400, "malformed-json"),
        ("\"\\ud800\"", 400, "malformed-json"),
        ("{\"amount\": \"1\", \"amount\": \"2\"}", 400, "duplicate-field"),
        ("[]", 422, "invalid-field"),
        ("null", 422, "invalid-field"),
        ("{}", 422, "invalid-field"),
    ];
    for (body, status, slug) in whole {
        let call = door.post("/v1/transactions/transfer").token(&partner.token).new_key();
        call.text(body).await.problem(status, slug);
    }
    let large = format!("{{\"description\": \"{}\"}}", "d".repeat(64 * 1024));
    let call = door.post("/v1/transactions/transfer").token(&partner.token).new_key();
    call.text(&large).await.problem(413, "payload-too-large");
    let call = door.post("/v1/transactions/transfer").token(&partner.token).new_key();
    call.empty().await.problem(415, "unsupported-media-type");
    assert_eq!(door.head().await, before, "nothing was written");
}

#[tokio::test]
async fn a_key_whose_request_was_malformed_is_still_unused() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let call = || door.post("/v1/transactions/transfer").token(&partner.token).key("k");
    call().json(&transfer(&alice, &bob, "1.001")).await.problem(422, "amount-precision");
    call().json(&transfer(&alice, &bob, "1.00")).await.expect(201);
}

#[tokio::test]
async fn text_of_any_content_is_data() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    for text in ["'; DROP TABLE events;--", "<script>alert(1)</script>", "{{7*7}}", "=cmd()", "日本語 😀", "\\u0000"]
    {
        let mut body = transfer(&alice, &bob, "0.01");
        body["description"] = json!(text);
        let call = door.post("/v1/transactions/transfer").token(&partner.token).new_key();
        assert_eq!(call.json(&body).await.expect(201)["description"], text);
    }
}

#[tokio::test]
async fn the_other_routes_refuse_what_they_do_not_take() {
    let door = Door::open().await;
    let (partner, alice, _) = door.alice_and_bob("10.00").await;
    let before = door.head().await;
    let freeze = format!("/v1/wallets/{alice}/freeze");
    let settle = "/v1/transactions/txn_0192f0c1-2d3e-7abc-8def-0123456789ab/settle";
    let cases = [
        (&partner.token, "/v1/wallets", json!({ "userId": "", "currency": "EUR" }), 422, "invalid-field"),
        (&partner.token, "/v1/wallets", json!({ "userId": "u".repeat(129), "currency": "EUR" }), 422, "invalid-field"),
        (&partner.token, "/v1/wallets", json!({ "userId": "u\u{7f}", "currency": "EUR" }), 422, "invalid-character"),
        (&partner.token, "/v1/wallets", json!({ "userId": "u", "currency": "ZZZ" }), 422, "currency-unknown"),
        (&partner.token, "/v1/wallets", json!({ "userId": "u", "currency": "USD" }), 422, "currency-not-enabled"),
        (&partner.token, "/v1/wallets", json!({ "user": "u", "currency": "EUR" }), 422, "unknown-field"),
        (&partner.token, &freeze, json!({}), 422, "invalid-field"),
        (&partner.token, &freeze, json!({ "reason": "r".repeat(513) }), 422, "invalid-field"),
        (&partner.token, "/v1/wallets/nonsense/freeze", json!({ "reason": "r" }), 400, "invalid-id"),
        (
            &partner.token,
            "/v1/transactions/top-up",
            json!({ "walletId": alice, "amount": "1.00", "currency": "EUR", "returnUrl": "http://shop.example/" }),
            422,
            "invalid-field",
        ),
        (
            &partner.token,
            "/v1/transactions/top-up",
            json!({ "walletId": alice, "amount": "0", "currency": "EUR" }),
            422,
            "amount-not-positive",
        ),
        (&door.admin, "/v1/partners", json!({ "name": "", "currencies": ["EUR"] }), 422, "invalid-field"),
        (&door.admin, "/v1/partners", json!({ "name": "x", "currencies": [] }), 422, "invalid-field"),
        (&door.admin, "/v1/partners", json!({ "name": "x", "currencies": ["EUR", "EUR"] }), 422, "invalid-field"),
        (&door.admin, "/v1/partners", json!({ "name": "x", "currencies": ["EUR", "ZZZ"] }), 422, "currency-unknown"),
        (&door.admin, "/v1/partners", json!({ "name": "x", "currencies": vec!["EUR"; 51] }), 422, "too-many-items"),
        (&door.workflow, settle, json!({ "amount": "1.00", "currency": "EUR" }), 422, "invalid-field"),
        (&door.workflow, "/v1/transactions/nonsense/expire", json!({}), 400, "invalid-id"),
        (
            &door.workflow,
            "/v1/transactions/txn_0192f0c1-2d3e-7abc-8def-0123456789ab/expire",
            json!({ "why": 1 }),
            422,
            "unknown-field",
        ),
    ];
    for (token, path, body, status, slug) in cases {
        // Without a key where none is needed, so that what the ledger refuses leaves no trace either.
        let call = door.post(path).token(token);
        let call = if path.starts_with("/v1/transactions") { call.new_key() } else { call };
        call.json(&body).await.problem(status, slug);
    }
    assert_eq!(door.head().await, before, "nothing was written");
    let answer = door.get("/v1/transactions/transfer").empty().await;
    answer.problem(405, "method-not-allowed");
    assert_eq!(answer.header("allow"), Some("POST"));
    door.post("/v1/transactions/teleport").json(&json!({})).await.problem(404, "not-found");
}
