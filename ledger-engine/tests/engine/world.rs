//! A ledger of the test's own, and the words in which tests speak to it.

use std::sync::Arc;
use std::time::Duration;

use event_store::{Log, connect};
use ledger_core::*;
use ledger_engine::{CommandError, Ledger, Receipt, Settings};
use local_stack::testing::TestDatabase;
use sqlx::{Connection, PgConnection};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

/// More than any of these tests needs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A database of the test's own with a partner in it, and as many engines as the test starts.
pub(crate) struct World {
    pub(crate) database: TestDatabase,
    pub(crate) partner: PartnerId,
}

impl World {
    pub(crate) async fn new() -> (Self, Ledger) {
        let database = local_stack::testing::database(|url| async move { migrations::run(&url).await }).await;
        let world = Self { database, partner: PartnerId::from_uuid(Uuid::now_v7()) };
        let ledger = world.engine(Settings::default()).await;
        let action = Action::RegisterPartner {
            partner: world.partner,
            name: "a partner".to_owned(),
            currencies: vec![(eur(), WalletId::from_uuid(Uuid::now_v7()))],
            client: ClientId::from_uuid(Uuid::now_v7()),
        };
        ledger.execute(command(None, Caller::Admin, action)).await.unwrap();
        (world, ledger)
    }

    pub(crate) async fn engine(&self, settings: Settings) -> Ledger {
        Ledger::start(self.database.url(), settings).await.unwrap()
    }

    pub(crate) async fn wallet(&self, ledger: &Ledger, funds: &str) -> WalletId {
        let wallet = WalletId::from_uuid(Uuid::now_v7());
        let caller = Caller::Partner { partner: self.partner, user: None };
        let action = Action::OpenWallet { wallet, user: "user-1".into(), currency: eur(), metadata: Metadata::new() };
        ledger.execute(command(None, caller, action)).await.unwrap();
        if funds != "0" {
            let instruction = instruction(TransactionKind::Adjustment, wallet, None, Some(Direction::Credit), funds);
            let transaction = TransactionId::from_uuid(Uuid::now_v7());
            ledger.execute(command(None, Caller::Admin, Action::Adjust { transaction, instruction })).await.unwrap();
        }
        wallet
    }

    pub(crate) fn opening(&self) -> Command {
        let wallet = WalletId::from_uuid(Uuid::now_v7());
        let caller = Caller::Partner { partner: self.partner, user: None };
        let action = Action::OpenWallet { wallet, user: "user-1".into(), currency: eur(), metadata: Metadata::new() };
        command(None, caller, action)
    }

    pub(crate) fn transfer(&self, key: Option<&str>, from: WalletId, to: WalletId, amount: &str) -> Command {
        let instruction = instruction(TransactionKind::Transfer, from, Some(to), None, amount);
        let transaction = TransactionId::from_uuid(Uuid::now_v7());
        let caller = Caller::Partner { partner: self.partner, user: None };
        command(key.map(|key| (key, amount)), caller, Action::Transfer { transaction, instruction })
    }

    pub(crate) fn top_up(&self, wallet: WalletId, amount: &str) -> (TransactionId, Command) {
        let instruction = instruction(TransactionKind::TopUp, wallet, None, None, amount);
        let transaction = TransactionId::from_uuid(Uuid::now_v7());
        let payment = Payment { token: transaction.to_string(), redirect_url: "u".to_owned(), return_url: None };
        let caller = Caller::Partner { partner: self.partner, user: None };
        (transaction, command(None, caller, Action::RequestTopUp { transaction, instruction, payment }))
    }

    pub(crate) async fn log(&self) -> Log {
        Log::new(connect(self.database.url(), "daybook_reader", 2).await.unwrap())
    }

    /// Every wallet's balance as the written entries say, checked for gaps on the way.
    pub(crate) async fn balance(&self, wallet: WalletId) -> String {
        let (mut balance, mut version) = (None, 0);
        for commit in self.log().await.commits_after(0, 1_000_000).await.unwrap() {
            for event in commit.events {
                match event.read().unwrap() {
                    Event::Wallet(id, event) if id == wallet => {
                        version += 1;
                        assert_eq!(event.wallet_version(), version);
                    }
                    Event::Transaction(_, event) => {
                        for entry in event.entries().into_iter().flatten().filter(|entry| entry.wallet_id == wallet) {
                            version += 1;
                            assert_eq!(entry.wallet_version, version, "changes of a wallet are numbered without a gap");
                            balance = Some(entry.balance_after.to_string());
                        }
                    }
                    _ => {}
                }
            }
        }
        balance.unwrap_or_else(|| "0.00".to_owned())
    }
}

/// Undoes what the log has after a commit, as a restored backup would.
pub(crate) async fn restore(owner: &mut PgConnection, commit: i64) {
    for statement in [
        "set session_replication_role = replica".to_owned(), // the triggers rest
        format!("delete from ledger.events where commit_number > {commit}"),
        format!("delete from ledger.commits where number > {commit}"),
        "set session_replication_role = origin".to_owned(),
    ] {
        sqlx::query(&statement).execute(&mut *owner).await.unwrap();
    }
}

/// The log, while nobody can append to it: appends wait, nothing fails.
pub(crate) struct Held(pub(crate) PgConnection);

impl Held {
    pub(crate) async fn take(world: &World) -> Self {
        let mut connection = PgConnection::connect(world.database.url()).await.unwrap();
        sqlx::raw_sql("begin; lock table ledger.commits in exclusive mode").execute(&mut connection).await.unwrap();
        Self(connection)
    }

    /// Returns the backend whose append waits for us.
    pub(crate) async fn append_waits(&mut self) -> i32 {
        let query = "select pid from pg_locks where not granted and relation = 'ledger.commits'::regclass
                     and database = (select oid from pg_database where datname = current_database())";
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(pid) = sqlx::query_scalar(query).fetch_optional(&mut self.0).await.unwrap() {
                return pid;
            }
            assert!(Instant::now() < deadline, "no append came");
            sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) async fn let_go(mut self) {
        sqlx::raw_sql("rollback").execute(&mut self.0).await.unwrap();
    }
}

/// Transactions of this database that came to nothing.
pub(crate) async fn rolled_back(owner: &mut PgConnection) -> i64 {
    let query = "select xact_rollback from pg_stat_database where datname = current_database()";
    sqlx::query_scalar(query).fetch_one(owner).await.unwrap()
}

pub(crate) async fn eventually(claim: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < deadline, "never seen: {claim}");
        sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn spawn(ledger: &Ledger, command: Command) -> tokio::task::JoinHandle<Result<Receipt, CommandError>> {
    let ledger = ledger.clone();
    tokio::spawn(async move { ledger.execute(command).await })
}

pub(crate) fn eur() -> Currency {
    "EUR".parse().unwrap()
}

pub(crate) fn instruction(
    kind: TransactionKind,
    wallet: WalletId,
    to: Option<WalletId>,
    direction: Option<Direction>,
    amount: &str,
) -> Arc<Instruction> {
    Arc::new(Instruction {
        kind,
        partner_id: None,
        user_id: None,
        wallet_id: wallet,
        to_wallet_id: to,
        direction,
        amount: Money::parse(amount, eur()).unwrap().amount(),
        currency: eur(),
        reference: None,
        description: None,
        metadata: Metadata::new(),
        effective_at: None,
    })
}

/// A command under a key, if there is one, that was used for a certain request.
pub(crate) fn command(key: Option<(&str, &str)>, caller: Caller, action: Action) -> Command {
    let bytes = |text: &str| {
        let mut bytes = [0; 32];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        bytes
    };
    let key = key.map(|(key, request)| Key { hash: bytes(key)[..16].try_into().unwrap(), request: bytes(request) });
    Command {
        id: CommandId::from_uuid(Uuid::now_v7()),
        key,
        caller,
        action,
        metadata: r#"{"requestId":"req_1"}"#.into(),
    }
}

pub(crate) fn event_types(receipt: &Receipt) -> Vec<&str> {
    receipt.events().iter().map(|event| event.event_type.as_ref()).collect()
}
