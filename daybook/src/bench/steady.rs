//! Ten minutes at a share of what the server can do, 70 % if not said otherwise, as callers come who know nothing of
//! each other.
//!
//! First the capacity, in a closed loop. Then requests that are due at that share of its rate, whatever the answers do;
//! one that finds every connection busy waits for one, and its latency counts from when it was due. Memory is watched,
//! and what could make anybody wait: checkpoints, autovacuum, the book's snapshot, what the kernel has to write, the
//! neighbours. A *stall* is a second with an answer that took longer than 50 ms; beside it stands what went on in that
//! second. That is coincidence, not cause.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::ensure;
use serde::Serialize;
use serde_json::json;
use sqlx::{Connection, PgConnection};

use super::figures::{Figure, Parts, millis, ratio};
use super::floors::{Floor, Measure};
use super::http::{Capacity, run_load};
use super::keys::Keys;
use super::load::{Answer, Extent, Load, Pace};
use super::machine::{Meter, Ticks, rss_mib, unwritten_mib};
use super::server::Server;
use super::{Run, check, lag};

/// The capacity, and the long run.
pub(crate) const MEASUREMENTS: u64 = 2;

/// As many as there are places at work, so that nobody is refused: what is too much waits here.
const CONNECTIONS: usize = 256;

const WARM_UP: Duration = Duration::from_secs(3);
const CAPACITY_TIME: Duration = Duration::from_secs(60); // as everything on is measured elsewhere
/// Of the capacity, in percent: what the floors are of.
pub(crate) const SHARE: u64 = 70;
const STALL: Duration = Duration::from_millis(50);
/// What one in a hundred may take at most.
const LATE: Duration = Duration::from_millis(20);

/// Stalls in the table, the longest first; all of them are in the JSON.
const SHOWN: usize = 12;

/// Of milliseconds, and of memory at the end against half-way.
const FLOORS: [(Measure, f64); 2] = [(Measure::P99Millis, 20.0), (Measure::P999Millis, 250.0)];
const GROWTH: f64 = 1.1;

pub(crate) async fn run(run: &Run<'_>, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    let server = Server::start(run.parts, run.wallets, run.steps).await?;
    let url = &server.database_url;
    run.steps.begin(format!("steady: capacity, closed loop, {}", run.parts));
    let closed = Capacity { server: &server, size: 1, connections: CONNECTIONS, keys: run.keys, seed: run.seed };
    closed.measure(WARM_UP).await?;
    let time = CAPACITY_TIME.min(run.time);
    let (_, _, mut capacity) = closed.measure_with_meter(time, run.parts).await?;
    capacity.workload = "steady";
    capacity.variant = format!("capacity, {CONNECTIONS} connections");
    let per_second = share(capacity.per_second, run.share).max(1);
    figures.push(capacity);

    let seconds = run.time.as_secs();
    run.steps.begin(format!("steady: {per_second} requests a second for {seconds} s, {}", run.parts));
    let position = check::head(url).await?;
    let views = (run.parts == Parts::EverythingOn).then(|| lag::Watch::start(url));
    let watch = Watch::start(url, server.pid());
    let meter = Meter::start(server.pid(), url).await?;
    let mut slowest = vec![Duration::ZERO; usize::try_from(seconds)? + 1];
    let mut late = vec![(0, 0_u64); slowest.len()];
    let load = Load {
        address: server.address,
        connections: CONNECTIONS,
        pace: Pace::Open { per_second, waits: true },
        extent: Extent::Time(run.time),
    };
    let seen = |answer: &Answer<'_>| {
        let due = answer.at.saturating_sub(answer.took);
        let last = slowest.len() - 1;
        let second = usize::try_from(due.as_secs()).map_or(last, |second| second.min(last));
        slowest[second] = answer.took.max(slowest[second]);
        late[second].0 += u64::from(LATE < answer.took);
        late[second].1 += 1;
    };
    let (tally, sent) = run_load(&load, &server, 1, &Keys::new(run.keys), run.seed, seen)?;
    let done = tally.accepted.count();
    let used = meter.stop(done).await?;
    let samples = watch.stop().await?;
    let lag = match views {
        Some(views) => Some(views.stop().await?),
        None => None,
    };
    check::in_log_since(url, position, check::POSTED, done).await?;

    let stalls = stalls(&slowest, &samples);
    let memory: Vec<u64> = samples.iter().map(|sample| sample.rss_mib).collect();
    let mut figure =
        Figure::new("steady", run.parts, format!("{per_second}/s, open loop{}", run.keys.suffix()), done, sent.took);
    figure.latency = tally.accepted.summary();
    figure.used = Some(used);
    figure.lag = lag;
    // A tenth of the time each: single looks differ by a tenth.
    let tenth = (memory.len() / 10).max(1);
    let half = mean(memory.iter().skip(memory.len() / 2).take(tenth));
    let end = mean(memory.iter().rev().take(tenth));
    if SHARE <= run.share {
        figure.floors = FLOORS.map(|(measure, bound)| Floor::new(measure, bound)).into();
        figure.floors.push(Floor::of(Measure::Growth, GROWTH, ratio(end, half)));
    }
    figure.notes.push(format!(
        "of {} sent, {done} were granted, {} refused, {} answered otherwise{}",
        sent.requests,
        tally.refused.count(),
        tally.others(),
        if tally.others() == 0 { String::new() } else { format!(": {}", tally.statuses()) },
    ));
    let over_time: Vec<_> = memory.iter().step_by(tenth).chain(memory.last()).map(ToString::to_string).collect();
    figure.notes.push(format!("RSS over time, MiB: {}", over_time.join(", ")));
    figure.notes.push(format!("{} of {seconds} seconds had an answer slower than 50 ms", stalls.len()));
    let bad = late.iter().filter(|(late, all)| *all < 100 * late);
    figure.notes.push(format!(
        "{} had more than one in a hundred slower than 20 ms: {} of all {}",
        bad.clone().count(),
        bad.map(|(late, _)| late).sum::<u64>(),
        late.iter().map(|(late, _)| late).sum::<u64>(),
    ));
    figure.notes.extend(common(&samples, &stalls));
    let mut longest: Vec<_> = stalls.iter().collect();
    longest.sort_by_key(|stall| std::cmp::Reverse(stall.took));
    longest.truncate(SHOWN);
    figure.notes.extend(longest.iter().map(|stall| stall.to_string()));
    figure.details = Some(json!({ "dueEachSecond": per_second, "rssMib": memory, "stalls": stalls }));
    figures.push(figure);
    ensure!(done == sent.requests, "not every transfer was granted: {}", tally.statuses());
    server.stop().await
}

#[expect(
    clippy::float_arithmetic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate is positive, and small"
)]
fn share(per_second: f64, percent: u64) -> u64 {
    (per_second * percent as f64 / 100.0) as u64
}

#[expect(clippy::float_arithmetic, reason = "a mean of memory, not money")]
fn mean<'f>(figures: impl ExactSizeIterator<Item = &'f u64>) -> f64 {
    let count = figures.len().max(1);
    figures.sum::<u64>() as f64 / count as f64
}

/// A second in which somebody waited, and what else went on in it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Stall {
    second: usize,
    #[serde(serialize_with = "as_millis")]
    took: Duration,
    beside: Vec<String>,
}

fn as_millis<S: serde::Serializer>(took: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(millis(*took))
}

impl std::fmt::Display for Stall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let beside = if self.beside.is_empty() { "nothing seen beside it".to_owned() } else { self.beside.join(", ") };
        write!(f, "stall in second {}: {:.0} ms; {beside}", self.second, millis(self.took))
    }
}

fn stalls(slowest: &[Duration], samples: &[Sample]) -> Vec<Stall> {
    let slow = slowest.iter().enumerate().filter(|(_, took)| STALL < **took);
    let beside = |second: usize| {
        // A long wait may have begun in one second and shown in the next.
        let near = || samples.iter().filter(|sample| sample.second <= second && second <= sample.second + 1);
        let mut beside: BTreeSet<String> = near().flat_map(|sample| sample.beside.iter().cloned()).collect();
        let unwritten = near().map(|sample| sample.unwritten_mib).max().unwrap_or(0);
        if UNWRITTEN_MIB < unwritten {
            beside.insert(format!("the kernel has {unwritten} MiB to write"));
        }
        let others = near().map(|sample| sample.others_cores).fold(0.0, f64::max);
        if OTHERS_CORES < others {
            beside.insert(format!("others take {others:.1} cores"));
        }
        beside.into_iter().collect()
    };
    slow.map(|(second, took)| Stall { second, took: *took, beside: beside(second) }).collect()
}

/// How often each thing was seen at all, and how often near a stall: what always goes on explains nothing.
fn common(samples: &[Sample], stalls: &[Stall]) -> Vec<String> {
    let kinds: BTreeSet<&String> = samples.iter().flat_map(|sample| &sample.beside).collect();
    let seen = |kind: &String| samples.iter().filter(|sample| sample.beside.contains(kind)).count();
    let near = |kind: &String| stalls.iter().filter(|stall| stall.beside.contains(kind)).count();
    kinds.into_iter().map(|kind| format!("{kind}: in {} seconds, near {} stalls", seen(kind), near(kind))).collect()
}

/// What was seen in a second.
struct Sample {
    second: usize,
    rss_mib: u64,
    unwritten_mib: u64,
    others_cores: f64,
    beside: BTreeSet<String>,
}

/// Looks four times a second, from a thread of its own.
struct Watch {
    over: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Vec<Sample>>>,
}

const LOOK: Duration = Duration::from_millis(250);

/// What the kernel has to write, in MiB, and what others take, in cores: more is worth telling.
const UNWRITTEN_MIB: u64 = 64;
const OTHERS_CORES: f64 = 0.5;

impl Watch {
    fn start(database_url: &str, pid: u32) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (stop, url) = (over.clone(), database_url.to_owned());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(watch(&url, pid, &stop))
        });
        Self { over, thread }
    }

    async fn stop(self) -> anyhow::Result<Vec<Sample>> {
        self.over.store(true, Ordering::Relaxed);
        let watched = tokio::task::spawn_blocking(|| self.thread.join()).await?;
        watched.map_err(|_| anyhow::anyhow!("the thread that watched panicked"))?
    }
}

async fn watch(database_url: &str, pid: u32, over: &AtomicBool) -> anyhow::Result<Vec<Sample>> {
    let mut connection = PgConnection::connect(database_url).await?;
    let begun = Instant::now();
    let mut samples: Vec<Sample> = Vec::new();
    let mut before = Postgres::look(&mut connection).await?;
    let (mut ticks, mut ticked, mut others_cores) = (Ticks::read(pid), Instant::now(), 0.0);
    while !over.load(Ordering::Relaxed) {
        tokio::time::sleep(LOOK).await;
        let now = Postgres::look(&mut connection).await?;
        let second = usize::try_from(begun.elapsed().as_secs())?;
        let mut beside = now.since(&before);
        before = now;
        if Duration::from_secs(1) <= ticked.elapsed() {
            let now = Ticks::read(pid);
            others_cores = now.of_others_since(&ticks, ticked.elapsed());
            (ticks, ticked) = (now, Instant::now());
        }
        if samples.last().is_none_or(|last| last.second != second) {
            let (rss_mib, unwritten_mib) = (rss_mib(pid), unwritten_mib());
            samples.push(Sample { second, rss_mib, unwritten_mib, others_cores, beside: BTreeSet::new() });
        }
        if let Some(sample) = samples.last_mut() {
            sample.beside.append(&mut beside);
        }
    }
    connection.close().await?;
    Ok(samples)
}

/// What Postgres has done until now, and is doing.
struct Postgres {
    checkpoints: i64,
    buffers: i64,
    /// Where the book's snapshot stands.
    snapshot: i64,
    vacuums: Vec<String>,
    writing_snapshot: bool,
}

impl Postgres {
    async fn look(connection: &mut PgConnection) -> sqlx::Result<Self> {
        // From 17 on, checkpoints have a view of their own.
        let version: i32 =
            sqlx::query_scalar("select current_setting('server_version_num')::int").fetch_one(&mut *connection).await?;
        let checkpoints = if 170_000 <= version {
            "select num_timed + num_requested, buffers_written from pg_stat_checkpointer"
        } else {
            "select checkpoints_timed + checkpoints_req, buffers_checkpoint from pg_stat_bgwriter"
        };
        let (checkpoints, buffers) = sqlx::query_as(checkpoints).fetch_one(&mut *connection).await?;
        let snapshot = sqlx::query_scalar("select coalesce(max(position), 0) from ledger.book_snapshot")
            .fetch_one(&mut *connection)
            .await?;
        let working: Vec<(String, String)> = sqlx::query_as(
            "select coalesce(backend_type, ''), left(query, 80) from pg_stat_activity
             where backend_type = 'autovacuum worker'
                or (pid <> pg_backend_pid() and state = 'active' and query ~ 'book_(wallets|snapshot|partners)'
                    and query ~* '^\\s*(insert|update|delete|with|copy)')",
        )
        .fetch_all(&mut *connection)
        .await?;
        let (vacuums, others): (Vec<_>, Vec<_>) =
            working.into_iter().partition(|(backend, _)| backend == "autovacuum worker");
        let vacuums = vacuums.into_iter().map(|(_, query)| query).collect();
        Ok(Self { checkpoints, buffers, snapshot, vacuums, writing_snapshot: !others.is_empty() })
    }

    fn since(&self, before: &Self) -> BTreeSet<String> {
        let mut beside: BTreeSet<String> = self.vacuums.iter().cloned().collect();
        if before.checkpoints < self.checkpoints || before.buffers < self.buffers {
            beside.insert("a checkpoint".to_owned());
        }
        if before.snapshot < self.snapshot || self.writing_snapshot {
            beside.insert("the book's snapshot".to_owned());
        }
        beside
    }
}
