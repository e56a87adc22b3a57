//! The log's end: that its last commits follow from each other and from what they hold, that nothing is missing, that
//! the engines' snapshot is of this log, and that the clocks agree.
//!
//! A look, bounded in time. `daybook audit` reads all of it.

use std::time::{Duration, Instant};

use event_store::{Commit, Head, Log, StoreError, hash};
use ledger_core::Timestamp;
use sqlx::Row;
use sqlx::types::time::OffsetDateTime;

use super::postgres::Server;
use super::{Finding, Findings};

/// Verified from the end, and taken from all over the log, in so much time each.
const COMMITS: i64 = 1_000;
const SAMPLES: i64 = 50;
const TIME: Duration = Duration::from_secs(4);

const AUDIT: &str =
    "Stop the services, run `daybook audit`, and compare with an export or a checkpoint that lies elsewhere.";

pub(super) async fn open(server: &Server) -> anyhow::Result<Log> {
    Ok(Log::new(event_store::connect(&server.url, "daybook_reader", 1).await?))
}

pub(super) async fn tail(server: Server) -> anyhow::Result<Findings> {
    const CHECK: &str = "chain";
    let mut connection = server.connect().await?;
    let opened: bool =
        sqlx::query_scalar("select to_regclass('ledger.commits') is not null").fetch_one(&mut connection).await?;
    if !opened {
        return Ok(vec![Finding::not_looked_at(CHECK, "there is no log")]);
    }
    let log = open(&server).await?;
    let head = log.head().await?;
    let mut findings = vec![Finding::ok(
        "head",
        format!(
            "position {}, commit {}, chain {}…, recorded at {}",
            head.position,
            head.commit,
            &hash::hex(&head.chain)[..16],
            head.recorded_at
        ),
    )];

    let genesis: Option<Vec<u8>> =
        sqlx::query_scalar("select chain from ledger.commits where number = 0").fetch_optional(&mut connection).await?;
    if genesis.as_deref() != Some(hash::genesis(log.ledger_id().await?).as_slice()) {
        findings.push(Finding::wrong(CHECK, "commit 0 does not belong to this ledger's id", AUDIT));
    }
    // In this order: the head may move on in between, the last event first.
    let last: Option<i64> =
        sqlx::query_scalar("select max(position) from ledger.events").fetch_one(&mut connection).await?;
    let now = log.head().await?;
    if now.position < last.unwrap_or(0) {
        findings.push(Finding::wrong(
            "gaps",
            format!(
                "there are events up to position {}, and the last commit ends at {}",
                last.unwrap_or(0),
                now.position
            ),
            AUDIT,
        ));
    }

    let from = (head.commit - COMMITS).max(0);
    match verify(&log, from, &head).await {
        Ok(Verified { commits, events, fault: None }) => findings.push(Finding::ok(
            CHECK,
            format!("the last {commits} commits with {events} events are as they were hashed, without a gap"),
        )),
        Ok(Verified { fault: Some(fault), .. }) | Err(StoreError::Corrupt(fault)) => {
            findings.push(Finding::wrong(CHECK, fault, AUDIT));
        }
        Err(error) => return Err(error.into()),
    }
    if 0 < from {
        findings.push(samples(&log, from).await?);
    }
    Ok(findings)
}

struct Verified {
    commits: i64,
    events: usize,
    fault: Option<String>,
}

/// From after a commit up to a head, or for as long as there is time.
async fn verify(log: &Log, after: i64, head: &Head) -> Result<Verified, StoreError> {
    let began = Instant::now();
    let mut at = after;
    let mut before: Option<Commit> = None;
    let mut verified = Verified { commits: 0, events: 0, fault: None };
    while at < head.commit && began.elapsed() < TIME {
        let page = log.commits_after(at, 1_000).await?;
        if page.is_empty() {
            verified.fault = Some(format!("commit {} is missing", at + 1));
            return Ok(verified);
        }
        for commit in page {
            verified.fault = fault_of(&commit).or_else(|| {
                if commit.number != at + 1 {
                    return Some(format!("commit {} is missing", at + 1));
                }
                let before = before.as_ref()?;
                let follows = commit.previous_chain == before.chain && commit.first == before.last + 1;
                (!follows).then(|| format!("commit {} does not follow from the one before", commit.number))
            });
            if verified.fault.is_some() {
                return Ok(verified);
            }
            at = commit.number;
            verified.commits += 1;
            verified.events += commit.events.len();
            before = Some(Commit { events: Vec::new(), ..commit });
        }
    }
    Ok(verified)
}

/// What about a commit is not as it was hashed.
fn fault_of(commit: &Commit) -> Option<String> {
    if let Some(event) = commit.events.iter().find(|event| event.leaf() != event.leaf_hash) {
        return Some(format!("position {} is not as it was hashed", event.position));
    }
    let leaves: Vec<_> = commit.events.iter().map(|event| event.leaf_hash).collect();
    if hash::root(&leaves) != commit.root {
        return Some(format!(
            "the events of commit {} (position {} on) are not those of its root",
            commit.number, commit.first
        ));
    }
    let chain = hash::chain(&commit.previous_chain, &commit.root, commit.first, commit.last);
    (chain != commit.chain).then(|| format!("the chain of commit {} does not follow", commit.number))
}

/// Commits from all over the log, others each time.
async fn samples(log: &Log, up_to: i64) -> anyhow::Result<Finding> {
    const CHECK: &str = "samples";
    let began = Instant::now();
    let step = (up_to / SAMPLES).max(1);
    let offset = i64::from(OffsetDateTime::now_utc().nanosecond()) % step;
    let mut looked = 0;
    let mut at = offset;
    while at < up_to && began.elapsed() < TIME {
        let fault = match log.commits_after(at, 1).await {
            Ok(found) => found.first().map_or_else(|| Some(format!("commit {} is missing", at + 1)), fault_of),
            Err(StoreError::Corrupt(fault)) => Some(fault),
            Err(error) => return Err(error.into()),
        };
        if let Some(fault) = fault {
            return Ok(Finding::wrong(CHECK, fault, AUDIT));
        }
        looked += 1;
        at += step;
    }
    Ok(Finding::ok(CHECK, format!("{looked} commits from all over the log are as they were hashed")))
}

/// The engines' book as it was at a position: a start that began from another log's would decide on invented balances.
pub(super) async fn snapshot(server: Server) -> anyhow::Result<Findings> {
    const CHECK: &str = "snapshot";
    const FAR: i64 = 5_000_000;
    let mut connection = server.connect().await?;
    let rows = sqlx::query(
        "select s.position, s.commit_number, c.chain is not distinct from s.chain and c.last_position = s.position as belongs,
                (select last_position from ledger.commits order by number desc limit 1) as head
         from ledger.book_snapshot s left join ledger.commits c on c.number = s.commit_number",
    );
    let mut findings = Vec::new();
    for row in rows.fetch_all(&mut connection).await? {
        let (position, commit, head): (i64, i64, i64) =
            (row.try_get("position")?, row.try_get("commit_number")?, row.try_get("head")?);
        findings.push(if !row.try_get::<Option<bool>, _>("belongs")?.unwrap_or(false) {
            Finding::wrong(
                CHECK,
                format!("it stands at position {position}, commit {commit}, which this log does not have so"),
                "With no engine running, empty ledger.book_snapshot, book_wallets and book_partners: the next start folds the log.",
            )
        } else if FAR < head - position {
            Finding::warning(
                CHECK,
                format!("it stands at position {position}, {} before the head: the next start takes long", head - position),
                "See that a command-api runs; it writes one as it goes.",
            )
        } else {
            Finding::ok(CHECK, format!("at position {position}, {} before the head", head - position))
        });
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, "none yet: a start folds the whole log"));
    }
    Ok(findings)
}

pub(super) async fn clock(server: Server) -> anyhow::Result<Findings> {
    const CHECK: &str = "clock";
    const APART: i64 = 1_000_000; // microseconds
    const FAR_APART: i64 = 60_000_000;
    let mut connection = server.connect().await?;
    let before = now()?;
    let theirs: OffsetDateTime = sqlx::query_scalar("select clock_timestamp()").fetch_one(&mut connection).await?;
    let after = now()?;
    let theirs = Timestamp::try_from(theirs)?.micros();
    // It was read somewhere between our two looks.
    let apart = if theirs < before { before - theirs } else { (theirs - after).max(0) };
    let sync = "Have both machines' clocks kept by NTP: tokens, callbacks and expiry are judged by them.";
    let found = format!("this machine's and Postgres' are at most {} ms apart", (apart + after - before) / 1_000);
    let mut findings = vec![match apart {
        FAR_APART.. => Finding::wrong(CHECK, found, sync),
        APART.. => Finding::warning(CHECK, found, sync),
        _ => Finding::ok(CHECK, found),
    }];

    let there: bool =
        sqlx::query_scalar("select to_regclass('ledger.commits') is not null").fetch_one(&mut connection).await?;
    if there {
        let ahead: Option<i64> = sqlx::query_scalar(
            "select (extract(epoch from recorded_at - clock_timestamp()) * 1000)::bigint
             from ledger.commits order by number desc limit 1",
        )
        .fetch_optional(&mut connection)
        .await?;
        let advice = "Correct the clocks. New events get the head's time until the clock has passed it; nothing is to be repaired.";
        findings.extend(ahead.map(|ahead| match ahead {
            60_000.. => Finding::wrong("head-in-future", format!("the head was recorded {ahead} ms from now"), advice),
            1_000.. => Finding::warning("head-in-future", format!("the head was recorded {ahead} ms from now"), advice),
            _ => Finding::ok("head-in-future", "the head was recorded in the past"),
        }));
    }
    Ok(findings)
}

/// Microseconds since 1970.
fn now() -> anyhow::Result<i64> {
    Ok(Timestamp::try_from(OffsetDateTime::now_utc())?.micros())
}
