//! Sending: what is told, how it is signed, and what happens when a receiver misbehaves.
#![expect(clippy::unwrap_used, reason = "in a test's helpers a panic is a finding, as in the tests themselves")]

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ledger_core::{Action, Key};
use reqwest::{Method, StatusCode};
use ring::hmac;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::receiver::{Receiver, Reply, Seen};
use crate::system::{Partner, System, eventually, text};

/// Both signatures, checked as a receiver would, with another implementation of HMAC than ours.
fn verify(seen: &Seen, secret: &str) {
    let body = seen.body.as_bytes();
    let hex = seen.header("x-daybook-signature").strip_prefix("sha256=").expect("the scheme is named");
    let tag: Vec<u8> = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
    hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()), body, &tag).expect("the first scheme verifies");

    let tag =
        STANDARD.decode(seen.header("webhook-signature").strip_prefix("v1,").expect("the version is named")).unwrap();
    let key = STANDARD.decode(secret.strip_prefix("whsec_").expect("a secret says what it is")).unwrap();
    assert_eq!(key.len(), 32);
    let message = format!("{}.{}.{}", seen.header("webhook-id"), seen.header("webhook-timestamp"), seen.body);
    hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, &key), message.as_bytes(), &tag)
        .expect("Standard Webhooks verifies");
    let timestamp: i64 = seen.header("webhook-timestamp").parse().unwrap();
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    assert!((now - timestamp).abs() < 60, "the timestamp {timestamp} is not fresh at {now}");
}

async fn redeliver(partner: &Partner, delivery: &Value) -> (StatusCode, Value) {
    let path = format!("/v1/deliveries/{}/redeliver", text(&delivery["id"]));
    let answer = partner.call(Method::POST, &path, None).await;
    (answer.status, answer.body)
}

/// How many deliveries this process has given up, in any of its tests.
fn given_up() -> u64 {
    let shown = prometheus::TextEncoder::new().encode_to_string(&prometheus::gather()).unwrap();
    let line = shown.lines().find_map(|line| line.strip_prefix("daybook_webhook_deliveries_given_up_total "));
    line.map_or(0, |count| count.parse().unwrap())
}

/// A partner with an endpoint for everything, and one delivery for it: that of an opened wallet.
async fn one_delivery(system: &System, receiver: &Receiver) -> (Partner, Value) {
    let partner = system.partner().await;
    let webhook = partner.register(receiver).await;
    system.wallet(&partner).await;
    (partner, webhook)
}

#[tokio::test]
async fn a_partner_is_told_everything_that_happens_to_its_own_in_order_and_signed_both_ways() {
    let system = System::start("1s").await;
    let (partner, other) = (system.partner().await, system.partner().await);
    let receiver = Receiver::start(|_| Reply::Status(200)).await;
    let webhook = partner.register(&receiver).await;
    let secret = text(&webhook["secret"]);

    let (alice, bob) = (system.wallet(&partner).await, system.wallet(&partner).await);
    system.wallet(&other).await;
    system.fund(&partner, alice, "100.00").await;
    let transfer = system.transfer(&partner, alice, bob, "30.00");
    let transferred = system.execute(partner.caller(), transfer).await;
    let declined = system.transfer(&partner, alice, bob, "30000.00");
    let key = Key { hash: [1; 16], request: [2; 32] };
    system.try_execute(partner.caller(), declined, Some(key)).await.expect("a keyed refusal is kept");
    let top_up = system.request_top_up(&partner, alice, "5.00").await;
    system.settle(top_up, "5.00").await;
    let failing = system.request_top_up(&partner, alice, "6.00").await;
    system.fail(failing).await;
    let expiring = system.request_top_up(&partner, alice, "7.00").await;
    system.execute(ledger_core::Caller::Workflow, Action::Expire { transaction: expiring }).await;
    let reason = || "asked".to_owned();
    system.execute(partner.caller(), Action::FreezeWallet { wallet: alice, reason: reason() }).await;
    system.execute(partner.caller(), Action::UnfreezeWallet { wallet: alice, reason: reason() }).await;
    let empty = system.transfer(&partner, bob, alice, "30.00");
    system.execute(partner.caller(), empty).await;
    let closed = system.execute(partner.caller(), Action::CloseWallet { wallet: bob, reason: reason() }).await;

    let expected = [
        ("wallet.opened", "ACTIVE", "0.00"),
        ("wallet.opened", "ACTIVE", "0.00"),
        ("transaction.created", "SUCCESS", "100.00"),
        ("transaction.completed", "SUCCESS", "100.00"),
        ("transaction.created", "SUCCESS", "30.00"),
        ("transaction.completed", "SUCCESS", "30.00"),
        ("transaction.created", "PENDING", "5.00"),
        ("transaction.completed", "SUCCESS", "5.00"),
        ("transaction.created", "PENDING", "6.00"),
        ("transaction.failed", "FAILED", "6.00"),
        ("transaction.created", "PENDING", "7.00"),
        ("transaction.failed", "EXPIRED", "7.00"),
        ("wallet.frozen", "FROZEN", "75.00"),
        ("transaction.created", "SUCCESS", "30.00"),
        ("transaction.completed", "SUCCESS", "30.00"),
        ("wallet.closed", "CLOSED", "0.00"),
    ];
    let seen = receiver.wait_for(expected.len()).await;
    let mut told: Vec<Value> = seen.iter().map(Seen::json).collect();
    told.sort_by_key(|body| body["sequence"].as_i64());
    let as_told: Vec<_> = told
        .iter()
        .map(|body| {
            let data = &body["data"];
            let amount = if data["amount"].is_string() { &data["amount"] } else { &data["balance"] };
            (text(&body["eventType"]), text(&data["status"]), text(amount))
        })
        .collect();
    assert_eq!(as_told, expected);
    let sequences: Vec<_> = told.iter().filter_map(|body| body["sequence"].as_i64()).collect();
    assert_eq!(sequences, (1..=16).collect::<Vec<_>>());

    for request in &seen {
        verify(request, secret);
        let body = request.json();
        assert_eq!(request.request_line, "POST /hook HTTP/1.1");
        assert_eq!(request.header("content-type"), "application/json");
        assert_eq!(request.header("webhook-id"), text(&body["eventId"]));
        assert_eq!(request.header("x-daybook-event"), text(&body["eventType"]));
        assert_eq!(request.header("x-daybook-attempt"), "1");
        assert!(!request.headers.contains_key("x-daybook-possible-duplicate"));
    }
    let event = &transferred.events()[0];
    assert_eq!(told[4]["ledgerPosition"], event.position);
    assert_eq!(told[4]["createdAt"], event.recorded_at.to_string());
    let id = ledger_core::EventId::of_webhook(&event.leaf_hash, "transaction.created");
    assert_eq!(told[4]["eventId"], id.to_string());
    assert_ne!(told[4]["eventId"], told[5]["eventId"]);
    assert_eq!(told[4]["data"], told[5]["data"]);
    let entries = told[7]["data"]["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 2, "a settled top-up shows what moved");
    assert!(entries[0]["balanceAfter"].is_null(), "what the system's wallet holds is no partner's business");
    assert_eq!(entries[1]["balanceAfter"], "75.00");
    assert_eq!(told[9]["data"]["failure"]["code"], "payment-declined");

    let position = closed.position();
    let path = format!("/v1/webhooks/{}/deliveries?limit=100&minPosition={position}", text(&webhook["id"]));
    let first = partner.get(&path).await["data"][0].clone();
    assert_eq!(first["ledgerPosition"], position);
    let delivered = eventually(
        "all delivered",
        || partner.deliveries(&webhook),
        |seen| seen.iter().all(|delivery| delivery["status"] == "DELIVERED"),
    )
    .await;
    assert_eq!(delivered.len(), expected.len());
    let delivery = partner.get(&format!("/v1/deliveries/{}", text(&delivered[0]["id"]))).await;
    let attempt = &delivery["attempts"][0];
    assert_eq!(delivery["attempts"].as_array().unwrap().len(), 1);
    assert_eq!(attempt["outcome"], "delivered");
    assert_eq!(attempt["statusCode"], 200);
    assert_eq!(attempt["responseBody"], "answer 200");
    assert!(attempt["latencyMs"].is_i64() && attempt["startedAt"].is_string(), "{attempt}");
}

#[tokio::test]
async fn only_the_event_types_that_were_asked_for_are_told() {
    let system = System::start("1s").await;
    let partner = system.partner().await;
    let receiver = Receiver::start(|_| Reply::Status(200)).await;
    let new = json!({ "url": receiver.url(), "events": ["transaction.completed"] });
    let registered = partner.call(Method::POST, "/v1/webhooks", Some(new)).await;
    assert_eq!(registered.status, StatusCode::CREATED);
    let wallet = system.wallet(&partner).await;
    let funded = system.fund(&partner, wallet, "1.00").await.position();
    let path = format!("/v1/webhooks/{}/deliveries?minPosition={funded}", text(&registered.body["id"]));
    let deliveries = partner.get(&path).await;
    let told: Vec<_> =
        deliveries["data"].as_array().unwrap().iter().map(|d| (text(&d["eventType"]), d["sequence"].clone())).collect();
    assert_eq!(told, [("transaction.completed", json!(1))]);
}

#[tokio::test]
async fn a_failed_delivery_is_repeated_on_schedule_with_the_same_bytes_until_it_is_a_dead_letter() {
    let system = System::start("300ms,600ms").await;
    let receiver = Receiver::start(|n| Reply::Status(if n < 3 { 500 } else { 204 })).await;
    let counted = given_up();
    let (partner, webhook) = one_delivery(&system, &receiver).await;
    let dead = partner.only_delivery(&webhook, "DEAD").await;
    eventually("it is counted", || async { given_up() }, |given_up| counted < *given_up).await;
    let seen = receiver.seen();
    assert_eq!(seen.len(), 3, "two waits are three attempts and no more");
    for (number, request) in (1..).zip(&seen) {
        verify(request, text(&webhook["secret"]));
        assert_eq!(request.header("x-daybook-attempt"), number.to_string());
        assert_eq!(request.body, seen[0].body);
        assert_eq!(request.header("webhook-id"), seen[0].header("webhook-id"));
        assert_eq!(request.header("x-daybook-delivery"), text(&dead["id"]));
        assert!(!request.headers.contains_key("x-daybook-possible-duplicate"), "it is known that 500 was answered");
    }
    assert!(Duration::from_millis(300) <= seen[1].at - seen[0].at, "the first wait was cut short");
    assert!(Duration::from_millis(600) <= seen[2].at - seen[1].at, "the second wait was cut short");
    let outcomes: Vec<_> =
        dead["attempts"].as_array().unwrap().iter().map(|a| (&a["outcome"], &a["statusCode"])).collect();
    assert_eq!(outcomes, [(&json!("status"), &json!(500)); 3]);
    assert!(dead.get("nextAttemptAt").is_none(), "nothing is due any more");
    let path = format!("/v1/webhooks/{}/deliveries?status=DEAD", text(&webhook["id"]));
    assert_eq!(partner.get(&path).await["data"][0]["id"], dead["id"]);

    assert_eq!(redeliver(&partner, &dead).await.0, StatusCode::ACCEPTED);
    assert_eq!(redeliver(&partner, &dead).await.0, StatusCode::ACCEPTED, "asking twice is no error");
    let delivered = partner.only_delivery(&webhook, "DELIVERED").await;
    let seen = receiver.seen();
    assert_eq!(seen[3].body, seen[0].body);
    assert_eq!(seen[3].header("x-daybook-attempt"), "4");
    assert_eq!(delivered["attempts"].as_array().unwrap().len(), seen.len());
}

#[tokio::test]
async fn a_redirect_is_a_failure_and_is_not_followed() {
    let system = System::start("6h").await;
    let elsewhere = Receiver::start(|_| Reply::Status(200)).await;
    let location = elsewhere.url();
    let receiver = Receiver::start(move |_| {
        Reply::Raw(format!("HTTP/1.1 302 Found\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n").into_bytes())
    })
    .await;
    let (partner, webhook) = one_delivery(&system, &receiver).await;
    let retrying = partner.only_delivery(&webhook, "RETRYING").await;
    assert_eq!(retrying["attempts"][0]["outcome"], "redirect");
    assert_eq!(retrying["attempts"][0]["statusCode"], 302);
    assert!(retrying["nextAttemptAt"].is_string());
    assert_eq!(elsewhere.connections(), 0);
}

#[tokio::test]
async fn an_endpoint_that_hangs_is_cut_at_the_deadline_and_delays_nobody_else() {
    let system = System::start("6h").await;
    let (slow, quick) = (system.partner().await, system.partner().await);
    let hanging = Receiver::start(|_| Reply::Trickle).await;
    let receiver = Receiver::start(|_| Reply::Status(200)).await;
    let hanging_webhook = slow.register(&hanging).await;
    quick.register(&receiver).await;
    let slow_wallet = system.wallet(&slow).await;
    for _ in 0..50 {
        system.fund(&slow, slow_wallet, "1.00").await;
    }
    hanging.wait_for(4).await;
    let quick_wallet = system.wallet(&quick).await;
    let begun = Instant::now();
    for _ in 0..50 {
        system.fund(&quick, quick_wallet, "1.00").await;
    }
    receiver.wait_for(101).await;
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?} for what nobody hinders", begun.elapsed());
    assert_eq!(hanging.connections(), 4, "a hanging endpoint has its own few places and no more");

    let deliveries = eventually(
        "an attempt that timed out",
        || slow.deliveries(&hanging_webhook),
        |seen| seen.iter().any(|delivery| delivery["attempts"][0]["outcome"] == "timeout"),
    )
    .await;
    let timed_out = deliveries.iter().find(|delivery| delivery["attempts"][0]["outcome"] == "timeout").unwrap();
    let latency = timed_out["attempts"][0]["latencyMs"].as_i64().unwrap();
    assert!((15_000..18_000).contains(&latency), "cut after {latency} ms");
    assert_eq!(timed_out["status"], "RETRYING");
}

#[tokio::test]
async fn a_backlog_of_a_hundred_thousand_delays_nobody_else() {
    let system = System::start("6h").await;
    let (buried, other) = (system.partner().await, system.partner().await);
    let hanging = Receiver::start(|_| Reply::Hang).await;
    let receiver = Receiver::start(|_| Reply::Status(200)).await;
    let backlog = buried.register(&hanging).await;
    let webhook = other.register(&receiver).await;
    let endpoint = &text(&backlog["id"])[4..];
    system
        .sql(&format!(
            "insert into webhooks.deliveries (id, endpoint_id, event_id, event_type, sequence, ledger_position, body)
             select gen_random_uuid(), '{endpoint}', gen_random_uuid(), 'wallet.opened', 1000 + n, 1, '{{}}'
             from generate_series(1, 100000) n"
        ))
        .await;
    hanging.wait_for(4).await;
    let mut latencies = Vec::new();
    for number in 1..=20 {
        system.wallet(&other).await;
        let begun = Instant::now();
        receiver.wait_for(number).await;
        latencies.push(begun.elapsed());
    }
    latencies.sort_unstable();
    assert!(latencies[10] < Duration::from_millis(500), "the median of {latencies:?}");
    assert_eq!(hanging.connections(), 4);
    assert_eq!(other.deliveries(&webhook).await.len(), 20);
}

#[tokio::test]
async fn a_status_that_is_rare_is_found_without_reading_all_that_have_another() {
    let system = System::start("6h").await;
    let receiver = Receiver::start(|_| Reply::Status(200)).await;
    let partner = system.partner().await;
    let webhook = partner.register(&receiver).await;
    let endpoint = &text(&webhook["id"])[4..];
    system
        .sql(&format!(
            "insert into webhooks.deliveries (id, endpoint_id, event_id, event_type, sequence, ledger_position, body, status, next_due, ended_at)
             select gen_random_uuid(), '{endpoint}', gen_random_uuid(), 'wallet.opened', 1000 + n, 1, repeat('x', 500), 'DELIVERED', null, now()
             from generate_series(1, 200000) n; analyze webhooks.deliveries;"
        ))
        .await;
    let (mut rare, mut common) = (Vec::new(), Vec::new());
    for _ in 0..15 {
        for (status, took, count) in [("DEAD", &mut rare, 0), ("DELIVERED", &mut common, 20)] {
            let path = format!("/v1/webhooks/{}/deliveries?limit=20&status={status}", text(&webhook["id"]));
            let begun = Instant::now();
            let page = partner.get(&path).await;
            took.push(begun.elapsed());
            assert_eq!(page["data"].as_array().unwrap().len(), count);
        }
    }
    rare.sort_unstable();
    common.sort_unstable();
    assert!(rare[7] < common[7] * 8, "medians of {rare:?} and {common:?}");
}

#[tokio::test]
async fn of_an_endless_answer_16_kib_are_kept_and_nothing_is_decompressed() {
    let system = System::start("6h").await;
    let bomb = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 6\r\n\r\n\x1f\x8b\x08abc";
    let receiver = Receiver::start(|n| if n == 0 { Reply::Endless } else { Reply::Raw(bomb.to_vec()) }).await;
    let (partner, webhook) = one_delivery(&system, &receiver).await;
    let endless = partner.only_delivery(&webhook, "DELIVERED").await;
    let attempt = &endless["attempts"][0];
    assert_eq!(text(&attempt["responseBody"]), "x".repeat(16 * 1024));
    assert_eq!(attempt["truncated"], true);

    assert_eq!(redeliver(&partner, &endless).await.0, StatusCode::ACCEPTED);
    receiver.wait_for(2).await;
    let zipped = partner.only_delivery(&webhook, "DELIVERED").await;
    assert_eq!(zipped["attempts"][1]["responseBody"], String::from_utf8_lossy(b"\x1f\x8b\x08abc").into_owned());
    assert_eq!(zipped["attempts"][1]["truncated"], false);
}

#[tokio::test]
async fn what_is_no_answer_and_who_is_not_there_have_outcomes_of_their_own() {
    let system = System::start("6h").await;
    let partner = system.partner().await;
    let closing = Receiver::start(|_| Reply::Close).await;
    let babbling = Receiver::start(|_| Reply::Raw(b"SSH-2.0-OpenSSH_9.6\r\n".to_vec())).await;
    let absent = Receiver::start(|_| Reply::Status(200)).await.url(); // gone with its value
    let expected = [(closing.url(), "no-answer"), (babbling.url(), "no-answer"), (absent, "connect")];
    let mut webhooks = Vec::new();
    for (url, outcome) in &expected {
        webhooks.push((partner.register_url(url).await, outcome));
    }
    system.wallet(&partner).await;
    for (webhook, outcome) in webhooks {
        let retrying = partner.only_delivery(&webhook, "RETRYING").await;
        assert_eq!(&retrying["attempts"][0]["outcome"], outcome, "{retrying}");
        assert!(retrying["attempts"][0]["detail"].is_string());
    }
}

#[tokio::test]
async fn an_endpoint_hears_of_what_happens_after_its_registration_only_and_in_a_sequence_without_gaps() {
    let mut system = System::start_without_dispatching("1s").await;
    let partner = system.partner().await;
    let receiver = Receiver::start(|_| Reply::Status(200)).await;
    let wallet = system.wallet(&partner).await;
    system.fund(&partner, wallet, "1.00").await;
    let webhook = partner.register(&receiver).await; // nothing has been turned into deliveries yet
    for _ in 0..20 {
        system.fund(&partner, wallet, "2.00").await;
    }
    system.dispatch();
    receiver.wait_for(40).await;
    let deliveries = eventually("40 deliveries", || partner.deliveries(&webhook), |seen| seen.len() == 40).await;
    let sequences: Vec<_> = deliveries.iter().filter_map(|delivery| delivery["sequence"].as_i64()).collect();
    assert_eq!(sequences, (1..=40).collect::<Vec<_>>());
    assert!(receiver.seen().iter().all(|seen| seen.json()["data"]["amount"] == "2.00"), "the past was told");

    // Another start from the same checkpoint tells nothing twice.
    system.crash().await;
    system.dispatch();
    let funded = system.fund(&partner, wallet, "3.00").await.position();
    receiver.wait_for(42).await;
    let path = format!("/v1/webhooks/{}/deliveries?limit=100&minPosition={funded}", text(&webhook["id"]));
    assert_eq!(partner.get(&path).await["data"].as_array().unwrap().len(), 42);
}

#[tokio::test]
async fn two_dispatchers_make_and_send_each_delivery_once() {
    let system = System::start("6h").await;
    let _second = system.run(system.another_dispatcher(true));
    let partner = system.partner().await;
    let receiver = Receiver::start(|_| Reply::Status(200)).await;
    let webhook = partner.register(&receiver).await;
    let wallet = system.wallet(&partner).await;
    for _ in 0..40 {
        system.fund(&partner, wallet, "2.00").await;
    }
    receiver.wait_for(81).await;
    let delivered = eventually(
        "81 delivered",
        || async {
            (
                partner.deliveries(&webhook).await.len(),
                system.count("select count(*) from webhooks.deliveries where status = 'DELIVERED'").await,
            )
        },
        |seen| *seen == (81, 81),
    );
    delivered.await;
    assert_eq!(receiver.seen().len(), 81);
    assert_eq!(system.count("select max(sequence) from webhooks.deliveries").await, 81);
}

#[tokio::test]
async fn after_a_crash_between_send_and_record_the_delivery_is_sent_again_as_a_possible_duplicate() {
    let mut system = System::start("6h").await;
    let receiver = Receiver::start(|n| if n == 0 { Reply::Hang } else { Reply::Status(200) }).await;
    let (partner, webhook) = one_delivery(&system, &receiver).await;
    receiver.wait_for(1).await;
    system.crash().await;
    let pending = partner.only_delivery(&webhook, "PENDING").await;
    assert_eq!(pending["attempts"][0]["outcome"], "in-flight", "the attempt was written before it was sent");

    system.sql("update webhooks.deliveries set next_due = now()").await; // the lease ends
    system.dispatch();
    let delivered = partner.only_delivery(&webhook, "DELIVERED").await;
    let outcomes: Vec<_> = delivered["attempts"].as_array().unwrap().iter().map(|a| text(&a["outcome"])).collect();
    assert_eq!(outcomes, ["unknown", "delivered"]);
    let seen = receiver.seen();
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[1].header("x-daybook-possible-duplicate"), "true");
    assert_eq!(seen[1].header("x-daybook-attempt"), "2");
    assert_eq!(seen[1].header("webhook-id"), seen[0].header("webhook-id"));
    assert_eq!(seen[1].body, seen[0].body);
}

#[tokio::test]
async fn an_outcome_that_comes_after_its_lease_changes_nothing() {
    let mut system = System::start("6h").await;
    let late = Arc::new(Notify::new());
    let notified = late.clone();
    let receiver =
        Receiver::start(move |n| if n == 0 { Reply::StatusAfter(notified.clone(), 500) } else { Reply::Status(200) })
            .await;
    let (partner, webhook) = one_delivery(&system, &receiver).await;
    receiver.wait_for(1).await;
    system.sql("update webhooks.deliveries set next_due = now()").await; // the lease ends while the attempt goes on
    let delivered = partner.only_delivery(&webhook, "DELIVERED").await;
    late.notify_one();
    system.stop_dispatching().await.unwrap(); // the late outcome has been recorded, or rather not
    let path = format!("/v1/deliveries/{}", text(&delivered["id"]));
    assert_eq!(partner.get(&path).await, delivered);
    assert_eq!(delivered["attempts"][0]["outcome"], "unknown");
}

#[tokio::test]
async fn the_last_attempt_of_a_schedule_is_the_last_even_when_its_outcome_is_unknown() {
    let mut system = System::start("1ms").await;
    let receiver = Receiver::start(|n| match n {
        0 => Reply::Status(500),
        1 => Reply::Hang,
        _ => Reply::Status(200),
    })
    .await;
    let (partner, webhook) = one_delivery(&system, &receiver).await;
    receiver.wait_for(2).await;
    system.crash().await;
    system.sql("update webhooks.deliveries set next_due = now()").await; // the lease ends
    let counted = given_up();
    system.dispatch();
    let dead = partner.only_delivery(&webhook, "DEAD").await;
    eventually("it is counted", || async { given_up() }, |given_up| counted < *given_up).await;
    let outcomes: Vec<_> = dead["attempts"].as_array().unwrap().iter().map(|a| text(&a["outcome"])).collect();
    assert_eq!(outcomes, ["status", "unknown"]);
    assert_eq!(receiver.seen().len(), 2);

    assert_eq!(redeliver(&partner, &dead).await.0, StatusCode::ACCEPTED);
    let seen = receiver.wait_for(3).await;
    assert_eq!(seen[2].header("x-daybook-possible-duplicate"), "true", "the unknown attempt may have arrived");
}

#[tokio::test]
async fn redelivering_while_the_last_attempt_is_under_way_begins_a_fresh_schedule() {
    let system = System::start("1ms").await;
    let answer = Arc::new(Notify::new());
    let notified = answer.clone();
    let receiver = Receiver::start(move |n| match n {
        0 => Reply::Status(500),
        1 => Reply::StatusAfter(notified.clone(), 500),
        _ => Reply::Status(200),
    })
    .await;
    let (partner, webhook) = one_delivery(&system, &receiver).await;
    receiver.wait_for(2).await;
    let path = format!("/v1/webhooks/{}", text(&webhook["id"]));
    for status in ["DISABLED", "ACTIVE"] {
        let changed = partner.call(Method::PATCH, &path, Some(json!({ "status": status }))).await;
        assert_eq!(changed.status, StatusCode::OK, "{}", changed.body);
    }
    let held = partner.only_delivery(&webhook, "HELD").await;
    assert_eq!(redeliver(&partner, &held).await.0, StatusCode::ACCEPTED);
    answer.notify_one();
    partner.only_delivery(&webhook, "DELIVERED").await;
}

#[tokio::test]
async fn a_stored_target_that_leads_inside_is_blocked_and_no_socket_is_opened() {
    let system = System::start_without_dispatching("6h").await;
    let partner = system.partner().await;
    let receiver = Receiver::start(|_| Reply::Status(200)).await;
    let port = receiver.address.port();
    let mut webhooks = Vec::new();
    for url in [format!("https://127.0.0.1:{port}/"), format!("https://localhost:{port}/"), receiver.url()] {
        webhooks.push(partner.register_url(&url).await); // taken where local targets are allowed
    }
    system.wallet(&partner).await;
    let _running = system.run(system.another_dispatcher(false)); // and sent where they are not
    for webhook in webhooks {
        let retrying = partner.only_delivery(&webhook, "RETRYING").await;
        assert_eq!(retrying["attempts"][0]["outcome"], "blocked-address", "{webhook}");
    }
    assert_eq!(receiver.connections(), 0);
}

#[tokio::test]
async fn a_certificate_that_nobody_vouches_for_is_refused_and_nothing_is_sent_in_plain() {
    let system = System::start("6h").await;
    let partner = system.partner().await;
    let (url, served) = self_signed_server();
    let signed_by_itself = partner.register_url(&url).await;
    let (url, heard) = plain_server();
    let not_tls = partner.register_url(&url).await;
    system.wallet(&partner).await;
    for webhook in [&signed_by_itself, &not_tls] {
        let retrying = partner.only_delivery(webhook, "RETRYING").await;
        assert_eq!(retrying["attempts"][0]["outcome"], "tls", "{retrying}");
        assert!(retrying["attempts"][0]["detail"].is_string());
    }
    let heard = heard.join().unwrap().unwrap();
    assert!(!heard.windows(4).any(|bytes| bytes == b"POST" || bytes == b"evt_"), "a request in plain");
    assert!(served.join().unwrap().is_err(), "the handshake was finished");
}

/// A server without TLS. Takes one connection, answers it unasked, and says what it heard.
fn plain_server() -> (String, std::thread::JoinHandle<std::io::Result<Vec<u8>>>) {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}/hook", listener.local_addr().unwrap());
    let served = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")?;
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).or_else(|error| match error.kind() {
            std::io::ErrorKind::ConnectionReset => Ok(0), // the sender left without reading everything
            _ => Err(error),
        })?;
        Ok(heard)
    });
    (url, served)
}

/// A server that says who it is with a certificate of its own making. Takes one connection.
fn self_signed_server() -> (String, std::thread::JoinHandle<std::io::Result<usize>>) {
    use std::io::Read;
    let pem = include_bytes!("self-signed.pem");
    let certificate = CertificateDer::from_pem_slice(pem).unwrap();
    let key = PrivateKeyDer::from_pem_slice(pem).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}/hook", listener.local_addr().unwrap());
    let served = std::thread::spawn(move || {
        let (stream, _) = listener.accept()?;
        let connection = rustls::ServerConnection::new(config.into()).map_err(std::io::Error::other)?;
        rustls::StreamOwned::new(connection, stream).read(&mut [0; 1024])
    });
    (url, served)
}

#[tokio::test]
async fn an_endpoint_that_is_gone_is_disabled_and_what_waits_is_held_until_it_is_redelivered() {
    let system = System::start("6h").await;
    let receiver = Receiver::start(|n| Reply::Status(if n == 0 { 410 } else { 200 })).await;
    let (partner, webhook) = one_delivery(&system, &receiver).await;
    let held = partner.only_delivery(&webhook, "HELD").await;
    assert_eq!(held["attempts"][0]["statusCode"], 410);
    let path = format!("/v1/webhooks/{}", text(&webhook["id"]));
    let disabled = partner.get(&path).await;
    assert_eq!((text(&disabled["status"]), text(&disabled["disabledReason"])), ("DISABLED", "gone"));

    let (status, problem) = redeliver(&partner, &held).await;
    assert_eq!((status, text(&problem["type"])), (StatusCode::CONFLICT, "/problems/invalid-transition"));
    let while_disabled = system.wallet(&partner).await;
    let enabled = partner.call(Method::PATCH, &path, Some(json!({ "status": "ACTIVE" }))).await;
    assert_eq!(enabled.body["status"], "ACTIVE");
    assert_eq!(redeliver(&partner, &held).await.0, StatusCode::ACCEPTED);
    partner.only_delivery(&webhook, "DELIVERED").await;
    let funded = system.fund(&partner, while_disabled, "1.00").await.position();
    let path = format!("/v1/webhooks/{}/deliveries?minPosition={funded}", text(&webhook["id"]));
    let deliveries = partner.get(&path).await;
    let types: Vec<_> = deliveries["data"].as_array().unwrap().iter().map(|d| text(&d["eventType"])).collect();
    assert_eq!(
        types,
        ["transaction.completed", "transaction.created", "wallet.opened"],
        "a wallet was opened while it was disabled"
    );
}

#[tokio::test]
async fn what_the_old_receiver_says_after_the_url_has_changed_does_not_disable_the_endpoint() {
    let system = System::start("6h").await;
    let answer = Arc::new(Notify::new());
    let notified = answer.clone();
    let old = Receiver::start(move |_| Reply::StatusAfter(notified.clone(), 410)).await;
    let new = Receiver::start(|_| Reply::Status(200)).await;
    let (partner, webhook) = one_delivery(&system, &old).await;
    old.wait_for(1).await;
    let path = format!("/v1/webhooks/{}", text(&webhook["id"]));
    let moved = partner.call(Method::PATCH, &path, Some(json!({ "url": new.url() }))).await;
    assert_eq!(moved.status, StatusCode::OK, "{}", moved.body);
    answer.notify_one();
    let retrying = partner.only_delivery(&webhook, "RETRYING").await;
    assert_eq!(retrying["attempts"][0]["statusCode"], 410);
    assert_eq!(partner.get(&path).await["status"], "ACTIVE");
}

#[tokio::test]
async fn changes_that_wait_for_fan_out_leave_it_what_it_needs() {
    let mut system = System::start_without_dispatching("6h").await;
    let partner = system.partner().await;
    let receiver = Receiver::start(|_| Reply::Status(200)).await;
    let webhook = partner.register(&receiver).await;
    let wallet = system.wallet(&partner).await;
    let freeze = Action::FreezeWallet { wallet, reason: "a test".to_owned() };
    system.execute(partner.caller(), freeze).await; // telling of it takes reading the wallet's stream

    let lock = system.hold_the_checkpoint().await;
    system.dispatch();
    eventually("fan-out waits for the checkpoint", || system.waiting_for_locks(), |waiting| *waiting == 1).await;
    let path = format!("/v1/webhooks/{}", text(&webhook["id"]));
    let mut changes = JoinSet::new();
    for _ in 0..16 {
        let (partner, path) = (partner.at(system.base()), path.clone());
        changes.spawn(async move { partner.call(Method::PATCH, &path, Some(json!({ "status": "ACTIVE" }))).await });
    }
    eventually("no connection is left", || system.waiting_for_locks(), |waiting| *waiting == 12).await;
    let begun = Instant::now();
    lock.rollback().await.unwrap();
    receiver.wait_for(2).await;
    assert!(begun.elapsed() < Duration::from_secs(4), "fan-out waited for those who waited for it");
    while let Some(changed) = changes.join_next().await {
        assert_eq!(changed.unwrap().status, StatusCode::OK);
    }
}

#[tokio::test]
async fn a_receiver_that_asks_for_a_pause_gets_it_for_the_whole_endpoint() {
    let system = System::start("100ms").await;
    let partner = system.partner().await;
    let receiver = Receiver::start(|n| match n {
        0 => Reply::Raw(b"HTTP/1.1 429 Slow Down\r\nretry-after: 2\r\ncontent-length: 0\r\n\r\n".to_vec()),
        _ => Reply::Status(200),
    })
    .await;
    let webhook = partner.register(&receiver).await;
    system.wallet(&partner).await;
    partner.only_delivery(&webhook, "RETRYING").await;
    system.wallet(&partner).await;
    let seen = receiver.wait_for(3).await;
    for later in &seen[1..] {
        let pause = later.at - seen[0].at;
        assert!(Duration::from_millis(1900) <= pause, "sent again after {pause:?}");
    }
    let mut attempts: Vec<_> = seen[1..].iter().map(|seen| seen.header("x-daybook-attempt")).collect();
    attempts.sort_unstable();
    assert_eq!(attempts, ["1", "2"], "a paused wait burns no attempt of other deliveries");
}

#[tokio::test]
async fn a_stop_lets_what_is_under_way_be_recorded() {
    let mut system = System::start("6h").await;
    let answer = Arc::new(Notify::new());
    let notified = answer.clone();
    let receiver = Receiver::start(move |_| Reply::StatusAfter(notified.clone(), 200)).await;
    let (partner, webhook) = one_delivery(&system, &receiver).await;
    receiver.wait_for(1).await;
    let running = system.stop_dispatching();
    answer.notify_one();
    timeout(Duration::from_secs(10), running).await.expect("the stop takes its time").unwrap();
    assert_eq!(partner.only_delivery(&webhook, "DELIVERED").await["attempts"][0]["outcome"], "delivered");
}

#[tokio::test]
async fn what_has_been_kept_long_enough_is_cleared_away_with_its_attempts() {
    let mut system = System::start("6h").await;
    let receiver = Receiver::start(|_| Reply::Status(200)).await;
    let (partner, webhook) = one_delivery(&system, &receiver).await;
    let old = partner.only_delivery(&webhook, "DELIVERED").await;
    system.wallet(&partner).await;
    eventually(
        "the second is delivered",
        || partner.deliveries(&webhook),
        |seen| seen.len() == 2 && seen[1]["status"] == "DELIVERED",
    )
    .await;
    let age = format!(
        "update webhooks.deliveries set ended_at = now() - interval '31 days' where id = '{}'",
        &text(&old["id"])[4..]
    );
    system.sql(&age).await;
    system.crash().await;
    system.dispatch(); // it clears away at its start
    let kept = eventually("one is left", || partner.deliveries(&webhook), |seen| seen.len() == 1).await;
    assert_eq!(kept[0]["sequence"], 2);
    assert_eq!(system.count("select count(*) from webhooks.attempts").await, 1);
}
