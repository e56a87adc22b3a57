//! Three engines with hardly any memory, killed, stopped, cut off and held up at random, and a naive fold of the log
//! that decides every command once more.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

use event_store::RecordedEvent;
use ledger_engine::Receipt;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::memory::Random;
use super::*;

const ENGINES: usize = 3;
const WALLETS: usize = 12;
const CALLERS: usize = 12;
const LASTS: Duration = Duration::from_secs(6);

/// An engine as a process would be: it can be killed, wherever it is.
struct Node {
    runtime: Option<Runtime>,
    ledger: Ledger,
}

impl Node {
    async fn start(url: String, settings: Settings) -> Option<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let url = url.clone();
            match runtime.spawn(async move { Ledger::start(&url, settings).await }).await.unwrap() {
                Ok(ledger) => return Some(Self { runtime: Some(runtime), ledger }),
                // Its connections may be cut as well.
                Err(error) if Instant::now() < deadline => {
                    eprintln!("start: {error}");
                    sleep(Duration::from_millis(50)).await;
                }
                Err(error) => panic!("no start: {error}"),
            }
        }
    }

    fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Chaos {
    world: World,
    wallets: Vec<WalletId>,
    nodes: Vec<Mutex<Node>>,
    /// Every command that was ever given to an engine.
    asked: Mutex<HashMap<CommandId, (Caller, Action)>>,
    top_ups: Mutex<Vec<TransactionId>>,
}

#[derive(Default)]
struct Told {
    receipts: Vec<(Option<[u8; 16]>, CommandId, Receipt)>,
    /// Told that they are not done, or are refused without a trace.
    undone: Vec<CommandId>,
    refused: usize,
    unsettled: usize,
    errors: BTreeMap<String, usize>,
}

fn settings(random: &mut Random) -> Settings {
    Settings {
        ahead_min: 1 + random.below(4),
        gather_min: random.below(12),
        gather_within: Duration::from_millis(random.below(20) as u64),
        wallets_max: 3 + random.below(10),
        snapshot_every: 3 + random.below(30) as i64,
        keys_max: 1 + random.below(8),
        batch_max: 1 + random.below(12),
        wait_max: Duration::from_millis(300),
        wait_expected_max: PATIENCE,
        answer_within: Duration::from_secs(3),
        keep_recent: true,
        ..Settings::default()
    }
}

impl Chaos {
    fn action(&self, random: &mut Random) -> (Caller, Action) {
        let partner = Caller::Partner { partner: self.world.partner, user: None };
        let wallet = |random: &mut Random| match random.below(40) {
            0 => WalletId::from_uuid(Uuid::now_v7()),
            _ => self.wallets[random.below(WALLETS)],
        };
        let transfer = |random: &mut Random| {
            let (from, to) = (wallet(random), wallet(random));
            let cents = 1 + random.below(300);
            let amount = format!("{}.{:02}", cents / 100, cents % 100);
            instruction(TransactionKind::Transfer, from, Some(to), None, &amount)
        };
        let top_up = |random: &mut Random| {
            let known = self.top_ups.lock().unwrap();
            if known.is_empty() || random.below(20) == 0 {
                mint()
            } else {
                known[known.len() - 1 - random.below(known.len().min(12))]
            }
        };
        match random.below(20) {
            0..=8 => (partner, Action::Transfer { transaction: mint(), instruction: transfer(random) }),
            9..=10 => {
                let transfers = (0..1 + random.below(6)).map(|_| (mint(), transfer(random))).collect();
                (partner, Action::Batch { atomic: random.below(2) == 0, transfers })
            }
            11..=13 => {
                let instruction = instruction(TransactionKind::TopUp, wallet(random), None, None, "1.00");
                let payment = Payment { token: "t".to_owned(), redirect_url: "u".to_owned(), return_url: None };
                (partner, Action::RequestTopUp { transaction: mint(), instruction, payment })
            }
            14..=16 => {
                let money = Money::parse("1.00", eur()).unwrap();
                let provider_reference = "bank".to_owned();
                (Caller::Workflow, Action::Settle { transaction: top_up(random), money, provider_reference })
            }
            17 => (Caller::Workflow, Action::Expire { transaction: top_up(random) }),
            18 => {
                let (wallet, reason) = (wallet(random), "r".to_owned());
                match random.below(12) {
                    0 => (partner, Action::CloseWallet { wallet, reason }),
                    1..=4 => (partner, Action::FreezeWallet { wallet, reason }),
                    _ => (partner, Action::UnfreezeWallet { wallet, reason }),
                }
            }
            _ => (partner, Action::UnfreezeWallet { wallet: wallet(random), reason: "r".to_owned() }),
        }
    }

    async fn call(self: Arc<Self>, seed: u64) -> Told {
        let mut random = Random(seed);
        let mut told = Told::default();
        let until = Instant::now() + LASTS;
        while Instant::now() < until {
            let (caller, action) = self.action(&mut random);
            let key = (random.below(3) != 0).then(|| Key { hash: *Uuid::now_v7().as_bytes(), request: [7; 32] });
            let mut settled = false;
            for _ in 0..60 {
                let action = again(&action);
                let id = CommandId::from_uuid(Uuid::now_v7());
                self.asked.lock().unwrap().insert(id, (caller.clone(), action.clone()));
                let command = Command { id, key, caller: caller.clone(), action, metadata: "{}".into() };
                let task = {
                    // By turns one engine has the log to itself and decides ahead, and all want it.
                    let alone = until.saturating_duration_since(Instant::now()).as_secs().is_multiple_of(2);
                    let node = self.nodes[if alone { 0 } else { random.below(ENGINES) }].lock().unwrap();
                    let ledger = node.ledger.clone();
                    node.runtime.as_ref().map(|runtime| runtime.spawn(async move { ledger.execute(command).await }))
                };
                let Some(task) = task else {
                    sleep(Duration::from_millis(10)).await;
                    continue;
                };
                let answer = timeout(PATIENCE, task).await.unwrap_or_else(|_| panic!("seed {seed}: no answer"));
                let error = match answer {
                    Err(_) => "killed".to_owned(),
                    Ok(Ok(receipt)) => {
                        if let Event::Transaction(id, TransactionEvent::Requested { .. }) =
                            receipt.events()[0].read().unwrap()
                        {
                            self.top_ups.lock().unwrap().push(id);
                        }
                        told.receipts.push((key.map(|key| key.hash), id, receipt));
                        settled = true;
                        break;
                    }
                    Ok(Err(CommandError::Refused(_))) => {
                        assert!(key.is_none(), "a refusal under a key is kept");
                        told.undone.push(id);
                        told.refused += 1;
                        settled = true;
                        break;
                    }
                    Ok(Err(error)) => {
                        if matches!(error, CommandError::Overloaded | CommandError::Unavailable) {
                            told.undone.push(id);
                        }
                        assert!(!matches!(error, CommandError::KeyReused), "the same request under the same key");
                        format!("{error:?}")
                    }
                };
                *told.errors.entry(error).or_default() += 1;
                sleep(Duration::from_millis(5)).await;
                if key.is_none() {
                    settled = true;
                    break; // without a key nobody repeats
                }
            }
            if !settled {
                told.unsettled += 1;
            }
        }
        told
    }

    async fn harm(self: Arc<Self>, seed: u64) -> BTreeMap<&'static str, usize> {
        let mut random = Random(seed);
        let mut done = BTreeMap::new();
        let mut owner = PgConnection::connect(self.world.database.url()).await.unwrap();
        let until = Instant::now() + LASTS;
        while Instant::now() < until {
            sleep(Duration::from_millis(5 + random.below(120) as u64)).await;
            let name = match random.below(10) {
                0..=2 => {
                    let query = "select count(pg_terminate_backend(pid)) from (select pid from pg_stat_activity
                         where datname = current_database() and application_name = 'daybook_ledger'
                         order by random() limit $1) one";
                    sqlx::query(query).bind(1 + random.below(6) as i64).execute(&mut owner).await.unwrap();
                    "cut"
                }
                3..=6 => {
                    let table = ["commits", "turn", "book_wallets", "book_snapshot", "events"][random.below(5)];
                    let mode = ["exclusive", "access exclusive"][random.below(2)];
                    let lock =
                        format!("begin; set local lock_timeout = '2s'; lock table ledger.{table} in {mode} mode");
                    if sqlx::raw_sql(&lock).execute(&mut owner).await.is_ok() {
                        sleep(Duration::from_millis(random.below(400) as u64)).await;
                    }
                    sqlx::raw_sql("rollback").execute(&mut owner).await.unwrap();
                    "hold"
                }
                kind => {
                    let slot = random.below(ENGINES);
                    let old = self.nodes[slot].lock().unwrap().ledger.clone();
                    if kind == 7 {
                        let runtime = self.nodes[slot].lock().unwrap().runtime.as_ref().map(|runtime| {
                            let old = old.clone();
                            runtime.spawn(async move { old.stop(Duration::from_secs(3)).await })
                        });
                        runtime.expect("it runs").await.unwrap();
                    } else {
                        self.nodes[slot].lock().unwrap().kill();
                    }
                    let url = self.world.database.url().to_owned();
                    let node = Node::start(url, settings(&mut random)).await.expect("a start");
                    *self.nodes[slot].lock().unwrap() = node;
                    if kind == 7 { "stop" } else { "kill" }
                }
            };
            *done.entry(name).or_default() += 1;
        }
        done
    }
}

fn mint() -> TransactionId {
    TransactionId::from_uuid(Uuid::now_v7())
}

/// The same request once more: new ids for what it makes.
fn again(action: &Action) -> Action {
    let mut action = action.clone();
    match &mut action {
        Action::Transfer { transaction, .. } | Action::RequestTopUp { transaction, .. } => *transaction = mint(),
        Action::Batch { transfers, .. } => transfers.iter_mut().for_each(|(id, _)| *id = mint()),
        _ => {}
    }
    action
}

/// The naive second opinion.
#[derive(Clone, Default)]
struct Model {
    balances: HashMap<WalletId, i64>,
    status: HashMap<WalletId, WalletStatus>,
    versions: HashMap<WalletId, i64>,
    expected: HashMap<WalletId, i64>,
    pending: HashMap<TransactionId, Option<WalletId>>,
}

impl Model {
    fn usable(&self, wallet: WalletId) -> Result<(), &'static str> {
        match self.status[&wallet] {
            WalletStatus::Active => Ok(()),
            WalletStatus::Frozen => Err("wallet-frozen"),
            WalletStatus::Closed => Err("wallet-closed"),
        }
    }

    fn known(&self, wallet: WalletId) -> Result<(), &'static str> {
        if self.status.contains_key(&wallet) { Ok(()) } else { Err("wallet-not-found") }
    }

    fn transfer(&self, instruction: &Instruction) -> Result<(), &'static str> {
        let (from, to) = (instruction.wallet_id, instruction.to_wallet_id.unwrap());
        if from == to {
            return Err("same-wallet");
        }
        self.known(from)?;
        self.known(to)?;
        self.usable(from)?;
        self.usable(to)?;
        let cents: i64 = instruction.amount.to_string().replace('.', "").parse().unwrap();
        if self.balances[&from] < cents { Err("insufficient-funds") } else { Ok(()) }
    }

    fn ends(&self, transaction: TransactionId) -> Result<WalletId, &'static str> {
        match self.pending.get(&transaction) {
            None => Err("transaction-not-found"),
            Some(None) => Err("invalid-transition"),
            Some(Some(wallet)) => Ok(*wallet),
        }
    }

    fn decides(&self, action: &Action) -> Result<(), &'static str> {
        match action {
            Action::Transfer { instruction, .. } => self.transfer(instruction),
            Action::RequestTopUp { instruction, .. } => {
                self.known(instruction.wallet_id)?;
                self.usable(instruction.wallet_id)
            }
            Action::Settle { transaction, .. } => self.usable(self.ends(*transaction)?),
            Action::Expire { transaction } => self.ends(*transaction).map(|_| ()),
            Action::FreezeWallet { wallet, .. } => {
                self.known(*wallet)?;
                self.usable(*wallet)
            }
            Action::UnfreezeWallet { wallet, .. } => {
                self.known(*wallet)?;
                match self.status[wallet] {
                    WalletStatus::Frozen => Ok(()),
                    WalletStatus::Active => Err("invalid-transition"),
                    WalletStatus::Closed => Err("wallet-closed"),
                }
            }
            Action::CloseWallet { wallet, .. } => {
                self.known(*wallet)?;
                match self.status[wallet] {
                    WalletStatus::Closed => Err("wallet-closed"),
                    _ if self.balances[wallet] != 0 || self.expected.get(wallet).is_some_and(|count| *count != 0) => {
                        Err("wallet-not-empty")
                    }
                    _ => Ok(()),
                }
            }
            _ => unreachable!("not asked here"),
        }
    }

    /// Folds an event in; the code of the refusal, if it is one.
    fn fold(&mut self, recorded: &RecordedEvent) -> Result<(), String> {
        let place = recorded.position;
        match recorded.read().unwrap() {
            Event::Partner(..) => {}
            Event::Command(_, CommandEvent::Declined { failure, .. } | CommandEvent::BatchDeclined { failure, .. }) => {
                return Err(failure.code);
            }
            Event::Wallet(id, event) => {
                let version = self.versions.entry(id).or_default();
                *version += 1;
                assert_eq!(*version, event.wallet_version(), "position {place}");
                let status = match event {
                    WalletEvent::Opened { .. } => {
                        self.balances.insert(id, 0);
                        WalletStatus::Active
                    }
                    WalletEvent::Frozen { .. } => WalletStatus::Frozen,
                    WalletEvent::Unfrozen { .. } => WalletStatus::Active,
                    WalletEvent::Closed { .. } => WalletStatus::Closed,
                };
                self.status.insert(id, status);
            }
            Event::Transaction(id, event) => {
                for entry in event.entries().into_iter().flatten() {
                    let version = self.versions.entry(entry.wallet_id).or_default();
                    *version += 1;
                    assert_eq!(*version, entry.wallet_version, "position {place}");
                    let cents: i64 = entry.amount.to_string().replace('.', "").parse().unwrap();
                    let balance = self.balances.get_mut(&entry.wallet_id).unwrap();
                    *balance += if entry.direction == Direction::Debit { -cents } else { cents };
                    assert_eq!(
                        balance.to_string(),
                        entry.balance_after.to_string().replace('.', "").parse::<i64>().unwrap().to_string(),
                        "position {place}"
                    );
                    assert!(entry.wallet_id.is_system() || 0 <= *balance, "position {place}: overdrawn");
                }
                match &event {
                    TransactionEvent::Requested { instruction, .. } => {
                        *self.expected.entry(instruction.wallet_id).or_default() += 1;
                        assert_eq!(recorded.sequence, 1);
                        self.pending.insert(id, Some(instruction.wallet_id));
                    }
                    TransactionEvent::Settled { wallet_id, .. }
                    | TransactionEvent::Failed { wallet_id, .. }
                    | TransactionEvent::Expired { wallet_id } => {
                        *self.expected.get_mut(wallet_id).unwrap() -= 1;
                        assert_eq!(recorded.sequence, 2);
                        assert_eq!(self.pending.insert(id, None), Some(Some(*wallet_id)), "position {place}");
                    }
                    TransactionEvent::Declined { failure, .. } => return Err(failure.code.clone()),
                    TransactionEvent::Posted { .. } => {}
                }
            }
        }
        Ok(())
    }

    /// One command's events, decided once more.
    fn command(&mut self, action: &Action, events: &[RecordedEvent]) {
        let place = events[0].position;
        let Action::Batch { atomic, transfers } = action else {
            let [event] = events else { panic!("position {place}: {} events", events.len()) };
            let expected = self.decides(action).map_err(str::to_owned);
            assert_eq!(self.fold(event), expected, "position {place}: {action:?}");
            return;
        };
        if let Event::Command(_, CommandEvent::BatchDeclined { item, failure, .. }) = events[0].read().unwrap() {
            assert!(*atomic && events.len() == 1);
            let mut trial = self.clone();
            for (number, (_, instruction)) in transfers.iter().enumerate() {
                match trial.transfer(instruction) {
                    Ok(()) => {
                        assert!(number < item as usize, "position {place}");
                        let cents: i64 = instruction.amount.to_string().replace('.', "").parse().unwrap();
                        *trial.balances.get_mut(&instruction.wallet_id).unwrap() -= cents;
                        *trial.balances.get_mut(&instruction.to_wallet_id.unwrap()).unwrap() += cents;
                    }
                    Err(code) => {
                        assert_eq!((number, code), (item as usize, failure.code.as_str()), "position {place}");
                        return;
                    }
                }
            }
            panic!("position {place}: every transfer was possible");
        }
        assert_eq!(events.len(), transfers.len());
        for ((_, instruction), event) in transfers.iter().zip(events) {
            let expected = self.transfer(instruction).map_err(str::to_owned);
            assert!(!*atomic || expected.is_ok(), "position {place}: a part of an atomic batch");
            assert_eq!(self.fold(event), expected, "position {}", event.position);
        }
    }
}

#[test]
fn three_engines_under_every_harm_decide_as_one_naive_fold_would() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let seed = match std::env::var("CHAOS_SEED") {
            Ok(seed) => seed.parse().expect("CHAOS_SEED is a number"),
            Err(_) => Uuid::now_v7().as_u128() as u64,
        };
        eprintln!("CHAOS_SEED={seed}");
        let mut random = Random(seed);
        let (world, first) = World::new().await;
        let mut wallets = Vec::new();
        for _ in 0..WALLETS {
            wallets.push(world.wallet(&first, "4.00").await);
        }
        first.stop(PATIENCE).await;
        let set_up = world.log().await.head().await.unwrap().position;
        let mut nodes = Vec::new();
        for _ in 0..ENGINES {
            let node = Node::start(world.database.url().to_owned(), settings(&mut random)).await.unwrap();
            nodes.push(Mutex::new(node));
        }
        let chaos = Arc::new(Chaos { world, wallets, nodes, asked: Mutex::default(), top_ups: Mutex::default() });
        let mut callers = JoinSet::new();
        for caller in 0..CALLERS {
            callers.spawn(chaos.clone().call(seed ^ ((caller as u64 + 1) << 40)));
        }
        let harm = chaos.clone().harm(seed ^ 0x5eed);
        let mut told = Told::default();
        let calls = async { while let Some(one) = timeout(PATIENCE * 6, callers.join_next()).await.expect("every call ends") {
            let one = one.unwrap();
            told.receipts.extend(one.receipts);
            told.undone.extend(one.undone);
            told.refused += one.refused;
            told.unsettled += one.unsettled;
            for (error, count) in one.errors {
                *told.errors.entry(error).or_default() += count;
            }
        }};
        let (harm, ()) = tokio::join!(harm, calls);
        eprintln!(
            "{harm:?}; {} receipts, {} refused, {} unsettled, {:?}",
            told.receipts.len(), told.refused, told.unsettled, told.errors
        );
        let mut recent = Vec::new();
        for node in &chaos.nodes {
            assert!(node.lock().unwrap().ledger.is_running(), "an engine has ended by itself");
            recent.extend(node.lock().unwrap().ledger.recent().cloned());
            node.lock().unwrap().kill();
        }
        // A backend of a killed engine may still be at it.
        let mut owner = PgConnection::connect(chaos.world.database.url()).await.unwrap();
        let alive = "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'daybook_ledger' and state <> 'idle'";
        let deadline = Instant::now() + PATIENCE;
        loop {
            let alive: i64 = sqlx::query_scalar(alive).fetch_one(&mut owner).await.unwrap();
            if alive == 0 {
                break;
            }
            assert!(Instant::now() < deadline, "{alive} backends of engines that are gone");
            sleep(Duration::from_millis(20)).await;
        }

        let asked = std::mem::take(&mut *chaos.asked.lock().unwrap());
        let mut model = Model::default();
        let mut by_command: HashMap<CommandId, Vec<RecordedEvent>> = HashMap::new();
        let mut keys: HashMap<[u8; 16], CommandId> = HashMap::new();
        let (log, mut events, mut commit) = (chaos.world.log().await, Vec::new(), 0);
        loop {
            let page = log.commits_after(commit, 1_000).await.unwrap();
            let Some(last) = page.last() else { break };
            commit = last.number;
            for commit in &page {
                let told = recent.iter().filter_map(|recent| recent.after(commit.number - 1, 1, 1).into_iter().next());
                told.for_each(|told| assert_eq!(*told, *commit, "what is in memory is what the log has"));
            }
            events.extend(page.into_iter().flat_map(|commit| commit.events));
        }
        assert!(recent.iter().filter_map(|recent| recent.last()).all(|last| last.number <= commit));
        for events in events.chunk_by(|one, next| one.command_id == next.command_id) {
            if events[0].position <= set_up {
                events.iter().for_each(|event| model.fold(event).unwrap());
                continue;
            }
            let id = events[0].command_id;
            model.command(&asked[&id].1, events);
            assert!(by_command.insert(id, events.to_vec()).is_none(), "a command's events lie together");
            if let Some(key) = events[0].key_hash {
                assert!(keys.insert(key, id).is_none(), "a key was used twice");
            }
        }
        for (key, id, receipt) in &told.receipts {
            let done = key.map_or(*id, |key| keys[&key]);
            assert_eq!(receipt.events(), by_command[&done], "what was acknowledged is what the log has");
            assert_eq!(receipt.replayed, done != *id, "{receipt:?}");
        }
        for id in &told.undone {
            assert!(!by_command.contains_key(id), "{:?} was called undone", asked[id]);
        }
        assert_eq!(model.balances.values().sum::<i64>(), 0);
        assert!(!told.receipts.is_empty());
        // A new start finds every wallet as the fold has it: nobody can spend a cent more than there is.
        let last = chaos.world.engine(settings(&mut random)).await;
        for (place, from) in chaos.wallets.iter().enumerate() {
            let to = chaos.wallets[(place + 1) % WALLETS];
            let cents = model.balances[from] + 1;
            let amount = format!("{}.{:02}", cents / 100, cents % 100);
            let code = model.transfer(&instruction(TransactionKind::Transfer, *from, Some(to), None, &amount));
            let told = last.execute(chaos.world.transfer(None, *from, to, &amount)).await;
            let Err(CommandError::Refused(refusal)) = told else { panic!("{told:?}") };
            assert_eq!(Err(refusal.code()), code);
        }
    });
}
