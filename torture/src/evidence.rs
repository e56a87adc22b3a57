//! The evidence: everything that a run has left, gathered when all is quiet.
//!
//! What clients know, the log as it lies in Postgres, what HTTP shows, what the receiver has got. It is written to a
//! file as a whole, so that a violation can be looked at later. Left out: what it proves (`check.rs`).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::sleep;

use crate::check::told;
use crate::fold::Fold;
use crate::history::{History, Known};
use crate::log::Log;
use crate::receiver::{Received, Receiver};
use crate::workload::World;

/// A bank that must be asked, and its answer to become a command.
const PAYMENTS_TIME: Duration = Duration::from_secs(60);

/// Longer than a dead process' lease on a delivery, and a few failures of the receiver.
const DELIVERY_TIME: Duration = Duration::from_secs(120);

/// For one page.
const READ_TIME: Duration = Duration::from_secs(40);

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Evidence {
    pub(crate) known: Known,
    pub(crate) log: Log,
    pub(crate) shown: Shown,
    /// By webhook id.
    pub(crate) received: BTreeMap<String, Received>,
    pub(crate) admin_client: String,
    pub(crate) partner_client: String,
    pub(crate) partner: String,
    /// Of the key that the partner was registered with.
    pub(crate) registration_key: Vec<u8>,
    /// The endpoint is told of what comes after this position.
    pub(crate) endpoint_after: i64,
}

/// What the read side shows to the operator.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Shown {
    pub(crate) wallets: Vec<Value>,
    pub(crate) transactions: Vec<Value>,
    /// By wallet, oldest first.
    pub(crate) entries: BTreeMap<String, Vec<Value>>,
}

/// Until nothing is under way any more: every decided payment has come in, everything has been told. Answers how long
/// that took; what has not come by then never comes, and is the judge's to name.
pub(crate) async fn quiet(
    database_url: &str,
    history: &History,
    receiver: &Receiver,
    partner: &str,
    endpoint_after: i64,
) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    loop {
        let log = Log::read(database_url).await?;
        let fold = Fold::of(&log);
        let open = history.with(|known| {
            let decided = known.payments.values().filter(|payment| payment.taken);
            decided.filter(|payment| is_pending(&fold, &payment.transaction)).count()
        });
        if open == 0 || PAYMENTS_TIME < begin.elapsed() {
            break;
        }
        sleep(Duration::from_millis(500)).await;
    }
    let log = Log::read(database_url).await?;
    let told = told(&log, &Fold::of(&log), partner, endpoint_after);
    while told.keys().any(|id| !receiver.has_taken(id)) && begin.elapsed() < PAYMENTS_TIME + DELIVERY_TIME {
        sleep(Duration::from_millis(100)).await;
    }
    Ok(begin.elapsed())
}

impl Shown {
    /// Every list to its end, at the log's head.
    pub(crate) async fn read(world: &World, head: i64) -> anyhow::Result<Self> {
        let mut shown = Self {
            wallets: list(world, &format!("/v1/wallets?limit=100&minPosition={head}&waitMs=30000")).await?,
            transactions: list(world, &format!("/v1/transactions?limit=100&minPosition={head}&waitMs=30000")).await?,
            entries: BTreeMap::new(),
        };
        let partners = shown.wallets.iter().filter(|wallet| wallet["partnerId"].is_string());
        let ids: Vec<String> = partners.filter_map(|wallet| wallet["id"].as_str().map(str::to_owned)).collect();
        for id in ids {
            let route = format!("/v1/wallets/{id}/entries?limit=100&minPosition={head}&waitMs=30000");
            let mut entries = list(world, &route).await?;
            entries.sort_by_key(|entry| entry["position"].as_i64());
            shown.entries.insert(id, entries);
        }
        Ok(shown)
    }
}

async fn list(world: &World, route: &str) -> anyhow::Result<Vec<Value>> {
    let (mut items, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = format!("{route}{cursor}");
        let (answer, mut body) = world.get(true, &page, READ_TIME).await.with_context(|| page.clone())?;
        if answer.status != 200 {
            bail!("{page}: {} {}", answer.status, answer.body);
        }
        items.append(body["data"].as_array_mut().with_context(|| format!("{page} is no list"))?);
        match body["nextCursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return Ok(items),
        }
    }
}

fn is_pending(fold: &Fold, transaction: &str) -> bool {
    fold.transactions.get(transaction).is_none_or(|found| found.status == "PENDING")
}
