//! `daybook bench`: how fast the ledger is, beside `pgbench` on the same Postgres; and what it does when it is too much.
//!
//! Each workload starts servers of its own on a temporary directory, with the default settings and durable commits,
//! and removes them. Every rate is of what the log has, not of what was sent. All figures of a run are from one machine
//! in one run; the load is made on that machine too, and what it takes is reported beside what the servers take.
//!
//! Left out: reads and the feed's own rates. Nothing here is a test: figures are for people to judge.

mod check;
mod engine;
mod figures;
mod http;
mod load;
mod machine;
mod old_keys;
mod overload;
mod random;
mod server;
mod yardstick;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use figures::{Figure, Parts, ratio, table};
pub(crate) use server::{CommandsOptions, serve_commands};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// One workload; all of them if none is named. Without the yardstick there are no ratios.
    name: Option<Name>,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
    /// How long each workload runs; by default 10 s, the overload 60 s.
    #[arg(long)]
    seconds: Option<u64>,
    /// Wallets between which money moves.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(2..=1_000_000))]
    wallets: u64,
    /// Decides which wallets pay which.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What runs beside the engine, for workloads over HTTP; both, one after the other, if not said.
    #[arg(long)]
    parts: Option<Beside>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// pgbench, TPC-B-like and prepared: what the others are compared with.
    Yardstick,
    /// The engine in this process, with 1 to 1,024 callers, and on one hot wallet.
    Engine,
    /// The same beside commands that repeat keys which the engine has forgotten.
    OldKeys,
    /// Transfers over keep-alive connections: single ones over 64 and 256, and in batches of 100 and 1,000.
    Http,
    /// Ten times the capacity, open loop, and the time until all is normal again.
    Overload,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Beside {
    /// Engine alone.
    Nothing,
    Everything,
}

const SECONDS: u64 = 10;
const OVERLOAD_SECONDS: u64 = 60;

pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    tokio::select! {
        measured = measure(&options) => measured,
        // The servers under test end with what `measure` holds.
        stopped = tokio::signal::ctrl_c() => stopped.map(|()| ExitCode::from(130)).map_err(Into::into),
    }
}

async fn measure(options: &Options) -> anyhow::Result<ExitCode> {
    if cfg!(debug_assertions) {
        eprintln!("built without optimisation: these figures say nothing (cargo run --release -- bench)");
    }
    let bar = ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{spinner} {elapsed} {msg}")?);
    bar.enable_steady_tick(Duration::from_millis(200));
    let load_before = machine::load_average();
    let mut measured = Measured::default();
    let outcome = measured.run_all(options, |what: &str| bar.set_message(what.to_owned())).await;
    bar.finish_and_clear();
    let Measured { mut figures, yardstick } = measured;
    for figure in figures.iter_mut().filter(|figure| figure.workload != "yardstick") {
        figure.ratio = yardstick.map(|best| ratio(figure.per_second, best));
    }

    let machine = machine::description();
    if options.json {
        let report = json!({
            "machine": machine,
            "loadAverageBefore": load_before,
            "optimised": !cfg!(debug_assertions),
            "yardstickPerSecond": yardstick,
            "seed": options.seed,
            "wallets": options.wallets,
            "figures": figures,
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{machine}; load average before: {load_before}; seed {}, {} wallets", options.seed, options.wallets);
        print!("{}", table(&figures));
    }
    outcome.map(|()| ExitCode::SUCCESS) // what was measured before a failure has been printed all the same
}

#[derive(Default)]
struct Measured {
    figures: Vec<Figure>,
    /// Transactions a second.
    yardstick: Option<f64>,
}

impl Measured {
    async fn run_all(&mut self, options: &Options, say: impl Fn(&str) + Copy) -> anyhow::Result<()> {
        let Options { wallets, seed, .. } = *options;
        let wanted = |name| options.name.is_none_or(|wanted| wanted == name);
        let seconds = options.seconds.unwrap_or(SECONDS).max(1);
        let parts: &[Parts] = match options.parts {
            None => &[Parts::EngineAlone, Parts::EverythingOn],
            Some(Beside::Nothing) => &[Parts::EngineAlone],
            Some(Beside::Everything) => &[Parts::EverythingOn],
        };
        if wanted(Name::Yardstick) {
            let (figures, best) = yardstick::run(seconds, say).await?;
            self.figures.extend(figures);
            self.yardstick = best;
        }
        if wanted(Name::Engine) {
            self.figures.extend(engine::run(seconds, wallets, seed, say).await?);
        }
        if wanted(Name::OldKeys) {
            self.figures.extend(old_keys::run(seconds, wallets, seed, say).await?);
        }
        if wanted(Name::Http) {
            for parts in parts {
                self.figures.extend(http::run(*parts, seconds, wallets, seed, say).await?);
            }
        }
        if wanted(Name::Overload) {
            let seconds = options.seconds.unwrap_or(OVERLOAD_SECONDS).max(1);
            for parts in parts {
                self.figures.extend(overload::run(*parts, seconds, wallets, seed, say).await?);
            }
        }
        Ok(())
    }
}
