//! Top-ups from the ledger's side: begun by a partner, ended by a workflow.

use serde_json::{Value, json};

use crate::door::{Answer, BANK_URL, Door, Partner};

async fn top_up(door: &Door, partner: &Partner, wallet: &str, key: &str) -> Answer {
    let body = json!({
        "walletId": wallet, "amount": "25.00", "currency": "EUR", "returnUrl": "https://shop.example/paid?id=1",
        "reference": "cart-7", "metadata": { "cart": 7 },
    });
    door.post("/v1/transactions/top-up").token(&partner.token).key(key).json(&body).await
}

fn id(answer: &Answer) -> String {
    answer.expect(202)["id"].as_str().unwrap().to_owned()
}

async fn end(door: &Door, transaction: &str, how: &str, key: &str, body: &Value) -> Answer {
    door.post(&format!("/v1/transactions/{transaction}/{how}")).token(&door.workflow).key(key).json(body).await
}

fn settlement(amount: &str) -> Value {
    json!({ "amount": amount, "currency": "EUR", "bankReference": "bnk-1" })
}

#[tokio::test]
async fn a_top_up_begins_pending_and_says_where_to_pay() {
    let door = Door::open().await;
    let (partner, alice, _) = door.alice_and_bob("0.00").await;
    let first = top_up(&door, &partner, &alice, "k").await;
    let body = first.expect(202);
    assert_eq!((&body["type"], &body["status"]), (&json!("TOP_UP"), &json!("PENDING")));
    assert_eq!(
        (&body["amount"], &body["reference"], &body["metadata"]),
        (&json!("25.00"), &json!("cart-7"), &json!({ "cart": 7 }))
    );
    assert_eq!(body["entries"], json!([]));
    assert_eq!(body.get("completedAt"), None);
    let token = body["token"].as_str().unwrap();
    assert!(
        22 < token.len() && token.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)),
        "{token}"
    );
    assert_eq!(body["redirectUrl"], format!("{BANK_URL}/bank/pay/{token}").as_str());
    assert_eq!(first.header("location"), Some(format!("/v1/transactions/{}", id(&first)).as_str()));
    assert!(door.balances().await.is_empty(), "nothing has moved");

    let other = top_up(&door, &partner, &alice, "k2").await;
    assert_ne!(other.json()["token"], body["token"]);
    // Ended since then, its key still answers as it began.
    end(&door, &id(&first), "settle", "s", &settlement("25.00")).await.expect(200);
    top_up(&door, &partner, &alice, "k").await.repeats(&first);
}

#[tokio::test]
async fn a_settled_top_up_brings_exactly_the_money_once() {
    let door = Door::open().await;
    let (partner, alice, _) = door.alice_and_bob("0.00").await;
    let transaction = id(&top_up(&door, &partner, &alice, "k").await);

    end(&door, &transaction, "settle", "wrong", &settlement("24.99")).await.problem(422, "callback-mismatch");
    let in_dollars = json!({ "amount": "25.00", "currency": "USD", "bankReference": "bnk-1" });
    end(&door, &transaction, "settle", "wrong-2", &in_dollars).await.problem(422, "callback-mismatch");
    assert!(door.balances().await.is_empty());

    let settled = end(&door, &transaction, "settle", "s", &settlement("25.00")).await;
    let body = settled.expect(200);
    assert_eq!((&body["status"], &body["id"]), (&json!("SUCCESS"), &json!(transaction)));
    assert!(body["createdAt"].as_str() < body["completedAt"].as_str());
    assert_eq!(body["ledgerPosition"], settled.position());
    let mine = body["entries"].as_array().unwrap().iter().find(|entry| entry["walletId"] == alice.as_str()).unwrap();
    assert_eq!((&mine["direction"], &mine["balanceAfter"]), (&json!("CREDIT"), &json!("25.00")));

    end(&door, &transaction, "settle", "s", &settlement("25.00")).await.repeats(&settled);
    for (how, body) in [
        ("settle", settlement("25.00")),
        ("fail", json!({ "code": "declined", "detail": "no" })),
        ("expire", json!({})),
    ] {
        let late = end(&door, &transaction, how, how, &body).await;
        assert_eq!(late.problem(409, "invalid-transition").get("transactionId"), None);
        end(&door, &transaction, how, how, &body).await.repeats(&late);
    }
    assert_eq!(door.balances().await[&alice], 2_500);
}

#[tokio::test]
async fn a_failed_or_expired_top_up_brings_nothing() {
    let door = Door::open().await;
    let (partner, alice, _) = door.alice_and_bob("0.00").await;
    let failed = id(&top_up(&door, &partner, &alice, "a").await);
    let failure = json!({ "code": "card-declined", "detail": "the payer's bank declined" });
    let answer = end(&door, &failed, "fail", "f", &failure).await;
    let body = answer.expect(200);
    assert_eq!((&body["status"], &body["failure"]), (&json!("FAILED"), &failure));
    end(&door, &failed, "fail", "f", &failure).await.repeats(&answer);

    let expired = id(&top_up(&door, &partner, &alice, "b").await);
    let answer = end(&door, &expired, "expire", "e", &json!({})).await;
    assert_eq!(answer.expect(200)["status"], "EXPIRED");
    end(&door, &expired, "settle", "late", &settlement("25.00")).await.problem(409, "invalid-transition");
    assert!(door.balances().await.is_empty());
}

#[tokio::test]
async fn what_was_never_requested_cannot_be_ended() {
    let door = Door::open().await;
    let nowhere = "txn_0192f0c1-2d3e-7abc-8def-0123456789ab";
    let answer = end(&door, nowhere, "settle", "s", &settlement("25.00")).await;
    answer.problem(404, "transaction-not-found");
    end(&door, nowhere, "settle", "s", &settlement("25.00")).await.repeats(&answer);
}

#[tokio::test]
async fn a_wallet_that_expects_money_stays_open() {
    let door = Door::open().await;
    let (partner, alice, _) = door.alice_and_bob("0.00").await;
    let transaction = id(&top_up(&door, &partner, &alice, "k").await);
    let close = || door.post(&format!("/v1/wallets/{alice}/close")).token(&partner.token);
    close().json(&json!({ "reason": "x" })).await.problem(409, "wallet-not-empty");
    end(&door, &transaction, "expire", "e", &json!({})).await.expect(200);
    close().json(&json!({ "reason": "x" })).await.expect(200);
}

#[tokio::test]
async fn what_the_system_holds_at_the_bank_is_not_shown_to_partners() {
    let door = Door::open().await;
    let (partner, alice, _) = door.alice_and_bob("0.00").await;
    let transaction = id(&top_up(&door, &partner, &alice, "k").await);
    let body = end(&door, &transaction, "settle", "s", &settlement("25.00")).await.expect(200);
    let theirs = body["entries"].as_array().unwrap().iter().find(|entry| entry["walletId"] != alice.as_str()).unwrap();
    assert_eq!(theirs.get("balanceAfter"), None);
}
