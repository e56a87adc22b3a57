//! Two engines on one log, as two processes would run them: each with its own memory and its own connections.
//!
//! Both are made to want the same ten wallets at once. What is checked afterwards is the log, by a fold of this file's
//! own, against what each caller was told.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use event_store::{Commit, Log, RecordedEvent, connect};
use ledger_core::*;
use ledger_engine::{CommandError, Ledger, Receipt, Settings};
use local_stack::testing::TestDatabase;
use sqlx::{Connection, PgConnection};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

/// More than any of these tests needs.
const PATIENCE: Duration = Duration::from_secs(30);

const ENGINES: [&str; 2] = ["left", "right"];
const WALLETS: usize = 10;

/// Callers of each engine. They outnumber the wallets, so that every group of commands has some about the same ones.
const CALLERS: u64 = 16;
const HAMMERED: Duration = Duration::from_secs(3);

struct World {
    database: TestDatabase,
    partner: PartnerId,
    wallets: Vec<WalletId>,
    /// In the order of [`ENGINES`].
    engines: Vec<Ledger>,
}

/// What callers were told, in all.
#[derive(Default)]
struct Told {
    /// The event that the receipt of each fresh command held, by its transaction.
    receipts: HashMap<TransactionId, RecordedEvent>,
    replays: Vec<(String, Receipt)>,
    /// Transactions that were refused without a key, or not executed: none of them may be in the log.
    untold: Vec<TransactionId>,
    overloaded: usize,
}

/// SplitMix64: what it gives is a function of the seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

impl World {
    /// Ten wallets with 5.00 in each.
    async fn new() -> Self {
        let database = local_stack::testing::database(|url| async move { migrations::run(&url).await }).await;
        let mut engines = Vec::new();
        for _ in ENGINES {
            engines.push(Ledger::start(database.url(), Settings::default()).await.unwrap());
        }
        let partner = PartnerId::from_uuid(Uuid::now_v7());
        let mut world = Self { database, partner, wallets: Vec::new(), engines };
        let register = Action::RegisterPartner {
            partner,
            name: "a partner".to_owned(),
            currencies: vec![(eur(), WalletId::from_uuid(Uuid::now_v7()))],
            client: ClientId::from_uuid(Uuid::now_v7()),
        };
        world.set_up(Caller::Admin, register).await;
        for _ in 0..WALLETS {
            let wallet = WalletId::from_uuid(Uuid::now_v7());
            let user = "user-1".into();
            let open = Action::OpenWallet { wallet, user, currency: eur(), metadata: Metadata::new() };
            world.set_up(world.caller(), open).await;
            let mut instruction = instruction(TransactionKind::Adjustment, wallet, None, 500);
            Arc::make_mut(&mut instruction).direction = Some(Direction::Credit);
            world.set_up(Caller::Admin, Action::Adjust { transaction: mint(), instruction }).await;
            world.wallets.push(wallet);
        }
        world
    }

    async fn set_up(&self, caller: Caller, action: Action) {
        let command = Command { id: command_id(), key: None, caller, action, metadata: metadata("set-up") };
        self.engines[0].execute(command).await.unwrap();
    }

    fn caller(&self) -> Caller {
        Caller::Partner { partner: self.partner, user: None }
    }

    fn transfer(
        &self,
        engine: &str,
        key: Option<&str>,
        from: usize,
        to: usize,
        cents: u64,
    ) -> (TransactionId, Command) {
        let transaction = mint();
        let instruction = instruction(TransactionKind::Transfer, self.wallets[from], Some(self.wallets[to]), cents);
        let action = Action::Transfer { transaction, instruction };
        let key = key.map(|key| Key { hash: bytes(key), request: bytes(&format!("{from} {to} {cents}")) });
        (transaction, Command { id: command_id(), key, caller: self.caller(), action, metadata: metadata(engine) })
    }

    /// The whole log, which comes in pages.
    async fn commits(&self) -> Vec<Commit> {
        let log = Log::new(connect(self.database.url(), "daybook_reader", 2).await.unwrap());
        let mut commits: Vec<Commit> = Vec::new();
        loop {
            let last = commits.last().map_or(0, |commit| commit.number);
            let page = log.commits_after(last, 10_000).await.unwrap();
            if page.is_empty() {
                assert_eq!(log.head().await.unwrap().commit, last);
                return commits;
            }
            commits.extend(page);
        }
    }

    fn spawn(&self, engine: usize, command: Command) -> JoinHandle<Result<Receipt, CommandError>> {
        let ledger = self.engines[engine].clone();
        tokio::spawn(async move { ledger.execute(command).await })
    }
}

/// The log, while nobody can append to it: appends wait, nothing fails.
struct Held(PgConnection);

impl Held {
    async fn take(world: &World) -> Self {
        let mut connection = PgConnection::connect(world.database.url()).await.unwrap();
        sqlx::raw_sql("begin; lock table ledger.commits in exclusive mode").execute(&mut connection).await.unwrap();
        Self(connection)
    }

    /// Returns once this many appends wait, for us or behind each other.
    async fn appends_wait(&mut self, count: i64) {
        let query = "select count(*) from pg_stat_activity
                     where datname = current_database() and application_name = 'daybook_ledger'
                           and cardinality(pg_blocking_pids(pid)) <> 0";
        let deadline = Instant::now() + PATIENCE;
        loop {
            let waiting: i64 = sqlx::query_scalar(query).fetch_one(&mut self.0).await.unwrap();
            if count <= waiting {
                return;
            }
            assert!(Instant::now() < deadline, "{waiting} appends wait, not {count}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    async fn let_go(mut self) {
        sqlx::raw_sql("rollback").execute(&mut self.0).await.unwrap();
    }
}

fn eur() -> Currency {
    "EUR".parse().unwrap()
}

fn mint() -> TransactionId {
    TransactionId::from_uuid(Uuid::now_v7())
}

fn command_id() -> CommandId {
    CommandId::from_uuid(Uuid::now_v7())
}

/// Names the engine that a command was given to, so that the log says who made a commit.
fn metadata(engine: &str) -> Arc<str> {
    format!(r#"{{"requestId":"{engine}"}}"#).into()
}

/// A stand-in for a hash: the texts of these tests differ within these bytes.
fn bytes<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    bytes
}

fn instruction(kind: TransactionKind, wallet: WalletId, to: Option<WalletId>, cents: u64) -> Arc<Instruction> {
    Arc::new(Instruction {
        kind,
        partner_id: None,
        user_id: None,
        wallet_id: wallet,
        to_wallet_id: to,
        direction: None,
        amount: Money::parse(&format!("{}.{:02}", cents / 100, cents % 100), eur()).unwrap().amount(),
        currency: eur(),
        reference: None,
        description: None,
        metadata: Metadata::new(),
        effective_at: None,
    })
}

fn cents(text: &str) -> i64 {
    text.replace('.', "").parse().unwrap()
}

/// One caller's share: transfers of up to 3.00 between wallets that hold 5.00 on average, so that many are refused.
async fn hammer(world: Arc<World>, engine: usize, caller: u64, seed: u64) -> Told {
    let name = ENGINES[engine];
    let mut random = Random(seed ^ (caller << 8));
    let mut told = Told::default();
    let until = Instant::now() + HAMMERED;
    for call in 0.. {
        if until <= Instant::now() {
            break;
        }
        let from = random.below(WALLETS as u64) as usize;
        let to = (from + 1 + random.below(WALLETS as u64 - 1) as usize) % WALLETS;
        let amount = 1 + random.below(300);
        // One in four has no key. One in eight has a key that the other engine's caller uses too: who comes second gets a
        // replay, for it asks for the same, as the callers' numbers come from the same seed. These are few, since who
        // only replays makes no commits.
        let key = match random.below(8) {
            0 | 1 => None,
            2 => Some(format!("{caller}-{call}")),
            _ => Some(format!("{name}{caller}-{call}")),
        };
        let (transaction, command) = world.transfer(name, key.as_deref(), from, to, amount);
        match world.engines[engine].execute(command).await {
            Ok(receipt) if receipt.replayed => {
                told.untold.push(transaction);
                told.replays.push((key.expect("only a key can be replayed"), receipt));
            }
            Ok(receipt) => {
                let [event] = receipt.events() else { panic!("a transfer is one event") };
                told.receipts.insert(transaction, event.clone());
            }
            Err(CommandError::Refused(Refusal::InsufficientFunds { .. })) if key.is_none() => {
                told.untold.push(transaction);
            }
            Err(CommandError::Overloaded) => {
                told.untold.push(transaction);
                told.overloaded += 1;
            }
            Err(error) => panic!("{name}, caller {caller}, call {call}: {error:?}"),
        }
    }
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_engines_that_want_the_same_wallets_stay_correct_and_share_the_log() {
    let seed = match std::env::var("TWO_ENGINES_SEED") {
        Ok(seed) => seed.parse().expect("TWO_ENGINES_SEED is a number"),
        Err(_) => Uuid::now_v7().as_u128() as u64,
    };
    eprintln!("TWO_ENGINES_SEED={seed}");
    let world = Arc::new(World::new().await);
    let set_up = world.commits().await.last().unwrap().number;
    let mut callers = JoinSet::new();
    for engine in 0..ENGINES.len() {
        for caller in 0..CALLERS {
            callers.spawn(hammer(world.clone(), engine, caller, seed));
        }
    }
    let mut told = Told::default();
    while let Some(one) = timeout(PATIENCE, callers.join_next()).await.expect("every call is answered") {
        let one = one.unwrap();
        told.receipts.extend(one.receipts);
        told.replays.extend(one.replays);
        told.untold.extend(one.untold);
        told.overloaded += one.overloaded;
    }

    let commits = world.commits().await;
    let mut fold = Fold::default();
    for commit in &commits {
        fold.commit(commit);
    }
    for (transaction, event) in &told.receipts {
        assert_eq!(fold.transactions.get(transaction), Some(event), "{transaction} was acknowledged");
    }
    assert_eq!(fold.transfers(), told.receipts.len(), "the log has what was acknowledged, and nothing else");
    assert!(
        told.untold.iter().all(|transaction| !fold.transactions.contains_key(transaction)),
        "not executed is not done"
    );
    for (key, receipt) in &told.replays {
        assert_eq!(
            fold.keys.get(&bytes(key)).map(Vec::as_slice),
            Some(receipt.events()),
            "{key}: a replay is what happened first"
        );
    }
    assert_eq!(fold.balances.values().sum::<i64>(), 0, "money was made or lost");
    let held: i64 = world.wallets.iter().map(|wallet| fold.balances[wallet]).sum();
    assert_eq!(held, 500 * WALLETS as i64, "transfers between them change nothing of their sum");

    let made = commits.iter().filter(|commit| set_up < commit.number).map(engine_of);
    let made = made.fold(BTreeMap::new(), |mut made, engine| {
        *made.entry(engine).or_insert(0) += 1;
        made
    });
    let posted = fold.transactions.values().filter(|event| event.event_type == "TransactionPosted").count();
    eprintln!(
        "commits {made:?}, {} acknowledged of which {posted} moved money, {} replays, {} overloaded",
        told.receipts.len(),
        told.replays.len(),
        told.overloaded
    );
    // No caller uses a key twice, so each of these was the other engine's.
    assert!(!told.replays.is_empty(), "the engines never met on a key");
    let all: i64 = made.values().sum();
    for engine in ENGINES {
        let own = made.get(engine).copied().unwrap_or_default();
        assert!(all <= 4 * own, "{engine} made {own} of {all} commits");
    }
    for engine in &world.engines {
        assert!(engine.is_running());
    }
}

/// The engine that made a commit: all events of one are of one engine.
fn engine_of(commit: &Commit) -> String {
    let engine = engine_of_event(&commit.events[0]);
    assert!(
        commit.events.iter().all(|event| engine_of_event(event) == engine),
        "commit {} is of two engines",
        commit.number
    );
    engine
}

fn engine_of_event(event: &RecordedEvent) -> String {
    let metadata: serde_json::Value = serde_json::from_str(&event.metadata).unwrap();
    metadata["requestId"].as_str().unwrap().to_owned()
}

/// The log, folded naively in cents; every decision in it is looked at with what the log had come to before it.
#[derive(Default)]
struct Fold {
    last: Option<Commit>,
    balances: BTreeMap<WalletId, i64>,
    versions: BTreeMap<WalletId, i64>,
    transactions: HashMap<TransactionId, RecordedEvent>,
    keys: HashMap<[u8; 16], Vec<RecordedEvent>>,
}

impl Fold {
    fn commit(&mut self, commit: &Commit) {
        let (number, position, chain) =
            self.last.as_ref().map_or((0, 0, commit.previous_chain), |last| (last.number, last.last, last.chain));
        assert_eq!((commit.number, commit.first, commit.previous_chain), (number + 1, position + 1, chain));
        for event in &commit.events {
            self.event(event);
        }
        self.last = Some(Commit { events: Vec::new(), ..commit.clone() });
    }

    fn event(&mut self, recorded: &RecordedEvent) {
        if let Some(key) = recorded.key_hash {
            assert!(self.keys.insert(key, vec![recorded.clone()]).is_none(), "a key was used twice");
        }
        let position = recorded.position;
        match recorded.read().unwrap() {
            Event::Wallet(id, event) => {
                let version = self.versions.entry(id).or_default();
                *version += 1;
                assert_eq!(event.wallet_version(), *version, "position {position}");
            }
            Event::Transaction(id, event) => {
                match &event {
                    TransactionEvent::Posted { entries, .. } => {
                        for entry in entries {
                            let version = self.versions.entry(entry.wallet_id).or_default();
                            *version += 1;
                            assert_eq!(entry.wallet_version, *version, "position {position}");
                            let amount = cents(&entry.amount.to_string());
                            let balance = self.balances.entry(entry.wallet_id).or_default();
                            *balance += if entry.direction == Direction::Debit { -amount } else { amount };
                            assert!(entry.wallet_id.is_system() || 0 <= *balance, "position {position}: overdrawn");
                            assert_eq!(cents(&entry.balance_after.to_string()), *balance, "position {position}");
                        }
                    }
                    TransactionEvent::Declined { instruction, failure } => {
                        assert_eq!(failure.code, "insufficient-funds", "position {position}");
                        let (asked, held) =
                            (cents(&instruction.amount.to_string()), self.balances[&instruction.wallet_id]);
                        assert!(held < asked, "position {position}: {held} were there for {asked}");
                    }
                    other => panic!("position {position}: {}", other.name()),
                }
                assert!(self.transactions.insert(id, recorded.clone()).is_none(), "{id} began twice");
            }
            Event::Partner(..) => {}
            Event::Command(..) => panic!("position {position}: every refusal here is a transaction's"),
        }
    }

    /// How many of the transactions were asked for by the callers, and not to set the world up.
    fn transfers(&self) -> usize {
        self.transactions.values().filter(|event| engine_of_event(event) != "set-up").count()
    }
}

#[tokio::test]
async fn a_key_that_two_engines_are_given_at_once_is_used_by_one_and_replayed_by_the_other() {
    let world = World::new().await;
    for round in 0..4 {
        let key = format!("k{round}");
        let mut held = Held::take(&world).await;
        let calls: Vec<_> = ENGINES
            .iter()
            .enumerate()
            .map(|(engine, name)| world.spawn(engine, world.transfer(name, Some(&key), 0, 1, 100).1))
            .collect();
        held.appends_wait(2).await; // both have decided that it is new
        held.let_go().await;
        let mut receipts = Vec::new();
        for call in calls {
            receipts.push(timeout(PATIENCE, call).await.expect("an answer").unwrap().unwrap());
        }
        assert_eq!(receipts[0].events(), receipts[1].events());
        assert_eq!(receipts.iter().filter(|receipt| receipt.replayed).count(), 1, "round {round}");
    }
}

#[tokio::test]
async fn a_key_that_two_engines_are_given_for_different_requests_is_the_firsts() {
    let world = World::new().await;
    let mut held = Held::take(&world).await;
    let calls = [(0, 100), (1, 200)]
        .map(|(engine, amount)| world.spawn(engine, world.transfer(ENGINES[engine], Some("k"), 0, 1, amount).1));
    held.appends_wait(2).await;
    held.let_go().await;
    let (mut done, mut reused) = (0, 0);
    for call in calls {
        match timeout(PATIENCE, call).await.expect("an answer").unwrap() {
            Ok(receipt) => {
                assert!(!receipt.replayed);
                done += 1;
            }
            Err(CommandError::KeyReused) => reused += 1,
            Err(error) => panic!("{error:?}"),
        }
    }
    assert_eq!((done, reused), (1, 1));
    let moved = world.commits().await.into_iter().flat_map(|commit| commit.events);
    assert_eq!(moved.filter(|event| event.key_hash == Some(bytes("k"))).count(), 1);
}

#[tokio::test]
async fn a_second_call_with_a_key_in_flight_gets_the_firsts_answer_when_that_comes_in_time() {
    let world = World::new().await;
    let mut held = Held::take(&world).await;
    let first = world.spawn(0, world.transfer("left", Some("k"), 0, 1, 100).1);
    held.appends_wait(1).await;
    let second = world.engines[0].execute(world.transfer("left", Some("k"), 0, 1, 100).1);
    let mut second = std::pin::pin!(second);
    let at_once = std::future::poll_fn(|context| std::task::Poll::Ready(second.as_mut().poll(context))).await;
    assert!(at_once.is_pending(), "it was answered before the first: {at_once:?}");
    held.let_go().await;
    let (first, second) = (first.await.unwrap().unwrap(), second.await.unwrap());
    assert!(!first.replayed && second.replayed);
    assert_eq!(first.events(), second.events());
}
