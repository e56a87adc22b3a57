//! A wallet's life.

use serde_json::json;

use crate::door::Door;
use crate::money::transfer;

#[tokio::test]
async fn an_opened_wallet_is_empty_active_and_its_users() {
    let door = Door::open().await;
    let partner = door.partner(&["JPY"]).await;
    let body = json!({ "userId": "üser 1", "currency": "JPY", "metadata": { "note": "two\nlines" } });
    let call = || door.post("/v1/wallets").token(&partner.token).key("open");
    let first = call().json(&body).await;
    let wallet = first.expect(201);
    assert_eq!(wallet["userId"], "üser 1");
    assert_eq!(wallet["partnerId"], partner.id.as_str());
    assert_eq!(wallet["status"], "ACTIVE");
    assert_eq!((&wallet["balance"], &wallet["held"], &wallet["available"]), (&json!("0"), &json!("0"), &json!("0")));
    assert_eq!(wallet["metadata"], body["metadata"]);
    assert_eq!(wallet["version"], 1);
    assert_eq!(first.header("location"), Some(format!("/v1/wallets/{}", wallet["id"].as_str().unwrap()).as_str()));
    call().json(&body).await.repeats(&first);
}

#[tokio::test]
async fn without_a_key_a_wallet_is_opened_each_time_and_a_refusal_leaves_no_trace() {
    let door = Door::open().await;
    let partner = door.partner(&["EUR"]).await;
    let first = door.wallet(&partner, "alice", "EUR").await;
    assert_ne!(door.wallet(&partner, "alice", "EUR").await, first);
    let before = door.head().await;
    let call = door.post(&format!("/v1/wallets/{first}/unfreeze")).token(&partner.token).header("x-request-id", "mine");
    let refused = call.json(&json!({ "reason": "x" })).await;
    assert_eq!(refused.problem(409, "invalid-transition")["requestId"], "mine");
    assert_eq!(refused.header("ledger-position"), None);
    assert_eq!(door.head().await, before);
}

#[tokio::test]
async fn a_frozen_wallet_moves_nothing_until_it_is_unfrozen() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let change =
        |what: &str, key: &str| door.post(&format!("/v1/wallets/{alice}/{what}")).token(&partner.token).key(key);
    let reason = json!({ "reason": "stolen\ncard" });

    let frozen = change("freeze", "f").json(&reason).await;
    let wallet = frozen.expect(200);
    assert_eq!((&wallet["status"], &wallet["balance"]), (&json!("FROZEN"), &json!("10.00")));
    assert_eq!(wallet["version"], 3, "opened, funded, frozen");
    change("freeze", "f2").json(&reason).await.problem(409, "wallet-frozen");
    for (from, to) in [(&alice, &bob), (&bob, &alice)] {
        let call = door.post("/v1/transactions/transfer").token(&partner.token).new_key();
        call.json(&transfer(from, to, "1.00")).await.problem(409, "wallet-frozen");
    }

    assert_eq!(change("unfreeze", "u").json(&reason).await.expect(200)["status"], "ACTIVE");
    let call = door.post("/v1/transactions/transfer").token(&partner.token).new_key();
    call.json(&transfer(&alice, &bob, "1.00")).await.expect(201);
    // What the key answered then, though the wallet has moved on.
    change("freeze", "f").json(&reason).await.repeats(&frozen);
}

#[tokio::test]
async fn a_wallet_is_closed_when_it_is_empty_and_then_for_good() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let change = |what: &str| door.post(&format!("/v1/wallets/{alice}/{what}")).token(&partner.token).new_key();
    let reason = json!({ "reason": "leaving" });
    let refused = change("close").json(&reason).await;
    assert_eq!(refused.problem(409, "wallet-not-empty").get("transactionId"), None);
    let call = door.post("/v1/transactions/transfer").token(&partner.token).new_key();
    call.json(&transfer(&alice, &bob, "10.00")).await.expect(201);

    let closed = change("close").json(&reason).await.expect(200);
    assert_eq!((&closed["status"], &closed["balance"]), (&json!("CLOSED"), &json!("0.00")));
    for what in ["close", "freeze", "unfreeze"] {
        change(what).json(&reason).await.problem(409, "wallet-closed");
    }
    let call = door.post("/v1/transactions/transfer").token(&partner.token).new_key();
    call.json(&transfer(&bob, &alice, "1.00")).await.problem(409, "wallet-closed");
}

#[tokio::test]
async fn another_partners_wallet_is_not_there() {
    let door = Door::open().await;
    let (partner, alice, _) = door.alice_and_bob("0.00").await;
    let other = door.partner(&["EUR"]).await;
    for what in ["freeze", "unfreeze", "close"] {
        let call = door.post(&format!("/v1/wallets/{alice}/{what}")).token(&other.token);
        call.json(&json!({ "reason": "x" })).await.problem(404, "wallet-not-found");
    }
    let own = door.post(&format!("/v1/wallets/{alice}/freeze")).token(&partner.token);
    assert_eq!(own.json(&json!({ "reason": "x" })).await.expect(200)["status"], "FROZEN");
}
