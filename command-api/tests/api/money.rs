//! The money cases that concern commands.

use futures::future::join_all;
use serde_json::{Value, json};

use crate::door::Door;

pub(crate) fn transfer(from: &str, to: &str, amount: &str) -> Value {
    json!({ "fromWalletId": from, "toWalletId": to, "amount": amount, "currency": "EUR" })
}

#[tokio::test]
async fn a_transfer_moves_money_and_is_one_event() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let before = door.head().await;

    let body = json!({
        "fromWalletId": alice, "toWalletId": bob, "amount": "0.70", "currency": "EUR", "reference": "order-1",
        "description": "two lines\nof text", "metadata": { "a": [1, true, null] }, "effectiveAt": "2020-01-01T00:00:00Z",
    });
    let call = door.post("/v1/transactions/transfer").token(&partner.token).key("k-1").user("alice");
    let answer = call.json(&body).await;
    let transaction = answer.expect(201);

    assert_eq!(transaction["type"], "TRANSFER");
    assert_eq!(transaction["status"], "SUCCESS");
    assert_eq!(transaction["amount"], "0.70");
    assert_eq!(transaction["userId"], "alice");
    assert_eq!(transaction["reference"], "order-1");
    assert_eq!(transaction["description"], "two lines\nof text");
    assert_eq!(transaction["metadata"], body["metadata"]);
    assert_eq!(transaction["effectiveAt"], "2020-01-01T00:00:00.000000Z");
    let entry = |wallet: &str, direction, after| json!({ "walletId": wallet, "direction": direction, "amount": "0.70", "balanceAfter": after });
    assert_eq!(transaction["entries"], json!([entry(&alice, "DEBIT", "9.30"), entry(&bob, "CREDIT", "0.70")]));
    assert_eq!(
        answer.header("location"),
        Some(format!("/v1/transactions/{}", transaction["id"].as_str().unwrap()).as_str())
    );

    let events = door.events_after(before).await;
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].event_type, "TransactionPosted");
    assert_eq!(events[0].position, answer.position());
    let metadata: Value = serde_json::from_str(&events[0].metadata).unwrap();
    assert_eq!(metadata["requestId"], answer.header("x-request-id").unwrap());
    assert_eq!(metadata["userId"], "alice");
    let balances = door.balances().await;
    assert_eq!((balances[&alice], balances[&bob]), (930, 70));
}

#[tokio::test]
async fn a_transfer_beyond_the_available_amount_is_refused_and_kept_without_moving_money() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("0.00").await;
    let before = door.head().await;

    let first = door.post("/v1/transactions/transfer").token(&partner.token).key("k").header("x-request-id", "first");
    let first = first.json(&transfer(&alice, &bob, "0.01")).await;
    let problem = first.problem(422, "insufficient-funds");
    assert_eq!(problem["requestId"], "first");
    assert_eq!(problem["instance"], "/v1/transactions/transfer");

    let events = door.events_after(before).await;
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].event_type, "TransactionDeclined");
    assert_eq!(problem["transactionId"], events[0].aggregate_id.as_str());
    assert!(door.balances().await.is_empty());

    // Funded since then: the refusal stays what the key says, down to the first call's request id.
    door.fund(&alice, "1.00", "EUR").await;
    let again = door.post("/v1/transactions/transfer").token(&partner.token).key("k").header("x-request-id", "second");
    let again = again.json(&transfer(&alice, &bob, "0.01")).await;
    again.repeats(&first);
    assert_eq!(again.header("x-request-id"), Some("second"));
}

#[tokio::test]
async fn fifty_calls_with_one_key_move_money_once() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let body = transfer(&alice, &bob, "1.00");
    let calls = (0..50).map(|_| door.post("/v1/transactions/transfer").token(&partner.token).key("one").json(&body));
    let answers = join_all(calls).await;

    let mut bodies: Vec<&str> = Vec::new();
    for answer in &answers {
        match answer.status.as_u16() {
            201 => bodies.push(&answer.text),
            409 => assert_eq!(answer.header("retry-after"), Some("1"), "{}", answer.text),
            other => panic!("{other}: {}", answer.text),
        }
    }
    assert!(!bodies.is_empty());
    assert!(bodies.iter().all(|body| *body == bodies[0]), "one transaction, one answer");
    assert_eq!(answers.iter().filter(|answer| answer.status == 201 && !answer.replayed()).count(), 1);
    assert_eq!(door.balances().await[&bob], 100);
}

#[tokio::test]
async fn what_the_ledger_refuses_has_its_own_problem_and_moves_nothing() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let other = door.partner(&["EUR"]).await;
    let theirs = door.wallet(&other, "alice", "EUR").await;
    let dollars_of = door.partner(&["EUR", "USD"]).await;
    let euros = door.wallet(&dollars_of, "alice", "EUR").await;
    let dollars = door.wallet(&dollars_of, "alice", "USD").await;
    let (frozen, closed) = (door.wallet(&partner, "carol", "EUR").await, door.wallet(&partner, "dave", "EUR").await);
    for (wallet, what) in [(&frozen, "freeze"), (&closed, "close")] {
        let call = door.post(&format!("/v1/wallets/{wallet}/{what}")).token(&partner.token);
        call.json(&json!({ "reason": "test" })).await.expect(200);
    }
    let adjustments = {
        use ledger_core::{WalletId, WalletKind};
        WalletId::system(WalletKind::Adjustments, "EUR".parse().unwrap()).to_string()
    };
    let nowhere = "wal_0192f0c1-2d3e-7abc-8def-0123456789ab";
    let balances = door.balances().await;

    let cases = [
        ("the paying wallet does not exist", &partner, None, nowhere, bob.as_str(), 404, "wallet-not-found"),
        ("the receiving wallet does not exist", &partner, None, &alice, nowhere, 404, "wallet-not-found"),
        ("the paying wallet is another partner's", &partner, None, &theirs, &bob, 404, "wallet-not-found"),
        ("the receiving wallet is another partner's", &partner, None, &alice, &theirs, 404, "wallet-not-found"),
        ("the paying wallet is the system's", &partner, None, &adjustments, &bob, 404, "wallet-not-found"),
        ("the paying wallet is another user's", &partner, Some("bob"), &alice, &bob, 403, "wallet-not-owned"),
        ("the currencies differ", &dollars_of, None, &euros, &dollars, 422, "currency-mismatch"),
        ("the receiving wallet is frozen", &partner, None, &alice, &frozen, 409, "wallet-frozen"),
        ("the paying wallet is frozen", &partner, None, &frozen, &alice, 409, "wallet-frozen"),
        ("the receiving wallet is closed", &partner, None, &alice, &closed, 409, "wallet-closed"),
        ("the paying wallet has nothing", &partner, None, &bob, &alice, 422, "insufficient-funds"),
    ];
    for (what, partner, user, from, to, status, slug) in cases {
        let call = || {
            let call =
                door.post("/v1/transactions/transfer").token(&partner.token).key(what.replace(' ', "-").as_str());
            if let Some(user) = user { call.user(user) } else { call }
        };
        let first = call().json(&transfer(from, to, "1.00")).await;
        let problem = first.problem(status, slug);
        assert!(problem["transactionId"].as_str().is_some_and(|id| id.starts_with("txn_")), "{what}: {problem}");
        call().json(&transfer(from, to, "1.00")).await.repeats(&first);
    }
    assert_eq!(door.balances().await, balances);
}

#[tokio::test]
async fn another_partners_wallet_answers_exactly_as_an_absent_one() {
    let door = Door::open().await;
    let (partner, alice, _) = door.alice_and_bob("10.00").await;
    let other = door.partner(&["EUR"]).await;
    let theirs = door.wallet(&other, "alice", "EUR").await;
    let mut seen = Vec::new();
    for wallet in [theirs.as_str(), "wal_0192f0c1-2d3e-7abc-8def-0123456789ab"] {
        let call = door.post("/v1/transactions/transfer").token(&partner.token).new_key();
        let mut problem = call.json(&transfer(&alice, wallet, "1.00")).await.problem(404, "wallet-not-found");
        for own in ["requestId", "transactionId"] {
            problem.as_object_mut().unwrap().remove(own);
        }
        seen.push(problem);
    }
    assert_eq!(seen[0], seen[1]);
}

#[tokio::test]
async fn an_adjustment_moves_money_between_a_wallet_and_the_system() {
    let door = Door::open().await;
    let (partner, alice, _) = door.alice_and_bob("0.00").await;
    let body = |direction: &str, amount: &str| json!({ "walletId": alice, "direction": direction, "amount": amount, "currency": "EUR", "reason": "a count" });
    let adjust = |token: &str| door.post("/v1/transactions/adjustment").token(token).new_key();

    let credited = adjust(&door.admin).json(&body("CREDIT", "5.00")).await.expect(201);
    assert_eq!(credited["type"], "ADJUSTMENT");
    assert_eq!(credited["walletId"], alice.as_str());
    assert_eq!(credited["description"], "a count");
    adjust(&door.admin).json(&body("DEBIT", "2.00")).await.expect(201);
    adjust(&door.admin).json(&body("DEBIT", "3.01")).await.problem(422, "insufficient-funds");
    adjust(&partner.token).json(&body("CREDIT", "5.00")).await.problem(403, "insufficient-scope");
    adjust(&door.admin).json(&body("SIDEWAYS", "5.00")).await.problem(422, "invalid-field");
    assert_eq!(door.balances().await[&alice], 300);
}

#[tokio::test]
async fn an_operators_adjustment_is_the_business_of_the_wallets_partner() {
    let door = Door::open().await;
    let (partner, alice, _) = door.alice_and_bob("10.00").await;
    let events = door.events_after(0).await;
    let funded = events.iter().find(|event| event.event_type == "TransactionPosted").unwrap();
    let payload: Value = serde_json::from_str(&funded.payload).unwrap();
    let instruction = &payload["TransactionPosted"]["instruction"];
    assert_eq!((&instruction["walletId"], &instruction["partnerId"]), (&Value::from(alice), &Value::from(partner.id)));
}
