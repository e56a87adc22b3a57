//! `daybook demo`: traffic as people make it, whose outcome is known beforehand, and a live line of what happens.
//!
//! It is a client like any other, over the public API: what was planned from the seed (`demo/plan.rs`) is done against a
//! running `daybook up`, or one of its own (`demo/system.rs`), under ids and keys of this run (`demo/client.rs`). At the
//! end every balance, every count and every webhook (`demo/receiver.rs`) is compared with the plan. Each run registers
//! partners of its own, so it can be done again on the same ledger, and disturbs nobody. However a run ends, its webhooks
//! are taken back, for nobody is left who would take what they send; what it did stays in the log, which only grows.

mod client;
mod plan;
mod receiver;
mod system;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
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

use crate::terminal::{Lines, reader_has_left, shown, unless_reader_left};
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
    /// The partners, wallets and adjustments that a demo makes stay in that system's log, which is append-only.
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

/// How often it is looked whether anybody still reads.
const LOOK_AT_READER: Duration = Duration::from_millis(500);

/// Differences that are printed; the rest are counted.
const DIFFERENCES_SHOWN: usize = 20;

/// As shells have it: for what Ctrl-C has ended, and for what a reader that left has ended (`| head`). Nothing was
/// compared then, so neither is a success.
const INTERRUPTED: u8 = 130;
const UNREAD: u8 = 141;

pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let shutdown = runtime::shutdown::signal();
    let mut lines = Lines::new();
    let system = tokio::select! {
        system = System::find_or_start(&options.data_dir, options.fresh, &mut lines) => system?,
        () = shutdown.requested() => return Ok(ExitCode::from(INTERRUPTED)), // what was half started ends with us
    };
    let shown = show(&options, &system, &shutdown, &mut lines).await;
    let stopped = system.stop().await;
    let code = shown?; // the first failure is the one to tell
    stopped.map(|()| code)
}

async fn show(options: &Options, system: &System, shutdown: &Shutdown, lines: &mut Lines) -> anyhow::Result<ExitCode> {
    let seconds = options.minutes.map_or(options.seconds, |minutes| minutes * 60);
    let acts = usize::try_from(u64::from(seconds) * u64::from(options.rate)).context("the number of acts")?;
    let plan = Arc::new(Plan::new(options.seed, acts));
    say(lines, &format!("demo: seed {}, {acts} acts in {seconds} s, against {}", options.seed, system.base_url()))?;
    let mut run = Arc::new(Run::new(system, plan.clone()).await?);
    let live = Arc::new(Live::default());
    let through = async {
        let preparing = Arc::get_mut(&mut run).expect("no household has it yet").prepare();
        preparing.await.context("preparing the demo")?;
        if run.receiver.is_none() {
            let why = "this system does not send them to its own machine (--allow-local-webhooks)";
            say(lines, &format!("demo: webhooks are not looked at: {why}"))?;
        }
        play(&run, &live, lines, options.rate, Duration::from_secs(seconds.into())).await?;
        compare(&run, &live).await
    };
    let compared = tokio::select! {
        compared = through => Ok(compared),
        () = shutdown.requested() => Err(INTERRUPTED),
        () = reader_leaves() => Err(UNREAD),
    };
    run.clean_up().await; // whatever came of it, and however little was prepared
    let found = match compared {
        Ok(found) => found?,
        Err(code) => {
            say(lines, "demo: interrupted; nothing was compared")?;
            return Ok(ExitCode::from(code));
        }
    };
    let (differences, refused, repeated) = {
        let mut seen = live.lock();
        (std::mem::take(&mut seen.differences), seen.refused, seen.repeated)
    };
    for difference in differences.iter().take(DIFFERENCES_SHOWN) {
        say(lines, &format!("  DIFFERENT  {}", shown(difference)))?;
    }
    let transactions: u64 = found.transactions.iter().flat_map(BTreeMap::values).sum();
    let webhooks: u64 = found.webhooks.iter().flat_map(BTreeMap::values).sum();
    let counts = format!("{refused} refusals as expected, {repeated} repetitions, {webhooks} webhooks");
    say(lines, &format!("demo: {} wallets, {transactions} transactions, {counts}", found.wallets.len()))?;
    let digest = found.digest();
    if differences.is_empty() {
        say(lines, &format!("demo: everything is as it was computed beforehand; digest {digest}"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let (count, planned) = (differences.len(), plan.outcome.digest());
    say(lines, &format!("demo: {count} differences; digest {digest}, not {planned}"))?;
    Ok(ExitCode::from(1))
}

/// One line, which whoever reads along sees at once.
fn say(lines: &mut Lines, line: &str) -> io::Result<()> {
    unless_reader_left(lines.line(line).and_then(|()| lines.flush()))
}

/// Returns once nobody reads our lines any more.
async fn reader_leaves() {
    while !reader_has_left() {
        sleep(LOOK_AT_READER).await;
    }
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
async fn play(run: &Arc<Run>, live: &Arc<Live>, lines: &mut Lines, rate: u32, time: Duration) -> anyhow::Result<()> {
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
    let watching = watch(run, live, lines, began);
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
        never = watching => match never? {},
    }
    if !lines.terminal {
        say(lines, &live.line(run, began))?;
    }
    Ok(())
}

async fn watch(run: &Run, live: &Live, lines: &mut Lines, began: Instant) -> io::Result<Infallible> {
    if !lines.terminal {
        loop {
            sleep(LINE_WRITTEN).await;
            say(lines, &live.line(run, began))?;
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
