//! The engine in this process, without HTTP: each caller has one transfer under way at a time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ledger_core::{
    Action, Caller, ClientId, Command, CommandId, Currency, Direction, Instruction, Key, Metadata, Money, PartnerId,
    TransactionId, TransactionKind, WalletId,
};
use ledger_engine::{CommandError, Ledger};
use local_stack::Stack;
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;
use uuid::Uuid;

use super::check;
use super::figures::{Figure, Latencies, Parts};
use super::machine::Meter;
use super::random::Random;
use super::server::Directory;

const CALLERS: [usize; 4] = [1, 64, 256, 1024];
const CALLERS_OF_HOT_WALLET: usize = 256;

/// Before anything is counted.
const WARM_UP: Duration = Duration::from_secs(1);

pub(crate) async fn run(seconds: u64, wallets: u64, seed: u64, say: impl Fn(&str)) -> anyhow::Result<Vec<Figure>> {
    let directory = Directory::new()?;
    let stack = Stack::start(directory.path(), local_stack::Options::default()).await?;
    let url = stack.database_url();
    migrations::run(url).await?;
    let ledger = Ledger::start(url, ledger_engine::Settings::default()).await?;
    say(&format!("engine: opening and funding {wallets} wallets"));
    let bench = Arc::new(Bench::populate(&ledger, wallets).await?);
    let mut figures = Vec::new();
    for (callers, hot) in CALLERS.map(|callers| (callers, false)).into_iter().chain([(CALLERS_OF_HOT_WALLET, true)]) {
        let variant = format!("{callers} callers{}", if hot { ", one hot wallet" } else { "" });
        say(&format!("engine: {variant}"));
        bench.load(&ledger, callers, hot, WARM_UP, seed).await?;
        let position = check::head(url).await?;
        let meter = Meter::start(std::process::id(), url).await?;
        let begun = Instant::now();
        let latencies = bench.load(&ledger, callers, hot, Duration::from_secs(seconds), seed + 1).await?;
        let took = begun.elapsed();
        let used = meter.stop(latencies.count()).await?;
        check::posted_since(url, position, latencies.count()).await?;
        let mut figure = Figure::new("engine", Parts::EngineAlone, variant, latencies.count(), took);
        figure.latency = latencies.summary();
        figure.used = Some(used);
        figures.push(figure);
    }
    ledger.stop(Duration::from_secs(10)).await;
    stack.stop().await?;
    Ok(figures)
}

/// A partner and its wallets.
pub(crate) struct Bench {
    partner: PartnerId,
    wallets: Vec<WalletId>,
    currency: Currency,
    price: Money,
    metadata: Arc<str>,
}

impl Bench {
    pub(crate) async fn populate(ledger: &Ledger, wallets: u64) -> anyhow::Result<Self> {
        let currency: Currency = "USD".parse()?;
        let client = ClientId::from_uuid(Uuid::now_v7());
        let bench = Self {
            partner: PartnerId::from_uuid(Uuid::now_v7()),
            wallets: (0..wallets).map(|_| WalletId::from_uuid(Uuid::now_v7())).collect(),
            currency,
            price: Money::parse("1.00", currency)?,
            metadata: format!(r#"{{"clientId":"{client}","requestId":"req_{}"}}"#, Uuid::now_v7()).into(),
        };
        let registered = Action::RegisterPartner {
            partner: bench.partner,
            name: "Bench".to_owned(),
            currencies: vec![(currency, WalletId::from_uuid(Uuid::now_v7()))],
            client,
        };
        ledger.execute(bench.command(Caller::Admin, registered)).await?;
        let open = |wallet| Action::OpenWallet { wallet, user: "user".into(), currency, metadata: Metadata::new() };
        let opened = bench.wallets.iter().map(|wallet| bench.command(bench.caller(), open(*wallet)));
        execute_all(ledger, opened.collect()).await?;
        let funds = Money::parse("1000000000.00", currency)?;
        let fund = |wallet| Action::Adjust {
            transaction: TransactionId::from_uuid(Uuid::now_v7()),
            instruction: Arc::new(Instruction {
                kind: TransactionKind::Adjustment,
                partner_id: None,
                direction: Some(Direction::Credit),
                amount: funds.amount(),
                ..bench.instruction(wallet, None)
            }),
        };
        let funded = bench.wallets.iter().map(|wallet| bench.command(Caller::Admin, fund(*wallet)));
        execute_all(ledger, funded.collect()).await?;
        Ok(bench)
    }

    /// Callers for some time. Every transfer must be granted; their latencies are answered.
    async fn load(
        self: &Arc<Self>,
        ledger: &Ledger,
        callers: usize,
        hot: bool,
        time: Duration,
        seed: u64,
    ) -> anyhow::Result<Latencies> {
        let until = Instant::now() + time;
        let mut tasks = JoinSet::new();
        for caller in 0..callers {
            let (bench, ledger) = (self.clone(), ledger.clone());
            let mut random = Random::new(seed ^ (u64::try_from(caller)? << 32));
            tasks.spawn(async move {
                let mut took = Vec::new();
                while Instant::now() < until {
                    let command = bench.transfer(hot, &mut random);
                    let begun = Instant::now();
                    ledger.execute(command).await?;
                    took.push(begun.elapsed());
                }
                Ok::<_, CommandError>(took)
            });
        }
        let mut latencies = Latencies::new();
        while let Some(ended) = tasks.join_next().await {
            ended?.context("a transfer was not granted")?.into_iter().for_each(|took| latencies.record(took));
        }
        Ok(latencies)
    }

    pub(crate) fn transfer(&self, hot: bool, random: &mut Random) -> Command {
        let (from, to) = random.two_of(self.wallets.len());
        let from = if hot { 0 } else { from };
        let to = if hot && to == 0 { 1 } else { to };
        let instruction = self.instruction(self.wallets[from], Some(self.wallets[to]));
        let transaction = TransactionId::from_uuid(Uuid::now_v7());
        self.command(self.caller(), Action::Transfer { transaction, instruction: Arc::new(instruction) })
    }

    fn instruction(&self, wallet_id: WalletId, to_wallet_id: Option<WalletId>) -> Instruction {
        Instruction {
            kind: TransactionKind::Transfer,
            partner_id: Some(self.partner),
            user_id: None,
            wallet_id,
            to_wallet_id,
            direction: None,
            amount: self.price.amount(),
            currency: self.currency,
            reference: None,
            description: None,
            metadata: Metadata::new(),
            effective_at: None,
        }
    }

    fn caller(&self) -> Caller {
        Caller::Partner { partner: self.partner, user: None }
    }

    /// Under a key of its own, as whatever moves money over HTTP.
    fn command(&self, caller: Caller, action: Action) -> Command {
        let id = CommandId::from_uuid(Uuid::now_v7());
        let request: [u8; 32] = Sha256::digest(Uuid::now_v7()).into();
        let mut hash = [0; 16];
        hash.copy_from_slice(&request[16..]);
        Command { id, key: Some(Key { hash, request }), caller, action, metadata: self.metadata.clone() }
    }
}

/// Some at a time.
pub(crate) async fn execute_all(ledger: &Ledger, commands: Vec<Command>) -> anyhow::Result<()> {
    let mut tasks = JoinSet::new();
    for command in commands {
        if 512 <= tasks.len() {
            executed(tasks.join_next().await)?;
        }
        let ledger = ledger.clone();
        tasks.spawn(async move { ledger.execute(command).await.map(|_| ()) });
    }
    while !tasks.is_empty() {
        executed(tasks.join_next().await)?;
    }
    Ok(())
}

fn executed(ended: Option<Result<Result<(), CommandError>, tokio::task::JoinError>>) -> anyhow::Result<()> {
    match ended {
        Some(Ok(done)) => done.context("preparing the wallets"),
        Some(Err(panic)) => Err(panic.into()),
        None => bail!("no task was left"),
    }
}
