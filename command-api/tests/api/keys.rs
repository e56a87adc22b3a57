//! Idempotency keys at the edge; that a key moves money once is a claim of `money.rs`.

use serde_json::json;

use crate::door::Door;
use crate::money::transfer;

#[tokio::test]
async fn a_key_repeats_its_first_answer_however_the_body_is_typed() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let call = || door.post("/v1/transactions/transfer").token(&partner.token).key("k");
    let first = call().json(&transfer(&alice, &bob, "1.00")).await;
    first.expect(201);

    call().json(&transfer(&alice, &bob, "1.00")).await.repeats(&first);
    let typed_otherwise = format!(
        "{{ \"amount\":\"1.00\",\n\t\"currency\": \"EUR\", \"toWalletId\": \"{bob}\", \"fromWalletId\": \"\\u0077{}\" }}",
        &alice[1..]
    );
    call().text(&typed_otherwise).await.repeats(&first);
    assert_eq!(door.balances().await[&bob], 100);
}

#[tokio::test]
async fn a_key_is_for_one_request_of_one_client() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let other = door.partner(&["EUR"]).await;
    let (theirs, their_other) = (door.wallet(&other, "x", "EUR").await, door.wallet(&other, "y", "EUR").await);
    door.fund(&theirs, "10.00", "EUR").await;
    let first = door
        .post("/v1/transactions/transfer")
        .token(&partner.token)
        .key("k")
        .json(&transfer(&alice, &bob, "1.00"))
        .await;
    first.expect(201);
    let before = door.head().await;

    let call = |path: &str| door.post(path).token(&partner.token).key("k");
    call("/v1/transactions/transfer")
        .json(&transfer(&alice, &bob, "2.00"))
        .await
        .problem(422, "idempotency-key-reused");
    let for_user = call("/v1/transactions/transfer").user("alice");
    for_user.json(&transfer(&alice, &bob, "1.00")).await.problem(422, "idempotency-key-reused");
    let top_up = json!({ "walletId": alice, "amount": "1.00", "currency": "EUR" });
    call("/v1/transactions/top-up").json(&top_up).await.problem(422, "idempotency-key-reused");
    assert_eq!(door.head().await, before, "nothing was written");

    // The first answer is intact, and the same key of another client is another key.
    call("/v1/transactions/transfer").json(&transfer(&alice, &bob, "1.00")).await.repeats(&first);
    let independent = door.post("/v1/transactions/transfer").token(&other.token).key("k");
    let independent = independent.json(&transfer(&theirs, &their_other, "1.00")).await;
    independent.expect(201);
    assert!(!independent.replayed());
}

#[tokio::test]
async fn a_key_is_known_after_a_restart() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let done = door
        .post("/v1/transactions/transfer")
        .token(&partner.token)
        .key("done")
        .json(&transfer(&alice, &bob, "1.00"))
        .await;
    let declined = door
        .post("/v1/transactions/transfer")
        .token(&partner.token)
        .key("declined")
        .json(&transfer(&alice, &bob, "50.00"))
        .await;
    done.expect(201);
    declined.problem(422, "insufficient-funds");

    let door = door.restart().await;
    let call = |key: &str| door.post("/v1/transactions/transfer").token(&partner.token).key(key);
    call("done").json(&transfer(&alice, &bob, "1.00")).await.repeats(&done);
    call("declined").json(&transfer(&alice, &bob, "50.00")).await.repeats(&declined);
    call("done").json(&transfer(&alice, &bob, "3.00")).await.problem(422, "idempotency-key-reused");
    assert_eq!(door.balances().await[&bob], 100);
}

#[tokio::test]
async fn where_money_can_move_a_good_key_is_required() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let pending = "txn_0192f0c1-2d3e-7abc-8def-0123456789ab";
    let before = door.head().await;
    let routes = [
        ("/v1/transactions/transfer".to_owned(), &partner.token, transfer(&alice, &bob, "1.00")),
        (
            "/v1/transactions/adjustment".to_owned(),
            &door.admin,
            json!({ "walletId": alice, "direction": "CREDIT", "amount": "1.00", "currency": "EUR", "reason": "x" }),
        ),
        (
            "/v1/transactions/top-up".to_owned(),
            &partner.token,
            json!({ "walletId": alice, "amount": "1.00", "currency": "EUR" }),
        ),
        (
            format!("/v1/transactions/{pending}/settle"),
            &door.workflow,
            json!({ "amount": "1.00", "currency": "EUR", "bankReference": "b" }),
        ),
        (format!("/v1/transactions/{pending}/fail"), &door.workflow, json!({ "code": "declined", "detail": "x" })),
        (format!("/v1/transactions/{pending}/expire"), &door.workflow, json!({})),
    ];
    for (path, token, body) in &routes {
        door.post(path).token(token).json(body).await.problem(400, "idempotency-key-missing");
    }
    let (path, token, body) = &routes[0];
    for bad in ["", "with space", "k\u{e9}y", &"k".repeat(256)] {
        door.post(path).token(token).key(bad).json(body).await.problem(400, "idempotency-key-invalid");
    }
    door.post(path).token(token).key("one").key("two").json(body).await.problem(400, "idempotency-key-invalid");
    assert_eq!(door.head().await, before, "nothing was written");
    door.post(path).token(token).key(&"k".repeat(255)).json(body).await.expect(201);
}
