//! Transfers over HTTP, one or many in a request: keep-alive connections that each send when their answer has come.
//!
//! Each request has a key of its own. With everything on, the views' lag is watched meanwhile. Left out: reads, and
//! requests that come whether the answers do or not (`steady.rs`, `overload.rs`).

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::bail;

use super::check::{self, Told};
use super::figures::{Figure, Latencies, Parts};
use super::floors::{Floor, Measure};
use super::keys::{Keys, Order};
use super::load::{Answer, Extent, Load, Pace, Sent};
use super::machine::Meter;
use super::random::Random;
use super::server::Server;
use super::{Run, lag};

/// One measurement.
struct Shape {
    /// Transfers in a request.
    size: usize,
    /// Not more transfers at a time than the engine takes on whatever the disk does.
    connections: usize,
    /// Not those of the run.
    keys: Option<Order>,
    floors: &'static [(Measure, f64)],
    floors_with_everything: &'static [(Measure, f64)],
}

const LAG: (Measure, f64) = (Measure::LagP99Millis, 1000.0);

const SINGLE: [Shape; 3] = [
    Shape {
        size: 1,
        connections: 64,
        keys: None,
        floors: &[(Measure::Ratio, 4.0), (Measure::P50Millis, 3.0)],
        floors_with_everything: &[(Measure::Ratio, 3.0), LAG],
    },
    Shape {
        size: 1,
        connections: 256,
        keys: None,
        floors: &[(Measure::Ratio, 6.0)],
        floors_with_everything: &[(Measure::Ratio, 4.0), LAG],
    },
    Shape {
        size: 1,
        connections: 256,
        keys: Some(Order::Random),
        floors: &[(Measure::Ratio, 6.0)],
        floors_with_everything: &[(Measure::Ratio, 4.0), LAG],
    },
];
const BATCHES: [Shape; 2] = [
    Shape { size: 100, connections: 16, keys: None, floors: &[], floors_with_everything: &[] },
    Shape {
        size: 1000,
        connections: 3,
        keys: None,
        floors: &[(Measure::Ratio, 15.0)],
        floors_with_everything: &[(Measure::Ratio, 9.0), LAG],
    },
];

pub(crate) const MEASUREMENTS: u64 = SINGLE.len() as u64;
pub(crate) const MEASUREMENTS_OF_BATCHES: u64 = BATCHES.len() as u64;

/// Before anything is counted.
const WARM_UP: Duration = Duration::from_secs(2);

pub(crate) async fn single(run: &Run<'_>, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    measure("http", run, &SINGLE, figures).await
}

pub(crate) async fn batches(run: &Run<'_>, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    measure("batches", run, &BATCHES, figures).await
}

async fn measure(
    workload: &'static str,
    run: &Run<'_>,
    shapes: &[Shape],
    figures: &mut Vec<Figure>,
) -> anyhow::Result<()> {
    let server = Server::start(run.parts, run.wallets, run.steps).await?;
    for Shape { size, connections, keys, floors, floors_with_everything } in shapes {
        let keys = keys.unwrap_or(run.keys);
        let suffix = keys.suffix();
        run.steps.begin(format!("{workload}: {size} in a request, {connections} connections{suffix}, {}", run.parts));
        let capacity = Capacity { server: &server, size: *size, connections: *connections, keys, seed: run.seed };
        capacity.measure(WARM_UP).await?;
        if run.parts == Parts::EverythingOn {
            lag::until_level(&server.database_url).await?;
        }
        let (tally, sent, mut figure) = capacity.measure_with_meter(run.time, run.parts).await?;
        figure.workload = workload;
        let floors = if run.parts == Parts::EverythingOn { floors_with_everything } else { floors };
        figure.floors = floors.iter().map(|(measure, bound)| Floor::new(*measure, *bound)).collect();
        figures.push(figure);
        if tally.accepted.count() != sent.requests {
            bail!("not every transfer was granted: {}", tally.statuses());
        }
    }
    server.stop().await
}

/// A closed loop.
pub(crate) struct Capacity<'a> {
    pub(crate) server: &'a Server,
    /// Transfers in a request.
    pub(crate) size: usize,
    pub(crate) connections: usize,
    pub(crate) keys: Order,
    pub(crate) seed: u64,
}

impl Capacity<'_> {
    pub(crate) async fn measure(&self, time: Duration) -> anyhow::Result<(Tally, Sent)> {
        let load = Load {
            address: self.server.address,
            connections: self.connections,
            pace: Pace::Closed,
            extent: Extent::Time(time),
        };
        run_load(&load, self.server, self.size, &Keys::new(self.keys), self.seed, |_| ())
    }

    pub(crate) async fn measure_with_meter(
        &self,
        time: Duration,
        parts: Parts,
    ) -> anyhow::Result<(Tally, Sent, Figure)> {
        let url = &self.server.database_url;
        let position = check::head(url).await?;
        let watch = (parts == Parts::EverythingOn).then(|| lag::Watch::start(url));
        let meter = Meter::start(self.server.pid(), url).await?;
        let (tally, sent) = self.measure(time).await?;
        let done = tally.accepted.count() * u64::try_from(self.size)?;
        let used = meter.stop(done).await?;
        let lag = match watch {
            Some(watch) => Some(watch.stop().await?),
            None => None,
        };
        check::in_log_since(url, position, check::POSTED, done).await?;
        let variant = match self.size {
            1 => format!("{} connections{}", self.connections, self.keys.suffix()),
            size => format!("batches of {size}, {} conn.", self.connections),
        };
        let mut figure = Figure::new("http", parts, variant, done, sent.took);
        figure.latency = tally.accepted.summary();
        figure.used = Some(used);
        figure.lag = lag;
        Ok((tally, sent, figure))
    }
}

/// What the answers were.
pub(crate) struct Tally {
    pub(crate) accepted: Latencies,
    pub(crate) refused: Latencies,
    pub(crate) told: Vec<Told>,
    /// Refusals that did not say when to come again.
    pub(crate) without_retry_after: u64,
    others: BTreeMap<String, u64>,
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self {
            accepted: Latencies::new(),
            refused: Latencies::new(),
            told: Vec::new(),
            without_retry_after: 0,
            others: BTreeMap::new(),
        }
    }

    pub(crate) fn take(&mut self, answer: &Answer<'_>) {
        let told = match answer.status {
            Some(201) => Told::Accepted,
            Some(503) if contains(answer.body, b"/problems/overloaded") => Told::Refused,
            Some(503) if contains(answer.body, b"/problems/outcome-unknown") => Told::Unknown,
            None => Told::Unknown,
            Some(_) => Told::Otherwise,
        };
        match told {
            Told::Accepted => self.accepted.record(answer.took),
            Told::Refused => {
                self.refused.record(answer.took);
                self.without_retry_after += u64::from(!answer.retry_after);
            }
            _ => {
                let body: String = String::from_utf8_lossy(answer.body).chars().take(160).collect();
                let status = answer.status.map_or_else(|| "no answer".to_owned(), |status| format!("{status} {body}"));
                if self.others.len() < 16 || self.others.contains_key(&status) {
                    *self.others.entry(status).or_default() += 1;
                }
            }
        }
        let at = usize::try_from(answer.number).expect("counted");
        if self.told.len() <= at {
            self.told.resize(at + 1, Told::Nothing);
        }
        self.told[at] = told;
    }

    /// For an error's message.
    pub(crate) fn statuses(&self) -> String {
        format!("{} accepted, {} refused, {:?}", self.accepted.count(), self.refused.count(), self.others)
    }

    pub(crate) fn others(&self) -> u64 {
        self.others.values().sum()
    }
}

/// Requests with these keys, numbered from zero; `seen` looks at every answer as well.
pub(crate) fn run_load(
    load: &Load,
    server: &Server,
    size: usize,
    keys: &Keys,
    seed: u64,
    mut seen: impl FnMut(&Answer<'_>),
) -> anyhow::Result<(Tally, Sent)> {
    let mut random = Random::new(seed);
    let mut tally = Tally::new();
    let write = |number, out: &mut Vec<u8>| match size {
        1 => server.transfer(&server.partner, keys.of(number), &mut random, out),
        size => server.batch(&server.partner, size, keys.of(number), &mut random, out),
    };
    let take = |answer: Answer<'_>| {
        tally.take(&answer);
        seen(&answer);
    };
    let sent = tokio::task::block_in_place(|| load.run(write, take))?;
    Ok((tally, sent))
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
