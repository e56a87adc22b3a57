//! `daybook bench`: how fast the ledger is, beside `pgbench` on the same Postgres; and what it does when it is too much.
//!
//! Each workload starts servers of its own on a temporary directory, with the default settings and durable commits,
//! and removes them. Every rate is of what the log has, not of what was sent. All figures of a run are from one machine
//! in one run; the load is made on that machine too, and what it takes is reported beside what the servers take.
//! What a figure must reach stands beside it, with whether it does (`floors.rs`).
//!
//! Left out: reads. Nothing here is a test: figures are for people to judge.

mod catch_up;
mod check;
mod deliveries;
mod engine;
mod figures;
mod floors;
mod http;
mod keys;
mod lag;
mod load;
mod machine;
mod memory;
mod old_keys;
mod overload;
mod progress;
mod random;
mod replay;
mod server;
mod start;
mod steady;
mod yardstick;

use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::{Args, ValueEnum};
use runtime::shutdown::Shutdown;
use serde_json::json;

use figures::{Figure, Parts, table};
use floors::{Yardstick, judge};
use progress::Steps;
pub(crate) use server::{CommandsOptions, serve_commands};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Workloads; all of them if none is named. Without the yardstick among them there are no ratios.
    #[arg(value_name = "NAME")]
    names: Vec<Name>,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
    /// How long each measurement runs; by default 10 s with the engine alone, 60 s with everything on and too much load,
    /// ten minutes for `steady`.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,
    /// Wallets between which money moves.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(2..=1_000_000))]
    wallets: u64,
    /// Events in the log of `replay`, `catch-up` and `memory` (the first number), and of `start` (all of them); by
    /// default a million, and for `start` five million as well.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(i64).range(1..))]
    events: Vec<i64>,
    /// Decides which wallets pay which.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The idempotency keys: UUIDs of version 7, or of version 4. `engine` and `http` have a measurement with the latter too.
    #[arg(long, default_value = "time")]
    keys: keys::Order,
    /// What `steady` asks for, in percent of the capacity. From 70 on its floors are judged.
    #[arg(long, default_value_t = steady::SHARE, value_parser = clap::value_parser!(u64).range(1..=100))]
    share: u64,
    /// What runs beside the engine; both, one after the other, if not said. Workloads that have only one form ignore it.
    #[arg(long)]
    parts: Option<Beside>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// pgbench, TPC-B-like and prepared: what the others are compared with. And a bare insert and commit.
    Yardstick,
    /// Transfers by callers in the engine's process: 1 to 1,024 of them, and on one hot wallet.
    Engine,
    /// Wallets opened by callers in the engine's process.
    NewWallets,
    /// Transfers that are refused for want of money, by callers in the engine's process.
    Declined,
    /// Commands beside others that repeat keys which the engine has forgotten.
    OldKeys,
    /// Single transfers over 64 and 256 keep-alive connections.
    Http,
    /// Transfers over HTTP in batches of 100 and 1,000.
    Batches,
    /// The whole log read, verified and folded; the engine's start without its snapshot; an audit.
    Replay,
    /// The projector, on a log and empty views.
    CatchUp,
    /// Until ready, with a log of a million and of five million events, after a clean end and after a kill.
    Start,
    /// Webhooks to a receiver here, for one endpoint and for a hundred.
    Deliveries,
    /// Memory after a million transfers over a hundred thousand wallets.
    Memory,
    /// Ten minutes at 70 % of the capacity (`--share`), open loop, and what coincided with stalls. Everything on, if not
    /// said otherwise.
    Steady,
    /// Ten times the capacity, open loop, and the time until all is normal again.
    Overload,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Beside {
    /// Engine alone.
    Nothing,
    Everything,
}

/// What a workload is told.
pub(crate) struct Run<'a> {
    pub(crate) parts: Parts,
    pub(crate) time: Duration,
    pub(crate) wallets: u64,
    /// Sizes of a log; nothing if not said.
    pub(crate) events: &'a [i64],
    pub(crate) seed: u64,
    pub(crate) keys: keys::Order,
    /// Of the capacity, in percent.
    pub(crate) share: u64,
    pub(crate) steps: &'a Steps,
    /// For what must be ended in order, and is not when it is let go of.
    pub(crate) shutdown: &'a Shutdown,
}

impl Run<'_> {
    /// The size of one log.
    pub(crate) fn events(&self) -> i64 {
        self.events.first().copied().unwrap_or(1_000_000)
    }
}

/// As shells have it for what Ctrl-C has ended.
const INTERRUPTED: u8 = 130;

pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let shutdown = runtime::shutdown::signal();
    let stop = shutdown.clone();
    tokio::spawn(async move {
        stop.requested().await;
        load::INTERRUPTED.store(true, Ordering::Relaxed);
    });
    measure(&options, &shutdown).await
}

/// Ends early when that is asked for: what was measured until then took its time, and is reported.
async fn measure(options: &Options, shutdown: &Shutdown) -> anyhow::Result<ExitCode> {
    if cfg!(debug_assertions) {
        eprintln!("built without optimisation: these figures say nothing (cargo run --release -- bench)");
    }
    let load_before = machine::load_average();
    let names = if options.names.is_empty() { Name::value_variants() } else { &options.names };
    let plan: Vec<(Name, Parts)> =
        names.iter().flat_map(|name| name.parts(options.parts).map(|parts| (*name, parts))).collect();
    let sizes = if options.events.is_empty() { start::SIZES.len() } else { options.events.len() };
    let steps = Steps::new(plan.iter().map(|(name, _)| name.measurements(sizes)).sum());
    let (mut figures, mut yardstick, mut failures) = (Vec::new(), Yardstick::default(), Vec::new());
    let mut interrupted = None;
    for (name, parts) in plan {
        let seconds = options.seconds.unwrap_or(name.seconds(parts));
        let run = Run {
            parts,
            time: Duration::from_secs(seconds),
            wallets: options.wallets,
            events: &options.events,
            seed: options.seed,
            keys: options.keys,
            share: options.share,
            steps: &steps,
            shutdown,
        };
        let measured = tokio::select! {
            measured = name.run(&run, &mut figures, &mut yardstick) => measured,
            // Servers that are processes end with what the workload held.
            () = shutdown.requested(), if !name.is_here() => Ok(()),
        };
        if shutdown.is_requested() {
            interrupted = Some(format!("{name:?}, {parts}")); // whatever failed in it, the interruption may be why
            break;
        }
        // What one workload cannot do says nothing about the next; what was measured is shown all the same.
        if let Err(error) = measured {
            failures.push(format!("{name:?}, {parts}: {error:#}"));
        }
    }
    drop(steps);
    judge(&mut figures, yardstick);
    report(options, &figures, yardstick, &failures, interrupted.as_deref(), &load_before)?;
    Ok(match interrupted {
        Some(_) => ExitCode::from(INTERRUPTED),
        None if failures.is_empty() => ExitCode::SUCCESS,
        None => ExitCode::from(1),
    })
}

fn report(
    options: &Options,
    figures: &[Figure],
    yardstick: Yardstick,
    failures: &[String],
    interrupted: Option<&str>,
    load_before: &str,
) -> anyhow::Result<()> {
    let machine = machine::description();
    if options.json {
        let report = json!({
            "machine": machine,
            "loadAverageBefore": load_before,
            "optimised": !cfg!(debug_assertions),
            "yardstickPerSecond": yardstick.per_second,
            "bareCommitMillis": yardstick.bare_commit_millis,
            "seed": options.seed,
            "wallets": options.wallets,
            "keys": options.keys,
            "figures": figures,
            "failures": failures,
            "interrupted": interrupted,
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    let Options { seed, wallets, keys, .. } = options;
    println!("{machine}; load average before: {load_before}; seed {seed}, {wallets} wallets{}", keys.suffix());
    print!("{}", table(figures));
    let floors = || figures.iter().flat_map(|figure| &figure.floors);
    let count = |met| floors().filter(|floor| floor.met() == met).count();
    if floors().next().is_some() {
        println!("floors: {} met, {} missed, {} not judged", count(Some(true)), count(Some(false)), count(None));
    }
    for failure in failures {
        println!("FAILED: {failure}");
    }
    if let Some(workload) = interrupted {
        println!("INTERRUPTED in {workload}: nothing after these figures was measured");
    }
    Ok(())
}

impl Name {
    fn parts(self, wanted: Option<Beside>) -> impl Iterator<Item = Parts> {
        let parts: &[Parts] = match (self, wanted) {
            (Self::Yardstick, _) => &[Parts::Postgres],
            (Self::OldKeys | Self::Replay, _) => &[Parts::EngineAlone],
            (Self::Deliveries, _) | (Self::Steady, None) => &[Parts::EverythingOn],
            (_, None) => &[Parts::EngineAlone, Parts::EverythingOn],
            (_, Some(Beside::Nothing)) => &[Parts::EngineAlone],
            (_, Some(Beside::Everything)) => &[Parts::EverythingOn],
        };
        parts.iter().copied()
    }

    /// Whether the product is in this process: such a workload ends it, also when it is interrupted.
    fn is_here(self) -> bool {
        matches!(self, Self::Engine | Self::NewWallets | Self::Declined)
    }

    fn seconds(self, parts: Parts) -> u64 {
        match (self, parts) {
            (Self::Steady, _) => 600,
            (Self::Overload, _) => 60,
            (Self::Deliveries, _) => 20,
            (_, Parts::EverythingOn) => 60,
            (_, Parts::EngineAlone | Parts::Postgres) => 10,
        }
    }

    /// For the progress bar. `sizes`: how many logs `start` makes.
    fn measurements(self, sizes: usize) -> u64 {
        match self {
            Self::Yardstick => yardstick::MEASUREMENTS,
            Self::Engine => engine::MEASUREMENTS,
            Self::NewWallets | Self::Declined => 1,
            Self::OldKeys => old_keys::MEASUREMENTS,
            Self::Http => http::MEASUREMENTS,
            Self::Batches => http::MEASUREMENTS_OF_BATCHES,
            Self::Replay => replay::MEASUREMENTS,
            Self::CatchUp => catch_up::MEASUREMENTS,
            Self::Start => start::MEASUREMENTS_EACH * sizes as u64,
            Self::Deliveries => deliveries::MEASUREMENTS,
            Self::Memory => memory::MEASUREMENTS,
            Self::Steady => steady::MEASUREMENTS,
            Self::Overload => overload::MEASUREMENTS,
        }
    }

    async fn run(self, run: &Run<'_>, figures: &mut Vec<Figure>, yardstick: &mut Yardstick) -> anyhow::Result<()> {
        match self {
            Self::Yardstick => *yardstick = yardstick::run(run, figures).await?,
            Self::Engine => engine::transfers(run, figures).await?,
            Self::NewWallets => engine::new_wallets(run, figures).await?,
            Self::Declined => engine::declined(run, figures).await?,
            Self::OldKeys => old_keys::run(run, figures).await?,
            Self::Http => http::single(run, figures).await?,
            Self::Batches => http::batches(run, figures).await?,
            Self::Replay => replay::run(run, figures).await?,
            Self::CatchUp => catch_up::run(run, figures).await?,
            Self::Start => start::run(run, figures).await?,
            Self::Deliveries => deliveries::run(run, figures).await?,
            Self::Memory => memory::run(run, figures).await?,
            Self::Steady => steady::run(run, figures).await?,
            Self::Overload => overload::run(run, figures).await?,
        }
        Ok(())
    }
}
