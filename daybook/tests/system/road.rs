//! The road end to end, in one process, on real servers: what other crates test apart, seen together.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::http::HeaderMap;
use axum::routing::post;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::process::{DataDirectory, Daybook, answer, eventually, run};

#[tokio::test]
async fn one_command_takes_money_from_http_to_the_log_into_balances_and_out_as_a_webhook() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &["--allow-local-webhooks"]).await;
    let (partner, admin) = (daybook.login("demoPartner").await, daybook.login("admin").await);
    let (url, received) = receiver().await;
    let webhook = daybook.post(&partner, "/v1/webhooks", json!({"url": url, "events": ["transaction.completed"]}));
    answer(webhook, StatusCode::CREATED).await;
    let (alice, bob) = (daybook.wallet("alice", "20.00").await, daybook.wallet("bob", "0").await);

    let body = json!({
        "fromWalletId": alice, "toWalletId": bob, "amount": "7.00", "currency": "EUR", "reference": "order-1",
        "metadata": {"table": 4}
    });
    let sent = daybook.post_with_key(&partner, "/v1/transactions/transfer", "k1", body).send().await.unwrap();
    let position: i64 = sent.headers()["ledger-position"].to_str().unwrap().parse().unwrap();
    let transaction: Value = sent.json().await.unwrap();
    let id = transaction["id"].as_str().unwrap();

    let read = answer(daybook.get(&partner, &format!("/v1/transactions/{id}")), StatusCode::OK).await;
    assert_eq!(read, transaction, "the view says what the answer said");
    let balance = daybook.get(&partner, &format!("/v1/wallets/{bob}/balance")).query(&[("minPosition", position)]);
    assert_eq!(answer(balance, StatusCode::OK).await["available"], "7.00");

    let filter = [("after", position - 1), ("limit", 1)];
    let events = answer(daybook.get(&admin, "/v1/events").query(&filter), StatusCode::OK).await;
    assert_eq!(events["data"][0]["aggregateId"], id);
    let forbidden = daybook.get(&partner, "/v1/events").send().await.unwrap();
    assert_eq!(forbidden.status(), StatusCode::FORBIDDEN, "the log of all partners is for auditors");

    let of_transfer = |seen: &Vec<Value>| seen.iter().any(|body| body["data"]["id"] == id);
    let seen = eventually("the webhook came", || async { received.lock().unwrap().clone() }, of_transfer).await;
    let body = seen.iter().find(|body| body["data"]["id"] == id).unwrap();
    assert_eq!((&body["data"], &body["ledgerPosition"]), (&transaction, &json!(position)));
}

#[tokio::test]
async fn a_top_up_comes_from_the_bank_once_whatever_the_bank_does() {
    let directory = DataDirectory::new();
    let options = ["--top-up-ask-after", "300ms", "--top-up-expire-after", "3s"];
    let daybook = Daybook::start(&directory, &options).await;
    let partner = daybook.login("demoPartner").await;
    let wallet = daybook.wallet("alice", "0").await;
    let top_up = async |key: &str| {
        let body = json!({"walletId": wallet, "amount": "10.00", "currency": "EUR"});
        let asked = daybook.post_with_key(&partner, "/v1/transactions/top-up", key, body);
        let asked = answer(asked, StatusCode::ACCEPTED).await;
        assert_eq!(asked["status"], "PENDING");
        (asked["id"].as_str().unwrap().to_owned(), asked["token"].clone())
    };
    let ended = async |id: &str| {
        let wait = daybook.get(&partner, &format!("/v1/transactions/{id}")).query(&[("waitMs", 20_000)]);
        answer(wait, StatusCode::OK).await["status"].clone()
    };

    let (once, token) = top_up("once").await;
    daybook.simulate(json!({"token": token, "outcome": "success", "callback": {"copies": 3}})).await;
    assert_eq!(ended(&once).await, "SUCCESS");
    let (declined, token) = top_up("declined").await;
    daybook.simulate(json!({"token": token, "outcome": "failure"})).await;
    assert_eq!(ended(&declined).await, "FAILED");
    let (silent, token) = top_up("silent").await;
    daybook.simulate(json!({"token": token, "outcome": "success", "callback": {"drop": true}})).await;
    assert_eq!(ended(&silent).await, "SUCCESS", "no word came, so the workflow asked");
    let (unpaid, token) = top_up("unpaid").await;
    assert_eq!(ended(&unpaid).await, "EXPIRED");
    let late = daybook.simulate(json!({"token": token, "outcome": "success"})).await;
    assert_eq!(
        late.status(),
        StatusCode::CONFLICT,
        "what expired was cancelled at the bank: nobody can pay it any more"
    );

    let head = answer(daybook.get(&partner, "/v1/head"), StatusCode::OK).await["position"].as_i64().unwrap();
    let balance = daybook.get(&partner, &format!("/v1/wallets/{wallet}/balance")).query(&[("minPosition", head)]);
    assert_eq!(answer(balance, StatusCode::OK).await["balance"], "20.00");
    let (sound, report) = run(&["audit", "--database-url", daybook.database_url()]);
    assert!(sound, "{report}");
}

#[tokio::test]
async fn the_documentation_is_served_offline_and_covers_every_door() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &["--no-demo"]).await;
    assert_eq!(daybook.connection["demoPartner"], Value::Null);
    let document = answer(daybook.get("", "/openapi.json"), StatusCode::OK).await;
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    for (route, method) in [
        ("/v1/auth/token", "post"),
        ("/v1/partners", "post"),
        ("/v1/partners", "get"),
        ("/v1/wallets", "post"),
        ("/v1/wallets", "get"),
        ("/v1/wallets/{id}/balance", "get"),
        ("/v1/wallets/{id}/entries", "get"),
        ("/v1/wallets/{id}/freeze", "post"),
        ("/v1/transactions/transfer", "post"),
        ("/v1/transactions/batch", "post"),
        ("/v1/transactions/adjustment", "post"),
        ("/v1/transactions/top-up", "post"),
        ("/v1/transactions/{id}", "get"),
        ("/v1/webhooks", "post"),
        ("/v1/webhooks/{id}", "patch"),
        ("/v1/deliveries/{id}/redeliver", "post"),
        ("/v1/callbacks/bank", "post"),
        ("/v1/head", "get"),
        ("/v1/events", "get"),
        ("/metrics", "get"),
    ] {
        assert!(document["paths"][route][method].is_object(), "{method} {route} is not described");
    }
    let text = document.to_string();
    for reference in text.split(r##""$ref":"#"##).skip(1).filter_map(|rest| rest.split('"').next()) {
        assert!(document.pointer(reference).is_some(), "{reference} leads nowhere");
    }
    let metrics = daybook.get("", "/metrics").send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains(r#"daybook_http_requests_total{method="GET",route="/openapi.json",status="200"} 1"#));
    let page = daybook.get("", "/docs").send().await.unwrap();
    assert_eq!(page.status(), StatusCode::OK);
    let page = page.text().await.unwrap();
    assert!(!page.contains("src=\"http") && !page.contains("href=\"http"), "nothing comes from elsewhere");
    let problem = daybook.get("", "/problems/insufficient-funds").send().await.unwrap();
    assert_eq!(problem.status(), StatusCode::OK);
}

/// A partner's own receiver on a real socket.
pub(crate) async fn receiver() -> (String, Arc<Mutex<Vec<Value>>>) {
    let received = Arc::new(Mutex::new(Vec::new()));
    let keep = received.clone();
    let receive = move |headers: HeaderMap, body: Bytes| {
        let keep = keep.clone();
        async move {
            assert!(headers.contains_key("x-daybook-signature") && headers.contains_key("webhook-signature"));
            keep.lock().unwrap().push(serde_json::from_slice(&body).unwrap());
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hooks", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, Router::new().route("/hooks", post(receive))).await });
    (url, received)
}
