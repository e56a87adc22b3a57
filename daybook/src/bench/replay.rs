//! Reading the log that is there: verified and folded, by the engine that starts without a snapshot, and by the auditor.
//!
//! The log is made by HTTP batches, so its commits have about a thousand events. *Replay* reads it in order, recomputes every leaf, root and
//! chain and folds every event into a book. *The engine's start* is what `Ledger::start` does when its snapshot is lost. *Audit* is
//! `daybook audit`, which folds a second time by its own code; the views are empty here and `catch_up.rs` has it with them.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use event_store::{Log, Writer};
use ledger_core::Book;
use ledger_engine::{Ledger, Settings};
use sqlx::{Connection, PgConnection};

use super::figures::{Figure, Parts};
use super::floors::{Floor, Measure};
use super::machine::Meter;
use super::server::Server;
use super::{Run, check};

pub(crate) const MEASUREMENTS: u64 = 3;

pub(crate) async fn run(run: &Run<'_>, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    let mut server = Server::start(Parts::EngineAlone, run.wallets, run.steps).await?;
    let events = run.events();
    run.steps.say(format!("making a log of {events} events"));
    server.fill(events, run.seed).await?;
    server.end().await?;
    let url = server.database_url.clone();

    run.steps.begin("replay: every hash recomputed, folded into a book");
    let mut figure = measure(&url, "hashes recomputed, folded", async || replay(&url).await).await?;
    figure.floors.push(Floor::new(Measure::Ratio, 60.0));
    figures.push(figure);

    run.steps.begin("replay: the engine's start without its snapshot");
    let mut connection = PgConnection::connect(&url).await?;
    sqlx::raw_sql("truncate ledger.book_snapshot, ledger.book_wallets, ledger.book_partners")
        .execute(&mut connection)
        .await?;
    connection.close().await?;
    let mut ledger = None;
    let start = async || {
        ledger = Some(Ledger::start(&url, Settings::default()).await?);
        Ok(())
    };
    figures.push(measure(&url, "engine's start, no snapshot", start).await?);
    if let Some(ledger) = ledger {
        ledger.stop(Duration::from_secs(10)).await;
    }

    run.steps.begin("replay: daybook audit");
    figures.push(audit(&url, "replay", "daybook audit, views empty").await?);
    if let Some(stack) = server.stack.take() {
        stack.stop().await?;
    }
    Ok(())
}

/// `daybook audit` in this process. The database must be sound.
pub(crate) async fn audit(url: &str, workload: &'static str, variant: &str) -> anyhow::Result<Figure> {
    let audit = async || {
        let report = auditor::audit(url, |_, _| ()).await?;
        ensure!(report.is_sound(), "the audit found what should not be: {report}");
        Ok(())
    };
    let mut figure = measure(url, variant, audit).await?;
    figure.workload = workload;
    Ok(figure)
}

/// Something that reads all of the log.
async fn measure(
    url: &str,
    variant: &str,
    reading: impl AsyncFnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Figure> {
    let events = u64::try_from(check::head(url).await?)?;
    let meter = Meter::start(std::process::id(), url).await?;
    let begun = Instant::now();
    reading().await?;
    let took = begun.elapsed();
    let mut figure = Figure::new("replay", Parts::EngineAlone, variant, events, took);
    figure.used = Some(meter.stop(events).await?);
    figure.notes.push(format!("{events} events in {:.2} s", took.as_secs_f64()));
    Ok(figure)
}

/// Over the same pass through the log as the engine's start: it recomputes every leaf, root and chain.
async fn replay(url: &str) -> anyhow::Result<()> {
    let log = Log::new(event_store::connect(url, "daybook_reader", 2).await?);
    let end = log.head().await?;
    let genesis = Writer::new(url)?.head_at(0).await?.context("a log has a commit 0")?;
    let mut replay = log.replay(genesis).await?;
    let mut book = Book::default();
    while let Some(page) = replay.next().await? {
        for event in page.events() {
            book.fold(event.position, &event.read()?);
        }
    }
    let reached = replay.head();
    ensure!(reached.chain == end.chain, "the replay ended at {}, the log at {}", reached.position, end.position);
    Ok(())
}
