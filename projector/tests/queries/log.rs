//! The log over HTTP: its head, pages of events, and the stream of all of them.

use event_feed::Log;
use event_store::hash::hex;
use serde_json::Value;

use crate::system::{System, transaction_of};

const NDJSON: &str = "application/x-ndjson";

async fn log(system: &System) -> Log {
    Log::new(event_store::connect(&system.database_url, "daybook_reader", 1).await.unwrap())
}

#[tokio::test]
async fn the_log_comes_in_order_by_pages_that_follow_each_other() {
    let system = System::start().await;
    let (partner, admin) = (system.partner().await, system.admin().await);
    let wallet = system.wallet(&partner, "alice").await;
    let receipt = system.fund(&partner, wallet, "5.00").await;
    let head = system.head().await;
    let mut seen = Vec::new();
    let mut after = "0".to_owned();
    loop {
        let (reflected, page) = admin.get_at(&format!("/v1/events?after={after}&limit=2")).await;
        assert_eq!(reflected, head);
        seen.extend(page["data"].as_array().unwrap().clone());
        match page["nextCursor"].as_str() {
            Some(next) => after = next.to_owned(),
            None => break,
        }
    }
    let positions: Vec<_> = seen.iter().map(|event| event["position"].as_i64().unwrap()).collect();
    assert_eq!(positions, (1..=head).collect::<Vec<_>>());
    assert_eq!(seen.last().unwrap(), &serde_json::to_value(&receipt.events()[0]).unwrap());

    let data = |query: String| {
        let admin = admin.clone();
        async move { admin.get(&format!("/v1/events?{query}")).await["data"].as_array().unwrap().clone() }
    };
    let transaction = transaction_of(&receipt);
    assert_eq!(data(format!("aggregate={transaction}")).await, seen[seen.len() - 1..]);
    assert_eq!(data(format!("aggregate={wallet}&type=WalletOpened")).await.len(), 1);
    assert_eq!(data(format!("aggregate={wallet}&type=WalletFrozen")).await.len(), 0);
    assert_eq!(data(format!("aggregate={wallet}&after={head}")).await.len(), 0);
    assert_eq!(data("type=PartnerRegistered".to_owned()).await, seen[..1]);
    assert_eq!(data(format!("after={}", head + 100)).await.len(), 0);
    for (query, problem) in [
        ("limit=1001", "422 limit-out-of-range"),
        ("limit=0", "422 limit-out-of-range"),
        ("aggregate=alice", "400 invalid-id"),
        ("after=-1", "422 position-unknown"),
        ("before=1", "422 unknown-field"),
    ] {
        assert_eq!(admin.problem(&format!("/v1/events?{query}")).await, problem, "{query}");
    }
}

#[tokio::test]
async fn the_head_is_the_logs_own() {
    let system = System::start_without_projecting().await;
    let partner = system.partner().await; // any client may know
    let head = log(&system).await.head().await.unwrap();
    let (reflected, body) = partner.get_at("/v1/head").await;
    assert_eq!(reflected, head.position);
    let expected = serde_json::json!({ "position": head.position, "commit": head.commit, "chain": hex(&head.chain) });
    assert_eq!(body, expected);
}

#[tokio::test]
async fn a_stream_of_the_log_has_each_event_on_a_line_with_its_stored_bytes() {
    let system = System::start_without_projecting().await;
    let (partner, admin) = (system.partner().await, system.admin().await);
    let (from, to) = (system.wallet(&partner, "alice").await, system.wallet(&partner, "bob").await);
    system.fund(&partner, from, "1000.00").await;
    let transfers = (0..1_200).map(|_| system.transfer(&partner, from, to, "0.01")); // several pages
    futures::future::join_all(transfers).await;
    let head = system.head().await;

    let answer = admin.accepting("/v1/events?after=3", Some(NDJSON)).await;
    assert_eq!(answer.headers["content-type"], NDJSON);
    assert_eq!(answer.position(), head);
    let log = log(&system).await;
    let stored = log.events_after(3, 10_000, &Default::default()).await.unwrap().1;
    let lines: Vec<_> = answer.text.lines().collect();
    assert_eq!(lines.len(), stored.len());
    for (line, event) in lines.iter().zip(&stored) {
        assert_eq!(*line, serde_json::to_string(event).unwrap());
        assert!(line.contains(&event.payload));
    }
    let two = admin.accepting("/v1/events?limit=2", Some(NDJSON)).await;
    assert_eq!(two.text.lines().count(), 2);
    let opened = admin.accepting("/v1/events?type=WalletOpened", Some(NDJSON)).await;
    let opened: Vec<Value> = opened.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(opened.len(), 5); // two of the system, the settlement wallet and two customers'
    assert!(opened.iter().all(|event| event["eventType"] == "WalletOpened"));
}

#[tokio::test]
async fn a_client_that_reads_slowly_still_gets_the_log_to_its_end() {
    let system = System::start_without_projecting().await;
    let (partner, admin) = (system.partner().await, system.admin().await);
    let (from, to) = (system.wallet(&partner, "alice").await, system.wallet(&partner, "bob").await);
    system.fund(&partner, from, "1000.00").await;
    futures::future::join_all((0..2_000).map(|_| system.transfer(&partner, from, to, "0.01"))).await;
    let head = system.head().await;
    let mut response = admin.send("/v1/events", Some(NDJSON)).await;
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.unwrap() {
        bytes.extend_from_slice(&chunk);
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let lines = String::from_utf8(bytes).unwrap().lines().count();
    assert_eq!(i64::try_from(lines).unwrap(), head);
}
