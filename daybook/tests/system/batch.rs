//! The largest batch there is, from HTTP to everybody who is told of it.

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::process::{DataDirectory, Daybook, answer, eventually, run};
use crate::road::receiver;

#[tokio::test]
async fn a_batch_of_a_thousand_passes_the_bus_the_views_and_the_webhooks() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &["--allow-local-webhooks"]).await;
    let (partner, admin) = (daybook.login("demoPartner").await, daybook.login("admin").await);
    let (alice, bob) = (daybook.wallet("alice", "100.00").await, daybook.wallet("bob", "0").await);
    let (url, received) = receiver().await;
    let webhook = json!({"url": url, "events": ["transaction.completed", "transaction.failed"]});
    answer(daybook.post(&partner, "/v1/webhooks", webhook), StatusCode::CREATED).await;

    // Every tenth asks for what was never there. A commit of this size travels without its events.
    let item = |number: usize| {
        json!({
            "fromWalletId": alice, "toWalletId": bob, "amount": if number % 10 == 9 { "100.01" } else { "0.10" },
            "currency": "EUR", "reference": format!("item-{number}"), "description": "d".repeat(300)
        })
    };
    let items: Vec<Value> = (0..1_000).map(item).collect();
    let batch = json!({"atomic": false, "transactions": items});
    let sent = daybook.post_with_key(&partner, "/v1/transactions/batch", "thousand", batch).send().await.unwrap();
    assert_eq!(sent.status(), StatusCode::CREATED);
    let position: i64 = sent.headers()["ledger-position"].to_str().unwrap().parse().unwrap();
    let body: Value = sent.json().await.unwrap();
    let results = body["results"].as_array().unwrap();
    let (done, failed): (Vec<&Value>, Vec<&Value>) = results.iter().partition(|result| result["status"] == "SUCCESS");
    assert_eq!((done.len(), failed.len()), (900, 100));

    // An atomic one with a refused item is told to nobody but its caller.
    let refused = json!({"atomic": true, "transactions": [item(0), item(9), item(1)]});
    let refused = daybook.post_with_key(&partner, "/v1/transactions/batch", "refused", refused);
    let problem = answer(refused, StatusCode::UNPROCESSABLE_ENTITY).await;
    assert_eq!(
        (&problem["type"], &problem["errors"][0]["pointer"]),
        (&json!("/problems/insufficient-funds"), &json!("/transactions/1"))
    );

    let seen = daybook.get(&partner, &format!("/v1/wallets/{bob}/balance")).query(&[("minPosition", position + 1)]);
    let seen = seen.query(&[("waitMs", 20_000)]);
    assert_eq!(answer(seen, StatusCode::OK).await["balance"], "90.00");
    for result in [results.first().unwrap(), &results[9], results.last().unwrap()] {
        let transaction = format!("/v1/transactions/{}", result["transactionId"].as_str().unwrap());
        let transaction = answer(daybook.get(&partner, &transaction), StatusCode::OK).await;
        assert_eq!((&transaction["type"], &transaction["status"]), (&json!("TRANSFER"), &result["status"]));
        assert_eq!(transaction["reference"], result["reference"]);
    }
    assert_eq!(listed(&daybook, &partner, &[("idempotencyKey", "thousand")]).await, 1_000, "one key stands for all");
    assert_eq!(listed(&daybook, &partner, &[("idempotencyKey", "thousand"), ("status", "FAILED")]).await, 100);
    assert_eq!(listed(&daybook, &partner, &[("idempotencyKey", "refused")]).await, 0);
    let kept = daybook.get(&admin, "/v1/events").query(&[("type", "BatchDeclined")]);
    assert_eq!(answer(kept, StatusCode::OK).await["data"].as_array().unwrap().len(), 1);

    let last = daybook.post_with_key(&partner, "/v1/transactions/transfer", "last", item(0));
    let last = answer(last, StatusCode::CREATED).await;
    // Nine hundred deliveries take their time; what must not happen is that they stand still.
    let mut told = Vec::new();
    for some in (100..=900).step_by(100).chain([901]) {
        let enough = |bodies: &Vec<Value>| some <= bodies.len();
        told = eventually("deliveries go on", || async { received.lock().unwrap().clone() }, enough).await;
    }
    let mut told: Vec<&str> = told.iter().map(|body| body["data"]["id"].as_str().unwrap()).collect();
    let mut expected: Vec<&str> = done.iter().map(|result| result["transactionId"].as_str().unwrap()).collect();
    expected.push(last["id"].as_str().unwrap());
    told.sort_unstable();
    expected.sort_unstable();
    assert_eq!(told, expected, "each transfer that was made, once, and nothing else");

    let (sound, report) = run(&["audit", "--database-url", daybook.database_url()]);
    assert!(sound, "{report}");
}

/// How many transactions a filter finds, over all pages.
async fn listed(daybook: &Daybook, partner: &str, filter: &[(&str, &str)]) -> usize {
    let (mut count, mut cursor) = (0, None);
    for _ in 0..20 {
        let page = daybook.get(partner, "/v1/transactions").query(filter).query(&[("limit", "100")]);
        let page =
            page.query(&cursor.map(|cursor: String| [("cursor", cursor)]).into_iter().flatten().collect::<Vec<_>>());
        let page = answer(page, StatusCode::OK).await;
        count += page["data"].as_array().unwrap().len();
        match page["nextCursor"].as_str() {
            Some(next) => cursor = Some(next.to_owned()),
            None => return count,
        }
    }
    panic!("more than 20 pages")
}
