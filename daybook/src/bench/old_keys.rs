//! What commands cost others that repeat keys from before the engine's memory: throughput of fresh ones alone, beside an
//! equal number of such repetitions, and beside as many as their callers can make.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ledger_core::Command;
use ledger_engine::{CommandError, Ledger, Settings};
use local_stack::Stack;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::engine::{Bench, Ids, execute_all};
use super::figures::{Figure, Latencies, Parts, ratio};
use super::keys::Order;
use super::machine::Meter;
use super::random::Random;
use super::server::Directory;
use super::{Run, check};

/// Of fresh commands, and of repetitions.
const CALLERS: usize = 64;

/// The engine's memory is made small, so that a run has more keys than fit.
const REMEMBERED: usize = 10_000;

/// Repeated one after another, around and around: each is forgotten again before its turn comes.
const OLD: usize = 40_000;

const WARM_UP: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Repetitions {
    None,
    /// One for each fresh command that is done.
    Equal,
    Flood,
}

pub(crate) const MEASUREMENTS: u64 = 3;

pub(crate) async fn run(run: &Run<'_>, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    let Run { wallets, seed, .. } = *run;
    run.steps.say(format!("starting the engine here, and {wallets} wallets"));
    let directory = Directory::new()?;
    let stack = Stack::start(directory.path(), local_stack::Options::default()).await?;
    let url = stack.database_url();
    migrations::run(url).await?;
    let ledger = Ledger::start(url, Settings { keys_max: REMEMBERED, ..Settings::default() }).await?;
    let bench = Arc::new(Bench::populate(&ledger, wallets, run.keys).await?);
    run.steps.say(format!("using {OLD} keys"));
    let mut ids = Ids::new(run.keys);
    let mut random = Random::new(seed);
    let old: Vec<Command> = (0..OLD).map(|_| bench.transfer(false, &mut random, &mut ids)).collect();
    execute_all(&ledger, old.clone()).await?;
    let flood = Arc::new(Flood { old, keys: run.keys, next: AtomicUsize::new(0), replayed: AtomicU64::new(0) });

    let mut alone = None;
    for (variant, repetitions) in [
        ("fresh commands alone", Repetitions::None),
        ("beside as many old keys", Repetitions::Equal),
        ("beside a flood of old keys", Repetitions::Flood),
    ] {
        run.steps.begin(format!("old keys: {variant}"));
        flood.load(&bench, &ledger, repetitions, WARM_UP, seed + 1).await?;
        let position = check::head(url).await?;
        let replayed = flood.replayed.load(Ordering::Relaxed);
        let meter = Meter::start(std::process::id(), url).await?;
        let begun = Instant::now();
        let latencies = flood.load(&bench, &ledger, repetitions, run.time, seed + 2).await?;
        let took = begun.elapsed();
        let used = meter.stop(latencies.count()).await?;
        check::in_log_since(url, position, check::POSTED, latencies.count()).await?;
        let replayed = flood.replayed.load(Ordering::Relaxed) - replayed;
        let mut figure = Figure::new("old-keys", Parts::EngineAlone, variant, latencies.count(), took);
        figure.latency = latencies.summary();
        figure.used = Some(used);
        if let Some(alone) = alone {
            let slower = ratio(alone, figure.per_second);
            figure.notes.push(format!("{replayed} repetitions; fresh commands alone are {slower:.2}× as many"));
        }
        alone = alone.or(Some(figure.per_second));
        figures.push(figure);
    }
    ledger.stop(Duration::from_secs(10)).await;
    stack.stop().await?;
    Ok(())
}

/// Commands that were done long ago, and who repeats them.
struct Flood {
    old: Vec<Command>,
    keys: Order,
    next: AtomicUsize,
    replayed: AtomicU64,
}

impl Flood {
    /// Callers for some time, each with one command under way. The latencies are those of fresh commands.
    async fn load(
        self: &Arc<Self>,
        bench: &Arc<Bench>,
        ledger: &Ledger,
        repetitions: Repetitions,
        time: Duration,
        seed: u64,
    ) -> anyhow::Result<Latencies> {
        let until = Instant::now() + time;
        let turns = Arc::new(Semaphore::new(0));
        let mut repeating = JoinSet::new();
        for _ in 0..if repetitions == Repetitions::None { 0 } else { CALLERS } {
            let (flood, ledger, turns) = (self.clone(), ledger.clone(), turns.clone());
            repeating.spawn(async move {
                loop {
                    if repetitions == Repetitions::Equal {
                        let Ok(turn) = turns.acquire().await else { return Ok(()) }; // the fresh ones are through
                        turn.forget();
                    } else if until <= Instant::now() {
                        return Ok(());
                    }
                    let place = flood.next.fetch_add(1, Ordering::Relaxed) % flood.old.len();
                    let receipt = ledger.execute(flood.old[place].clone()).await.context("an old key was refused")?;
                    ensure!(receipt.replayed, "an old key was used again");
                    flood.replayed.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut fresh = JoinSet::new();
        for caller in 0..CALLERS {
            let (bench, ledger, turns) = (bench.clone(), ledger.clone(), turns.clone());
            let mut random = Random::new(seed ^ (u64::try_from(caller)? << 32));
            let mut ids = Ids::new(self.keys);
            fresh.spawn(async move {
                let mut took = Vec::new();
                while Instant::now() < until {
                    let command = bench.transfer(false, &mut random, &mut ids);
                    let begun = Instant::now();
                    ledger.execute(command).await?;
                    took.push(begun.elapsed());
                    turns.add_permits(1);
                }
                Ok::<_, CommandError>(took)
            });
        }
        let mut latencies = Latencies::new();
        while let Some(ended) = fresh.join_next().await {
            ended?.context("a transfer was not granted")?.into_iter().for_each(|took| latencies.record(took));
        }
        turns.close();
        while let Some(ended) = repeating.join_next().await {
            ended??;
        }
        Ok(latencies)
    }
}
