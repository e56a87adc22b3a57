//! The engine in this process, without HTTP: each caller has one command under way at a time.
//!
//! *Engine alone* is the engine and Postgres. *Everything on* is `daybook up` in this process, and the callers beside
//! it call its ledger. The callers are on the same runtime as the product, so their CPU is in ours: they make a command as
//! cheaply as they can, with keys made up instead of hashed, and share one histogram.
//!
//! Here are transfers between many wallets, the same on one hot wallet, new wallets, and transfers that are declined for want of
//! money. Left out: what HTTP, tokens and JSON cost (`http.rs`).

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use ledger_core::{
    Action, Caller, ClientId, Command, CommandId, Currency, Direction, Instruction, Key, Metadata, Money, PartnerId,
    TransactionId, TransactionKind, WalletId,
};
use ledger_engine::{CommandError, Ledger, Settings};
use local_stack::Stack;
use runtime::shutdown::Shutdown;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::figures::{Figure, Latencies, Parts, ratio};
use super::floors::{Floor, Measure};
use super::keys::{Order, sixteen};
use super::machine::Meter;
use super::random::Random;
use super::server::{Directory, up_arguments};
use super::{Run, check, lag};
use crate::up;

/// One measurement.
struct Workload {
    name: &'static str,
    work: Work,
    callers: usize,
    /// Not those of the run.
    keys: Option<Order>,
    /// Engine alone.
    floors: &'static [(Measure, f64)],
    floors_with_everything: &'static [(Measure, f64)],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Transfer,
    /// All of them from one wallet.
    HotWallet,
    OpenWallet,
    /// Transfers of more than any wallet has.
    Decline,
}

/// A share of the rate between many wallets is the hot wallet's floor: there is no lock on it.
const HOT_WALLET_SHARE: f64 = 0.9;

const LAG: (Measure, f64) = (Measure::LagP99Millis, 1000.0);

const TRANSFERS: [Workload; 7] = [
    Workload::transfers(1, &[(Measure::BareCommits, 3.0)], &[]),
    Workload::transfers(16, &[], &[]),
    Workload::transfers(64, &[], &[]),
    Workload::transfers(256, &[(Measure::Ratio, 12.0)], &[(Measure::Ratio, 6.0), LAG]),
    // Behind what it is compared with: the longer the log, the slower it grows.
    Workload { work: Work::HotWallet, ..Workload::transfers(256, &[], &[]) },
    Workload::transfers(1024, &[], &[]),
    Workload {
        keys: Some(Order::Random),
        ..Workload::transfers(256, &[(Measure::Ratio, 12.0)], &[(Measure::Ratio, 6.0), LAG])
    },
];
const NEW_WALLETS: [Workload; 1] =
    [Workload { name: "new-wallets", work: Work::OpenWallet, ..Workload::transfers(256, &[], &[]) }];
const DECLINED: [Workload; 1] =
    [Workload { name: "declined", work: Work::Decline, ..Workload::transfers(256, &[], &[]) }];

pub(crate) const MEASUREMENTS: u64 = TRANSFERS.len() as u64;

/// Before anything is counted.
const WARM_UP: Duration = Duration::from_secs(1);

impl Workload {
    const fn transfers(
        callers: usize,
        floors: &'static [(Measure, f64)],
        floors_with_everything: &'static [(Measure, f64)],
    ) -> Self {
        Self { name: "engine", work: Work::Transfer, callers, keys: None, floors, floors_with_everything }
    }

    fn variant(&self) -> String {
        let what = match self.work {
            Work::Transfer => "",
            Work::HotWallet => ", one hot wallet",
            Work::OpenWallet => ", in-process",
            Work::Decline => ", in-process, no funds",
        };
        let keys = self.keys.map_or("", Order::suffix);
        format!("{} caller{}{what}{keys}", self.callers, if self.callers == 1 { "" } else { "s" })
    }
}

pub(crate) async fn transfers(run: &Run<'_>, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    measure(run, &TRANSFERS, figures).await
}

pub(crate) async fn new_wallets(run: &Run<'_>, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    measure(run, &NEW_WALLETS, figures).await
}

pub(crate) async fn declined(run: &Run<'_>, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    measure(run, &DECLINED, figures).await
}

async fn measure(run: &Run<'_>, workloads: &[Workload], figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    run.steps.say(format!("starting the engine here, {}, and {} wallets", run.parts, run.wallets));
    let product = Product::start(run.parts).await?;
    let measured = tokio::select! {
        measured = measure_on(&product, run, workloads, figures) => measured,
        () = run.shutdown.requested() => Ok(()),
    };
    product.stop().await?; // also after a failure: it would go on beside the next workload
    measured
}

async fn measure_on(
    product: &Product,
    run: &Run<'_>,
    workloads: &[Workload],
    figures: &mut Vec<Figure>,
) -> anyhow::Result<()> {
    let (ledger, url) = (&product.ledger, product.stack.database_url());
    let alone = run.parts == Parts::EngineAlone;
    let bench = Arc::new(Bench::populate(ledger, run.wallets, run.keys).await?);
    let mut between_many: Option<f64> = None;
    for workload in workloads {
        let Workload { work, callers, .. } = *workload;
        let keys = workload.keys.unwrap_or(run.keys);
        run.steps.begin(format!("{}: {}, {}", workload.name, workload.variant(), run.parts));
        bench.load(ledger, work, callers, keys, WARM_UP, run.seed).await?;
        if !alone {
            lag::until_level(url).await?;
        }
        let position = check::head(url).await?;
        let watch = (!alone).then(|| lag::Watch::start(url));
        let meter = Meter::start(std::process::id(), url).await?;
        let begun = Instant::now();
        let latencies = bench.load(ledger, work, callers, keys, run.time, run.seed + 1).await?;
        let took = begun.elapsed();
        let used = meter.stop(latencies.count()).await?;
        let mut figure = Figure::new(workload.name, run.parts, workload.variant(), latencies.count(), took);
        figure.latency = latencies.summary();
        figure.used = Some(used);
        if let Some(watch) = watch {
            figure.lag = Some(watch.stop().await?);
        }
        check::in_log_since(url, position, work.leaves(), latencies.count()).await?;
        let floors = if alone { workload.floors } else { workload.floors_with_everything };
        figure.floors = floors.iter().map(|(measure, bound)| Floor::new(*measure, *bound)).collect();
        match (work, between_many) {
            (Work::Transfer, None) if callers == 256 => between_many = Some(figure.per_second),
            (Work::HotWallet, Some(many)) if alone => {
                let share = ratio(figure.per_second, many);
                figure.floors.push(Floor::of(Measure::OfManyWallets, HOT_WALLET_SHARE, share));
            }
            _ => {}
        }
        figures.push(figure);
    }
    Ok(())
}

impl Work {
    /// The type of the one event that each command leaves.
    fn leaves(self) -> &'static str {
        match self {
            Self::Transfer | Self::HotWallet => check::POSTED,
            Self::OpenWallet => "WalletOpened",
            Self::Decline => "TransactionDeclined",
        }
    }
}

/// The engine in this process, and what runs beside it.
struct Product {
    ledger: Ledger,
    stack: Arc<Stack>,
    /// With everything on, `daybook up` and the word that ends it. Its tasks are on our runtime; what starts them has a thread.
    everything: Option<(thread::JoinHandle<anyhow::Result<()>>, Shutdown)>,
    _directory: Directory,
}

/// As the command line reads it.
#[derive(Debug, Parser)]
struct Up {
    #[command(flatten)]
    options: up::Options,
}

impl Product {
    async fn start(parts: Parts) -> anyhow::Result<Self> {
        let directory = Directory::new()?;
        let stack = Arc::new(Stack::start(directory.path(), local_stack::Options::default()).await?);
        let (ledger, everything) = if parts == Parts::EverythingOn {
            let options = Up::try_parse_from(up_arguments(directory.path()))?.options;
            let (shutdown, beside) = (Shutdown::new(), stack.clone());
            let stop = shutdown.clone();
            let (ready, started) = oneshot::channel();
            let here = Handle::current();
            let up = thread::spawn(move || {
                here.block_on(up::serve(&options, &beside, &stop, |_, ledger| _ = ready.send(ledger.clone())))
            });
            match started.await {
                Ok(ledger) => (ledger, Some((up, shutdown))),
                Err(_) => {
                    ended(up).await?;
                    bail!("daybook up ended before it was ready");
                }
            }
        } else {
            migrations::run(stack.database_url()).await?;
            (Ledger::start(stack.database_url(), Settings::default()).await?, None)
        };
        Ok(Self { ledger, stack, everything, _directory: directory })
    }

    async fn stop(self) -> anyhow::Result<()> {
        match self.everything {
            Some((up, shutdown)) => {
                shutdown.trigger();
                ended(up).await?;
            }
            None => self.ledger.stop(Duration::from_secs(10)).await,
        }
        Arc::into_inner(self.stack).context("the servers are still used")?.stop().await?;
        Ok(())
    }
}

async fn ended(up: thread::JoinHandle<anyhow::Result<()>>) -> anyhow::Result<()> {
    let ended = tokio::task::spawn_blocking(|| up.join()).await?;
    ended.map_err(|_| anyhow::anyhow!("daybook up panicked"))?
}

/// A partner and its wallets.
pub(crate) struct Bench {
    partner: PartnerId,
    wallets: Vec<WalletId>,
    currency: Currency,
    price: Money,
    too_much: Money,
    metadata: Arc<str>,
}

impl Bench {
    pub(crate) async fn populate(ledger: &Ledger, wallets: u64, keys: Order) -> anyhow::Result<Self> {
        let currency: Currency = "USD".parse()?;
        let client = ClientId::from_uuid(Uuid::now_v7());
        let bench = Self {
            partner: PartnerId::from_uuid(Uuid::now_v7()),
            wallets: (0..wallets).map(|_| WalletId::from_uuid(Uuid::now_v7())).collect(),
            currency,
            price: Money::parse("1.00", currency)?,
            too_much: Money::parse("1000000000000.00", currency)?,
            metadata: format!(r#"{{"clientId":"{client}","requestId":"req_{}"}}"#, Uuid::now_v7()).into(),
        };
        let mut ids = Ids::new(keys);
        let registered = Action::RegisterPartner {
            partner: bench.partner,
            name: "Bench".to_owned(),
            currencies: vec![(currency, WalletId::from_uuid(Uuid::now_v7()))],
            client,
        };
        ledger.execute(bench.command(Caller::Admin, registered, &mut ids)).await?;
        let opened = bench.wallets.iter().map(|wallet| bench.open(*wallet, &mut ids));
        execute_all(ledger, opened.collect()).await?;
        let funds = Money::parse("1000000000.00", currency)?;
        let fund = |wallet| {
            let action = Action::Adjust {
                transaction: TransactionId::from_uuid(ids.next()),
                instruction: Arc::new(Instruction {
                    kind: TransactionKind::Adjustment,
                    partner_id: None,
                    direction: Some(Direction::Credit),
                    amount: funds.amount(),
                    ..bench.instruction(wallet, None)
                }),
            };
            bench.command(Caller::Admin, action, &mut ids)
        };
        let funded = bench.wallets.iter().copied().map(fund);
        execute_all(ledger, funded.collect()).await?;
        Ok(bench)
    }

    /// Callers for some time. Every command must end as it is meant to; their latencies are answered.
    async fn load(
        self: &Arc<Self>,
        ledger: &Ledger,
        work: Work,
        callers: usize,
        keys: Order,
        time: Duration,
        seed: u64,
    ) -> anyhow::Result<Latencies> {
        let until = Instant::now() + time;
        let latencies = Arc::new(Mutex::new(Latencies::new()));
        let mut tasks = JoinSet::new();
        for caller in 0..callers {
            let (bench, ledger, latencies) = (self.clone(), ledger.clone(), latencies.clone());
            let mut random = Random::new(seed ^ (u64::try_from(caller)? << 32));
            let mut ids = Ids::new(keys);
            tasks.spawn(async move {
                while Instant::now() < until {
                    let command = bench.command_for(work, &mut random, &mut ids);
                    let begun = Instant::now();
                    ledger.execute(command).await?;
                    let took = begun.elapsed();
                    latencies.lock().unwrap_or_else(PoisonError::into_inner).record(took);
                }
                Ok::<_, CommandError>(())
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended?.context("a command did not end as it should")?;
        }
        let latencies = latencies.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(latencies)
    }

    fn command_for(&self, work: Work, random: &mut Random, ids: &mut Ids) -> Command {
        match work {
            Work::Transfer | Work::HotWallet => self.transfer(work == Work::HotWallet, random, ids),
            Work::OpenWallet => self.open(WalletId::from_uuid(ids.next()), ids),
            Work::Decline => {
                let (from, to) = random.two_of(self.wallets.len());
                let instruction = self.instruction(self.wallets[from], Some(self.wallets[to]));
                self.transfer_of(Instruction { amount: self.too_much.amount(), ..instruction }, ids)
            }
        }
    }

    pub(crate) fn transfer(&self, hot: bool, random: &mut Random, ids: &mut Ids) -> Command {
        let (from, to) = random.two_of(self.wallets.len());
        let from = if hot { 0 } else { from };
        let to = if hot && to == 0 { 1 } else { to };
        self.transfer_of(self.instruction(self.wallets[from], Some(self.wallets[to])), ids)
    }

    fn transfer_of(&self, instruction: Instruction, ids: &mut Ids) -> Command {
        let transaction = TransactionId::from_uuid(ids.next());
        let action = Action::Transfer { transaction, instruction: Arc::new(instruction) };
        self.command(self.caller(), action, ids)
    }

    fn open(&self, wallet: WalletId, ids: &mut Ids) -> Command {
        let (user, metadata) = ("user".into(), Metadata::new());
        self.command(self.caller(), Action::OpenWallet { wallet, user, currency: self.currency, metadata }, ids)
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
    fn command(&self, caller: Caller, action: Action, ids: &mut Ids) -> Command {
        let mut request = [0; 32];
        request[..16].copy_from_slice(&sixteen(&mut ids.random));
        request[16..].copy_from_slice(&sixteen(&mut ids.random));
        let key = Key { hash: ids.keys.hash(&mut ids.random), request };
        let id = CommandId::from_uuid(ids.next());
        Command { id, key: Some(key), caller, action, metadata: self.metadata.clone() }
    }
}

/// Ids as the edge mints them, and bytes that look like hashes. Different in every run: the seed decides about wallets alone.
pub(crate) struct Ids {
    random: Random,
    keys: Order,
}

impl Ids {
    pub(crate) fn new(keys: Order) -> Self {
        Self { random: Random::new(Uuid::now_v7().as_u64_pair().1), keys }
    }

    fn next(&mut self) -> Uuid {
        Uuid::now_v7()
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
