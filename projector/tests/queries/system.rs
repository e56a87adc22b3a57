//! A ledger, a bus and a projector of a test's own, and clients that call it over HTTP.

use std::sync::Arc;
use std::time::Duration;

use api_contract::{Access, NewClient, Scopes, Seal, Secret, key_hash};
use event_feed::{FeedSettings, Log};
use ledger_core::*;
use ledger_engine::{CommandError, Ledger, Receipt};
use local_stack::testing;
use projector::{Progress, Queries, Settings};
use reqwest::StatusCode;
use reqwest::header::HeaderMap;
use runtime::http::Limits;
use runtime::shutdown::Shutdown;
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

pub(crate) struct System {
    pub(crate) database_url: String,
    pub(crate) ledger: Ledger,
    access: Access,
    feed: FeedSettings,
    progress: Progress,
    base: String,
    projecting: Option<(Shutdown, JoinHandle<anyhow::Result<()>>)>,
    shutdown: Shutdown,
}

/// A client of a partner, or of the operator.
#[derive(Clone)]
pub(crate) struct Caller {
    pub(crate) id: ClientId,
    pub(crate) partner: PartnerId,
    /// The settlement wallet.
    pub(crate) settlement: WalletId,
    token: String,
    http: reqwest::Client,
    base: String,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl System {
    pub(crate) async fn start() -> Self {
        let mut system = Self::start_without_projecting().await;
        system.project();
        system
    }

    /// Everything but the projecting task.
    pub(crate) async fn start_without_projecting() -> Self {
        let database = testing::database(|url| async move { migrations::run(&url).await }).await;
        let nats_url = testing::stack().await.nats_url();
        Self::on(database.url(), nats_url, format!("daybook-{}", database.name())).await
    }

    /// On a migrated database and a stream that nobody else uses; without the projecting task.
    pub(crate) async fn on(database_url: &str, nats_url: &str, stream: String) -> Self {
        let database_url = database_url.to_owned();
        let feed = FeedSettings { nats_url: Some(nats_url.to_owned()), stream, beside: None };
        let ledger = Ledger::start(&database_url, ledger_engine::Settings::default()).await.unwrap();
        let access = Access::connect(&database_url, seal()).await.unwrap();
        let shutdown = Shutdown::new();
        let log = Log::new(event_store::connect(&database_url, "daybook_reader", 2).await.unwrap());
        tokio::spawn(event_feed::relay::run(log, feed.clone(), shutdown.clone()));
        let progress = Progress::default();
        let (base, projecting) = (String::new(), None);
        let mut system = Self { database_url, ledger, access, feed, progress, base, projecting, shutdown };
        system.base = system.serve(system.progress.clone()).await;
        system
    }

    /// Serves queries and answers their address. They know of projecting in this process by `progress` alone.
    pub(crate) async fn serve(&self, progress: Progress) -> String {
        let queries = Queries::connect(&self.database_url, self.access.clone(), &seal(), progress).await.unwrap();
        let router = api_contract::layer(projector::routes(queries));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(runtime::http::serve(listener, router, Limits::default(), self.shutdown.clone()));
        base
    }

    pub(crate) fn project(&mut self) {
        let stop = Shutdown::new();
        let settings = Settings { database_url: self.database_url.clone(), feed: self.feed.clone() };
        let task = tokio::spawn(projector::follow(settings, self.progress.clone(), stop.clone()));
        self.projecting = Some((stop, task));
    }

    pub(crate) async fn stop_projecting(&mut self) {
        let (stop, task) = self.projecting.take().unwrap();
        stop.trigger();
        task.await.unwrap().unwrap();
    }

    /// Waits for the projecting task to end by itself.
    pub(crate) async fn projecting_ended(&mut self) -> anyhow::Error {
        let (_, task) = self.projecting.take().unwrap();
        tokio::time::timeout(Duration::from_secs(30), task).await.unwrap().unwrap().unwrap_err()
    }

    pub(crate) async fn partner(&self) -> Caller {
        let (partner, client, settlement) = (PartnerId::from_uuid(new()), ClientId::from_uuid(new()), wallet_id());
        let currencies = vec![(eur(), settlement)];
        let register = Action::RegisterPartner { partner, name: "Acme".to_owned(), currencies, client };
        self.execute(ledger_core::Caller::Admin, register).await;
        Caller { partner, settlement, ..self.client(client, Some(partner), Scopes::PARTNER).await }
    }

    pub(crate) async fn admin(&self) -> Caller {
        self.client(ClientId::from_uuid(new()), None, Scopes::ADMIN).await
    }

    async fn client(&self, id: ClientId, partner: Option<PartnerId>, scopes: Scopes) -> Caller {
        let secret = Secret::mint_for_client();
        self.access.create_client(NewClient { id, partner, secret: secret.clone(), scopes }).await.unwrap();
        let tokens = self.access.issue(&id.to_string(), &secret).await.unwrap();
        Caller {
            id,
            partner: partner.unwrap_or(PartnerId::from_uuid(Uuid::nil())),
            settlement: wallet_id(),
            token: tokens.access_token.reveal().to_owned(),
            http: http(),
            base: self.base.clone(),
        }
    }

    /// A customer's wallet.
    pub(crate) async fn wallet(&self, partner: &Caller, user: &str) -> WalletId {
        let wallet = wallet_id();
        let open = Action::OpenWallet { wallet, user: user.into(), currency: eur(), metadata: Metadata::new() };
        self.execute(partner.caller(), open).await;
        wallet
    }

    pub(crate) async fn fund(&self, partner: &Caller, wallet: WalletId, amount: &str) -> Receipt {
        self.fund_at(partner, wallet, amount, None).await
    }

    pub(crate) async fn fund_at(
        &self,
        partner: &Caller,
        wallet: WalletId,
        amount: &str,
        effective_at: Option<Timestamp>,
    ) -> Receipt {
        let direction = Some(Direction::Credit);
        let instruction = instruction(partner, TransactionKind::Adjustment, wallet, amount);
        let instruction = Arc::new(Instruction { direction, effective_at, ..instruction });
        let transaction = TransactionId::from_uuid(new());
        self.execute(ledger_core::Caller::Admin, Action::Adjust { transaction, instruction }).await
    }

    pub(crate) async fn transfer(&self, partner: &Caller, from: WalletId, to: WalletId, amount: &str) -> Receipt {
        self.transfer_with(partner, from, to, amount, |_| {}).await
    }

    /// A keyed transfer with the instruction changed: refused ones are in the log too.
    pub(crate) async fn transfer_with(
        &self,
        partner: &Caller,
        from: WalletId,
        to: WalletId,
        amount: &str,
        change: impl FnOnce(&mut Instruction),
    ) -> Receipt {
        self.transfer_command(partner, from, to, amount, change).await.unwrap()
    }

    pub(crate) async fn try_transfer(
        &self,
        partner: &Caller,
        from: WalletId,
        to: WalletId,
        amount: &str,
    ) -> Result<Receipt, CommandError> {
        self.transfer_command(partner, from, to, amount, |_| {}).await
    }

    async fn transfer_command(
        &self,
        partner: &Caller,
        from: WalletId,
        to: WalletId,
        amount: &str,
        change: impl FnOnce(&mut Instruction),
    ) -> Result<Receipt, CommandError> {
        let mut instruction = instruction(partner, TransactionKind::Transfer, from, amount);
        instruction.to_wallet_id = Some(to);
        change(&mut instruction);
        let key = instruction.reference.clone().unwrap_or_else(|| new().to_string());
        let transaction = TransactionId::from_uuid(new());
        let command = Command {
            id: CommandId::from_uuid(new()),
            key: Some(Key { hash: key_hash(partner.id, &key), request: [0; 32] }),
            caller: partner.caller(),
            action: Action::Transfer { transaction, instruction: Arc::new(instruction) },
            metadata: "{}".into(),
        };
        self.ledger.execute(command).await
    }

    pub(crate) async fn request_top_up(&self, partner: &Caller, wallet: WalletId, amount: &str) -> TransactionId {
        let transaction = TransactionId::from_uuid(new());
        let payment = Payment { token: "t".to_owned(), redirect_url: "http://bank/pay".to_owned(), return_url: None };
        let instruction = Arc::new(instruction(partner, TransactionKind::TopUp, wallet, amount));
        self.execute(partner.caller(), Action::RequestTopUp { transaction, instruction, payment }).await;
        transaction
    }

    pub(crate) async fn settle(&self, transaction: TransactionId, amount: &str) -> Receipt {
        let money = Money::parse(amount, eur()).unwrap();
        let settle = Action::Settle { transaction, money, provider_reference: "bank-1".to_owned() };
        self.execute(ledger_core::Caller::Workflow, settle).await
    }

    pub(crate) async fn execute(&self, caller: ledger_core::Caller, action: Action) -> Receipt {
        let id = CommandId::from_uuid(new());
        self.ledger.execute(Command { id, key: None, caller, action, metadata: "{}".into() }).await.unwrap()
    }

    /// What happens to the database behind everybody's back.
    pub(crate) async fn sql(&self, statement: &str) {
        let mut connection = PgConnection::connect(&self.database_url).await.unwrap();
        sqlx::raw_sql(statement).execute(&mut connection).await.unwrap();
    }

    pub(crate) async fn scalar<T>(&self, query: &str) -> T
    where
        T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres> + Send + Unpin,
    {
        let mut connection = PgConnection::connect(&self.database_url).await.unwrap();
        sqlx::query_scalar(query).fetch_one(&mut connection).await.unwrap()
    }

    pub(crate) async fn head(&self) -> i64 {
        self.scalar("select max(position) from ledger.events").await
    }

    /// Asks the servers and the relay to stop, but not the projector.
    pub(crate) fn stop(&self) {
        self.shutdown.trigger();
    }

    /// Waits until all views are at the head.
    pub(crate) async fn caught_up(&self) {
        let head = self.head().await;
        let lag = || self.scalar::<i64>("select min(position) from views.checkpoints");
        eventually("the views are at the head", lag, |position| *position == head).await;
    }
}

impl Drop for System {
    fn drop(&mut self) {
        self.shutdown.trigger();
        if let Some((stop, _)) = &self.projecting {
            stop.trigger();
        }
    }
}

impl Caller {
    pub(crate) fn caller(&self) -> ledger_core::Caller {
        ledger_core::Caller::Partner { partner: self.partner, user: None }
    }

    /// The same client at another address.
    pub(crate) fn at(&self, base: String) -> Self {
        Self { base, ..self.clone() }
    }

    pub(crate) async fn call(&self, path: &str) -> Answer {
        self.accepting(path, None).await
    }

    pub(crate) async fn accepting(&self, path: &str, accept: Option<&str>) -> Answer {
        let response = self.send(path, accept).await;
        let (status, headers) = (response.status(), response.headers().clone());
        Answer { status, headers, text: response.text().await.unwrap() }
    }

    pub(crate) async fn send(&self, path: &str, accept: Option<&str>) -> reqwest::Response {
        let mut request = self.http.get(format!("{}{path}", self.base)).bearer_auth(&self.token);
        if let Some(accept) = accept {
            request = request.header("accept", accept);
        }
        request.send().await.unwrap()
    }

    /// What is answered 200, with the position that it reflects.
    pub(crate) async fn get_at(&self, path: &str) -> (i64, Value) {
        let answer = self.call(path).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.text);
        (answer.position(), answer.json())
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        self.get_at(path).await.1
    }

    /// Expects a problem and nothing else.
    pub(crate) async fn problem(&self, path: &str) -> String {
        let answer = self.call(path).await;
        let body = answer.json();
        assert_eq!(answer.headers["content-type"], "application/problem+json", "{path}: {body}");
        format!("{} {}", answer.status.as_u16(), body["type"].as_str().unwrap().trim_start_matches("/problems/"))
    }

    /// All items of a list, page by page.
    pub(crate) async fn all(&self, path: &str, limit: usize) -> Vec<Value> {
        let mut items = Vec::new();
        let mut cursor = String::new();
        loop {
            let mark = if path.contains('?') { '&' } else { '?' };
            let page = self.get(&format!("{path}{mark}limit={limit}{cursor}")).await;
            let data = page["data"].as_array().unwrap();
            assert!(data.len() <= limit);
            items.extend(data.clone());
            match page["nextCursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => {
                    assert_eq!(page["hasMore"], false);
                    return items;
                }
            }
        }
    }
}

impl Answer {
    pub(crate) fn position(&self) -> i64 {
        let position = self.headers.get("ledger-position").expect("a read says which position it reflects");
        position.to_str().unwrap().parse().unwrap()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("not JSON: {}", self.text))
    }
}

/// The transaction that a receipt is about.
pub(crate) fn transaction_of(receipt: &Receipt) -> TransactionId {
    receipt.events()[0].aggregate_id.parse().unwrap()
}

/// Waits for a state, with a bound, and says what was last seen.
pub(crate) async fn eventually<T: std::fmt::Debug, F: Future<Output = T>>(
    what: &str,
    look: impl Fn() -> F,
    is_there: impl Fn(&T) -> bool,
) -> T {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let seen = look().await;
        if is_there(&seen) {
            return seen;
        }
        assert!(Instant::now() < until, "{what}: last seen {seen:#?}");
        sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) fn ids(items: &[Value]) -> Vec<&str> {
    items.iter().map(|item| item["id"].as_str().unwrap()).collect()
}

fn instruction(partner: &Caller, kind: TransactionKind, wallet_id: WalletId, amount: &str) -> Instruction {
    Instruction {
        kind,
        partner_id: Some(partner.partner),
        user_id: None,
        wallet_id,
        to_wallet_id: None,
        direction: None,
        amount: Money::parse(amount, eur()).unwrap().amount(),
        currency: eur(),
        reference: None,
        description: None,
        metadata: Metadata::new(),
        effective_at: None,
    }
}

pub(crate) fn eur() -> Currency {
    "EUR".parse().unwrap()
}

pub(crate) fn wallet_id() -> WalletId {
    WalletId::from_uuid(new())
}

fn http() -> reqwest::Client {
    rustls::crypto::ring::default_provider().install_default().ok(); // another test may have been first
    reqwest::Client::builder().no_proxy().build().unwrap()
}

fn new() -> Uuid {
    Uuid::now_v7()
}

fn seal() -> Seal {
    Seal::from_key([7; 32])
}
