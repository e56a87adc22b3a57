//! Top-ups through the real command-api, ledger-engine, relay and simulated bank, on real Postgres and NATS.
//!
//! What is looked at in the end is the log: a top-up that succeeded has one settlement, whatever happened on the way.

mod system;

use std::time::Duration;

use local_stack::Stack;
use serde_json::json;
use tokio::time::timeout;

use system::{Parts, System, TopUp, eventually};

#[tokio::test]
async fn a_payment_that_the_payer_approves_becomes_one_balanced_event() {
    let system = System::start().await;
    let top_up = system.top_up("10.50").await;
    system.simulate(&top_up, json!({ "outcome": "success" })).await;
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
    let settled = system.events(&top_up).await.pop().unwrap();
    let entries = settled["TransactionSettled"]["entries"].as_array().unwrap().clone();
    let sides: Vec<_> =
        entries.iter().map(|e| (e["direction"].as_str().unwrap(), e["amount"].as_str().unwrap())).collect();
    assert_eq!(sides.len(), 2);
    assert!(sides.contains(&("DEBIT", "10.50")) && sides.contains(&("CREDIT", "10.50")), "{sides:?}");
    assert!(settled["TransactionSettled"]["providerReference"].as_str().unwrap().starts_with("BNK"));
    let row = system.row_where(&top_up, "ended by the log", |row| row.ended_position.is_some()).await;
    assert_eq!((row.state.as_str(), row.outcome.as_deref(), row.alert), ("ENDED", Some("SUCCESS"), None));
}

#[tokio::test]
async fn a_payment_that_the_payer_declines_fails_and_moves_nothing() {
    let system = System::start().await;
    let top_up = system.top_up("10.50").await;
    system.simulate(&top_up, json!({ "outcome": "failure" })).await;
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionFailed"]);
    let failure = &system.events(&top_up).await[1]["TransactionFailed"]["failure"];
    assert_eq!(failure["code"], "payment-declined");
}

#[tokio::test]
async fn a_callback_that_comes_five_times_settles_once() {
    let system = System::start().await;
    let top_up = system.top_up("10.50").await;
    system.simulate(&top_up, json!({ "outcome": "success", "callback": { "copies": 5 } })).await;
    let received =
        eventually("five callbacks were received", || system.callbacks_received(&top_up), |seen| *seen == 5).await;
    assert_eq!(received, 5);
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
    assert_eq!(system.verdicts(&top_up).await, ["ACCEPTED"]);
}

#[tokio::test]
async fn a_callback_that_is_lost_is_made_up_for_by_asking() {
    let system = System::start_with(Parts { ask_after: Duration::from_millis(300), ..Parts::default() }).await;
    let top_up = system.top_up("10.50").await;
    system.simulate(&top_up, json!({ "outcome": "success", "callback": { "drop": true } })).await;
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
    assert_eq!(system.callbacks_received(&top_up).await, 0);
    // The callback comes after all: it says what is known.
    let again = system.callback(&top_up, json!({ "bankReference": system.reference(&top_up).await })).await;
    assert_eq!((again.status, again.text("/status")), (200, "accepted".to_owned()));
}

#[tokio::test]
async fn a_payment_that_nobody_decides_is_cancelled_at_the_bank_and_expires() {
    let system = System::start_with(Parts { expire_after: OFFERED_BY_THEN, ..Parts::default() }).await;
    let top_up = system.top_up("10.50").await;
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionExpired"]);
    assert_eq!(system.at_the_bank(&top_up).await["status"], "cancelled");

    let late = system.callback(&top_up, json!({ "status": "success" })).await;
    assert_eq!((late.status, late.slug()), (409, "invalid-transition".to_owned()));
    assert_eq!(system.verdicts(&top_up).await, ["CONTRARY"]);
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionExpired"]);
}

#[tokio::test]
async fn a_payment_that_was_paid_at_the_last_moment_is_settled_and_not_expired() {
    let system = System::start_with(Parts { expire_after: Duration::from_secs(3), ..Parts::default() }).await;
    let top_up = system.top_up("10.50").await;
    system.simulate(&top_up, json!({ "outcome": "success", "callback": { "drop": true } })).await;
    // Asking is half a minute away; what comes first is the cancellation, and the bank says that it is too late for it.
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
    assert!(system.steps(&top_up).await.contains(&"cancel".to_owned()));
}

#[tokio::test]
async fn what_the_bank_did_not_sign_is_refused_before_anything_is_read() {
    let system = System::start().await;
    let top_up = system.top_up("10.50").await;
    let body = system.word(&top_up, json!({}));
    let now = system::unix_seconds();
    let good = system::sign(system::CALLBACK_SECRET, now, &body);
    let stale = system::sign(system::CALLBACK_SECRET, now - 301, &body);
    let early = system::sign(system::CALLBACK_SECRET, now + 310, &body);
    let forged = system::sign("another secret", now, &body);
    let (time, old, future) = (now.to_string(), (now - 301).to_string(), (now + 310).to_string());
    for (timestamp, signature, body, slug) in [
        (Some(&time), None, &body, "signature-invalid"),
        (None, Some(&good), &body, "signature-invalid"),
        (Some(&time), Some(&forged), &body, "signature-invalid"),
        (Some(&time), Some(&good.replace("sha256=", "sha1=")), &body, "signature-invalid"),
        (Some(&time), Some(&good), &body.replace("10.50", "99.50"), "signature-invalid"),
        (Some(&time), Some(&stale), &body, "signature-invalid"),
        (Some(&old), Some(&stale), &body, "timestamp-out-of-tolerance"),
        (Some(&future), Some(&early), &body, "timestamp-out-of-tolerance"),
        // Not JSON, and refused for its signature all the same.
        (Some(&time), Some(&good), &"{".to_owned(), "signature-invalid"),
    ] {
        let answer = system.doors.post(timestamp.map(String::as_str), signature.map(String::as_str), body).await;
        assert_eq!((answer.status, answer.slug().as_str()), (401, slug), "{timestamp:?} {signature:?} {body}");
    }
    assert_eq!(system.verdicts(&top_up).await, Vec::<String>::new(), "nothing of it was kept");
    assert_eq!(system.types(&top_up).await, ["TransactionRequested"]);
}

#[tokio::test]
async fn a_signed_callback_is_read_as_strictly_as_any_request() {
    let system = System::start().await;
    let top_up = system.top_up("10.50").await;
    let word = system.word(&top_up, json!({}));
    for (body, status, slug) in [
        ("{}x".to_owned(), 400, "malformed-json"),
        ("{}".to_owned(), 422, "invalid-field"),
        (word.replace('{', "{\"more\":1,"), 422, "unknown-field"),
        (word.replace('{', "{\"status\":\"failure\","), 400, "duplicate-field"),
        (word.replace("\"10.50\"", "10.50"), 422, "amount-format"),
        (word.replace("10.50", "10.501"), 422, "amount-precision"),
        (word.replace("EUR", "eur"), 422, "currency-unknown"),
        (word.replace("success", "cancelled"), 422, "invalid-field"),
        (word.replace("success", "succ\\u0000ess"), 422, "invalid-character"),
        (format!("{word}{}", " ".repeat(64 * 1024)), 413, "payload-too-large"),
    ] {
        let answer = system.doors.clone().signed(body.clone()).await;
        assert_eq!((answer.status, answer.slug().as_str()), (status, slug), "{}", &body[..body.len().min(200)]);
    }
    assert_eq!(system.verdicts(&top_up).await, Vec::<String>::new());
}

#[tokio::test]
async fn a_callback_about_other_money_is_kept_and_moves_nothing() {
    let system = System::start().await;
    let top_up = system.top_up("10.50").await;
    for (n, other) in [json!({ "amount": "10.51" }), json!({ "currency": "USD" })].into_iter().enumerate() {
        let mut other = other;
        other["bankReference"] = format!("OTHER{n}").into();
        for _ in 0..2 {
            let answer = system.callback(&top_up, other.clone()).await;
            assert_eq!((answer.status, answer.slug()), (422, "callback-mismatch".to_owned()), "{other}");
        }
    }
    assert_eq!(system.verdicts(&top_up).await, ["MISMATCH", "MISMATCH"]);
    assert_eq!(system.types(&top_up).await, ["TransactionRequested"]);
    // The true word still counts.
    system.simulate(&top_up, json!({ "outcome": "success" })).await;
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
}

/// What a callback was answered: its status in the body, or the problem's slug.
async fn said(system: &System, top_up: &TopUp, change: serde_json::Value) -> (u16, String) {
    let answer = system.callback(top_up, change).await;
    (answer.status, if answer.status < 300 { answer.text("/status") } else { answer.slug() })
}

#[tokio::test]
async fn a_mistaken_amount_is_corrected_under_the_same_reference_which_then_stands_for_that_payment_alone() {
    let system = System::start().await;
    let (top_up, other) = (system.top_up("10.50").await, system.top_up("10.50").await);
    let mistaken = json!({ "bankReference": "B1", "amount": "105.00" });
    for _ in 0..2 {
        assert_eq!(said(&system, &top_up, mistaken.clone()).await, (422, "callback-mismatch".to_owned()));
    }
    for _ in 0..2 {
        assert_eq!(said(&system, &top_up, json!({ "bankReference": "B1" })).await, (200, "accepted".to_owned()));
    }
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
    assert_eq!(system.events(&top_up).await[1]["TransactionSettled"]["providerReference"], "B1");

    let conflict = (409, "callback-conflict".to_owned());
    assert_eq!(said(&system, &top_up, mistaken).await, (422, "callback-mismatch".to_owned()), "as it was told before");
    assert_eq!(said(&system, &top_up, json!({ "bankReference": "B1", "amount": "9.00" })).await, conflict);
    assert_eq!(said(&system, &other, json!({ "bankReference": "B1" })).await, conflict);
    assert_eq!(system.verdicts(&top_up).await, ["MISMATCH", "ACCEPTED", "CONFLICT"]);
    assert_eq!(system.types(&other).await, ["TransactionRequested"]);
    assert_eq!(said(&system, &other, json!({ "bankReference": "B2" })).await, (200, "accepted".to_owned()));
    assert_eq!(system.ended(&other).await, ["TransactionRequested", "TransactionSettled"]);
}

/// How many callbacks about other money this process has counted, in any of its tests.
fn mismatches() -> u64 {
    let shown = prometheus::TextEncoder::new().encode_to_string(&prometheus::gather()).expect("the metrics are text");
    let line = shown.lines().find_map(|line| line.strip_prefix(r#"daybook_bank_callbacks_total{verdict="mismatch"} "#));
    line.map_or(0, |count| count.parse().expect("a counter is a number"))
}

#[tokio::test]
async fn a_mistaken_amount_that_came_before_its_payment_was_known_can_be_corrected_too() {
    let mut system = System::start().await;
    system.stop_workflows().await; // the log is not followed now
    let top_up = system.top_up("10.50").await;
    let mistaken = json!({ "bankReference": "B1", "amount": "105.00" });
    assert_eq!(said(&system, &top_up, mistaken).await, (202, "quarantined".to_owned()));
    let correct = json!({ "bankReference": "B1" });
    assert_eq!(said(&system, &top_up, correct.clone()).await, (409, "callback-conflict".to_owned()));

    let counted = mismatches();
    system.start_workflows();
    let judged = |verdicts: &Vec<String>| *verdicts == ["MISMATCH", "CONFLICT"];
    eventually("the quarantined one is judged", || system.verdicts(&top_up), judged).await;
    eventually("and counted, for somebody must look", || async { mismatches() }, |now| counted < *now).await;
    assert_eq!(said(&system, &top_up, correct).await, (200, "accepted".to_owned()));
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
    assert_eq!(system.verdicts(&top_up).await, ["MISMATCH", "ACCEPTED"]);
}

#[tokio::test]
async fn a_reference_that_the_bank_gave_when_it_was_asked_settles_no_other_payment() {
    let system = System::start_with(Parts { ask_after: Duration::from_millis(300), ..Parts::default() }).await;
    let (asked, other) = (system.top_up("10.50").await, system.top_up("10.50").await);
    system.simulate(&asked, json!({ "outcome": "success", "callback": { "drop": true } })).await;
    assert_eq!(system.ended(&asked).await, ["TransactionRequested", "TransactionSettled"]);
    let reused = json!({ "bankReference": system.reference(&asked).await });
    assert_eq!(said(&system, &other, reused).await, (409, "callback-conflict".to_owned()));
    assert_eq!((system.verdicts(&other).await, system.types(&other).await.len()), (vec!["CONFLICT".to_owned()], 1));
}

#[tokio::test]
async fn the_bank_cannot_take_its_word_back_nor_use_a_reference_twice() {
    let system = System::start().await;
    let top_up = system.top_up("10.50").await;
    let check = async |change, status, outcome: &str| {
        let answer = system.callback(&top_up, change).await;
        let said = if answer.status < 300 { answer.text("/status") } else { answer.slug() };
        assert_eq!((answer.status, said.as_str()), (status, outcome));
    };
    check(json!({ "bankReference": "B1" }), 200, "accepted").await;
    check(json!({ "bankReference": "B1" }), 200, "accepted").await;
    check(json!({ "bankReference": "B1", "amount": "10.5" }), 200, "accepted").await;
    check(json!({ "bankReference": "B1", "status": "failure" }), 409, "callback-conflict").await;
    check(json!({ "bankReference": "B1", "status": "failure" }), 409, "callback-conflict").await;
    check(json!({ "bankReference": "B1", "amount": "99.00" }), 409, "callback-conflict").await;
    check(json!({ "bankReference": "B2" }), 409, "callback-conflict").await;
    check(json!({ "bankReference": "B3", "status": "failure" }), 409, "invalid-transition").await;
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
    check(json!({ "bankReference": "B4", "status": "failure" }), 409, "invalid-transition").await;
    assert_eq!(system.verdicts(&top_up).await, ["ACCEPTED", "CONFLICT", "CONFLICT", "SECOND", "CONTRARY", "CONTRARY"]);
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
}

#[tokio::test]
async fn twenty_equal_callbacks_at_once_settle_once() {
    let system = System::start().await;
    let top_up = system.top_up("10.50").await;
    let body = system.word(&top_up, json!({}));
    let answers: Vec<_> = (0..20).map(|_| tokio::spawn(system.doors.clone().signed(body.clone()))).collect();
    for answer in answers {
        let answer = answer.await.unwrap();
        assert_eq!((answer.status, answer.text("/status")), (200, "accepted".to_owned()));
    }
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
    assert_eq!(system.callbacks_received(&top_up).await, 20);
}

#[tokio::test]
async fn a_callback_for_a_payment_that_is_not_known_is_quarantined_until_the_payment_appears() {
    let mut system = System::start().await;
    system.stop_workflows().await; // the log is not followed now
    let top_up = system.top_up("10.50").await;
    for _ in 0..2 {
        let early = system.callback(&top_up, json!({})).await;
        assert_eq!((early.status, early.text("/status")), (202, "quarantined".to_owned()));
    }
    assert_eq!(system.types(&top_up).await, ["TransactionRequested"]);

    system.start_workflows();
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
    assert_eq!(system.verdicts(&top_up).await, ["ACCEPTED"]);
}

#[tokio::test]
async fn a_callback_that_is_faster_than_the_feed_waits_for_it_and_is_accepted() {
    let system = System::start().await;
    let lock = system.hold_the_checkpoint().await;
    let top_up = system.top_up("10.50").await;
    let mut early = tokio::spawn(system.doors.clone().signed(system.word(&top_up, json!({}))));
    let answered = timeout(Duration::from_millis(500), &mut early).await;
    assert!(answered.is_err(), "answered before the log was followed: {answered:?}");
    lock.rollback().await.unwrap();
    let early = early.await.unwrap();
    assert_eq!((early.status, early.text("/status")), (200, "accepted".to_owned()));
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
}

#[tokio::test]
async fn money_that_arrives_for_a_frozen_wallet_waits_and_is_booked_once_the_wallet_is_free() {
    let system = System::start().await;
    let top_up = system.top_up("10.50").await;
    system.wallet_command("freeze").await;
    let taken = system.callback(&top_up, json!({})).await;
    assert_eq!((taken.status, taken.text("/status")), (200, "accepted".to_owned()), "the bank has done its part");
    let row = system.row_where(&top_up, "blocked", |row| row.state == "BLOCKED").await;
    assert!(row.alert.is_some_and(|alert| alert.contains("wallet-frozen")));
    assert_eq!(system.types(&top_up).await, ["TransactionRequested"]);

    system.wallet_command("unfreeze").await;
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
    let row = system.row_where(&top_up, "ended", |row| row.state == "ENDED").await;
    assert_eq!(row.alert, None);
}

/// By then the bank was offered the payment, on a busy machine too: one that it was never offered expires without its knowing.
const OFFERED_BY_THEN: Duration = Duration::from_secs(5);

/// A pause that no test lives to see the end of: what happens, happens for another reason.
const TOO_LONG: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn unfreezing_a_wallet_books_what_waited_for_it_at_once() {
    let system = System::start_with(Parts { blocked_after: TOO_LONG, ..Parts::default() }).await;
    let both = [system.top_up("10.50").await, system.top_up("20.00").await];
    system.wallet_command("freeze").await;
    for top_up in &both {
        assert_eq!(system.callback(top_up, json!({})).await.status, 200);
        system.row_where(top_up, "blocked", |row| row.state == "BLOCKED").await;
        assert_eq!(system.types(top_up).await, ["TransactionRequested"]);
    }

    system.wallet_command("unfreeze").await;
    for top_up in &both {
        assert_eq!(system.ended(top_up).await, ["TransactionRequested", "TransactionSettled"]);
        let row = system.row_where(top_up, "ended by the log", |row| row.ended_position.is_some()).await;
        assert_eq!((row.outcome.as_deref(), row.command_try, row.alert), (Some("SUCCESS"), 1, None));
    }
}

#[tokio::test]
async fn a_refusal_that_is_heard_of_only_after_the_wallet_was_unfrozen_is_not_waited_for() {
    let system = System::start_with(Parts { blocked_after: TOO_LONG, ..Parts::default() }).await;
    let top_up = system.top_up("10.50").await;
    system.row_where(&top_up, "waiting", |row| row.state == "WAITING").await;
    system.wallet_command("freeze").await;
    system.commands.hang();
    assert_eq!(system.callback(&top_up, json!({})).await.status, 200);
    let refused = system.settle_in_their_name(&top_up).await;
    assert_eq!((refused.status, refused.slug()), (409, "wallet-frozen".to_owned()));
    system.wallet_command("unfreeze").await;
    let row = system.row_where(&top_up, "marked", |row| row.unfrozen).await;
    assert_eq!((row.state.as_str(), row.command_try), ("DECIDED", 0), "the refusal is not known yet");

    system.commands.resume(); // the same key again brings the refusal of the time when the wallet was frozen
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
    let row = system.row_where(&top_up, "ended by the log", |row| row.ended_position.is_some()).await;
    assert_eq!((row.outcome.as_deref(), row.command_try), (Some("SUCCESS"), 1));
}

#[tokio::test]
async fn a_bank_that_does_not_answer_fails_nothing_and_is_asked_until_it_does() {
    let system = System::start_with(Parts { bank_hangs: true, ..Parts::default() }).await;
    let top_up = system.top_up("10.50").await;
    let row =
        system.row_where(&top_up, "asked after a time-out", |row| row.state == "UNSURE" && 1 < row.failures).await;
    assert_eq!(row.outcome, None);
    assert_eq!(system.steps(&top_up).await[..2], ["register", "ask"], "after a time-out it is asked, not repeated");

    system.bank.resume();
    system.simulate(&top_up, json!({ "outcome": "success" })).await;
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
}

#[tokio::test]
async fn a_top_up_stays_pending_past_its_time_while_the_bank_cannot_be_asked() {
    let parts = Parts { bank_hangs: true, expire_after: OFFERED_BY_THEN, ..Parts::default() };
    let system = System::start_with(parts).await;
    let top_up = system.top_up("10.50").await;
    let cancels = async || system.steps(&top_up).await.iter().filter(|step| *step == "cancel").count();
    eventually("the cancellation was tried twice", cancels, |seen| 2 <= *seen).await;
    assert_eq!(system.types(&top_up).await, ["TransactionRequested"], "unknown is not expired");

    // The first offer still hangs on the wire. When it arrives after all, it must find a payment that cannot be paid.
    system.bank.resume_anew();
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionExpired"]);
    assert_eq!(system.at_the_bank(&top_up).await["status"], "cancelled");
}

#[tokio::test]
async fn a_word_that_was_taken_survives_a_crash_before_the_ledger_heard_it() {
    let mut system = System::start().await;
    let top_up = system.top_up("10.50").await;
    system.row_where(&top_up, "waiting", |row| row.state == "WAITING").await;
    system.commands.hang();
    let taken = system.callback(&top_up, json!({})).await;
    assert_eq!(
        (taken.status, taken.text("/status")),
        (200, "accepted".to_owned()),
        "kept, though it could not be booked yet"
    );
    system.row_where(&top_up, "decided", |row| row.state == "DECIDED").await;
    assert_eq!(system.types(&top_up).await, ["TransactionRequested"]);

    system.crash_workflows();
    system.commands.resume();
    system.start_workflows();
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
    let row = system.row_where(&top_up, "ended", |row| row.state == "ENDED").await;
    assert_eq!((row.outcome.as_deref(), row.command_try), (Some("SUCCESS"), 0), "the same key throughout");
}

#[tokio::test]
async fn workflows_that_were_away_take_up_what_happened_meanwhile() {
    let mut system = System::start().await;
    let registered = system.top_up("10.50").await;
    system.row_where(&registered, "waiting", |row| row.state == "WAITING").await;
    system.stop_workflows().await;
    let requested = system.top_up("20.00").await; // nobody tells the bank
    system.simulate(&registered, json!({ "outcome": "success" })).await;

    system.start_workflows();
    assert_eq!(system.ended(&registered).await, ["TransactionRequested", "TransactionSettled"]);
    system.simulate(&requested, json!({ "outcome": "failure" })).await;
    assert_eq!(system.ended(&requested).await, ["TransactionRequested", "TransactionFailed"]);
}

#[tokio::test]
async fn a_top_up_that_someone_else_ended_is_ended_here_too() {
    let system = System::start().await;
    let top_up = system.top_up("10.50").await;
    system.row_where(&top_up, "waiting", |row| row.state == "WAITING").await;
    system.expire_by_hand(&top_up).await;
    let row = system.row_where(&top_up, "ended", |row| row.state == "ENDED").await;
    assert_eq!((row.outcome.as_deref(), row.alert), (Some("EXPIRED"), None));

    let paid = system.callback(&top_up, json!({})).await;
    assert_eq!((paid.status, paid.slug()), (409, "invalid-transition".to_owned()));
}

#[tokio::test]
async fn a_top_up_that_bank_and_ledger_see_differently_is_left_to_a_person() {
    let system = System::start().await;
    let top_up = system.top_up("10.50").await;
    system.row_where(&top_up, "waiting", |row| row.state == "WAITING").await;
    system.commands.hang();
    assert_eq!(system.callback(&top_up, json!({})).await.status, 200);
    system.expire_by_hand(&top_up).await;
    system.commands.resume();
    let row = system.row_where(&top_up, "ended", |row| row.state == "ENDED").await;
    assert_eq!(row.outcome.as_deref(), Some("EXPIRED"));
    let alert = row.alert.expect("money has arrived that is not booked");
    assert!(alert.contains("success") && alert.contains("EXPIRED"), "{alert}");
    assert_eq!(system.types(&top_up).await, ["TransactionRequested", "TransactionExpired"]);
}

#[tokio::test]
async fn an_answer_that_a_callback_has_overtaken_changes_nothing() {
    let system = System::start_with(Parts { ask_after: Duration::from_millis(500), ..Parts::default() }).await;
    let top_up = system.top_up("10.50").await;
    system.row_where(&top_up, "waiting", |row| row.state == "WAITING").await;
    system.bank.hang();
    let under_way = |outcomes: &Vec<String>| outcomes.last().is_some_and(String::is_empty);
    eventually("the bank is being asked", async || system.outcomes(&top_up).await, under_way).await;
    assert_eq!(system.callback(&top_up, json!({})).await.status, 200);
    assert_eq!(system.ended(&top_up).await, ["TransactionRequested", "TransactionSettled"]);
    system.bank.resume();
    let all_over = |outcomes: &Vec<String>| !outcomes.iter().any(String::is_empty);
    eventually("the bank has answered", async || system.outcomes(&top_up).await, all_over).await;
    let row = system.row_where(&top_up, "ended by the log", |row| row.ended_position.is_some()).await;
    assert_eq!((row.state.as_str(), row.outcome.as_deref(), row.alert), ("ENDED", Some("SUCCESS"), None));
}

#[tokio::test]
async fn a_database_that_lets_them_wait_does_not_keep_workflows_from_stopping() {
    let mut system = System::start().await;
    let lock = system.hold_the_top_ups().await;
    eventually("both lanes wait for the table", || system.waiting_for_locks(), |waiting| 2 <= *waiting).await;
    system.stop_workflows().await;
    drop(lock);
}

#[tokio::test]
async fn a_token_that_is_revoked_is_replaced() {
    let system = System::start().await;
    let first = system.top_up("10.50").await;
    assert_eq!(system.callback(&first, json!({})).await.status, 200);
    assert_eq!(system.ended(&first).await, ["TransactionRequested", "TransactionSettled"]);
    let second = system.top_up("20.00").await;
    system.revoke_all_tokens().await;
    assert_eq!(system.callback(&second, json!({})).await.status, 200);
    assert_eq!(system.ended(&second).await, ["TransactionRequested", "TransactionSettled"]);
    assert!(!system.outcomes(&second).await.iter().any(|outcome| outcome.starts_with("unknown")), "renewed at once");
}

/// Servers of the test's own, which it kills.
#[tokio::test]
async fn a_bus_and_a_database_that_crash_and_return_lose_no_top_up() {
    let directory = tempfile::tempdir().unwrap();
    let stack = Stack::start(&directory.path().join("data"), local_stack::Options::default()).await.unwrap();
    migrations::run(stack.database_url()).await.unwrap();
    let system = System::start_on(stack.database_url(), stack.nats_url(), "crashing", Parts::default()).await;
    let before = system.top_up("10.50").await;
    system.row_where(&before, "waiting", |row| row.state == "WAITING").await;

    stack.kill_nats().await.unwrap();
    let without_bus = system.top_up("20.00").await;
    system.simulate(&without_bus, json!({ "outcome": "success" })).await;
    assert_eq!(system.ended(&without_bus).await, ["TransactionRequested", "TransactionSettled"]);

    stack.kill_postgres().await.unwrap();
    let refused = system.callback(&before, json!({})).await;
    assert_eq!(
        (refused.status, refused.slug()),
        (503, "storage-unavailable".to_owned()),
        "what cannot be kept is not taken"
    );
    stack.start_postgres().await.unwrap();
    stack.start_nats().await.unwrap();

    system.simulate(&before, json!({ "outcome": "success" })).await;
    assert_eq!(system.ended(&before).await, ["TransactionRequested", "TransactionSettled"]);
    stack.stop().await.unwrap();
}
