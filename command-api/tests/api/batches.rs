//! Batches: many transfers in one command, each for itself or all or none.

use serde_json::{Value, json};

use crate::door::{Answer, Door, Partner};
use crate::money::transfer;

fn batch(atomic: bool, transactions: &[Value]) -> Value {
    json!({ "atomic": atomic, "transactions": transactions })
}

async fn send(door: &Door, partner: &Partner, key: &str, body: &Value) -> Answer {
    door.post("/v1/transactions/batch").token(&partner.token).key(key).json(body).await
}

fn referenced(mut transfer: Value, reference: &str) -> Value {
    transfer["reference"] = json!(reference);
    transfer
}

#[tokio::test]
async fn without_atomic_each_item_is_for_itself_and_later_ones_spend_what_earlier_ones_brought() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let before = door.head().await;
    let body = batch(
        false,
        &[
            referenced(transfer(&alice, &bob, "4.00"), "first"),
            transfer(&alice, &bob, "7.00"),
            referenced(transfer(&bob, &alice, "3.50"), "third"),
            referenced(transfer(&alice, &alice, "1.00"), "to itself"),
            transfer(&alice, "wal_0192f0c1-2d3e-7abc-8def-0123456789ab", "1.00"),
        ],
    );
    let first = send(&door, &partner, "k", &body).await;
    let answer = first.expect(201);
    assert_eq!(first.header("location"), None, "several things have no one place");
    let events = door.events_after(before).await;
    let types: Vec<&str> = events.iter().map(|event| event.event_type.as_ref()).collect();
    let (posted, declined) = ("TransactionPosted", "TransactionDeclined");
    assert_eq!(types, [posted, declined, posted, declined, declined]);
    assert_eq!(first.position(), before + 5);
    assert_eq!(events.iter().filter(|event| event.key_hash.is_some()).count(), 1, "the key stands on the first alone");
    assert!(events.iter().all(|event| event.command_id == events[0].command_id));

    let ids: Vec<&str> = events.iter().map(|event| event.aggregate_id.as_str()).collect();
    let problem = |slug: &str, title: &str, status: u16, detail: &str| json!({ "type": format!("/problems/{slug}"), "title": title, "status": status, "detail": detail });
    let expected = json!({ "results": [
        { "reference": "first", "status": "SUCCESS", "transactionId": ids[0] },
        { "status": "FAILED", "transactionId": ids[1], "problem":
            problem("insufficient-funds", "Insufficient funds", 422, "available 6.00 does not cover 7.00") },
        { "reference": "third", "status": "SUCCESS", "transactionId": ids[2] },
        { "reference": "to itself", "status": "FAILED", "transactionId": ids[3], "problem":
            problem("same-wallet", "Same wallet", 422, "money cannot move from a wallet to itself") },
        { "status": "FAILED", "transactionId": ids[4], "problem":
            problem("wallet-not-found", "Wallet not found", 404, "no such wallet") },
    ] });
    assert_eq!(answer, expected);
    let balances = door.balances().await;
    assert_eq!((balances[&alice], balances[&bob]), (950, 50));

    // Enough for the second by now: what was refused stays refused.
    door.fund(&alice, "100.00", "EUR").await;
    send(&door, &partner, "k", &body).await.repeats(&first);
    let other = batch(true, body["transactions"].as_array().unwrap());
    send(&door, &partner, "k", &other).await.problem(422, "idempotency-key-reused");
}

/// Case 9 of the money cases.
#[tokio::test]
async fn an_atomic_batch_with_a_refused_item_moves_nothing_and_its_key_keeps_the_refusal() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let (before, balances) = (door.head().await, door.balances().await);
    let items = [transfer(&alice, &bob, "4.00"), transfer(&alice, &bob, "7.00"), transfer(&alice, &bob, "1.00")];
    let body = batch(true, &items);
    let first = send(&door, &partner, "k", &body).await;
    let problem = first.problem(422, "insufficient-funds");
    let detail = "available 6.00 does not cover 7.00";
    assert_eq!(problem["errors"], json!([{ "pointer": "/transactions/1", "detail": detail }]));
    assert_eq!((&problem["detail"], problem.get("transactionId")), (&json!(detail), None));
    let events = door.events_after(before).await;
    let types: Vec<&str> = events.iter().map(|event| event.event_type.as_ref()).collect();
    assert_eq!(
        types,
        ["BatchDeclined"],
        "it leaves the refusal alone: no money event, and nothing that a webhook tells"
    );
    assert_eq!(first.position(), events[0].position);
    assert_eq!(door.balances().await, balances);

    door.fund(&alice, "100.00", "EUR").await;
    let funded = door.balances().await;
    send(&door, &partner, "k", &body).await.repeats(&first);
    assert_eq!(door.balances().await, funded, "a refusal is final for its key");
    let again = send(&door, &partner, "k2", &body).await.expect(201);
    let statuses: Vec<&Value> = again["results"].as_array().unwrap().iter().map(|result| &result["status"]).collect();
    assert_eq!(statuses, ["SUCCESS", "SUCCESS", "SUCCESS"]);
    assert_eq!(door.balances().await[&bob], 1_200);
}

#[tokio::test]
async fn a_refused_atomic_batch_is_422_whatever_its_item_is_refused_for() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let other = door.partner(&["EUR"]).await;
    let theirs = door.wallet(&other, "alice", "EUR").await;
    let frozen = door.wallet(&partner, "carol", "EUR").await;
    let freeze = door.post(&format!("/v1/wallets/{frozen}/freeze")).token(&partner.token);
    freeze.json(&json!({ "reason": "test" })).await.expect(200);
    let balances = door.balances().await;
    for (key, from, to, slug) in [
        ("another partner's", &alice, &theirs, "wallet-not-found"),
        ("frozen", &alice, &frozen, "wallet-frozen"),
        ("itself", &alice, &alice, "same-wallet"),
        ("another user's", &bob, &alice, "wallet-not-owned"),
    ] {
        let body = batch(true, &[transfer(&alice, &bob, "1.00"), transfer(from, to, "0.50")]);
        let key = key.replace(' ', "-");
        let call = || door.post("/v1/transactions/batch").token(&partner.token).key(&key).user("alice");
        let first = call().json(&body).await;
        let problem = first.problem(422, slug);
        assert_eq!(problem["errors"][0]["pointer"], "/transactions/1", "{problem}");
        call().json(&body).await.repeats(&first);
    }
    assert_eq!(door.balances().await, balances);
}

#[tokio::test]
async fn a_malformed_item_refuses_the_whole_batch_with_its_place_and_nothing_is_written() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let before = door.head().await;
    let good = transfer(&alice, &bob, "1.00");
    for (field, value, status, slug) in [
        ("amount", json!("0"), 422, "amount-not-positive"),
        ("amount", json!(1), 422, "amount-format"),
        ("amount", json!("1.001"), 422, "amount-precision"),
        ("amount", Value::Null, 422, "invalid-field"),
        ("currency", json!("ZZZ"), 422, "currency-unknown"),
        ("fromWalletId", json!("nonsense"), 400, "invalid-id"),
        ("toWalletId", json!(7), 422, "invalid-field"),
        ("reference", json!("two\nlines"), 422, "invalid-character"),
        ("metadata", json!({ "k": "v".repeat(513) }), 422, "metadata-too-large"),
        ("effectiveAt", json!("2999-01-01T00:00:00Z"), 422, "time-range-invalid"),
        ("fee", json!("0.01"), 422, "unknown-field"),
    ] {
        for atomic in [true, false] {
            let mut bad = good.clone();
            bad[field] = value.clone();
            let mut items = vec![good.clone(); 9];
            items[7] = bad;
            let problem = send(&door, &partner, "k", &batch(atomic, &items)).await.problem(status, slug);
            assert_eq!(problem["errors"][0]["pointer"], format!("/transactions/7/{field}"), "{problem}");
        }
    }
    let mut missing = good.clone();
    missing.as_object_mut().unwrap().remove("currency");
    let problem = send(&door, &partner, "k", &batch(false, &[missing])).await.problem(422, "invalid-field");
    assert_eq!(problem["errors"][0]["pointer"], "/transactions/0/currency");
    for (body, status, slug, pointer) in [
        (json!({ "transactions": [good] }), 422, "invalid-field", "/atomic"),
        (json!({ "atomic": "true", "transactions": [good] }), 422, "invalid-field", "/atomic"),
        (json!({ "atomic": true }), 422, "invalid-field", "/transactions"),
        (json!({ "atomic": true, "transactions": [] }), 422, "invalid-field", "/transactions"),
        (json!({ "atomic": true, "transactions": null }), 422, "invalid-field", "/transactions"),
        (json!({ "atomic": true, "transactions": good }), 422, "invalid-field", "/transactions"),
        (json!({ "atomic": true, "transactions": ["x"] }), 422, "invalid-field", "/transactions/0"),
        (json!({ "atomic": true, "transactions": [good], "x": 1 }), 422, "unknown-field", "/x"),
        (batch(true, &vec![json!("x"); 1_001]), 422, "too-many-items", "/transactions"),
    ] {
        let problem = send(&door, &partner, "k", &body).await.problem(status, slug);
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
    }
    let text = batch(false, std::slice::from_ref(&good)).to_string();
    let twice = text.replacen("\"amount\":", "\"amount\":\"2.00\",\"amount\":", 1);
    let call = door.post("/v1/transactions/batch").token(&partner.token).key("k");
    let problem = call.text(&twice).await.problem(400, "duplicate-field");
    assert_eq!(problem["errors"][0]["pointer"], "/transactions/0/amount");
    let keyless = door.post("/v1/transactions/batch").token(&partner.token);
    keyless.json(&batch(false, std::slice::from_ref(&good))).await.problem(400, "idempotency-key-missing");
    let workflow = door.post("/v1/transactions/batch").token(&door.workflow).key("k");
    workflow.json(&batch(false, std::slice::from_ref(&good))).await.problem(403, "insufficient-scope");
    assert_eq!(door.head().await, before, "nothing was written");

    // None of these has used the key up.
    send(&door, &partner, "k", &batch(false, &[good])).await.expect(201);
}

#[tokio::test]
async fn a_thousand_items_go_in_at_once_and_come_back_in_their_order() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let before = door.head().await;
    // The last hundred find nothing left. Some 1,000 bytes each: far more than 64 KiB in all, and nearly 1 MiB.
    let items: Vec<Value> = (0..1_000)
        .map(|item| {
            let mut transfer = referenced(transfer(&alice, &bob, "0.01"), &format!("item-{item}"));
            transfer["amount"] = json!(if item < 900 { "0.01" } else { "1.01" });
            transfer["description"] = json!("d".repeat(500));
            transfer["metadata"] = json!({ "filler": "m".repeat(300) });
            transfer
        })
        .collect();
    let body = batch(false, &items);
    let length = body.to_string().len();
    assert!(900 * 1024 < length && length <= 1024 * 1024, "{length}");
    let first = send(&door, &partner, "k", &body).await;
    let answer = first.expect(201);
    let results = answer["results"].as_array().unwrap();
    assert_eq!(results.len(), 1_000);
    for (item, result) in results.iter().enumerate() {
        assert_eq!(result["reference"], format!("item-{item}"));
        assert_eq!(result["status"], if item < 900 { "SUCCESS" } else { "FAILED" }, "{result}");
    }
    assert_eq!(door.head().await, before + 1_000);
    assert_eq!(
        door.log.head().await.unwrap().commit,
        door.log.commit_of(before + 1).await.unwrap().unwrap(),
        "one commit"
    );
    assert_eq!(door.balances().await[&bob], 900);
    send(&door, &partner, "k", &body).await.repeats(&first);

    let door = door.restart().await;
    send(&door, &partner, "k", &body).await.repeats(&first);
    assert_eq!(door.balances().await[&bob], 900);
}

#[tokio::test]
async fn only_a_batch_may_be_larger_than_64_kib_and_no_body_is_larger_than_1_mib() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let before = door.head().await;
    let padded = |body: &Value, length: usize| {
        let text = body.to_string();
        format!("{text}{}", " ".repeat(length - text.len()))
    };
    let one = transfer(&alice, &bob, "1.00");
    let single = door.post("/v1/transactions/transfer").token(&partner.token).key("single");
    single.text(&padded(&one, 64 * 1024 + 1)).await.problem(413, "payload-too-large");
    let body = batch(false, &[one]);
    let many = door.post("/v1/transactions/batch").token(&partner.token).key("many");
    many.text(&padded(&body, 1024 * 1024 + 1)).await.problem(413, "payload-too-large");
    assert_eq!(door.head().await, before, "nothing was written");
    let many = door.post("/v1/transactions/batch").token(&partner.token).key("many");
    many.text(&padded(&body, 1024 * 1024)).await.expect(201);
}
