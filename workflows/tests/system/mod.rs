//! The whole system around a top-up, for tests: every part is the real one, and the wires to the bank and to
//! command-api can be made to hang.
#![expect(clippy::unwrap_used, reason = "clippy.toml excepts tests, but not their helpers")]

use std::fmt::Debug;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use api_contract::{Access, NewClient, Scopes, Seal, Secret};
use event_feed::{FeedSettings, Log, RecordedEvent, relay};
use hmac::{Hmac, Mac};
use ledger_core::ClientId;
use ledger_engine::Ledger;
use local_stack::testing;
use runtime::http::Limits;
use runtime::shutdown::Shutdown;
use serde_json::{Value, json};
use sha2::Sha256;
use sqlx::{Connection, FromRow, PgPool};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;
use workflows::{Settings, State, Times};

pub(crate) const CALLBACK_SECRET: &str = "the secret of the bank's callbacks";
const API_KEY: &str = "the key to the bank";
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Parts {
    pub(crate) ask_after: Duration,
    pub(crate) expire_after: Duration,
    pub(crate) blocked_after: Duration,
    pub(crate) bank_hangs: bool,
}

pub(crate) struct System {
    pub(crate) doors: Doors,
    /// The wires from the workflows.
    pub(crate) bank: Wire,
    pub(crate) commands: Wire,
    settings: Settings,
    running: Option<(Shutdown, JoinHandle<anyhow::Result<()>>)>,
    http: reqwest::Client,
    command_url: String,
    bank_url: String,
    admin: String,
    partner: String,
    wallet: String,
    log: Log,
    workflows: PgPool,
    all: Shutdown,
}

#[derive(Debug)]
pub(crate) struct TopUp {
    pub(crate) id: String,
    pub(crate) token: String,
    amount: String,
}

/// What the schema `workflows` has about a top-up.
#[derive(Debug, FromRow)]
pub(crate) struct Row {
    pub(crate) state: String,
    pub(crate) outcome: Option<String>,
    pub(crate) ended_position: Option<i64>,
    pub(crate) failures: i32,
    pub(crate) command_try: i32,
    pub(crate) unfrozen: bool,
    requested_position: i64,
    pub(crate) alert: Option<String>,
    bank_reference: Option<String>,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    body: Value,
}

impl Default for Parts {
    fn default() -> Self {
        Self {
            ask_after: Duration::from_secs(30),
            expire_after: Duration::from_secs(900),
            blocked_after: Duration::from_millis(300),
            bank_hangs: false,
        }
    }
}

impl System {
    pub(crate) async fn start() -> Self {
        Self::start_with(Parts::default()).await
    }

    /// A partner with one wallet in euros, and everything running.
    pub(crate) async fn start_with(parts: Parts) -> Self {
        let database = testing::database(|url| async move { migrations::run(&url).await }).await;
        Self::start_on(database.url(), testing::stack().await.nats_url(), database.name(), parts).await
    }

    pub(crate) async fn start_on(url: &str, nats_url: &str, stream: &str, parts: Parts) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default(); // an error says that there is one already
        let all = Shutdown::new();
        let log = Log::new(event_store::connect(url, "daybook_reader", 2).await.unwrap());
        let feed = FeedSettings { nats_url: Some(nats_url.to_owned()), stream: stream.to_owned(), beside: None };
        tokio::spawn(relay::run(log.clone(), feed.clone(), all.clone()));

        let (bank, bank_url) = listen().await;
        let config = bank_simulator::Config {
            callback_secret: CALLBACK_SECRET.to_owned(),
            api_key: API_KEY.to_owned(),
            journal: None,
        };
        tokio::spawn(bank_simulator::run(bank, config, all.clone()));

        let ledger = Ledger::start(url, ledger_engine::Settings::default()).await.unwrap();
        let access = Access::connect(url, Seal::from_key([7; 32])).await.unwrap();
        let (admin_id, admin_secret) = client(&access, Scopes::ADMIN).await;
        let (client_id, client_secret) = client(&access, Scopes::WORKFLOW).await;
        let (commands, command_url) = listen().await;
        let settings = command_api::Settings { bank_url: bank_url.clone() };
        let state = command_api::Commands::new(ledger, access, settings);
        tokio::spawn(command_api::run(commands, state, all.clone()));

        let bank = Wire::to(&bank_url, parts.bank_hangs).await;
        let commands = Wire::to(&command_url, false).await;
        let (callbacks, callback_base) = listen().await;
        let callback_url = format!("{callback_base}/v1/callbacks/bank");
        let settings = Settings {
            database_url: url.to_owned(),
            feed,
            command_url: commands.url.clone(),
            client_id,
            client_secret,
            bank_url: bank.url.clone(),
            bank_api_key: API_KEY.to_owned(),
            callback_secret: CALLBACK_SECRET.to_owned(),
            callback_url: callback_url.clone(),
            times: Times {
                ask_after: parts.ask_after,
                expire_after: parts.expire_after,
                blocked_after: parts.blocked_after,
                call_time: Duration::from_secs(2),
            },
        };
        let router = api_contract::layer(workflows::routes(State::new(&settings).unwrap()));
        tokio::spawn(runtime::http::serve(callbacks, router, Limits::default(), all.clone()));

        let http = reqwest::Client::new();
        let mut system = Self {
            doors: Doors { http: http.clone(), callback_url },
            bank,
            commands,
            settings,
            running: None,
            http,
            command_url,
            bank_url,
            admin: String::new(),
            partner: String::new(),
            wallet: String::new(),
            log,
            workflows: event_store::connect(url, "daybook_workflows", 2).await.unwrap(),
            all,
        };
        system.admin = system.token(&admin_id, &admin_secret).await;
        let body = json!({ "name": "Acme Pay", "currencies": ["EUR"] });
        let partner = system.command(&system.admin, "/v1/partners", &body).await.expect(201);
        let text = |pointer| partner.pointer(pointer).and_then(Value::as_str).unwrap();
        system.partner = system.token(text("/clientId"), text("/clientSecret")).await;
        let body = json!({ "userId": "alice", "currency": "EUR" });
        let wallet = system.command(&system.partner, "/v1/wallets", &body).await.expect(201);
        system.wallet = wallet["id"].as_str().unwrap().to_owned();
        system.start_workflows();
        system
    }

    pub(crate) fn start_workflows(&mut self) {
        let shutdown = Shutdown::new();
        self.running = Some((shutdown.clone(), tokio::spawn(workflows::run(self.settings.clone(), shutdown))));
    }

    /// Lets them finish what they do.
    pub(crate) async fn stop_workflows(&mut self) {
        let (shutdown, task) = self.running.take().expect("they run");
        shutdown.trigger();
        timeout(PATIENCE, task).await.expect("workflows stop when they are asked to").unwrap().unwrap();
    }

    /// Cuts them off wherever they are.
    pub(crate) fn crash_workflows(&mut self) {
        self.running.take().expect("they run").1.abort();
    }

    pub(crate) async fn top_up(&self, amount: &str) -> TopUp {
        let body = json!({ "walletId": self.wallet, "amount": amount, "currency": "EUR" });
        let answer = self.command(&self.partner, "/v1/transactions/top-up", &body).await.expect(202);
        let text = |name: &str| answer[name].as_str().unwrap().to_owned();
        assert_eq!(text("status"), "PENDING");
        TopUp { id: text("id"), token: text("token"), amount: amount.to_owned() }
    }

    pub(crate) async fn wallet_command(&self, command: &str) {
        let path = format!("/v1/wallets/{}/{command}", self.wallet);
        self.command(&self.partner, &path, &json!({ "reason": "a test" })).await.expect(200);
    }

    pub(crate) async fn expire_by_hand(&self, top_up: &TopUp) {
        let path = format!("/v1/transactions/{}/expire", top_up.id);
        self.command(&self.admin, &path, &json!({})).await.expect(200);
    }

    /// The very command that the workflows issue for an accepted callback, key included: as if its answer had been lost on
    /// the way to them.
    pub(crate) async fn settle_in_their_name(&self, top_up: &TopUp) -> Answer {
        let row = self.row(top_up).await.unwrap();
        let token = self.token(&self.settings.client_id, &self.settings.client_secret).await;
        let path = format!("{}/v1/transactions/{}/settle", self.command_url, top_up.id);
        let body = json!({ "amount": top_up.amount, "currency": "EUR", "bankReference": row.bank_reference });
        let request = self.http.post(path).bearer_auth(token).json(&body);
        answer(request.header("idempotency-key", format!("topup:{}:settle:0:{}", row.requested_position, top_up.id)))
            .await
    }

    /// The payer decides; with `callback` the bank misbehaves.
    pub(crate) async fn simulate(&self, top_up: &TopUp, wish: Value) {
        let mut body = wish;
        body["token"] = top_up.token.as_str().into();
        let request = self.http.post(format!("{}/bank/simulate", self.bank_url)).json(&body);
        answer(request).await.expect(200);
    }

    pub(crate) async fn at_the_bank(&self, top_up: &TopUp) -> Value {
        let request = self.http.get(format!("{}/bank/payments/{}", self.bank_url, top_up.token)).bearer_auth(API_KEY);
        answer(request).await.expect(200)
    }

    /// The body of a callback: a success, changed as wanted.
    pub(crate) fn word(&self, top_up: &TopUp, change: Value) -> String {
        let mut word = json!({ "token": top_up.token, "status": "success", "amount": top_up.amount, "currency": "EUR",
                               "bankReference": format!("REF-{}", top_up.token) });
        for (name, value) in change.as_object().unwrap() {
            word[name] = value.clone();
        }
        word.to_string()
    }

    pub(crate) async fn callback(&self, top_up: &TopUp, change: Value) -> Answer {
        self.doors.clone().signed(self.word(top_up, change)).await
    }

    /// The payloads of the transaction's stream.
    pub(crate) async fn events(&self, top_up: &TopUp) -> Vec<Value> {
        let stream = self.stream(top_up).await;
        stream.iter().map(|event| serde_json::from_str(&event.payload).unwrap()).collect()
    }

    /// The types of its stream's events.
    pub(crate) async fn types(&self, top_up: &TopUp) -> Vec<String> {
        self.stream(top_up).await.into_iter().map(|event| event.event_type.into_owned()).collect()
    }

    /// Read again after an error: a pool may hand out a connection that a crash of Postgres has just broken.
    async fn stream(&self, top_up: &TopUp) -> Vec<RecordedEvent> {
        let read = || self.log.stream("transaction", &top_up.id, i64::MAX);
        eventually("the stream is read", read, Result::is_ok).await.unwrap()
    }

    /// The same, once it has ended. Nothing can follow then: the ledger ends a transaction once.
    pub(crate) async fn ended(&self, top_up: &TopUp) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let types = self.types(top_up).await;
            if 1 < types.len() {
                return types;
            }
            if deadline < Instant::now() {
                panic!("{top_up:?} did not end; {:?}; {:?}", self.row(top_up).await, self.steps(top_up).await);
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) async fn row(&self, top_up: &TopUp) -> Option<Row> {
        sqlx::query_as(
            "select state, outcome, ended_position, failures, command_try, unfrozen, requested_position, alert, bank_reference
             from workflows.top_ups where token = $1",
        )
        .bind(&top_up.token)
        .fetch_optional(&self.workflows)
        .await
        .unwrap()
    }

    pub(crate) async fn row_where(&self, top_up: &TopUp, claim: &str, wanted: impl Fn(&Row) -> bool) -> Row {
        let wanted = |row: &Option<Row>| row.as_ref().is_some_and(&wanted);
        eventually(claim, || self.row(top_up), wanted).await.expect("it was there just now")
    }

    pub(crate) async fn reference(&self, top_up: &TopUp) -> String {
        let row = self.row_where(top_up, "the bank has given its word", |row| row.bank_reference.is_some()).await;
        row.bank_reference.expect("it was there just now")
    }

    /// The attempts, in order.
    pub(crate) async fn steps(&self, top_up: &TopUp) -> Vec<String> {
        sqlx::query_scalar(
            "select step from workflows.attempts join workflows.top_ups using (transaction_id)
             where token = $1 order by started_at",
        )
        .bind(&top_up.token)
        .fetch_all(&self.workflows)
        .await
        .unwrap()
    }

    /// What its attempts brought.
    pub(crate) async fn outcomes(&self, top_up: &TopUp) -> Vec<String> {
        sqlx::query_scalar(
            "select coalesce(attempts.outcome, '') from workflows.attempts join workflows.top_ups using (transaction_id)
             where token = $1 order by started_at",
        )
        .bind(&top_up.token)
        .fetch_all(&self.workflows)
        .await
        .unwrap()
    }

    /// Keeps the log from being followed until the lock is dropped.
    pub(crate) async fn hold_the_checkpoint(&self) -> sqlx::Transaction<'static, sqlx::Postgres> {
        let mut lock = self.workflows.begin().await.unwrap();
        sqlx::query("select 1 from workflows.checkpoint for update").execute(&mut *lock).await.unwrap();
        lock
    }

    /// Keeps every query about top-ups waiting until the lock is dropped.
    pub(crate) async fn hold_the_top_ups(&self) -> sqlx::Transaction<'static, sqlx::Postgres> {
        let mut lock = self.workflows.begin().await.unwrap();
        sqlx::query("lock table workflows.top_ups in access exclusive mode").execute(&mut *lock).await.unwrap();
        lock
    }

    /// How many connections of the workflows wait for a lock.
    pub(crate) async fn waiting_for_locks(&self) -> i64 {
        let mut superuser = sqlx::PgConnection::connect(&self.settings.database_url).await.unwrap();
        sqlx::query_scalar(
            "select count(*) from pg_stat_activity
             where datname = current_database() and wait_event_type = 'Lock' and application_name = 'daybook_workflows'",
        )
        .fetch_one(&mut superuser)
        .await
        .unwrap()
    }

    /// Ends every login there is, and waits until that is in force.
    pub(crate) async fn revoke_all_tokens(&self) {
        let mut superuser = sqlx::PgConnection::connect(&self.settings.database_url).await.unwrap();
        sqlx::query(
            "insert into access.revocations (family, expires_at)
             select distinct family, now() + interval '1 day' from access.refresh_tokens on conflict do nothing",
        )
        .execute(&mut superuser)
        .await
        .unwrap();
        let body = json!({ "userId": "bob", "currency": "EUR" });
        let open = async || self.command(&self.partner, "/v1/wallets", &body).await.status;
        eventually("the partner's token is revoked", open, |status| *status == 401).await;
    }

    /// What became of its different callbacks, in order.
    pub(crate) async fn verdicts(&self, top_up: &TopUp) -> Vec<String> {
        sqlx::query_scalar("select verdict from workflows.callbacks where token = $1 order by received_at, id")
            .bind(&top_up.token)
            .fetch_all(&self.workflows)
            .await
            .unwrap()
    }

    /// All that were kept, repetitions included.
    pub(crate) async fn callbacks_received(&self, top_up: &TopUp) -> i64 {
        sqlx::query_scalar("select coalesce(sum(received_times), 0)::bigint from workflows.callbacks where token = $1")
            .bind(&top_up.token)
            .fetch_one(&self.workflows)
            .await
            .unwrap()
    }

    async fn token(&self, id: &str, secret: &str) -> String {
        let body = json!({ "clientId": id, "clientSecret": secret });
        let answer =
            answer(self.http.post(format!("{}/v1/auth/token", self.command_url)).json(&body)).await.expect(200);
        answer["accessToken"].as_str().unwrap().to_owned()
    }

    async fn command(&self, token: &str, path: &str, body: &Value) -> Answer {
        let request = self.http.post(format!("{}{path}", self.command_url)).bearer_auth(token).json(body);
        answer(request.header("idempotency-key", Uuid::now_v7().to_string())).await
    }
}

impl Drop for System {
    fn drop(&mut self) {
        self.all.trigger();
        if let Some((shutdown, _)) = &self.running {
            shutdown.trigger();
        }
    }
}

/// Where the bank's callbacks come in.
#[derive(Clone)]
pub(crate) struct Doors {
    http: reqwest::Client,
    callback_url: String,
}

impl Doors {
    /// A callback that is signed as it should be.
    pub(crate) async fn signed(self, body: String) -> Answer {
        let now = unix_seconds();
        self.post(Some(&now.to_string()), Some(&sign(CALLBACK_SECRET, now, &body)), &body).await
    }

    pub(crate) async fn post(&self, timestamp: Option<&str>, signature: Option<&str>, body: &str) -> Answer {
        let mut request = self.http.post(&self.callback_url).header("content-type", "application/json");
        if let Some(timestamp) = timestamp {
            request = request.header("x-bank-timestamp", timestamp);
        }
        if let Some(signature) = signature {
            request = request.header("x-bank-signature", signature);
        }
        answer(request.body(body.to_owned())).await
    }
}

impl Answer {
    pub(crate) fn slug(&self) -> String {
        self.text("/type").trim_start_matches("/problems/").to_owned()
    }

    pub(crate) fn text(&self, pointer: &str) -> String {
        self.body.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    fn expect(self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.body);
        self.body
    }
}

/// A wire to an address, which can hang: then nothing is lost and nothing arrives.
pub(crate) struct Wire {
    pub(crate) url: String,
    /// Connections with a smaller number hang.
    hung: watch::Sender<usize>,
    opened: watch::Receiver<usize>,
}

impl Wire {
    async fn to(url: &str, hangs: bool) -> Self {
        let to: SocketAddr = url.trim_start_matches("http://").parse().unwrap();
        let (listener, url) = listen().await;
        let (hung, state) = watch::channel(if hangs { usize::MAX } else { 0 });
        let (open, opened) = watch::channel(0);
        tokio::spawn(async move {
            for number in 0.. {
                let Ok((near, _)) = listener.accept().await else { return };
                open.send_replace(number + 1);
                let state = state.clone();
                tokio::spawn(async move {
                    let Ok(far) = TcpStream::connect(to).await else { return };
                    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                    tokio::join!(
                        carry(number, near_in, far_out, state.clone()),
                        carry(number, far_in, near_out, state)
                    );
                });
            }
        });
        Self { url, hung, opened }
    }

    pub(crate) fn hang(&self) {
        self.hung.send_replace(usize::MAX);
    }

    /// New connections work; what hung before goes on hanging.
    pub(crate) fn resume_anew(&self) {
        self.hung.send_replace(*self.opened.borrow());
    }

    pub(crate) fn resume(&self) {
        self.hung.send_replace(0);
    }
}

async fn carry(number: usize, mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut hung: watch::Receiver<usize>) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if hung.wait_for(|hung| *hung <= number).await.is_err() || to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

/// Waits for a state, with a bound, and says what was last seen.
pub(crate) async fn eventually<T: Debug>(claim: &str, look: impl AsyncFn() -> T, wanted: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = look().await;
        if wanted(&seen) {
            return seen;
        }
        assert!(Instant::now() < deadline, "not in time: {claim}; last seen: {seen:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) fn sign(secret: &str, timestamp: u64, body: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(format!("{timestamp}.{body}").as_bytes());
    mac.finalize().into_bytes().iter().fold("sha256=".to_owned(), |hex, byte| format!("{hex}{byte:02x}"))
}

pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

async fn client(access: &Access, scopes: Scopes) -> (String, String) {
    let (id, secret) = (ClientId::from_uuid(Uuid::now_v7()), Secret::mint_for_client());
    access.create_client(NewClient { id, partner: None, secret: secret.clone(), scopes }).await.unwrap();
    (id.to_string(), secret.reveal().to_owned())
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (listener, url)
}

async fn answer(request: reqwest::RequestBuilder) -> Answer {
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    Answer { status, body: serde_json::from_str(&text).unwrap_or(Value::String(text)) }
}
