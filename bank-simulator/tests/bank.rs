//! Claims about the bank, made over HTTP with a merchant that really listens.

#![expect(clippy::unwrap_used, reason = "clippy.toml excepts tests, but not their helpers")]

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::{Router, routing};
use bank_simulator::Config;
use reqwest::{Client, Method, Response};
use ring::hmac;
use runtime::shutdown::Shutdown;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

const SECRET: &str = "callback-secret";
const API_KEY: &str = "api-key";
const PATIENCE: Duration = Duration::from_secs(20);

struct Bank {
    address: SocketAddr,
    client: Client,
    shutdown: Shutdown,
    running: JoinHandle<anyhow::Result<()>>,
}

impl Bank {
    async fn open() -> Self {
        Self::open_with(None).await
    }

    async fn open_with(journal: Option<&Path>) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default(); // for our own client
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = Shutdown::new();
        let config =
            Config { callback_secret: SECRET.into(), api_key: API_KEY.into(), journal: journal.map(PathBuf::from) };
        let running = tokio::spawn(bank_simulator::run(listener, config, shutdown.clone()));
        let client = Client::builder().no_proxy().build().unwrap();
        Self { address, client, shutdown, running }
    }

    async fn close(self) {
        self.shutdown.trigger();
        timeout(PATIENCE, self.running).await.expect("the bank closes").unwrap().unwrap();
    }

    async fn send(&self, method: Method, path: &str, key: &str, body: Option<Value>) -> Response {
        let mut request = self.client.request(method, format!("http://{}{path}", self.address)).bearer_auth(key);
        if let Some(body) = body {
            request = request.json(&body);
        }
        timeout(PATIENCE, request.send()).await.expect("an answer in time").unwrap()
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        answer(self.send(Method::GET, path, API_KEY, None).await).await
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        answer(self.send(Method::POST, path, API_KEY, Some(body)).await).await
    }

    async fn register(&self, token: &str, merchant: &Merchant) -> (u16, Value) {
        self.post("/bank/payments", registration(token, merchant)).await
    }

    async fn simulate(&self, token: &str, outcome: &str, callback: Value) -> (u16, Value) {
        self.post("/bank/simulate", json!({ "token": token, "outcome": outcome, "callback": callback })).await
    }

    async fn press(&self, token: &str, form: &str) -> (u16, String) {
        let request = self.client.post(format!("http://{}/bank/pay/{token}", self.address));
        let request = request.header("content-type", "application/x-www-form-urlencoded").body(form.to_owned());
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }
}

async fn answer(response: Response) -> (u16, Value) {
    let status = response.status();
    let kind = response.headers()["content-type"].to_str().unwrap().to_owned();
    let body: Value = response.json().await.unwrap();
    if !status.is_success() {
        assert_eq!(kind, "application/problem+json", "{body}");
        assert_eq!(body["status"], status.as_u16());
    }
    (status.as_u16(), body)
}

fn registration(token: &str, merchant: &Merchant) -> Value {
    json!({ "token": token, "amount": "10.50", "currency": "EUR", "callbackUrl": merchant.url() })
}

/// A merchant's door for callbacks. It answers what it was told to, then always 200.
struct Merchant {
    address: SocketAddr,
    door: Arc<Door>,
}

#[derive(Default)]
struct Door {
    callbacks: Mutex<Vec<Callback>>,
    answers: Mutex<VecDeque<u16>>,
}

#[derive(Clone, Debug)]
struct Callback {
    at: Instant,
    headers: HeaderMap,
    body: String,
}

impl Merchant {
    async fn listen(answers: &[u16]) -> Self {
        async fn take(State(door): State<Arc<Door>>, headers: HeaderMap, body: String) -> StatusCode {
            door.callbacks.lock().unwrap().push(Callback { at: Instant::now(), headers, body });
            let answer = door.answers.lock().unwrap().pop_front().unwrap_or(200);
            StatusCode::from_u16(answer).unwrap()
        }
        let door = Arc::new(Door { answers: Mutex::new(answers.iter().copied().collect()), ..Door::default() });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/callbacks", routing::post(take)).with_state(door.clone());
        tokio::spawn(runtime::http::serve(listener, router, runtime::http::Limits::default(), Shutdown::new()));
        Self { address, door }
    }

    fn url(&self) -> String {
        format!("http://{}/callbacks", self.address)
    }

    fn seen(&self) -> Vec<Callback> {
        self.door.callbacks.lock().unwrap().clone()
    }

    async fn callbacks(&self, count: usize) -> Vec<Callback> {
        let begun = Instant::now();
        loop {
            let seen = self.seen();
            if count <= seen.len() {
                return seen;
            }
            assert!(begun.elapsed() < PATIENCE, "{count} callbacks were expected, {seen:?} came");
            sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Callback {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    /// Verified by other code than that which signed.
    #[track_caller]
    fn is_signed(&self) {
        let timestamp = self.headers["x-bank-timestamp"].to_str().unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        assert!(now.abs_diff(timestamp.parse().unwrap()) < 60, "{timestamp}");
        let signature = self.headers["x-bank-signature"].to_str().unwrap().strip_prefix("sha256=").unwrap();
        let key = hmac::Key::new(hmac::HMAC_SHA256, SECRET.as_bytes());
        let expected = hmac::sign(&key, [timestamp.as_bytes(), b".", self.body.as_bytes()].concat().as_slice());
        let expected: String = expected.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(signature, expected);
    }
}

#[tokio::test]
async fn an_approved_payment_is_told_once_with_a_signature() {
    let (bank, merchant) = (Bank::open().await, Merchant::listen(&[]).await);
    let (status, registered) = bank.register("t1", &merchant).await;
    let pending =
        json!({ "token": "t1", "status": "pending", "amount": "10.50", "currency": "EUR", "bankReference": null });
    assert_eq!((status, &registered), (201, &pending));
    assert_eq!(bank.get("/bank/payments/t1").await, (200, pending));

    let (status, ended) = bank.simulate("t1", "success", json!({})).await;
    assert_eq!((status, &ended["status"]), (200, &json!("success")));
    assert!(ended["bankReference"].as_str().is_some_and(|reference| !reference.is_empty()));
    let callback = merchant.callbacks(1).await.remove(0);
    callback.is_signed();
    assert_eq!(callback.json(), ended);
    assert_eq!(callback.headers["content-type"], "application/json");
    assert_eq!(bank.get("/bank/payments/t1").await, (200, ended.clone()));

    assert_eq!(bank.simulate("t1", "success", json!({})).await, (200, ended.clone()), "a repetition changes nothing");
    assert_eq!(bank.simulate("t1", "failure", json!({})).await.0, 409);
    assert_eq!(bank.simulate("t1", "success", json!({ "copies": 2 })).await, (200, ended));
    assert_eq!(merchant.callbacks(3).await.len(), 3, "only the one that asked for copies told again");
    bank.close().await;
}

#[tokio::test]
async fn a_declined_payment_is_told_and_collects_nothing() {
    let (bank, merchant) = (Bank::open().await, Merchant::listen(&[]).await);
    bank.register("t1", &merchant).await;
    assert_eq!(bank.simulate("t1", "failure", json!({})).await.1["status"], "failure");
    let callback = merchant.callbacks(1).await.remove(0);
    callback.is_signed();
    assert_eq!(callback.json()["status"], "failure");
    assert_eq!(bank.get("/bank/ledger").await, (200, json!({ "currencies": [] })));
}

#[tokio::test]
async fn copies_come_apart_and_late_as_wished() {
    let (bank, merchant) = (Bank::open().await, Merchant::listen(&[]).await);
    bank.register("t1", &merchant).await;
    let begun = Instant::now();
    let wish = json!({ "copies": 3, "delayMs": 1000, "delayEachMs": 200 });
    assert_eq!(bank.simulate("t1", "success", wish).await.0, 200);
    assert!(merchant.seen().is_empty(), "the answer does not wait for the callbacks");
    let callbacks = merchant.callbacks(3).await;
    for (callback, earliest) in callbacks.iter().zip([1000, 1200, 1400]) {
        callback.is_signed();
        assert!(Duration::from_millis(earliest) <= callback.at - begun, "{:?}", callback.at - begun);
    }
    assert_eq!(callbacks[0].body, callbacks[2].body);
}

#[tokio::test]
async fn a_dropped_callback_never_comes_but_the_bank_says_what_happened() {
    let (bank, merchant) = (Bank::open().await, Merchant::listen(&[]).await);
    bank.register("dropped", &merchant).await;
    bank.register("told", &merchant).await;
    bank.simulate("dropped", "success", json!({ "drop": true })).await;
    bank.simulate("told", "success", json!({ "delayMs": 300 })).await;
    let callbacks = merchant.callbacks(1).await; // by then the other would have come
    assert_eq!(callbacks[0].json()["token"], "told");
    assert_eq!(callbacks.len(), 1);
    assert_eq!(bank.get("/bank/payments/dropped").await.1["status"], "success");
}

#[tokio::test]
async fn a_merchant_that_fails_is_told_again_with_a_fresh_timestamp() {
    let (bank, merchant) = (Bank::open().await, Merchant::listen(&[500, 429]).await);
    bank.register("t1", &merchant).await;
    bank.simulate("t1", "success", json!({})).await;
    let callbacks = merchant.callbacks(3).await;
    callbacks.iter().for_each(Callback::is_signed);
    assert!(Duration::from_secs(1) <= callbacks[1].at - callbacks[0].at);
    assert!(Duration::from_secs(2) <= callbacks[2].at - callbacks[1].at);
    assert_ne!(callbacks[0].headers["x-bank-timestamp"], callbacks[2].headers["x-bank-timestamp"]);
    assert_eq!(callbacks[0].body, callbacks[2].body);
}

#[tokio::test]
async fn a_merchant_that_refuses_is_not_told_again() {
    let (bank, merchant) = (Bank::open().await, Merchant::listen(&[422]).await);
    bank.register("refused", &merchant).await;
    bank.register("later", &merchant).await;
    bank.simulate("refused", "success", json!({})).await;
    merchant.callbacks(1).await;
    bank.simulate("later", "success", json!({ "delayMs": 1500 })).await; // a second attempt would come after one second
    let told: Vec<Value> =
        merchant.callbacks(2).await.iter().map(|callback| callback.json()["token"].clone()).collect();
    assert_eq!(told, ["refused", "later"]);
}

#[tokio::test]
async fn a_redirecting_merchant_is_not_followed() {
    let (bank, merchant) = (Bank::open().await, Merchant::listen(&[302]).await);
    bank.register("t1", &merchant).await;
    bank.simulate("t1", "success", json!({})).await;
    let callbacks = merchant.callbacks(2).await; // it counts as a failure: told again, at the same address
    assert!(Duration::from_secs(1) <= callbacks[1].at - callbacks[0].at);
}

#[tokio::test]
async fn a_payer_may_be_faster_than_the_registration() {
    let (bank, merchant) = (Bank::open().await, Merchant::listen(&[]).await);
    let (simulated, shown, _) = tokio::join!(
        bank.simulate("t1", "success", json!({})),
        bank.send(Method::GET, "/bank/pay/t1", API_KEY, None),
        async {
            sleep(Duration::from_millis(300)).await;
            assert_eq!(bank.register("t1", &merchant).await.0, 201);
        },
    );
    assert_eq!((simulated.0, &simulated.1["status"]), (200, &json!("success")));
    assert_eq!(shown.status(), 200);
    merchant.callbacks(1).await;
}

#[tokio::test]
async fn a_token_that_stays_unknown_is_404_after_five_seconds() {
    let bank = Bank::open().await;
    let begun = Instant::now();
    let (simulated, shown) = tokio::join!(bank.simulate("t1", "success", json!({})), bank.get("/bank/pay/t1"));
    assert!((5..15).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    for (status, problem) in [simulated, shown] {
        assert_eq!((status, &problem["type"]), (404, &json!("/problems/payment-not-found")));
        assert!(problem["requestId"].is_string() && problem["instance"].as_str().unwrap().starts_with("/bank/"));
    }
}

#[tokio::test]
async fn a_token_is_registered_once() {
    let (bank, merchant) = (Bank::open().await, Merchant::listen(&[]).await);
    assert_eq!(bank.register("t1", &merchant).await.0, 201);
    assert_eq!(bank.register("t1", &merchant).await.0, 200);
    for (field, value) in [("amount", json!("10.51")), ("currency", json!("USD")), ("description", json!("x"))] {
        let mut other = registration("t1", &merchant);
        other[field] = value;
        let (status, problem) = bank.post("/bank/payments", other).await;
        assert_eq!((status, &problem["type"]), (409, &json!("/problems/payment-exists")));
    }
    assert_eq!(bank.get("/bank/payments/t1").await.1["amount"], "10.50");
}

#[tokio::test]
async fn a_cancelled_payment_stays_cancelled_and_an_ended_one_stays_as_it_ended() {
    let (bank, merchant) = (Bank::open().await, Merchant::listen(&[]).await);
    for token in ["cancelled", "paid"] {
        bank.register(token, &merchant).await;
    }
    for _ in 0..2 {
        let (status, cancelled) = bank.post("/bank/payments/cancelled/cancel", json!({})).await;
        assert_eq!((status, &cancelled["status"]), (200, &json!("cancelled")));
    }
    for outcome in ["success", "failure"] {
        let (status, problem) = bank.simulate("cancelled", outcome, json!({})).await;
        assert_eq!((status, &problem["type"]), (409, &json!("/problems/payment-ended")));
    }
    let (status, page) = bank.press("cancelled", "outcome=success").await;
    assert!(status == 409 && page.contains("Cancelled"), "{page}");

    bank.simulate("paid", "success", json!({})).await;
    let (status, paid) = bank.post("/bank/payments/paid/cancel", json!({})).await;
    assert_eq!((status, &paid["status"]), (200, &json!("success")));
    assert_eq!(bank.post("/bank/payments/unknown/cancel", json!({})).await.0, 404);
    let told = merchant.callbacks(1).await;
    assert!(told.len() == 1 && told[0].json()["token"] == "paid");
}

#[tokio::test]
async fn an_approval_and_a_cancellation_at_once_end_the_payment_one_way() {
    let (bank, merchant) = (Bank::open().await, Merchant::listen(&[]).await);
    for n in 0..50 {
        let token = format!("t{n}");
        bank.register(&token, &merchant).await;
        let cancel_path = format!("/bank/payments/{token}/cancel");
        let ((simulated, _), (_, cancelled)) =
            tokio::join!(bank.simulate(&token, "success", json!({})), bank.post(&cancel_path, json!({})));
        let ended = if simulated == 200 { "success" } else { "cancelled" };
        assert_eq!(cancelled["status"], ended);
        assert_eq!(bank.get(&format!("/bank/payments/{token}")).await.1["status"], ended);
    }
}

#[tokio::test]
async fn the_bank_knows_what_it_collected_per_currency() {
    let (bank, merchant) = (Bank::open().await, Merchant::listen(&[]).await);
    for (token, amount, currency, outcome) in [
        ("t1", "0.10", "EUR", "success"),
        ("t2", "0.2", "EUR", "success"),
        ("t3", "5.00", "EUR", "failure"),
        ("t4", "700", "JPY", "success"),
        ("t5", "1.005", "KWD", "success"),
    ] {
        let body = json!({ "token": token, "amount": amount, "currency": currency, "callbackUrl": merchant.url() });
        assert_eq!(bank.post("/bank/payments", body).await.0, 201);
        assert_eq!(
            bank.simulate(token, outcome, json!({})).await.1["amount"],
            amount,
            "the amount stays as registered"
        );
    }
    let collected = json!({ "currencies": [
        { "currency": "EUR", "collected": "0.30", "payments": 2 },
        { "currency": "JPY", "collected": "700", "payments": 1 },
        { "currency": "KWD", "collected": "1.005", "payments": 1 },
    ] });
    assert_eq!(bank.get("/bank/ledger").await, (200, collected));
}

#[tokio::test]
async fn a_restarted_bank_remembers_everything_that_it_answered() {
    let folder = tempfile::tempdir().unwrap();
    let journal = folder.path().join("bank.jsonl");
    let merchant = Merchant::listen(&[]).await;
    let bank = Bank::open_with(Some(&journal)).await;
    for token in ["pending", "paid", "declined", "cancelled"] {
        assert_eq!(bank.register(token, &merchant).await.0, 201);
    }
    bank.simulate("paid", "success", json!({})).await;
    bank.simulate("declined", "failure", json!({})).await;
    bank.post("/bank/payments/cancelled/cancel", json!({})).await;
    let tokens = ["pending", "paid", "declined", "cancelled"];
    let mut before = Vec::new();
    for token in tokens {
        before.push(bank.get(&format!("/bank/payments/{token}")).await);
    }
    let collected = bank.get("/bank/ledger").await;
    merchant.callbacks(2).await;
    assert_eq!(std::fs::metadata(&journal).unwrap().mode() & 0o777, 0o600, "whoever reads a token can pay");
    bank.running.abort(); // no farewell
    let _ = bank.running.await;

    // A crash can leave half a line, which nobody was told about.
    let mut torn = std::fs::read(&journal).unwrap();
    torn.extend_from_slice(br#"{"registered":{"token":"half"#);
    std::fs::write(&journal, torn).unwrap();

    let bank = Bank::open_with(Some(&journal)).await;
    for (token, before) in tokens.iter().zip(before) {
        assert_eq!(bank.get(&format!("/bank/payments/{token}")).await, before);
    }
    assert_eq!(bank.get("/bank/ledger").await, collected);
    assert_eq!(bank.register("paid", &merchant).await.0, 200);
    let again = bank.simulate("pending", "success", json!({})).await.1;
    assert_ne!(again["bankReference"], bank.get("/bank/payments/paid").await.1["bankReference"]);
    bank.close().await;
    let bank = Bank::open_with(Some(&journal)).await;
    assert_eq!(bank.get("/bank/payments/pending").await.1, again);
}

#[tokio::test]
async fn a_callback_that_was_still_owed_is_sent_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let journal = folder.path().join("bank.jsonl");
    let merchant = Merchant::listen(&[]).await;
    let bank = Bank::open_with(Some(&journal)).await;
    for token in ["owed", "dropped"] {
        bank.register(token, &merchant).await;
    }
    bank.simulate("dropped", "success", json!({ "drop": true })).await;
    bank.simulate("owed", "success", json!({ "delayMs": 60_000 })).await;
    bank.close().await;
    assert!(merchant.seen().is_empty());

    let bank = Bank::open_with(Some(&journal)).await;
    let callback = merchant.callbacks(1).await.remove(0);
    callback.is_signed();
    assert_eq!(callback.json()["token"], "owed");
    let told = |text: String| text.lines().any(|line| line == r#"{"called":{"token":"owed"}}"#);
    let begun = Instant::now();
    while !told(std::fs::read_to_string(&journal).unwrap()) {
        assert!(begun.elapsed() < PATIENCE, "that it was told is never noted");
        sleep(Duration::from_millis(5)).await;
    }
    bank.close().await;

    let bank = Bank::open_with(Some(&journal)).await;
    bank.register("later", &merchant).await;
    bank.simulate("later", "success", json!({})).await;
    assert_eq!(merchant.callbacks(2).await[1].json()["token"], "later", "what was told is not told again");
    assert_eq!(merchant.seen().len(), 2);
}

#[tokio::test]
async fn two_banks_cannot_share_a_journal_and_an_unreadable_one_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let journal = folder.path().join("bank.jsonl");
    let first = Bank::open_with(Some(&journal)).await;
    assert_eq!(first.get("/readyz").await.0, 200);
    let second = Bank::open_with(Some(&journal)).await;
    let refused = timeout(PATIENCE, second.running).await.unwrap().unwrap().unwrap_err();
    assert!(format!("{refused:#}").contains("another process"), "{refused:#}");
    first.close().await;

    std::fs::write(&journal, "nonsense\n").unwrap();
    let third = Bank::open_with(Some(&journal)).await;
    let refused = timeout(PATIENCE, third.running).await.unwrap().unwrap().unwrap_err();
    assert!(format!("{refused:#}").contains("line 1"), "{refused:#}");
    assert_eq!(std::fs::read_to_string(&journal).unwrap(), "nonsense\n");
}

#[tokio::test]
async fn a_merchant_needs_the_key_and_a_payer_does_not() {
    let (bank, merchant) = (Bank::open().await, Merchant::listen(&[]).await);
    bank.register("t1", &merchant).await;
    for key in ["", "wrong", "api-keys"] {
        for path in ["/bank/payments/t1", "/bank/ledger"] {
            let response = bank.send(Method::GET, path, key, None).await;
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
            assert_eq!(answer(response).await.0, 401);
        }
        for path in ["/bank/payments", "/bank/payments/t1/cancel"] {
            let response = bank.send(Method::POST, path, key, Some(registration("t2", &merchant))).await;
            assert_eq!(answer(response).await.0, 401);
        }
    }
    assert_eq!(bank.get("/bank/payments/t2").await.0, 404);
    assert_eq!(bank.get("/bank/payments/t1").await.1["status"], "pending");
    let body = json!({ "token": "t1", "outcome": "success" });
    assert_eq!(bank.send(Method::POST, "/bank/simulate", "", Some(body)).await.status(), 200);
}

#[tokio::test]
async fn the_page_shows_what_is_paid_as_text_and_its_buttons_end_the_payment() {
    let (bank, merchant) = (Bank::open().await, Merchant::listen(&[]).await);
    let mut body = registration("t1", &merchant);
    body["description"] = json!("<script>alert(1)</script>");
    body["returnUrl"] = json!("https://shop.example/back?a=\"><script>&b='1'");
    assert_eq!(bank.post("/bank/payments", body).await.0, 201);

    let response = bank.send(Method::GET, "/bank/pay/t1", "", None).await;
    let policy = response.headers()["content-security-policy"].to_str().unwrap().to_owned();
    assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    let page = response.text().await.unwrap();
    for shown in ["10.50 EUR", "shop.example", "Approve", "Decline", "&lt;script&gt;alert(1)&lt;/script&gt;"] {
        assert!(page.contains(shown), "{shown} in {page}");
    }
    assert!(!page.contains("<script"), "{page}");
    assert_eq!(bank.send(Method::GET, "/bank/style.css", "", None).await.status(), 200);

    assert_eq!(bank.press("t1", "outcome=everything").await.0, 422);
    let (status, page) = bank.press("t1", "outcome=success").await;
    assert!(status == 200 && page.contains("Approved"), "{page}");
    assert!(page.contains("href=\"https://shop.example/back?a=&quot;&gt;&lt;script&gt;&amp;b=&#39;1&#39;\""), "{page}");
    merchant.callbacks(1).await[0].is_signed();
    let (status, page) = bank.press("t1", "outcome=failure").await;
    assert!(status == 409 && page.contains("Approved"), "{page}");
}

#[tokio::test]
async fn bad_input_gets_a_clear_answer() {
    let (bank, merchant) = (Bank::open().await, Merchant::listen(&[]).await);
    for (field, value) in [
        ("token", json!("")),
        ("token", json!("a/b")),
        ("amount", json!(10.5)),
        ("amount", json!("10.505")),
        ("amount", json!("0.00")),
        ("amount", json!("-1.00")),
        ("currency", json!("eur")),
        ("callbackUrl", json!("ftp://x/")),
        ("callbackUrl", json!("nonsense")),
        ("returnUrl", json!("javascript:alert(1)")),
        ("description", json!("x".repeat(501))),
        ("surprise", json!(1)),
    ] {
        let mut body = registration("t1", &merchant);
        body[field] = value;
        let (status, problem) = bank.post("/bank/payments", body.clone()).await;
        assert_eq!((status, &problem["type"]), (422, &json!("/problems/invalid-field")), "{body}");
    }
    bank.register("t1", &merchant).await;
    for callback in
        [json!({ "copies": 0 }), json!({ "copies": 11 }), json!({ "delayMs": 60_001 }), json!({ "drop": 1 })]
    {
        assert_eq!(bank.simulate("t1", "success", callback).await.0, 422);
    }
    assert_eq!(bank.simulate("t1", "perhaps", json!({})).await.0, 422);
    assert_eq!(bank.get("/bank/payments/t1").await.1["status"], "pending");

    let raw = async |kind: &str, body: &str| {
        let request = bank.client.post(format!("http://{}/bank/simulate", bank.address)).header("content-type", kind);
        answer(request.body(body.to_owned()).send().await.unwrap()).await
    };
    assert_eq!(raw("application/json", "{").await.1["type"], "/problems/malformed-json");
    assert_eq!(
        raw("application/json", r#"{"token": "t1", "outcome": "success"} x"#).await.1["type"],
        "/problems/malformed-json"
    );
    assert_eq!(raw("text/plain", "{}").await.1["type"], "/problems/unsupported-media-type");
    assert_eq!(raw("application/json", &" ".repeat(70_000)).await.1["type"], "/problems/payload-too-large");
    assert_eq!(bank.get("/bank").await.1["type"], "/problems/not-found");
    assert_eq!(bank.get("/bank/simulate").await.1["type"], "/problems/method-not-allowed");
}
