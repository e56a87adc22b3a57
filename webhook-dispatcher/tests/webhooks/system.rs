//! A ledger, a bus and a dispatcher of a test's own, and clients that call it over HTTP.

use std::sync::Arc;
use std::time::Duration;

use api_contract::{Access, NewClient, Scopes, Seal, Secret};
use event_feed::FeedSettings;
use ledger_core::{
    Action, Caller, ClientId, Command, CommandId, Currency, Direction, Failure, Instruction, Key, Metadata, Money,
    PartnerId, Payment, TransactionId, TransactionKind, WalletId,
};
use ledger_engine::{CommandError, Ledger, Receipt};
use local_stack::testing;
use reqwest::{Method, StatusCode};
use runtime::http::Limits;
use runtime::shutdown::Shutdown;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use uuid::Uuid;
use webhook_dispatcher::{Dispatcher, Settings};

use crate::receiver::Receiver;

pub(crate) struct System {
    database_url: String,
    ledger: Ledger,
    access: Access,
    feed: FeedSettings,
    schedule: &'static str,
    base: String,
    /// Of the routes, and of the tasks while they run: they share what they know.
    dispatcher: Dispatcher,
    running: Option<JoinHandle<()>>,
    /// Of the tasks alone, so that they can be stopped while the routes go on.
    stop: Shutdown,
    shutdown: Shutdown,
}

/// A partner with a client.
pub(crate) struct Partner {
    pub(crate) id: PartnerId,
    token: String,
    http: reqwest::Client,
    base: String,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) body: Value,
}

const CURRENCY: &str = "EUR";

impl System {
    /// Everything runs; deliveries may go to this machine.
    pub(crate) async fn start(schedule: &'static str) -> Self {
        let mut system = Self::start_without_dispatching(schedule).await;
        system.dispatch();
        system
    }

    /// Everything but the dispatcher's tasks.
    pub(crate) async fn start_without_dispatching(schedule: &'static str) -> Self {
        let database = testing::database(|url| async move { migrations::run(&url).await }).await;
        let nats_url = testing::stack().await.nats_url();
        Self::on(database.url(), nats_url, format!("daybook-{}", database.name()), schedule).await
    }

    /// On a migrated database and a stream that nobody else uses; without the dispatcher's tasks.
    pub(crate) async fn on(database_url: &str, nats_url: &str, stream: String, schedule: &'static str) -> Self {
        let feed = FeedSettings { nats_url: Some(nats_url.to_owned()), stream, beside: None };
        let ledger = Ledger::start(database_url, ledger_engine::Settings::default()).await.expect("the ledger starts");
        let access = Access::connect(database_url, seal()).await.expect("the schema access is there");
        let shutdown = Shutdown::new();

        let log = webhook_dispatcher::log(database_url).expect("the address is one");
        let (relay_feed, relay_shutdown) = (feed.clone(), shutdown.clone());
        tokio::spawn(async move { event_feed::relay::run(log, relay_feed, relay_shutdown).await });

        let dispatcher = dispatcher(database_url, &access, &feed, schedule, true);
        let database_url = database_url.to_owned();
        let (base, running, stop) = (String::new(), None, Shutdown::new());
        let mut system =
            Self { database_url, ledger, access, feed, schedule, base, dispatcher, running, stop, shutdown };
        system.base = system.serve(system.dispatcher.clone()).await;
        system
    }

    pub(crate) fn base(&self) -> String {
        self.base.clone()
    }

    /// A dispatcher of its own beside the system's.
    pub(crate) fn another_dispatcher(&self, allow_local: bool) -> Dispatcher {
        dispatcher(&self.database_url, &self.access, &self.feed, self.schedule, allow_local)
    }

    /// Serves the routes of a dispatcher and answers their address.
    pub(crate) async fn serve(&self, dispatcher: Dispatcher) -> String {
        let router = api_contract::layer(webhook_dispatcher::routes(dispatcher));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let base = format!("http://{}", listener.local_addr().expect("it is bound"));
        tokio::spawn(runtime::http::serve(listener, router, Limits::default(), self.shutdown.clone()));
        base
    }

    pub(crate) fn dispatch(&mut self) {
        self.running = Some(self.run(self.dispatcher.clone()));
    }

    pub(crate) fn run(&self, dispatcher: Dispatcher) -> JoinHandle<()> {
        tokio::spawn(webhook_dispatcher::run(dispatcher, self.stop.clone()))
    }

    /// Asks the tasks to stop and answers their end.
    pub(crate) fn stop_dispatching(&mut self) -> JoinHandle<()> {
        self.stop.trigger();
        self.running.take().expect("they run")
    }

    /// As a crash would: nothing is finished and nothing recorded.
    pub(crate) async fn crash(&mut self) {
        let running = self.running.take().expect("it runs");
        running.abort();
        running.await.expect_err("it was aborted");
    }

    pub(crate) async fn partner(&self) -> Partner {
        let id = PartnerId::from_uuid(Uuid::now_v7());
        let client = ClientId::from_uuid(Uuid::now_v7());
        let register = Action::RegisterPartner {
            partner: id,
            name: "Acme".to_owned(),
            currencies: vec![(eur(), WalletId::from_uuid(Uuid::now_v7()))],
            client,
        };
        self.execute(Caller::Admin, register).await;
        Partner { id, ..self.client(client, Some(id), Scopes::PARTNER).await }
    }

    /// A client with all rights and no partner.
    pub(crate) async fn admin(&self) -> Partner {
        self.client(ClientId::from_uuid(Uuid::now_v7()), None, Scopes::ADMIN).await
    }

    async fn client(&self, id: ClientId, partner: Option<PartnerId>, scopes: Scopes) -> Partner {
        let secret = Secret::mint_for_client();
        let client = NewClient { id, partner, secret: secret.clone(), scopes };
        self.access.create_client(client).await.expect("the client is new");
        let tokens = self.access.issue(&id.to_string(), &secret).await.expect("its secret is right");
        Partner {
            id: partner.unwrap_or(PartnerId::from_uuid(Uuid::nil())),
            token: tokens.access_token.reveal().to_owned(),
            http: reqwest::Client::builder().no_proxy().build().expect("a provider was installed"),
            base: self.base.clone(),
        }
    }

    /// A customer's wallet.
    pub(crate) async fn wallet(&self, partner: &Partner) -> WalletId {
        let wallet = WalletId::from_uuid(Uuid::now_v7());
        let open = Action::OpenWallet { wallet, user: "alice".into(), currency: eur(), metadata: Metadata::new() };
        self.execute(partner.caller(), open).await;
        wallet
    }

    /// One transaction that succeeds at once.
    pub(crate) async fn fund(&self, partner: &Partner, wallet: WalletId, amount: &str) -> Receipt {
        let instruction = Instruction {
            direction: Some(Direction::Credit),
            ..instruction(partner, TransactionKind::Adjustment, wallet, amount)
        };
        let transaction = TransactionId::from_uuid(Uuid::now_v7());
        self.execute(Caller::Admin, Action::Adjust { transaction, instruction: instruction.into() }).await
    }

    pub(crate) fn transfer(&self, partner: &Partner, from: WalletId, to: WalletId, amount: &str) -> Action {
        let instruction = instruction(partner, TransactionKind::Transfer, from, amount);
        let instruction = Arc::new(Instruction { to_wallet_id: Some(to), ..instruction });
        Action::Transfer { transaction: TransactionId::from_uuid(Uuid::now_v7()), instruction }
    }

    pub(crate) async fn request_top_up(&self, partner: &Partner, wallet: WalletId, amount: &str) -> TransactionId {
        let transaction = TransactionId::from_uuid(Uuid::now_v7());
        let payment =
            Payment { token: "token".to_owned(), redirect_url: "http://bank/pay".to_owned(), return_url: None };
        let instruction = Arc::new(instruction(partner, TransactionKind::TopUp, wallet, amount));
        self.execute(partner.caller(), Action::RequestTopUp { transaction, instruction, payment }).await;
        transaction
    }

    pub(crate) async fn settle(&self, transaction: TransactionId, amount: &str) {
        let money = Money::parse(amount, eur()).expect("the test's amount is one");
        let settle = Action::Settle { transaction, money, provider_reference: "bank-1".to_owned() };
        self.execute(Caller::Workflow, settle).await;
    }

    pub(crate) async fn fail(&self, transaction: TransactionId) {
        let failure = Failure { code: "payment-declined".to_owned(), detail: "the bank said no".to_owned() };
        self.execute(Caller::Workflow, Action::Fail { transaction, failure }).await;
    }

    pub(crate) async fn execute(&self, caller: Caller, action: Action) -> Receipt {
        self.try_execute(caller, action, None).await.expect("the ledger takes the command")
    }

    pub(crate) async fn try_execute(
        &self,
        caller: Caller,
        action: Action,
        key: Option<Key>,
    ) -> Result<Receipt, CommandError> {
        let id = CommandId::from_uuid(Uuid::now_v7());
        self.ledger.execute(Command { id, key, caller, action, metadata: "{}".into() }).await
    }

    /// What happens to the database behind the dispatcher's back.
    pub(crate) async fn sql(&self, statement: &str) {
        use sqlx::Connection;
        let mut connection = sqlx::PgConnection::connect(&self.database_url).await.expect("the database answers");
        sqlx::raw_sql(statement).execute(&mut connection).await.expect("the test's statement is right");
    }

    /// Keeps the log from being turned into deliveries until the lock is dropped.
    pub(crate) async fn hold_the_checkpoint(&self) -> sqlx::Transaction<'static, sqlx::Postgres> {
        let pool = sqlx::PgPool::connect(&self.database_url).await.expect("the database answers");
        let mut lock = pool.begin().await.expect("the database answers");
        let hold = sqlx::query("select from webhooks.checkpoint for update").execute(&mut *lock).await;
        hold.expect("the checkpoint is there");
        lock
    }

    /// How many of the dispatcher's connections wait for a lock.
    pub(crate) async fn waiting_for_locks(&self) -> i64 {
        self.count(
            "select count(*) from pg_stat_activity
             where datname = current_database() and wait_event_type = 'Lock' and application_name = 'daybook_webhooks'",
        )
        .await
    }

    pub(crate) async fn count(&self, query: &str) -> i64 {
        use sqlx::Connection;
        let mut connection = sqlx::PgConnection::connect(&self.database_url).await.expect("the database answers");
        sqlx::query_scalar(query).fetch_one(&mut connection).await.expect("the test's query is right")
    }
}

impl Drop for System {
    fn drop(&mut self) {
        self.stop.trigger();
        self.shutdown.trigger();
    }
}

impl Partner {
    pub(crate) fn caller(&self) -> Caller {
        Caller::Partner { partner: self.id, user: None }
    }

    pub(crate) fn without_token(self) -> Self {
        Self { token: String::new(), ..self }
    }

    /// The same client at another address.
    pub(crate) fn at(&self, base: String) -> Self {
        Self { id: self.id, token: self.token.clone(), http: self.http.clone(), base }
    }

    pub(crate) async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Answer {
        let mut request = self.http.request(method, format!("{}{path}", self.base));
        if !self.token.is_empty() {
            request = request.bearer_auth(&self.token);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.expect("the service answers");
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.expect("the answer has an end");
        let body = if text.is_empty() { Value::Null } else { serde_json::from_str(&text).expect("answers are JSON") };
        Answer { status, headers, body }
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        let answer = self.call(Method::GET, path, None).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.body);
        assert!(answer.headers.contains_key("ledger-position"), "{path} does not say which position it reflects");
        answer.body
    }

    /// Registers an endpoint for everything and answers its body.
    pub(crate) async fn register(&self, receiver: &Receiver) -> Value {
        self.register_url(&receiver.url()).await
    }

    pub(crate) async fn register_url(&self, url: &str) -> Value {
        let answer = self.call(Method::POST, "/v1/webhooks", Some(json!({ "url": url, "events": ["*"] }))).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.body);
        answer.body
    }

    /// The deliveries of an endpoint, in the order of their sequence.
    pub(crate) async fn deliveries(&self, webhook: &Value) -> Vec<Value> {
        let mut page = self.get(&format!("/v1/webhooks/{}/deliveries?limit=100", text(&webhook["id"]))).await;
        let mut deliveries = page["data"].take().as_array().expect("a page has data").clone();
        deliveries.reverse();
        deliveries
    }

    /// Waits until the endpoint's one delivery has the status, and shows it in full.
    pub(crate) async fn only_delivery(&self, webhook: &Value, status: &str) -> Value {
        let deliveries = eventually(
            &format!("one delivery that is {status}"),
            || self.deliveries(webhook),
            |seen| seen.len() == 1 && seen[0]["status"] == status,
        )
        .await;
        self.get(&format!("/v1/deliveries/{}", text(&deliveries[0]["id"]))).await
    }
}

/// Waits for a state, with a bound, and says what was last seen.
pub(crate) async fn eventually<T: std::fmt::Debug, F: Future<Output = T>>(
    what: &str,
    look: impl Fn() -> F,
    is_there: impl Fn(&T) -> bool,
) -> T {
    let until = Instant::now() + Duration::from_secs(40);
    loop {
        let seen = look().await;
        if is_there(&seen) {
            return seen;
        }
        assert!(Instant::now() < until, "{what}: last seen {seen:#?}");
        sleep(Duration::from_millis(50)).await;
    }
}

pub(crate) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("not a text: {value}"))
}

fn instruction(partner: &Partner, kind: TransactionKind, wallet_id: WalletId, amount: &str) -> Instruction {
    Instruction {
        kind,
        partner_id: Some(partner.id),
        user_id: None,
        wallet_id,
        to_wallet_id: None,
        direction: None,
        amount: Money::parse(amount, eur()).expect("the test's amount is one").amount(),
        currency: eur(),
        reference: None,
        description: None,
        metadata: Metadata::new(),
        effective_at: None,
    }
}

fn dispatcher(
    database_url: &str,
    access: &Access,
    feed: &FeedSettings,
    schedule: &str,
    allow_local_webhooks: bool,
) -> Dispatcher {
    let log = webhook_dispatcher::log(database_url).expect("the address is one");
    let schedule = schedule.parse().expect("the test's schedule is one");
    let settings = Settings { feed: feed.clone(), allow_local_webhooks, schedule };
    Dispatcher::new(log, access.clone(), &seal(), settings).expect("there is a TLS client")
}

fn eur() -> Currency {
    CURRENCY.parse().expect("a currency")
}

fn seal() -> Seal {
    Seal::from_key([7; 32])
}
