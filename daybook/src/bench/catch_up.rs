//! The read side from nothing: the views are empty, the log is there, and the projector starts.
//!
//! *Engine alone*: the projector in this process, and nothing else runs. *Everything on*: `daybook up` starts on that
//! log, so that webhooks and workflows read it at the same time; counted from when it is ready.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use event_feed::{FeedSettings, Log};
use projector::Progress;
use runtime::shutdown::Shutdown;
use sqlx::{Connection, PgConnection};

use super::figures::{Figure, Parts};
use super::floors::{Floor, Measure};
use super::lag::{positions, until_level};
use super::machine::Meter;
use super::server::Server;
use super::{Run, replay};

/// The projector, and the audit of what it has made.
pub(crate) const MEASUREMENTS: u64 = 2;

pub(crate) async fn run(run: &Run<'_>, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    let mut server = Server::start(Parts::EngineAlone, run.wallets, run.steps).await?;
    let events = run.events();
    run.steps.say(format!("making a log of {events} events"));
    server.fill(events, run.seed).await?;
    server.end().await?;

    run.steps.begin(format!("catch-up: {events} events, {}", run.parts));
    let alone = match run.parts {
        Parts::EverythingOn => {
            server.start_again(run.parts).await?;
            None
        }
        Parts::EngineAlone | Parts::Postgres => Some(Projector::start(&server).await?),
    };
    let url = server.database_url.clone();
    let pid = if alone.is_some() { std::process::id() } else { server.pid() };
    let mut connection = PgConnection::connect(&url).await?;
    let (head, from) = positions(&mut connection).await?;
    connection.close().await?;
    let behind = u64::try_from(head - from)?;
    let meter = Meter::start(pid, &url).await?;
    let begun = Instant::now();
    until_level(&url).await?.context("the views were not level in time")?;
    let took = begun.elapsed();
    let variant = if alone.is_some() { "projector, views empty" } else { "daybook up, views empty" };
    let mut figure = Figure::new("catch-up", run.parts, variant, behind, took);
    figure.used = Some(meter.stop(behind).await?);
    figure.notes.push(format!("{behind} events in {:.2} s", took.as_secs_f64()));
    if alone.is_some() {
        figure.floors.push(Floor::new(Measure::Ratio, 8.0));
    }
    figures.push(figure);
    match alone {
        Some(projector) => projector.stop().await?,
        None => {
            server.end().await?;
            server.start_again(Parts::EngineAlone).await?; // for its Postgres
            server.end().await?;
        }
    }

    run.steps.begin("catch-up: daybook audit, with the views");
    let mut audited = replay::audit(&server.database_url, "catch-up", "daybook audit, with views").await?;
    audited.parts = run.parts;
    figures.push(audited);
    if let Some(stack) = server.stack.take() {
        stack.stop().await?;
    }
    Ok(())
}

struct Projector {
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
    shutdown: Shutdown,
}

impl Projector {
    async fn start(server: &Server) -> anyhow::Result<Self> {
        let stack = server.stack.as_ref().context("the servers run")?;
        let log = Log::new(event_store::connect(stack.database_url(), "daybook_reader", 1).await?);
        let feed = FeedSettings::of(&log, Some(stack.nats_url().to_owned())).await?;
        let settings = projector::Settings { database_url: stack.database_url().to_owned(), feed };
        let shutdown = Shutdown::new();
        let task = tokio::spawn(projector::follow(settings, Progress::default(), shutdown.clone()));
        Ok(Self { task, shutdown })
    }

    async fn stop(mut self) -> anyhow::Result<()> {
        ensure!(!self.task.is_finished(), "the projector ended by itself");
        self.shutdown.trigger();
        tokio::time::timeout(Duration::from_secs(10), &mut self.task).await.context("the projector did not stop")??
    }
}

/// After a failure it must not go on beside the next workload.
impl Drop for Projector {
    fn drop(&mut self) {
        self.shutdown.trigger();
    }
}
