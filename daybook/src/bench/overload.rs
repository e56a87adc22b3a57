//! Ten times more than the server can do, for a minute; and what became of every request.
//!
//! First the capacity, closed loop. Then requests that are due at ten times that rate, whatever the answers are. Then the
//! capacity again: tables grow meanwhile and others use the machine, so the goodput is compared with the mean of both.
//! Latencies count from the moment at which a request was due. Meanwhile health is asked for, memory is watched, and
//! afterwards the log is asked whether what was refused was truly not executed. A light load before and after shows
//! how long it takes until nobody notices any more.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::figures::{Figure, Latencies, millis, ratio};
use super::http::{Capacity, Tally, run_load};
use super::keys::{Keys, Order};
use super::load::{Answer, Extent, Load, Pace};
use super::machine::{Meter, rss_mib};
use super::server::{Server, status_of};
use super::{Run, check};

/// How many times the capacity is asked for.
const TIMES: u64 = 10;

/// Below the server's cap on connections, so that it is requests that are too many.
const CONNECTIONS: usize = 1000;
const CAPACITY_CONNECTIONS: usize = 256;

const WARM_UP: Duration = Duration::from_secs(3);
const CAPACITY_TIME: Duration = Duration::from_secs(10);
const LIGHT_TIME: Duration = Duration::from_secs(10);

/// For the answer to "is it normal again": short enough to see a few seconds, long enough to hold some answers.
const WINDOW: Duration = Duration::from_millis(500);

/// The capacity, too much, and the capacity again.
pub(crate) const MEASUREMENTS: u64 = 3;

pub(crate) async fn run(run: &Run<'_>, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    let Run { parts, seed, keys: order, .. } = *run;
    let (begin, say) = (|what: &str| run.steps.begin(format!("{what}, {parts}")), |what: &str| run.steps.say(what));
    let server = Server::start(parts, run.wallets, run.steps).await?;
    let url = &server.database_url;
    begin("overload: capacity, closed loop");
    let closed = Capacity { server: &server, size: 1, connections: CAPACITY_CONNECTIONS, keys: order, seed };
    closed.measure(WARM_UP).await?;
    let (_, _, mut capacity) = closed.measure_with_meter(CAPACITY_TIME, parts).await?;
    capacity.workload = "overload";
    capacity.variant = format!("capacity, {CAPACITY_CONNECTIONS} connections");
    let capacity_before = capacity.per_second;
    figures.push(capacity);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate is positive, and small")]
    let per_second = (capacity_before as u64).max(10);

    say("overload: a light load, before");
    let light = Pace::Open { per_second: per_second / 5, waits: false };
    let before = Windows::watch(&server, light, order, seed)?;

    let rate = TIMES * per_second;
    begin(&format!("overload: {rate} requests a second, open loop"));
    let position = check::head(url).await?;
    let rss_before = rss_mib(server.pid());
    let watch = Watch::start(server.address, server.pid());
    let meter = Meter::start(server.pid(), url).await?;
    let load = Load {
        address: server.address,
        connections: CONNECTIONS,
        pace: Pace::Open { per_second: rate, waits: false },
        extent: Extent::Time(run.time),
    };
    let keys = Keys::new(order);
    let (tally, sent) = run_load(&load, &server, 1, &keys, seed, |_| ())?;
    let used = meter.stop(tally.accepted.count()).await?;
    let seen = watch.stop()?;
    let mut overload =
        Figure::new("overload", parts, format!("{TIMES} × capacity, open loop"), tally.accepted.count(), sent.took);
    overload.latency = tally.accepted.summary();
    overload.used = Some(used);
    let accepted_per_second = overload.per_second;
    let place = figures.len();
    figures.push(overload); // what follows may be interrupted
    say("overload: a light load, after");
    let after = Windows::watch(&server, light, order, seed)?;
    begin("overload: capacity again");
    let (_, _, mut capacity_after) = closed.measure_with_meter(CAPACITY_TIME, parts).await?;
    capacity_after.workload = "overload";
    capacity_after.variant = "capacity afterwards".to_owned();
    let goodput = ratio(accepted_per_second, mean(capacity_before, capacity_after.per_second));
    figures.push(capacity_after);
    let rss_after = rss_mib(server.pid());

    say("overload: comparing answers and log");
    let verdict =
        check::compare(url, position, server.partner.client, &tally.told, |number| keys.of(number).to_string()).await?;
    server.stop().await?;

    figures[place].notes = vec![
        format!(
            "goodput {goodput:.2} of the mean capacity; of {} due, {} were sent, the others found {CONNECTIONS} connections busy; \
             {:.0}/s; {} reconnects",
            sent.requests + sent.unsent,
            sent.requests,
            ratio(f64::from(u32::try_from(sent.requests).unwrap_or(u32::MAX)), sent.took.as_secs_f64()),
            sent.reconnects,
        ),
        refusals(&tally),
        format!(
            "log: {} accepted and executed once, {} refused and not executed, {} accepted and lost, {} refused and \
             executed, {} twice, {} unknown, {} other answers: {}",
            verdict.accepted_and_executed_once,
            verdict.refused_and_not_executed,
            verdict.accepted_and_not_executed,
            verdict.refused_and_executed,
            verdict.executed_twice,
            verdict.unknown_and_executed + verdict.unknown_and_not_executed,
            verdict.answered_otherwise,
            if verdict.holds() { "it holds" } else { "IT DOES NOT HOLD" },
        ),
        format!("other answers: {}", if tally.others() == 0 { "none".to_owned() } else { tally.statuses() }),
        seen,
        format!("memory: {rss_before} MiB before, {rss_after} MiB after the light load"),
        match after.normal_after(&before) {
            Some(time) => format!(
                "normal again after {:.2} s (light load: p99 {:.1} ms before, {:.1} ms after)",
                time.as_secs_f64(),
                millis(before.all.at(0.99)),
                millis(after.all.at(0.99))
            ),
            None => "NOT NORMAL again within the light load after it".to_owned(),
        },
    ];
    Ok(())
}

#[expect(clippy::float_arithmetic, reason = "a mean of rates, not money")]
fn mean(one: f64, other: f64) -> f64 {
    (one + other) / 2.0
}

fn refusals(tally: &Tally) -> String {
    let Some(latency) = tally.refused.summary() else { return "no refusals".to_owned() };
    format!(
        "{} refusals: p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms; {} without Retry-After",
        tally.refused.count(),
        latency.p50,
        latency.p99,
        latency.max,
        tally.without_retry_after
    )
}

/// A light load, cut into windows by when a request was due.
struct Windows {
    all: Latencies,
    /// The latencies of each, and whether all was granted.
    windows: Vec<(Latencies, bool)>,
}

impl Windows {
    fn watch(server: &Server, pace: Pace, order: Order, seed: u64) -> anyhow::Result<Self> {
        let mut windows: Vec<(Latencies, bool)> = Vec::new();
        let seen = |answer: &Answer<'_>| {
            let due = answer.at.saturating_sub(answer.took);
            let at = usize::try_from(due.as_millis() / WINDOW.as_millis()).expect("a few seconds");
            if windows.len() <= at {
                windows.resize(at + 1, (Latencies::new(), true));
            }
            let (latencies, granted) = &mut windows[at];
            latencies.record(answer.took);
            *granted &= answer.status == Some(201);
        };
        let load =
            Load { address: server.address, connections: CAPACITY_CONNECTIONS, pace, extent: Extent::Time(LIGHT_TIME) };
        let (tally, _) = run_load(&load, server, 1, &Keys::new(order), seed, seen)?;
        Ok(Self { all: tally.accepted, windows })
    }

    /// The end of the last window in which anything was refused, or in which more than one in ten was slower than all
    /// but one in a hundred were before: twice as slow, and 50 ms where that is less, for others use the machine too.
    fn normal_after(&self, before: &Self) -> Option<Duration> {
        let bound = (before.all.at(0.99) * 2).max(Duration::from_millis(50));
        let normal = |(latencies, granted): &(Latencies, bool)| *granted && latencies.at(0.9) <= bound;
        let bad = self.windows.iter().rposition(|window| !normal(window)).map_or(0, |at| at + 1);
        (bad < self.windows.len()).then(|| WINDOW * u32::try_from(bad).unwrap_or(u32::MAX))
    }
}

/// Asks for health and looks at the memory, from a thread of its own.
struct Watch {
    over: Arc<AtomicBool>,
    thread: thread::JoinHandle<String>,
}

impl Watch {
    fn start(address: SocketAddr, pid: u32) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let stop = over.clone();
        let thread = thread::spawn(move || {
            let (mut latencies, mut failed, mut rss) = (Latencies::new(), Vec::new(), 0);
            let mut asked = 0;
            while !stop.load(Ordering::Relaxed) {
                for path in ["/healthz", "/readyz"] {
                    let begun = Instant::now();
                    asked += 1;
                    match status_of(address, path) {
                        Ok(200) => latencies.record(begun.elapsed()),
                        Ok(status) => failed.push(format!("{path} {status}")),
                        Err(error) => failed.push(format!("{path} {error:#}")),
                    }
                }
                rss = rss.max(rss_mib(pid));
                thread::sleep(Duration::from_millis(200));
            }
            failed.truncate(4);
            let (p50, p99) = (millis(latencies.at(0.5)), millis(latencies.at(0.99)));
            let failed = if failed.is_empty() { "none failed".to_owned() } else { format!("FAILED: {failed:?}") };
            format!(
                "health, new connections: {asked} asked, p50 {p50:.1} ms, p99 {p99:.1} ms, {failed}; {rss} MiB at most"
            )
        });
        Self { over, thread }
    }

    fn stop(self) -> anyhow::Result<String> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the thread that asked for health panicked"))
    }
}
