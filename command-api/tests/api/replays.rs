//! What a key answers, for everything that can be answered under one: the same bytes, wherever and whenever it is asked.

use std::time::Duration;

use ledger_engine::Settings;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::time::Instant;

use crate::door::{Answer, Call, Door};
use crate::held::Held;
use crate::money::transfer;

/// More than any of these tests needs.
const PATIENCE: Duration = Duration::from_secs(20);

/// One call under a key.
struct Asked {
    what: &'static str,
    path: String,
    token: String,
    user: Option<&'static str>,
    body: Value,
}

impl Asked {
    fn of(what: &'static str, path: impl Into<String>, token: &str, body: Value) -> Self {
        Self { what, path: path.into(), token: token.to_owned(), user: None, body }
    }

    fn key(&self) -> String {
        self.what.replace(' ', "-")
    }

    fn call<'d>(&self, door: &'d Door, key: &str, user: Option<&str>) -> Call<'d> {
        let call = door.post(&self.path).token(&self.token).key(key);
        if let Some(user) = user { call.user(user) } else { call }
    }

    async fn ask(&self, door: &Door) -> Answer {
        self.call(door, &self.key(), self.user).json(&self.body).await
    }
}

/// Every kind of answer that a key can have, as it was given first. Afterwards the world is another one: nothing of it
/// could be decided or built the same way again.
async fn everything(door: &Door) -> Vec<(Asked, Answer)> {
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let other = door.partner(&["EUR"]).await;
    let theirs = door.wallet(&other, "x", "EUR").await;
    let (carol, dave) = (door.wallet(&partner, "carol", "EUR").await, door.wallet(&partner, "dave", "EUR").await);
    let (token, admin, workflow) = (partner.token.as_str(), door.admin.as_str(), door.workflow.as_str());
    let reason = || json!({ "reason": "test" });
    let wallet = |wallet: &str, what: &str| format!("/v1/wallets/{wallet}/{what}");
    let adjust = |direction: &str, amount: &str| json!({ "walletId": alice, "direction": direction, "amount": amount, "currency": "EUR", "reason": "test" });
    let top_up = |wallet: &str, amount: &str| json!({ "walletId": wallet, "amount": amount, "currency": "EUR", "metadata": { "b": [1, { "d": null, "c": "\u{e9}" }], "a": "x" } });
    let settlement = || json!({ "amount": "5.00", "currency": "EUR", "bankReference": "bnk-1" });
    let batch = |atomic: bool, amounts: &[&str]| {
        let items: Vec<Value> = amounts.iter().map(|amount| transfer(&alice, &bob, amount)).collect();
        json!({ "atomic": atomic, "transactions": items })
    };
    let (single, many) = ("/v1/transactions/transfer", "/v1/transactions/batch");
    let mut all: Vec<(Asked, Answer)> = Vec::new();
    let mut ask = async |status: u16, asked: Asked| -> Value {
        let answer = asked.ask(door).await;
        assert_eq!(answer.status, status, "{}: {}", asked.what, answer.text);
        assert!(!answer.replayed(), "{}", asked.what);
        let body = answer.json();
        all.push((asked, answer));
        body
    };

    ask(201, Asked::of("transfer", single, token, transfer(&alice, &bob, "1.00"))).await;
    let for_alice =
        Asked { user: Some("alice"), ..Asked::of("for a user", single, token, transfer(&alice, &bob, "1.00")) };
    ask(201, for_alice).await;
    let for_bob = Asked { user: Some("bob"), ..Asked::of("not owned", single, token, transfer(&alice, &bob, "1.00")) };
    ask(403, for_bob).await;
    ask(422, Asked::of("too much", single, token, transfer(&alice, &bob, "50.00"))).await;
    ask(404, Asked::of("not there", single, token, transfer(&alice, &theirs, "1.00"))).await;
    ask(201, Asked::of("adjusted", "/v1/transactions/adjustment", admin, adjust("CREDIT", "2.00"))).await;
    ask(422, Asked::of("not adjusted", "/v1/transactions/adjustment", admin, adjust("DEBIT", "50.00"))).await;

    ask(201, Asked::of("some of a batch", many, token, batch(false, &["0.10", "50.00", "0.20"]))).await;
    ask(201, Asked::of("a batch", many, token, batch(true, &["0.10", "0.20"]))).await;
    ask(422, Asked::of("no batch", many, token, batch(true, &["0.10", "50.00"]))).await;

    ask(
        201,
        Asked::of(
            "opened",
            "/v1/wallets",
            token,
            json!({ "userId": "erin", "currency": "EUR", "metadata": { "z": 1, "a": 2 } }),
        ),
    )
    .await;
    ask(422, Asked::of("not opened", "/v1/wallets", token, json!({ "userId": "erin", "currency": "USD" }))).await;
    ask(200, Asked::of("frozen", wallet(&carol, "freeze"), token, reason())).await;
    ask(409, Asked::of("frozen already", wallet(&carol, "freeze"), token, reason())).await;
    ask(409, Asked::of("to a frozen one", single, token, transfer(&alice, &carol, "1.00"))).await;
    ask(409, Asked::of("top-up of a frozen one", "/v1/transactions/top-up", token, top_up(&carol, "5.00"))).await;
    ask(200, Asked::of("unfrozen", wallet(&carol, "unfreeze"), token, reason())).await;
    ask(409, Asked::of("not empty", wallet(&alice, "close"), token, reason())).await;
    ask(200, Asked::of("closed", wallet(&dave, "close"), token, reason())).await;
    ask(404, Asked::of("not theirs", wallet(&theirs, "close"), token, reason())).await;

    for (what, how, ended, body) in [
        ("top-up that is settled", "settle", "settled", settlement()),
        ("top-up that fails", "fail", "failed", json!({ "code": "declined", "detail": "no" })),
        ("top-up that expires", "expire", "expired", json!({})),
    ] {
        let pending = ask(202, Asked::of(what, "/v1/transactions/top-up", token, top_up(&alice, "5.00"))).await;
        let path = |how: &str| format!("/v1/transactions/{}/{how}", pending["id"].as_str().unwrap());
        if how == "settle" {
            let mut less = settlement();
            less["amount"] = json!("4.00");
            ask(422, Asked::of("settled with less", path("settle"), workflow, less)).await;
        }
        ask(200, Asked::of(ended, path(how), workflow, body)).await;
        if how == "settle" {
            ask(409, Asked::of("expired too late", path("expire"), workflow, json!({}))).await;
        }
    }
    let nothing = "/v1/transactions/txn_0192f0c1-2d3e-7abc-8def-0123456789ab/expire";
    ask(404, Asked::of("never pending", nothing, workflow, json!({}))).await;

    door.fund(&alice, "1000.00", "EUR").await;
    for (path, body) in [(wallet(&carol, "close"), reason()), (wallet(&bob, "freeze"), reason())] {
        door.post(&path).token(token).json(&body).await.expect(200);
    }
    all
}

#[tokio::test]
async fn every_answer_under_a_key_is_repeated_byte_for_byte_here_elsewhere_later_and_however_it_is_typed() {
    let door = Door::open().await;
    let all = everything(&door).await;
    let head = door.head().await;
    for (asked, first) in &all {
        asked.ask(&door).await.repeats(first);
        let otherwise = asked.call(&door, &asked.key(), asked.user).text(&typed_otherwise(&asked.body)).await;
        otherwise.repeats(first);
    }
    // An engine that was not there, and whose memory holds one key: what it knows of the others, it must look up.
    let other = door.beside(Settings { keys_max: 1, ..Settings::default() }).await;
    for (asked, first) in all.iter().chain(all.iter().rev()) {
        asked.ask(&other).await.repeats(first);
    }
    let door = door.restart().await;
    for (asked, first) in all.iter().rev() {
        asked.ask(&door).await.repeats(first);
    }
    assert_eq!(door.head().await, head, "nothing was written");
}

#[tokio::test]
async fn a_key_that_was_used_takes_no_other_body_route_or_user_not_even_after_memory_has_forgotten_it() {
    let door = Door::open().await;
    let all = everything(&door).await;
    let forgetful = door.beside(Settings { keys_max: 1, ..Settings::default() }).await;
    let (before, held) = (door.head().await, door.balances().await);
    for door in [&door, &forgetful] {
        for (place, (asked, first)) in all.iter().enumerate() {
            let key = asked.key();
            let user = if asked.user.is_none() { Some("alice") } else { None };
            let reused = asked.call(door, &key, user).json(&asked.body).await;
            reused.problem(422, "idempotency-key-reused");
            let others = all.iter().cycle().skip(place + 1).take(all.len() - 1);
            let mut others = others.filter(|(other, _)| other.token == asked.token);
            // The same route with another body, and another route, where there are such.
            let same_route = others.clone().find(|(other, _)| other.path == asked.path && other.body != asked.body);
            let other_route = others.find(|(other, _)| other.path != asked.path);
            for (other, _) in same_route.into_iter().chain(other_route) {
                let reused = other.call(door, &key, asked.user).json(&other.body).await;
                reused.problem(422, "idempotency-key-reused");
            }
            asked.ask(door).await.repeats(first);
        }
    }
    assert_eq!((door.head().await, door.balances().await), (before, held), "nothing was written");
}

#[tokio::test]
async fn a_key_is_its_clients_own_the_operators_included() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let colleague = door.client(api_contract::Scopes::PARTNER, Some(&partner.id)).await;
    let operator = door.client(api_contract::Scopes::ADMIN, None).await;
    let body = transfer(&alice, &bob, "1.00");
    let adjust =
        json!({ "walletId": alice, "direction": "CREDIT", "amount": "5.00", "currency": "EUR", "reason": "test" });
    let mut firsts = Vec::new();
    for (path, token, body) in [
        ("/v1/transactions/transfer", &partner.token, &body),
        ("/v1/transactions/transfer", &colleague, &body),
        ("/v1/transactions/adjustment", &door.admin, &adjust),
        ("/v1/transactions/adjustment", &operator, &adjust),
    ] {
        let call = || door.post(path).token(token).key("k");
        let first = call().json(body).await;
        first.expect(201);
        assert!(!first.replayed(), "the same key of another client is another key");
        firsts.push((path, token, body, first));
    }
    let ids: std::collections::BTreeSet<String> =
        firsts.iter().map(|(.., first)| first.json()["id"].to_string()).collect();
    assert_eq!(ids.len(), 4);
    let before = door.head().await;
    for (path, token, body, first) in &firsts {
        door.post(path).token(token).key("k").json(body).await.repeats(first);
    }
    let for_bob = door.post("/v1/transactions/adjustment").token(&operator).key("k").user("bob").json(&adjust).await;
    for_bob.problem(422, "idempotency-key-reused");
    assert_eq!(door.head().await, before, "nothing was written");
    assert_eq!((door.balances().await[&alice], door.balances().await[&bob]), (1_800, 200));
}

#[tokio::test]
async fn what_was_refused_before_the_ledger_was_asked_has_not_used_its_key_up() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let before = door.head().await;
    let call = || door.post("/v1/transactions/transfer").token(&partner.token).key("k");
    let good = transfer(&alice, &bob, "1.00");
    let with = |field: &str, value: Value| {
        let mut body = good.clone();
        body[field] = value;
        body
    };
    door.post("/v1/transactions/transfer").key("k").json(&good).await.problem(401, "unauthenticated");
    let (said, signature) = partner.token.rsplit_once('.').unwrap();
    let forged = format!("{said}.{}", signature.chars().rev().collect::<String>());
    let forged = door.post("/v1/transactions/transfer").token(&forged).key("k").json(&good).await;
    forged.problem(401, "token-invalid");
    call().text("{").await.problem(400, "malformed-json");
    call().text(&good.to_string().replacen('{', "{\"amount\":\"1\",", 1)).await.problem(400, "duplicate-field");
    call().json(&with("toWalletId", json!("nonsense"))).await.problem(400, "invalid-id");
    call().json(&with("amount", json!(1))).await.problem(422, "amount-format");
    call().json(&with("toWalletId", json!(alice))).await.problem(422, "same-wallet");
    call().json(&with("surprise", json!(1))).await.problem(422, "unknown-field");
    call().json(&with("description", json!("d".repeat(70_000)))).await.problem(413, "payload-too-large");
    call().header("accept", "text/html").json(&good).await.problem(406, "not-acceptable");
    call().empty().await.problem(415, "unsupported-media-type");
    assert_eq!(door.head().await, before, "nothing was written");
    let first = call().json(&good).await;
    first.expect(201);
    assert!(!first.replayed());
    call().json(&good).await.repeats(&first);

    // By its scope, the workflows' client may not; the key is free for what it may.
    let scoped = door.post("/v1/transactions/transfer").token(&door.workflow).key("k").json(&good).await;
    scoped.problem(403, "insufficient-scope");
    let nothing = "/v1/transactions/txn_0192f0c1-2d3e-7abc-8def-0123456789ab/expire";
    let asked = || door.post(nothing).token(&door.workflow).key("k");
    let decided = asked().text("{}").await;
    decided.problem(404, "transaction-not-found");
    asked().text("{}").await.repeats(&decided);
}

#[tokio::test]
async fn what_was_refused_as_overloaded_is_executed_when_it_is_repeated() {
    let door = Door::open_with(Settings { queue_max: 1, batch_max: 1, ..Settings::default() }).await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let mut held = Held::take(&door).await;
    let body = transfer(&alice, &bob, "1.00");
    let call = |key: &str| door.post("/v1/transactions/transfer").token(&partner.token).key(key).json(&body);
    let mut waiting = Vec::new();
    let mut refused = None;
    // Each is one more than before, and nothing can end while the log is held: a bounded engine refuses one soon.
    for number in 0..64 {
        let key = format!("k{number}");
        let mut call = Box::pin(call(&key));
        let answer = tokio::time::timeout(Duration::from_millis(300), &mut call).await;
        match answer {
            Ok(answer) => {
                answer.problem(503, "overloaded");
                assert_eq!(answer.header("retry-after"), Some("1"));
                refused = Some(key);
                break;
            }
            Err(_) => waiting.push(call),
        }
        held.append_waits().await;
    }
    let refused = refused.expect("64 commands wait in a queue of one");
    held.let_go().await;
    for call in waiting {
        call.await.expect(201);
    }
    let first = call(&refused).await;
    first.expect(201);
    assert!(!first.replayed(), "it was not executed before");
    call(&refused).await.repeats(&first);
}

#[tokio::test]
async fn what_was_refused_by_a_rate_limit_is_executed_when_it_is_repeated() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("1000.00").await;
    let mut owner = PgConnection::connect(door.database_url()).await.unwrap();
    let body = transfer(&alice, &bob, "0.01");
    let call = async |number: u32| {
        let key = format!("k{number}");
        door.post("/v1/transactions/transfer").token(&partner.token).key(&key).json(&body).await
    };
    let partner_id = uuid::Uuid::parse_str(partner.id.trim_start_matches("par_")).unwrap();
    let limit = "insert into access.rate_limits (partner_id, requests, seconds) values ($1, 3, 3600)";
    sqlx::query(limit).bind(partner_id).execute(&mut owner).await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut key = 0;
    loop {
        let answer = call(key).await;
        if answer.status == 429 {
            answer.problem(429, "rate-limited");
            break;
        }
        answer.expect(201);
        assert!(Instant::now() < deadline, "the limit never came into force");
        tokio::time::sleep(Duration::from_millis(10)).await;
        key += 1;
    }
    sqlx::query("delete from access.rate_limits").execute(&mut owner).await.unwrap();
    let first = loop {
        let answer = call(key).await;
        if answer.status != 429 {
            break answer;
        }
        assert!(Instant::now() < deadline, "the limit never ended");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    first.expect(201);
    assert!(!first.replayed(), "it was not executed before");
    call(key).await.repeats(&first);
    assert_eq!(door.balances().await[&bob], i64::from(key) + 1);
}

/// The same JSON with its fields in reverse order, with much white space, and with letters as escapes.
fn typed_otherwise(value: &Value) -> String {
    let text = |text: &str| {
        let escaped = text.encode_utf16().map(|unit| format!("\\u{unit:04X}"));
        format!("\"{}\"", escaped.collect::<String>())
    };
    match value {
        Value::String(string) => text(string),
        Value::Array(items) => {
            format!("[\n{} ]", items.iter().map(typed_otherwise).collect::<Vec<_>>().join(" ,\t"))
        }
        Value::Object(fields) => {
            let fields =
                fields.iter().rev().map(|(name, value)| format!("{}\r\n: {}", text(name), typed_otherwise(value)));
            format!("{{ {}\n}}", fields.collect::<Vec<_>>().join("\n, "))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => format!(" {value} "),
    }
}
