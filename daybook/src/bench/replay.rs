//! Reading the log that is there: verified and folded, by the engine that starts without a snapshot, and by the auditor.
//!
//! The log is made by HTTP batches, so its commits have about a thousand events. *Replay* reads it in order, recomputes every leaf, root and
//! chain and folds every event into a book. *The engine's start* is what `Ledger::start` does when its snapshot is lost. *Audit* is
//! `daybook audit`, which folds a second time by its own code; the views are empty here and `catch_up.rs` has it with them.

use std::time::Instant;

use anyhow::{Context, ensure};
use event_store::{Commit, Head, Log, StoreError, hash};
use ledger_core::Book;
use ledger_engine::{Ledger, Settings};
use sqlx::{Connection, PgConnection};

use super::figures::{Figure, Parts};
use super::floors::{Floor, Measure};
use super::machine::Meter;
use super::server::Server;
use super::{Run, check};

pub(crate) const MEASUREMENTS: u64 = 3;

/// Events that are read at a time.
const PAGE: i64 = 2_000;

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
        ledger.stop(std::time::Duration::from_secs(10)).await;
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

/// One page is read while the one before is folded.
async fn replay(url: &str) -> anyhow::Result<()> {
    let log = Log::new(event_store::connect(url, "daybook_reader", 2).await?);
    let end = log.head().await?;
    let mut book = Book::default();
    let (mut position, mut chain) = (0, hash::genesis(log.ledger_id().await?));
    let mut next = page_after(&log, 0);
    loop {
        let commits = next.await??;
        let Some(last) = commits.last() else { break };
        next = page_after(&log, last.number);
        for commit in &commits {
            verify(commit, position, &chain)?;
            for event in &commit.events {
                book.apply(event.position, &event.read()?);
            }
            book.keep(book.mark());
            (position, chain) = (commit.last, commit.chain);
        }
        tokio::task::yield_now().await;
    }
    let Head { position: last, chain: expected, .. } = end;
    ensure!(position == last && chain == expected, "the replay ended at {position}, the log at {last}");
    Ok(())
}

fn page_after(log: &Log, commit: i64) -> tokio::task::JoinHandle<Result<Vec<Commit>, StoreError>> {
    let log = log.clone();
    tokio::spawn(async move { log.commits_after(commit, PAGE).await })
}

fn verify(commit: &Commit, position: i64, chain: &hash::Hash) -> anyhow::Result<()> {
    let number = commit.number;
    let leaves: Vec<_> = commit.events.iter().map(event_store::RecordedEvent::leaf).collect();
    let stored = commit.events.iter().map(|event| event.leaf_hash);
    ensure!(stored.eq(leaves.iter().copied()), "a leaf of commit {number} is not that of its event");
    let root = hash::root(&leaves);
    let follows = commit.first == position + 1 && commit.previous_chain == *chain;
    let sound = root == commit.root && hash::chain(chain, &root, commit.first, commit.last) == commit.chain;
    (follows && sound).then_some(()).with_context(|| format!("commit {number} does not follow from the one before it"))
}
