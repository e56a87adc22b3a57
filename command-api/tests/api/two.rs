//! Two services on one database, each with an engine of its own: to a client they are one.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::future::join_all;
use ledger_core::{Event, TransactionEvent};
use ledger_engine::Settings;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::door::{Answer, Door};
use crate::money::transfer;

const WALLETS: usize = 10;
const CLIENTS: usize = 8;
const HAMMERED: Duration = Duration::from_secs(3);

#[tokio::test]
async fn fifty_equal_calls_split_over_two_services_have_one_effect_and_one_answer() {
    let left = Door::open().await;
    let right = left.beside(Settings::default()).await;
    let (partner, alice, bob) = left.alice_and_bob("10.00").await;
    let batch =
        json!({ "atomic": false, "transactions": [transfer(&alice, &bob, "0.50"), transfer(&alice, &bob, "90.00")] });
    let atomic =
        json!({ "atomic": true, "transactions": [transfer(&alice, &bob, "0.50"), transfer(&alice, &bob, "90.00")] });
    for (key, path, body, status) in [
        ("done", "/v1/transactions/transfer", transfer(&alice, &bob, "1.00"), 201),
        ("refused", "/v1/transactions/transfer", transfer(&alice, &bob, "50.00"), 422),
        ("pending", "/v1/transactions/top-up", json!({ "walletId": alice, "amount": "5.00", "currency": "EUR" }), 202),
        ("opened", "/v1/wallets", json!({ "userId": "carol", "currency": "EUR" }), 201),
        ("batch", "/v1/transactions/batch", batch, 201),
        ("no batch", "/v1/transactions/batch", atomic, 422),
    ] {
        let before = left.head().await;
        let call = |number: usize| {
            let door = if number.is_multiple_of(2) { &left } else { &right };
            door.post(path).token(&partner.token).key(&key.replace(' ', "-")).json(&body)
        };
        let answers = join_all((0..50).map(call)).await;
        let (in_flight, given): (Vec<&Answer>, Vec<&Answer>) = answers.iter().partition(|answer| answer.status == 409);
        for answer in in_flight {
            answer.problem(409, "idempotency-in-flight");
            assert_eq!(answer.header("retry-after"), Some("1"));
        }
        let fresh: Vec<&&Answer> = given.iter().filter(|answer| !answer.replayed()).collect();
        let [first] = fresh.as_slice() else { panic!("{key}: {} calls were the first", fresh.len()) };
        assert_eq!(first.status, status, "{key}: {}", first.text);
        for answer in given.iter().filter(|answer| answer.replayed()) {
            answer.repeats(first);
        }
        let commands: std::collections::HashSet<_> =
            left.events_after(before).await.iter().map(|event| event.command_id).collect();
        assert_eq!(commands.len(), 1, "{key}");
        for door in [&left, &right] {
            door.post(path).token(&partner.token).key(&key.replace(' ', "-")).json(&body).await.repeats(first);
        }
    }
    assert_eq!(left.balances().await[&bob], 150);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_services_that_want_the_same_wallets_answer_well_and_share_the_log() {
    let left = Door::open().await;
    let right = left.beside(Settings::default()).await;
    let partner = left.partner(&["EUR"]).await;
    let mut wallets = Vec::new();
    for _ in 0..WALLETS {
        let wallet = left.wallet(&partner, "user", "EUR").await;
        left.fund(&wallet, "5.00", "EUR").await;
        wallets.push(wallet);
    }
    let set_up = left.log.head().await.unwrap();

    let until = Instant::now() + HAMMERED;
    let client = async |door: &Door, name: &str, client: usize| {
        let mut answers = Vec::new();
        for call in 0.. {
            if until <= Instant::now() {
                break;
            }
            // Around and around, each client at its own pace: every wallet pays and is paid by all of them.
            let (from, step) = ((client + call) % WALLETS, 1 + (client + call / WALLETS) % (WALLETS - 1));
            let cents = 1 + (client * 37 + call * 91) % 300;
            let amount = format!("{}.{:02}", cents / 100, cents % 100);
            let body = transfer(&wallets[from], &wallets[(from + step) % WALLETS], &amount);
            let post = door.post("/v1/transactions/transfer").token(&partner.token);
            let post = post.key(&format!("{name}-{client}-{call}")).header("x-request-id", name);
            answers.push(post.json(&body).await);
        }
        answers
    };
    let both = [(&left, "left"), (&right, "right")];
    let clients = both.iter().flat_map(|(door, name)| (0..CLIENTS).map(|number| client(door, name, number)));
    let answers: Vec<Answer> = join_all(clients).await.into_iter().flatten().collect();

    let mut told = BTreeMap::new();
    for answer in &answers {
        match answer.status.as_u16() {
            201 => drop(told.insert(answer.json()["id"].as_str().unwrap().to_owned(), answer.position())),
            422 => {
                let problem = answer.problem(422, "insufficient-funds");
                told.insert(problem["transactionId"].as_str().unwrap().to_owned(), answer.position());
            }
            503 => drop(answer.problem(503, "overloaded")),
            other => panic!("{other}: {}", answer.text),
        }
        assert!(!answer.replayed(), "no key was used twice");
    }

    // The log: exactly what was told, each decision right at its place, each commit of one engine.
    let (mut logged, mut held, mut commits) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for event in left.events_after(0).await {
        if let Event::Transaction(_, read) = event.read().unwrap() {
            match &read {
                TransactionEvent::Posted { entries, .. } => {
                    for entry in entries {
                        let entry = serde_json::to_value(entry).unwrap();
                        let change = cents(&entry["amount"]) * if entry["direction"] == "DEBIT" { -1 } else { 1 };
                        let balance: &mut i64 = held.entry(entry["walletId"].as_str().unwrap().to_owned()).or_default();
                        *balance += change;
                        assert_eq!(*balance, cents(&entry["balanceAfter"]), "position {}", event.position);
                    }
                }
                TransactionEvent::Declined { instruction, .. } => {
                    let asked: i64 = instruction.amount.to_string().replace('.', "").parse().unwrap();
                    assert!(
                        held[&instruction.wallet_id.to_string()] < asked,
                        "position {}: it was there",
                        event.position
                    );
                }
                other => panic!("{}", other.name()),
            }
        }
        if set_up.position < event.position {
            logged.insert(event.aggregate_id.clone(), event.position);
            let metadata: Value = serde_json::from_str(&event.metadata).unwrap();
            let engine = metadata["requestId"].as_str().unwrap().to_owned();
            let maker = commits.entry(event.commit).or_insert_with(|| engine.clone());
            assert_eq!(*maker, engine, "commit {} is of two engines", event.commit);
        }
    }
    assert_eq!(logged, told);
    assert!(wallets.iter().all(|wallet| 0 <= held[wallet]));
    assert_eq!(wallets.iter().map(|wallet| held[wallet]).sum::<i64>(), 500 * WALLETS as i64);
    for (_, name) in both {
        let own = commits.values().filter(|maker| *maker == name).count();
        assert!(commits.len() <= 4 * own, "{name} made {own} of {} commits", commits.len());
    }
}

fn cents(text: &Value) -> i64 {
    text.as_str().unwrap().replace('.', "").parse().unwrap()
}
