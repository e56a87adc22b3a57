//! The service as a client meets it, and the log as it stands behind it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

use api_contract::{Access, NewClient, Scopes, Seal, Secret};
use command_api::{Commands, Settings};
use event_store::{EventFilter, Log, RecordedEvent};
use ledger_core::{ClientId, Event, PartnerId};
use ledger_engine::Ledger;
use local_stack::testing::TestDatabase;
use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode};
use runtime::shutdown::Shutdown;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use uuid::Uuid;

pub(crate) const BANK_URL: &str = "https://bank.example";

/// A service on a database of its own.
pub(crate) struct Door {
    database: Arc<TestDatabase>,
    base: String,
    http: reqwest::Client,
    shutdown: Shutdown,
    service: JoinHandle<anyhow::Result<()>>,
    access: Access,
    pub(crate) log: Log,
    pub(crate) admin: String,
    pub(crate) workflow: String,
}

/// A registered partner and what is needed to act as it.
pub(crate) struct Partner {
    pub(crate) id: String,
    pub(crate) token: String,
}

/// One answer, whole.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

/// One call, being put together.
pub(crate) struct Call<'d> {
    door: &'d Door,
    request: reqwest::RequestBuilder,
}

impl Door {
    pub(crate) async fn open() -> Self {
        Self::open_with(ledger_engine::Settings::default()).await
    }

    pub(crate) async fn open_with(engine: ledger_engine::Settings) -> Self {
        let database = local_stack::testing::database(|url| async move { migrations::run(&url).await }).await;
        Self::open_on(Arc::new(database), engine).await
    }

    /// Another service on the same database, with an engine of its own.
    pub(crate) async fn beside(&self, engine: ledger_engine::Settings) -> Self {
        Self::open_on(self.database.clone(), engine).await
    }

    /// Stops the service cleanly and starts another one on the same database.
    pub(crate) async fn restart(self) -> Self {
        self.shutdown.trigger();
        self.service.await.expect("the service does not panic").expect("the service ends well");
        Self::open_on(self.database, ledger_engine::Settings::default()).await
    }

    async fn open_on(database: Arc<TestDatabase>, engine: ledger_engine::Settings) -> Self {
        static PROVIDER: Once = Once::new();
        PROVIDER.call_once(|| rustls::crypto::ring::default_provider().install_default().expect("it is called once"));
        let access = Access::connect(database.url(), Seal::from_key([7; 32])).await.unwrap();
        let ledger = Ledger::start(database.url(), engine).await.unwrap();
        let settings = Settings { bank_url: BANK_URL.to_owned() };
        let commands = Commands::new(ledger, access.clone(), settings);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let shutdown = Shutdown::new();
        let service = tokio::spawn(command_api::run(listener, commands, shutdown.clone()));
        let log = Log::new(event_store::connect(database.url(), "daybook_reader", 2).await.unwrap());
        let http = reqwest::Client::builder().timeout(Duration::from_secs(30)).build().unwrap();
        let mut door = Self {
            database,
            base,
            http,
            shutdown,
            service,
            access,
            log,
            admin: String::new(),
            workflow: String::new(),
        };
        door.admin = door.client(Scopes::ADMIN, None).await;
        door.workflow = door.client(Scopes::WORKFLOW, None).await;
        door
    }

    /// The access token of a new client.
    pub(crate) async fn client(&self, scopes: Scopes, partner: Option<&str>) -> String {
        let (id, secret) = (ClientId::from_uuid(Uuid::now_v7()), Secret::mint_for_client());
        let partner = partner.map(|id| id.parse::<PartnerId>().unwrap());
        let client = NewClient { id, partner, secret: secret.clone(), scopes };
        self.access.create_client(client).await.unwrap();
        self.login(&id.to_string(), secret.reveal()).await
    }

    pub(crate) async fn login(&self, client_id: &str, secret: &str) -> String {
        let body = json!({ "clientId": client_id, "clientSecret": secret });
        let answer = self.post("/v1/auth/token").json(&body).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()["accessToken"].as_str().unwrap().to_owned()
    }

    pub(crate) fn post(&self, path: &str) -> Call<'_> {
        self.call(Method::POST, path)
    }

    pub(crate) fn get(&self, path: &str) -> Call<'_> {
        self.call(Method::GET, path)
    }

    fn call(&self, method: Method, path: &str) -> Call<'_> {
        Call { door: self, request: self.http.request(method, format!("{}{path}", self.base)) }
    }

    pub(crate) async fn partner(&self, currencies: &[&str]) -> Partner {
        let body = json!({ "name": "Acme Pay", "currencies": currencies });
        let registered = self.post("/v1/partners").token(&self.admin).json(&body).await.expect(201);
        let text = |name: &str| registered[name].as_str().unwrap().to_owned();
        Partner { id: text("id"), token: self.login(&text("clientId"), &text("clientSecret")).await }
    }

    pub(crate) async fn wallet(&self, partner: &Partner, user: &str, currency: &str) -> String {
        let body = json!({ "userId": user, "currency": currency });
        let wallet = self.post("/v1/wallets").token(&partner.token).json(&body).await.expect(201);
        wallet["id"].as_str().unwrap().to_owned()
    }

    pub(crate) async fn fund(&self, wallet: &str, amount: &str, currency: &str) {
        let body = json!({ "walletId": wallet, "direction": "CREDIT", "amount": amount, "currency": currency, "reason": "test" });
        let call = self.post("/v1/transactions/adjustment").token(&self.admin).new_key();
        call.json(&body).await.expect(201);
    }

    /// A partner with two wallets in EUR; the first one, of user `alice`, holds `amount`, the other one is `bob`'s.
    pub(crate) async fn alice_and_bob(&self, amount: &str) -> (Partner, String, String) {
        let partner = self.partner(&["EUR"]).await;
        let alice = self.wallet(&partner, "alice", "EUR").await;
        let bob = self.wallet(&partner, "bob", "EUR").await;
        if amount != "0.00" {
            self.fund(&alice, amount, "EUR").await;
        }
        (partner, alice, bob)
    }

    pub(crate) async fn head(&self) -> i64 {
        self.log.head().await.unwrap().position
    }

    pub(crate) async fn events_after(&self, position: i64) -> Vec<RecordedEvent> {
        self.log.events_after(position, 1_000_000, &EventFilter::default()).await.unwrap().1
    }

    /// What each wallet holds in minor units: the sum of all entries of the log, by our own arithmetic.
    pub(crate) async fn balances(&self) -> BTreeMap<String, i64> {
        let mut balances = BTreeMap::new();
        for event in self.events_after(0).await {
            let Event::Transaction(_, event) = event.read().unwrap() else { continue };
            for entry in event.entries().into_iter().flatten() {
                let entry = serde_json::to_value(entry).unwrap();
                let amount: i64 = entry["amount"].as_str().unwrap().replace('.', "").parse().unwrap();
                let sign = if entry["direction"] == "DEBIT" { -1 } else { 1 };
                *balances.entry(entry["walletId"].as_str().unwrap().to_owned()).or_default() += sign * amount;
            }
        }
        assert_eq!(balances.values().sum::<i64>(), 0, "debits and credits differ");
        balances
    }

    /// Host and port, for a client that does not speak HTTP well.
    pub(crate) fn address(&self) -> &str {
        self.base.trim_start_matches("http://")
    }

    pub(crate) fn database_url(&self) -> &str {
        self.database.url()
    }
}

impl Call<'_> {
    pub(crate) fn token(self, token: &str) -> Self {
        self.header("authorization", &format!("Bearer {token}"))
    }

    pub(crate) fn key(self, key: &str) -> Self {
        self.header("idempotency-key", key)
    }

    /// A key that nobody has used.
    pub(crate) fn new_key(self) -> Self {
        static KEYS: AtomicU32 = AtomicU32::new(0);
        self.key(&format!("test-{}", KEYS.fetch_add(1, Ordering::Relaxed)))
    }

    pub(crate) fn user(self, user: &str) -> Self {
        self.header("x-user-id", user)
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.request = self.request.header(name, value);
        self
    }

    pub(crate) async fn json(self, body: &Value) -> Answer {
        self.text(&body.to_string()).await
    }

    /// A body as it is, said to be JSON.
    pub(crate) async fn text(self, body: &str) -> Answer {
        self.header("content-type", "application/json").send(body.to_owned()).await
    }

    /// No body.
    pub(crate) async fn empty(self) -> Answer {
        self.send(String::new()).await
    }

    async fn send(self, body: String) -> Answer {
        let response = self.request.body(body).send().await.unwrap_or_else(|error| {
            panic!("{}: {error}", self.door.base);
        });
        let (status, headers) = (response.status(), response.headers().clone());
        let answer = Answer { status, headers, text: response.text().await.unwrap() };
        assert!(answer.header("x-request-id").is_some(), "every answer names its request");
        answer
    }
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    pub(crate) fn position(&self) -> i64 {
        self.header("ledger-position").expect("a command's answer has Ledger-Position").parse().unwrap()
    }

    pub(crate) fn replayed(&self) -> bool {
        self.header("idempotent-replayed") == Some("true")
    }

    /// The body, when the status is this one.
    #[track_caller]
    pub(crate) fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        self.json()
    }

    /// The problem, when it is this one: with everything that a problem must have.
    #[track_caller]
    pub(crate) fn problem(&self, status: u16, slug: &str) -> Value {
        let body = self.json();
        assert_eq!((self.status.as_u16(), &body["type"]), (status, &json!(format!("/problems/{slug}"))), "{body}");
        assert_eq!(self.header("content-type"), Some("application/problem+json"));
        assert_eq!(body["status"], status);
        for member in ["title", "detail", "instance", "requestId"] {
            assert!(body[member].as_str().is_some_and(|text| !text.is_empty()), "{member}: {body}");
        }
        body
    }

    /// Status and body are those of the first answer, byte for byte; only the header says that this is not the first time.
    #[track_caller]
    pub(crate) fn repeats(&self, first: &Answer) {
        assert_eq!((self.status, &self.text), (first.status, &first.text));
        assert_eq!(self.header("content-type"), first.header("content-type"));
        assert_eq!(self.header("location"), first.header("location"));
        assert_eq!(self.position(), first.position());
        assert!(self.replayed() && !first.replayed());
    }
}
