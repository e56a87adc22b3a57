//! Freshness: what was answered is seen, whatever the views lag behind.

use std::time::Duration;

use ledger_core::TransactionId;
use projector::Progress;
use serde_json::json;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::system::{System, transaction_of, wallet_id};

#[tokio::test]
async fn what_a_command_wrote_is_read_back_at_its_position() {
    let system = System::start().await;
    let partner = system.partner().await;
    let elsewhere = partner.at(system.serve(Progress::default()).await); // no projecting in that process: it polls
    for caller in [&partner, &elsewhere] {
        let (from, to) = (system.wallet(&partner, "alice").await, system.wallet(&partner, "bob").await);
        system.fund(&partner, from, "10.00").await;
        for left in (0..10).rev() {
            let position = system.transfer(&partner, from, to, "1.00").await.position();
            let path = format!("/v1/wallets/{from}/balance?minPosition={position}");
            let (reflected, balance) = caller.get_at(&path).await;
            assert!(position <= reflected);
            assert_eq!(
                balance,
                json!({ "walletId": from, "currency": "EUR", "balance": format!("{left}.00"), "held": "0.00",
                        "available": format!("{left}.00"), "ledgerPosition": reflected })
            );
        }
    }
}

#[tokio::test]
async fn a_view_that_stays_behind_says_so_and_never_shows_the_past_for_the_present() {
    let mut system = System::start().await;
    let partner = system.partner().await;
    let wallet = system.wallet(&partner, "alice").await;
    system.caught_up().await;
    system.stop_projecting().await;
    let position = system.fund(&partner, wallet, "5.00").await.position();
    for path in [format!("/v1/wallets/{wallet}"), format!("/v1/wallets/{wallet}/balance"), "/v1/wallets".to_owned()] {
        let answer = partner.call(&format!("{path}?minPosition={position}&waitMs=50")).await;
        assert_eq!(answer.status, 503, "{path}");
        assert_eq!(answer.json()["type"], "/problems/projection-behind");
        assert!(answer.headers.contains_key("retry-after"));
    }
    // It waits, and is answered as soon as the projector is back.
    let path = format!("/v1/wallets/{wallet}?minPosition={position}&waitMs=20000");
    let waiting = tokio::spawn({
        let partner = partner.clone();
        async move { partner.get(&path).await }
    });
    sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished());
    system.project();
    assert_eq!(waiting.await.unwrap()["balance"], "5.00");
}

#[tokio::test]
async fn a_thing_that_is_on_its_way_is_waited_for_before_it_is_absent() {
    let mut system = System::start().await;
    let partner = system.partner().await;
    system.caught_up().await;
    system.stop_projecting().await;
    let wallet = system.wallet(&partner, "alice").await;
    let transaction = transaction_of(&system.fund(&partner, wallet, "5.00").await);
    let behind = partner.problem(&format!("/v1/wallets/{wallet}?waitMs=50")).await;
    assert_eq!(behind, "503 projection-behind");
    let paths = [
        format!("/v1/wallets/{wallet}"),
        format!("/v1/wallets/{wallet}/balance"),
        format!("/v1/wallets/{wallet}/entries"),
        format!("/v1/transactions/{transaction}"),
    ];
    let waiting = paths.map(|path| {
        let partner = partner.clone();
        tokio::spawn(async move { partner.call(&format!("{path}?waitMs=20000")).await })
    });
    sleep(Duration::from_millis(100)).await;
    system.project();
    for answer in waiting {
        let answer = answer.await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
}

#[tokio::test]
async fn what_never_was_is_absent_at_once() {
    let system = System::start().await;
    let partner = system.partner().await;
    system.caught_up().await;
    let begun = Instant::now();
    let nobody = wallet_id();
    assert_eq!(partner.problem(&format!("/v1/wallets/{nobody}")).await, "404 wallet-not-found");
    assert_eq!(partner.problem(&format!("/v1/wallets/{nobody}/balance")).await, "404 wallet-not-found");
    assert_eq!(partner.problem(&format!("/v1/wallets/{nobody}/entries")).await, "404 wallet-not-found");
    let nothing = TransactionId::from_uuid(Uuid::now_v7());
    assert_eq!(partner.problem(&format!("/v1/transactions/{nothing}")).await, "404 transaction-not-found");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed()); // one wait alone would take as long
}

#[tokio::test]
async fn a_position_beyond_the_head_is_unknown_and_not_waited_for() {
    let system = System::start().await;
    let partner = system.partner().await;
    let beyond = system.head().await + 1;
    let wallet = partner.settlement;
    for path in [
        format!("/v1/wallets?minPosition={beyond}"),
        format!("/v1/wallets/{wallet}?minPosition={beyond}"),
        format!("/v1/wallets/{wallet}/balance?atPosition={beyond}"),
        format!("/v1/transactions?minPosition={beyond}"),
        format!("/v1/head?minPosition={beyond}"),
        "/v1/wallets?minPosition=-1".to_owned(),
    ] {
        assert_eq!(partner.problem(&path).await, "422 position-unknown", "{path}");
    }
    let refused = partner.call(&format!("/v1/wallets/{wallet}/balance?minPosition=1&atPosition={beyond}")).await.json();
    assert_eq!(refused["errors"][0]["pointer"], "/atPosition", "{refused}");
}

#[tokio::test]
async fn a_pending_transaction_is_waited_for() {
    let system = System::start().await;
    let partner = system.partner().await;
    let elsewhere = partner.at(system.serve(Progress::default()).await);
    for caller in [partner.clone(), elsewhere] {
        let wallet = system.wallet(&partner, "alice").await;
        let transaction = system.request_top_up(&partner, wallet, "25.00").await;
        let path = format!("/v1/transactions/{transaction}");
        assert_eq!(caller.get(&path).await["status"], "PENDING");
        assert_eq!(caller.get(&format!("{path}?waitMs=50")).await["status"], "PENDING");
        let waiting = tokio::spawn(async move { caller.get(&format!("{path}?waitMs=20000")).await });
        sleep(Duration::from_millis(100)).await;
        assert!(!waiting.is_finished());
        let position = system.settle(transaction, "25.00").await.position();
        let ended = waiting.await.unwrap();
        assert_eq!((&ended["status"], &ended["ledgerPosition"]), (&json!("SUCCESS"), &json!(position)));
        assert_eq!(ended["entries"].as_array().unwrap().len(), 2);
    }
}

#[tokio::test]
async fn a_server_that_stops_answers_whoever_waits_with_what_is_known() {
    let system = System::start().await;
    let partner = system.partner().await;
    let wallet = system.wallet(&partner, "alice").await;
    let transaction = system.request_top_up(&partner, wallet, "25.00").await;
    let path = format!("/v1/transactions/{transaction}");
    assert_eq!(partner.get(&path).await["status"], "PENDING");
    let begun = Instant::now();
    let waiting = tokio::spawn(async move { partner.get(&format!("{path}?waitMs=20000")).await });
    sleep(Duration::from_millis(100)).await;
    system.stop();
    assert_eq!(waiting.await.unwrap()["status"], "PENDING");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn two_projectors_fold_everything_once() {
    let mut system = System::start().await;
    let other = Progress::default();
    let settings = projector::Settings {
        database_url: system.database_url.clone(),
        feed: event_feed::FeedSettings { nats_url: None, stream: String::new(), beside: None },
    };
    let stop = runtime::shutdown::Shutdown::new();
    let second = tokio::spawn(projector::follow(settings, other, stop.clone()));
    let partner = system.partner().await;
    let (from, to) = (system.wallet(&partner, "alice").await, system.wallet(&partner, "bob").await);
    system.fund(&partner, from, "100.00").await;
    for _ in 0..50 {
        system.transfer(&partner, from, to, "1.00").await;
    }
    system.caught_up().await;
    assert_eq!(partner.get(&format!("/v1/wallets/{to}")).await["balance"], "50.00");
    assert_eq!(partner.all(&format!("/v1/wallets/{to}/entries"), 100).await.len(), 50);
    system.stop_projecting().await; // the second goes on alone
    system.transfer(&partner, from, to, "1.00").await;
    system.caught_up().await;
    stop.trigger();
    second.await.unwrap().unwrap();
}

#[tokio::test]
async fn beside_a_projector_that_is_quicker_a_node_still_answers_what_is_there() {
    let system = System::start().await;
    let other = Progress::default();
    let settings = projector::Settings {
        database_url: system.database_url.clone(),
        feed: event_feed::FeedSettings { nats_url: None, stream: String::new(), beside: None },
    };
    let stop = runtime::shutdown::Shutdown::new();
    let second = tokio::spawn(projector::follow(settings, other.clone(), stop.clone()));
    let partner = system.partner().await;
    let there = partner.at(system.serve(other).await);
    let (from, to) = (system.wallet(&partner, "alice").await, system.wallet(&partner, "bob").await);
    system.fund(&partner, from, "100.00").await;
    for moved in 1..=60 {
        let position = system.transfer(&partner, from, to, "1.00").await.position();
        for node in [&partner, &there] {
            let balance = node.get(&format!("/v1/wallets/{to}/balance?minPosition={position}&waitMs=5000")).await;
            assert_eq!(balance["balance"], format!("{moved}.00"));
        }
    }
    stop.trigger();
    second.await.unwrap().unwrap();
}

#[tokio::test]
async fn views_that_a_crash_took_back_are_not_taken_for_what_they_were() {
    let mut system = System::start().await;
    let partner = system.partner().await;
    let wallet = system.wallet(&partner, "alice").await;
    let transaction = transaction_of(&system.fund(&partner, wallet, "5.00").await);
    system.caught_up().await;
    let position = system.head().await;
    let mut paths = [
        format!("/v1/wallets/{wallet}"),
        format!("/v1/wallets/{wallet}/balance"),
        format!("/v1/wallets/{wallet}/entries"),
        format!("/v1/transactions/{transaction}"),
        "/v1/wallets".to_owned(),
        "/v1/transactions".to_owned(),
    ]
    .map(|path| format!("{path}?minPosition={position}&waitMs=50"))
    .to_vec();
    for path in &paths {
        partner.get(path).await; // from now on it is known that the views have come so far
    }
    system.stop_projecting().await;
    // What is left of the last page after such a crash: nothing, and its checkpoint is gone with it.
    system
        .sql(&format!(
            "delete from views.postings where position = {position};
             update views.checkpoints set position = position - 1, commit_number = commit_number - 1"
        ))
        .await;
    paths.push(format!("/v1/transactions/{transaction}?waitMs=50")); // answered 201, so never 404
    for path in &paths {
        assert_eq!(partner.problem(path).await, "503 projection-behind", "{path}");
    }
}

#[tokio::test]
async fn a_query_that_takes_too_long_is_given_up() {
    use sqlx::{Connection, PgConnection};
    let system = System::start_without_projecting().await;
    let partner = system.partner().await;
    let mut blocker = PgConnection::connect(&system.database_url).await.unwrap();
    let mut tx = blocker.begin().await.unwrap();
    sqlx::query("lock table views.wallets in access exclusive mode").execute(&mut *tx).await.unwrap();
    assert_eq!(partner.problem("/v1/wallets").await, "503 query-timeout");
    tx.rollback().await.unwrap();
    partner.get("/v1/wallets").await;
}
