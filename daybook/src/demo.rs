//! `daybook demo`: traffic as people make it, whose outcome is known beforehand, and a live line of what happens.
//!
//! It is a client like any other, over the public API: what was planned from the seed (`demo/plan.rs`) is done against a
//! running `daybook up`, or one of its own (`demo/system.rs`), under ids and keys of this run (`demo/client.rs`). At the
//! end every balance, every count and every webhook (`demo/receiver.rs`) is compared with the plan. Each run registers
//! partners of its own, so it can be done again on the same ledger, and disturbs nobody.

mod client;
mod plan;
mod receiver;
mod system;

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use runtime::shutdown::Shutdown;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use crate::terminal::shown;
use client::{Done, Run};
use plan::{Outcome, Plan};
use system::System;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// What happens follows from the seed and the number of acts, which is the rate times the time.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long, in seconds.
    #[arg(long, default_value_t = 30, conflicts_with = "minutes", value_parser = clap::value_parser!(u32).range(1..=3_600))]
    seconds: u32,
    /// How long, in minutes.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=60))]
    minutes: Option<u32>,
    /// So many acts each second.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rate: u32,
    /// Where a running `daybook up` has its connection.json. If none runs there, one is started on a temporary directory.
    #[arg(long, env = "DAYBOOK_DATA_DIR", default_value = "data")]
    data_dir: PathBuf,
    /// Start one on a temporary directory in any case.
    #[arg(long)]
    fresh: bool,
}

/// A run may take so many times as long as it was asked to, and this beside: what is slow is waited for, but not for ever.
const PATIENCE_TIMES: u32 = 4;
const PATIENCE: Duration = Duration::from_secs(120);

/// For webhooks that are still to come when everything else is done.
const WEBHOOKS_TIME: Duration = Duration::from_secs(60);

/// How often the line is renewed on a terminal, and written elsewhere.
const LINE_LIVE: Duration = Duration::from_millis(200);
const LINE_WRITTEN: Duration = Duration::from_secs(5);

/// Differences that are printed; the rest are counted.
const DIFFERENCES_SHOWN: usize = 20;

pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let shutdown = runtime::shutdown::signal();
    let system = tokio::select! {
        system = System::find_or_start(&options.data_dir, options.fresh) => system?,
        () = shutdown.requested() => return Ok(ExitCode::from(INTERRUPTED)), // what was half started ends with us
    };
    let shown = show(&options, &system, &shutdown).await;
    system.stop().await?;
    shown
}

/// As shells have it for what Ctrl-C has ended.
const INTERRUPTED: u8 = 130;

async fn show(options: &Options, system: &System, shutdown: &Shutdown) -> anyhow::Result<ExitCode> {
    let seconds = options.minutes.map_or(options.seconds, |minutes| minutes * 60);
    let acts = usize::try_from(u64::from(seconds) * u64::from(options.rate)).context("the number of acts")?;
    let plan = Arc::new(Plan::new(options.seed, acts));
    println!("demo: seed {}, {acts} acts in {seconds} s, against {}", options.seed, system.base_url());
    let run = Arc::new(Run::prepare(system, plan.clone()).await.context("preparing the demo")?);
    if run.receiver.is_none() {
        println!(
            "demo: webhooks are not looked at: this system does not send them to its own machine (--allow-local-webhooks)"
        );
    }
    let live = Arc::new(Live::default());
    let played = tokio::select! {
        played = play(&run, &live, options.rate, Duration::from_secs(seconds.into())) => Some(played),
        () = shutdown.requested() => None,
    };
    let compared = match played {
        None => None,
        Some(played) => {
            played?;
            tokio::select! {
                compared = compare(&run, &live) => Some(compared?),
                () = shutdown.requested() => None,
            }
        }
    };
    run.clean_up().await; // nobody is left who would take the webhooks
    let Some(found) = compared else {
        println!("demo: interrupted; nothing was compared");
        return Ok(ExitCode::from(INTERRUPTED));
    };
    let (differences, refused, repeated) = {
        let mut seen = live.lock();
        (std::mem::take(&mut seen.differences), seen.refused, seen.repeated)
    };
    for difference in differences.iter().take(DIFFERENCES_SHOWN) {
        println!("  DIFFERENT  {}", shown(difference));
    }
    let transactions: u64 = found.transactions.iter().flat_map(BTreeMap::values).sum();
    let webhooks: u64 = found.webhooks.iter().flat_map(BTreeMap::values).sum();
    println!(
        "demo: {} wallets, {transactions} transactions, {refused} refusals as expected, {repeated} repetitions, {webhooks} webhooks",
        found.wallets.len(),
    );
    let digest = found.digest();
    if differences.is_empty() {
        println!("demo: everything is as it was computed beforehand; digest {digest}");
        return Ok(ExitCode::SUCCESS);
    }
    println!("demo: {} differences; digest {digest}, not {}", differences.len(), plan.outcome.digest());
    Ok(ExitCode::from(1))
}

/// What happens, for whoever watches.
#[derive(Default)]
pub(crate) struct Live(Mutex<Seen>);

struct Seen {
    done: usize,
    refused: u64,
    repeated: u64,
    latest: String,
    latencies: Histogram<u64>,
    differences: Vec<String>,
}

impl Default for Seen {
    fn default() -> Self {
        // Microseconds, up to ten minutes, within a hundredth.
        let latencies = Histogram::new_with_bounds(1, 600_000_000, 2).expect("the bounds are well-formed");
        Self { done: 0, refused: 0, repeated: 0, latest: String::new(), latencies, differences: Vec::new() }
    }
}

impl Live {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner) // counts cannot be half-written
    }

    fn line(&self, run: &Run, began: Instant) -> String {
        let seen = self.lock();
        let millis = |percent| {
            let micros = seen.latencies.value_at_quantile(percent);
            format!("{}.{}", micros / 1_000, micros % 1_000 / 100)
        };
        let tenths = u128::try_from(seen.done).unwrap_or(0) * 10_000 / began.elapsed().as_millis().max(1);
        let webhooks = match &run.receiver {
            Some(receiver) => format!("{} webhooks", receiver.count()),
            None => "webhooks not looked at".to_owned(),
        };
        format!(
            "{}/{}  {}.{}/s  p50 {} ms, p99 {} ms  {} refused as expected  {webhooks}  {}{}",
            seen.done,
            run.plan.acts.len(),
            tenths / 10,
            tenths % 10,
            millis(0.5),
            millis(0.99),
            seen.refused,
            if seen.differences.is_empty() { String::new() } else { format!("{} DIFFERENT  ", seen.differences.len()) },
            shown(&seen.latest)
        )
    }
}

/// Does everything that is planned, each household in its order, each act when it is due.
async fn play(run: &Arc<Run>, live: &Arc<Live>, rate: u32, time: Duration) -> anyhow::Result<()> {
    let began = Instant::now();
    let deadline = began + time * PATIENCE_TIMES + PATIENCE;
    let mut households = JoinSet::new();
    for household in 0..run.plan.households {
        let (run, live) = (run.clone(), live.clone());
        households.spawn(async move {
            for (number, act) in run.plan.acts.iter().enumerate().filter(|(_, act)| act.household == household) {
                let due = u32::try_from(number).unwrap_or(u32::MAX);
                sleep_until(began + Duration::from_secs(1) * due / rate).await;
                let done = run.act(number, act, deadline).await;
                let mut seen = live.lock();
                seen.done += 1;
                match done {
                    Ok(Done { words, latency, refused, repeated }) => {
                        seen.latest = words;
                        seen.latencies.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
                        seen.refused += u64::from(refused);
                        seen.repeated += u64::from(repeated);
                    }
                    Err(difference) => seen.differences.push(format!("act {number}, {:?}: {difference:#}", act.kind)),
                }
            }
        });
    }
    let watching = watch(run, live, began);
    let all = async {
        while let Some(ended) = households.join_next().await {
            ended.context("a household panicked")?;
        }
        anyhow::Ok(())
    };
    tokio::select! {
        ended = timeout_at(deadline, all) => match ended {
            Ok(ended) => ended?,
            Err(_) => {
                let mut seen = live.lock();
                let undone = run.plan.acts.len() - seen.done;
                seen.differences.push(format!("{undone} acts were not done in time"));
            }
        },
        never = watching => match never {},
    }
    if !std::io::stdout().is_terminal() {
        println!("{}", live.line(run, began));
    }
    Ok(())
}

async fn watch(run: &Run, live: &Live, began: Instant) -> std::convert::Infallible {
    if !std::io::stdout().is_terminal() {
        loop {
            sleep(LINE_WRITTEN).await;
            println!("{}", live.line(run, began));
        }
    }
    let bar = Cleared(ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout()));
    bar.0.set_style(ProgressStyle::with_template("{spinner} {wide_msg}").expect("the template is well-formed"));
    loop {
        bar.0.set_message(live.line(run, began));
        bar.0.tick();
        sleep(LINE_LIVE).await;
    }
}

/// A line that is gone once nobody renews it.
struct Cleared(ProgressBar);

impl Drop for Cleared {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Reads what has come of it, and notes everything that is not as planned.
async fn compare(run: &Run, live: &Live) -> anyhow::Result<Outcome> {
    let expected = &run.plan.outcome;
    let mut found = run.read().await.context("reading what has come of it")?;
    let mut differences = Vec::new();
    for (number, (expected, found)) in expected.wallets.iter().zip(&found.wallets).enumerate() {
        if expected != found {
            let wallet = &run.plan.wallets[number];
            let partner = &run.plan.partners[wallet.partner];
            differences.push(format!(
                "{} ({}) of {}: expected {expected:?}, found {found:?}",
                wallet.user, run.wallets[number], partner.name
            ));
        }
    }
    let mut of_partner = |what: &str, partner: usize, expected: String, found: String| {
        if expected != found {
            let name = run.plan.partners[partner].name;
            differences.push(format!("{what} of {name}: expected {expected}, found {found}"));
        }
    };
    for (partner, (expected, found)) in expected.transactions.iter().zip(&found.transactions).enumerate() {
        of_partner("transactions", partner, format!("{expected:?}"), format!("{found:?}"));
    }
    if let Some(receiver) = &run.receiver {
        let wanted: u64 = expected.webhooks.iter().flat_map(BTreeMap::values).sum();
        receiver.until(wanted, WEBHOOKS_TIME).await;
        for (partner, expected) in expected.webhooks.iter().enumerate() {
            let (counts, faults) = receiver.outcome(partner, &run.completed(partner));
            of_partner("webhooks", partner, format!("{expected:?}"), format!("{counts:?}"));
            for fault in faults {
                of_partner("a webhook", partner, "none".to_owned(), fault);
            }
            found.webhooks.push(counts);
        }
    }
    live.lock().differences.extend(differences);
    Ok(found)
}
