//! Transfers over HTTP, one or many in a request: keep-alive connections that each send when their answer has come.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::bail;

use super::check::{self, Told};
use super::figures::{Figure, Latencies, Parts};
use super::load::{Answer, Extent, Load, Pace, Sent};
use super::machine::Meter;
use super::random::Random;
use super::server::Server;

/// Transfers in a request, and connections: not more at a time than the engine takes on whatever the disk does.
const SHAPES: [(usize, usize); 4] = [(1, 64), (1, 256), (100, 16), (1000, 3)];

/// Before anything is counted.
const WARM_UP: Duration = Duration::from_secs(2);

pub(crate) async fn run(
    parts: Parts,
    seconds: u64,
    wallets: u64,
    seed: u64,
    say: impl Fn(&str),
) -> anyhow::Result<Vec<Figure>> {
    let with = if parts == Parts::EverythingOn { "everything on" } else { "engine alone" };
    say(&format!("http: starting the server, {with}, and {wallets} wallets"));
    let server = Server::start(parts, wallets).await?;
    let mut figures = Vec::new();
    for (size, connections) in SHAPES {
        say(&format!("http: {size} in a request, {connections} connections, {with}"));
        let capacity = Capacity { server: &server, size, connections, seed };
        capacity.measure(&format!("warm-up-{size}-{connections}"), WARM_UP).await?;
        let name = format!("http-{size}-{connections}");
        let (tally, sent, figure) = capacity.measure_with_meter(&name, Duration::from_secs(seconds), parts).await?;
        if tally.accepted.count() != sent.requests {
            bail!("not every transfer was granted: {}", tally.statuses());
        }
        figures.push(figure);
    }
    server.stop().await?;
    Ok(figures)
}

/// A closed loop.
pub(crate) struct Capacity<'a> {
    pub(crate) server: &'a Server,
    /// Transfers in a request.
    pub(crate) size: usize,
    pub(crate) connections: usize,
    pub(crate) seed: u64,
}

impl Capacity<'_> {
    pub(crate) async fn measure(&self, name: &str, time: Duration) -> anyhow::Result<(Tally, Sent)> {
        let load = Load {
            address: self.server.address,
            connections: self.connections,
            pace: Pace::Closed,
            extent: Extent::Time(time),
        };
        run_load(&load, self.server, self.size, name, self.seed, |_| ())
    }

    pub(crate) async fn measure_with_meter(
        &self,
        name: &str,
        time: Duration,
        parts: Parts,
    ) -> anyhow::Result<(Tally, Sent, Figure)> {
        let url = &self.server.database_url;
        let position = check::head(url).await?;
        let meter = Meter::start(self.server.pid(), url).await?;
        let (tally, sent) = self.measure(name, time).await?;
        let done = tally.accepted.count() * u64::try_from(self.size)?;
        let used = meter.stop(done).await?;
        check::posted_since(url, position, done).await?;
        let variant = match self.size {
            1 => format!("{} connections", self.connections),
            size => format!("batches of {size}, {} conn.", self.connections),
        };
        let mut figure = Figure::new("http", parts, variant, done, sent.took);
        figure.latency = tally.accepted.summary();
        figure.used = Some(used);
        if parts == Parts::EverythingOn {
            let caught_up = caught_up(url).await?;
            figure.notes.push(format!("views were at the head {:.1} s after the last answer", caught_up.as_secs_f64()));
        }
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

/// The key of a request.
pub(crate) fn key(name: &str, number: u64) -> String {
    format!("{name}-{number:09}")
}

/// Requests of one name, numbered from zero; `seen` looks at every answer as well.
pub(crate) fn run_load(
    load: &Load,
    server: &Server,
    size: usize,
    name: &str,
    seed: u64,
    mut seen: impl FnMut(&Answer<'_>),
) -> anyhow::Result<(Tally, Sent)> {
    let mut random = Random::new(seed);
    let mut tally = Tally::new();
    let write = |number, out: &mut Vec<u8>| match size {
        1 => server.transfer(&key(name, number), &mut random, out),
        size => server.batch(size, &key(name, number), &mut random, out),
    };
    let take = |answer: Answer<'_>| {
        tally.take(&answer);
        seen(&answer);
    };
    let sent = tokio::task::block_in_place(|| load.run(write, take))?;
    Ok((tally, sent))
}

/// How long the views take to reach the head, at most a minute.
async fn caught_up(database_url: &str) -> anyhow::Result<Duration> {
    use sqlx::{Connection, PgConnection};
    let mut connection = PgConnection::connect(database_url).await?;
    let begun = Instant::now();
    loop {
        let behind: i64 = sqlx::query_scalar(
            "select (select last_position from ledger.commits order by number desc limit 1)
                    - (select min(position) from views.checkpoints)",
        )
        .fetch_one(&mut connection)
        .await?;
        if behind <= 0 || Duration::from_secs(60) < begun.elapsed() {
            connection.close().await?;
            return Ok(begun.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
