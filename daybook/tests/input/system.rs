//! The running system that the tables are sent to, and what is in it: wallets of every kind, and callers with tokens.

use std::io::Read;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::process::{DataDirectory, Daybook};
use crate::wire::{Answer, Request, exchange};

/// A daybook process with something in it. Dropping it ends the process.
pub(crate) struct System {
    pub(crate) daybook: Daybook,
    pub(crate) address: SocketAddr,
    /// What the process has logged and nobody has looked at yet.
    log: std::fs::File,
    alerts: usize,
    database: PgConnection,
    pub(crate) admin: String,
    /// The demo partner's token.
    pub(crate) partner: String,
    /// Of the partner: EUR with 100.00 in it.
    pub(crate) alice: String,
    /// EUR, empty.
    pub(crate) bob: String,
    pub(crate) yen: String,
    pub(crate) dinar: String,
    pub(crate) frozen: String,
    pub(crate) closed: String,
    /// The secret that the bank signs its callbacks with.
    pub(crate) bank_secret: String,
    _directory: DataDirectory, // last, so that it outlives the process
}

static KEYS: AtomicU32 = AtomicU32::new(0);

/// A key that nobody has used.
pub(crate) fn fresh_key() -> String {
    format!("input-{}", KEYS.fetch_add(1, Ordering::Relaxed))
}

impl System {
    pub(crate) async fn start(options: &[&str]) -> Self {
        let directory = DataDirectory::new();
        let daybook = Daybook::start(&directory, options).await;
        let address = daybook.base_url().strip_prefix("http://").unwrap().parse().unwrap();
        let log = std::fs::File::open(directory.path().join("daybook.log")).unwrap();
        let database = PgConnection::connect(daybook.database_url()).await.unwrap();
        let (admin, partner) = (daybook.login("admin").await, daybook.login("demoPartner").await);
        let installation = std::fs::read(directory.path().join("installation.json")).unwrap();
        let installation: Value = serde_json::from_slice(&installation).unwrap();
        let bank_secret = installation["bankCallbackSecret"].as_str().unwrap().to_owned();
        let none = String::new;
        let mut system = Self {
            daybook,
            address,
            log,
            alerts: 0,
            database,
            admin,
            partner,
            alice: none(),
            bob: none(),
            yen: none(),
            dinar: none(),
            frozen: none(),
            closed: none(),
            bank_secret,
            _directory: directory,
        };
        let partner = system.partner.clone();
        system.alice = system.wallet(&partner, "alice", "EUR", "100.00").await;
        system.bob = system.wallet(&partner, "bob", "EUR", "0").await;
        system.yen = system.wallet(&partner, "alice", "JPY", "100").await;
        system.dinar = system.wallet(&partner, "alice", "KWD", "100.000").await;
        system.frozen = system.wallet(&partner, "alice", "EUR", "10.00").await;
        system.closed = system.wallet(&partner, "alice", "EUR", "0").await;
        for (wallet, what) in [(&system.frozen, "freeze"), (&system.closed, "close")] {
            let request = Request::post(format!("/v1/wallets/{wallet}/{what}")).bearer(&partner);
            system.done(request.json(&json!({"reason": "a test"})), 200).await;
        }
        system
    }

    /// A wallet of this caller's partner with so much in it.
    pub(crate) async fn wallet(&self, token: &str, user: &str, currency: &str, funds: &str) -> String {
        let open = Request::post("/v1/wallets").bearer(token).json(&json!({"userId": user, "currency": currency}));
        let wallet = self.done(open, 201).await["id"].as_str().unwrap().to_owned();
        if funds != "0" {
            let body = json!({
                "walletId": wallet, "direction": "CREDIT", "amount": funds, "currency": currency, "reason": "a start"
            });
            let fund = Request::post("/v1/transactions/adjustment").bearer(&self.admin).key(fresh_key()).json(&body);
            self.done(fund, 201).await;
        }
        wallet
    }

    /// The answer to what must be answered with this status.
    pub(crate) async fn done(&self, request: Request, status: u16) -> Value {
        let answer = self.ask(&request).await;
        assert_eq!(answer.status, status, "{}: {}", String::from_utf8_lossy(&request.bytes()), answer.text());
        if answer.body.is_empty() { Value::Null } else { answer.json() }
    }

    pub(crate) async fn ask(&self, request: &Request) -> Answer {
        let answer = exchange(self.address, &request.bytes(), false).await;
        answer.unwrap_or_else(|error| panic!("{}: {error}", String::from_utf8_lossy(&request.bytes())))
    }

    /// A transfer of one euro from Alice to Bob, with a key of its own; the tables change something about it.
    pub(crate) fn transfer(&self) -> Request {
        self.transfer_of(&self.transfer_body())
    }

    pub(crate) fn transfer_of(&self, body: &Value) -> Request {
        self.transfer_request().json(body)
    }

    /// Without a body yet.
    pub(crate) fn transfer_request(&self) -> Request {
        Request::post("/v1/transactions/transfer").bearer(&self.partner).key(fresh_key())
    }

    pub(crate) fn transfer_body(&self) -> Value {
        json!({"fromWalletId": self.alice, "toWalletId": self.bob, "amount": "0.01", "currency": "EUR"})
    }

    /// The transfer with one field otherwise.
    pub(crate) fn transfer_with(&self, name: &str, value: impl Into<Value>) -> Request {
        let mut body = self.transfer_body();
        body[name] = value.into();
        self.transfer_of(&body)
    }

    pub(crate) fn get(&self, target: impl AsRef<[u8]>) -> Request {
        Request::get(target).bearer(&self.partner)
    }

    /// Where the log ends, and how many of its events have moved money.
    pub(crate) async fn log_position(&mut self) -> (i64, i64) {
        let query = "select coalesce(max(position), 0),
                            count(*) filter (where payload::text like '%\"entries\":%') from ledger.events";
        sqlx::query_as(query).fetch_one(&mut self.database).await.unwrap()
    }

    pub(crate) fn database(&mut self) -> &mut PgConnection {
        &mut self.database
    }

    /// What the process has logged since this was asked last: panics, and failures of its own.
    pub(crate) fn complaints(&mut self) -> Vec<String> {
        let mut lines = String::new();
        self.log.read_to_string(&mut lines).unwrap();
        let is_bad = |line: &&str| line.contains("panic") || line.contains("\"ERROR\"");
        let (alerts, complaints): (Vec<&str>, Vec<&str>) =
            lines.lines().filter(is_bad).partition(|line| line.contains("\"alert\":"));
        self.alerts += alerts.len();
        complaints.into_iter().map(str::to_owned).collect()
    }

    /// How often it has called somebody of ours so far.
    pub(crate) fn alerts(&mut self) -> usize {
        assert_eq!(self.complaints(), [""; 0]);
        self.alerts
    }
}
