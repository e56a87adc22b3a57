//! The report of a run: what was done to the system, how it came back, and which promises held.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::act::Done;
use crate::check::{Promise, Violation};
use crate::script::Length;

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub seed: u64,
    pub length: Length,
    pub seconds: u64,
    pub faults: Vec<Done>,
    pub kills: u32,
    pub counts: Counts,
    /// How many violations each promise has.
    pub violated: BTreeMap<Promise, usize>,
    /// The first violations of each promise.
    pub violations: Vec<Violation>,
    pub planted: Planted,
    /// From the last fault until every payment had come in and everything had been told.
    pub quiet_ms: u64,
    /// Where the history, the evidence and the logs are, when there is something to look for in them.
    pub kept: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    pub calls: usize,
    pub acknowledged: usize,
    pub refused: usize,
    /// Calls of which at some time nobody knew what had become of them; all were settled by their keys.
    pub once_unknown: usize,
    pub abandoned: usize,
    pub replayed: usize,
    pub reads: usize,
    pub payments: usize,
    pub events: usize,
    pub commits: usize,
    pub webhooks: usize,
    pub webhooks_repeated: usize,
}

/// Bugs planted into copies of the run's evidence, to see whether they are caught.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Planted {
    pub planted: usize,
    pub caught: usize,
    pub missed: Vec<&'static str>,
}

impl Report {
    /// Whether every promise held, and the judge has shown that it would have seen otherwise.
    pub fn is_sound(&self) -> bool {
        self.violations.is_empty() && self.planted.planted == crate::planted::COUNT && self.planted.missed.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { counts, planted, .. } = self;
        writeln!(f, "{:>8} {:>8}  fault", "ack ms", "views ms")?;
        for done in &self.faults {
            let missed = if done.at_its_moment { "" } else { "  (its moment did not come)" };
            writeln!(f, "{:>8} {:>8}  {}{missed}", done.acknowledged_ms, done.views_ms, done.fault)?;
        }
        let percentile = |of: fn(&Done) -> u64, percent: usize| {
            let mut times: Vec<u64> = self.faults.iter().map(of).collect();
            times.sort_unstable();
            times.get(times.len().saturating_sub(1) * percent / 100).copied().unwrap_or_default()
        };
        let (ack, views) = (|done: &Done| done.acknowledged_ms, |done: &Done| done.views_ms);
        writeln!(
            f,
            "\n{} faults with {} kills in {} s; acknowledged again after {} ms (median), {} ms (worst), \
             views level after {} ms, {} ms; all told {} ms after the last one",
            self.faults.len(),
            self.kills,
            self.seconds,
            percentile(ack, 50),
            percentile(ack, 100),
            percentile(views, 50),
            percentile(views, 100),
            self.quiet_ms,
        )?;
        writeln!(
            f,
            "{} calls: {} acknowledged, {} refused, {} abandoned; {} were once unknown, {} answers replayed",
            counts.calls, counts.acknowledged, counts.refused, counts.abandoned, counts.once_unknown, counts.replayed
        )?;
        writeln!(
            f,
            "{} events in {} commits, {} payments, {} reads, {} webhooks, {} of them more than once\n",
            counts.events, counts.commits, counts.payments, counts.reads, counts.webhooks, counts.webhooks_repeated
        )?;
        for (promise, count) in &self.violated {
            writeln!(f, "{:<20} {count}", promise.name())?;
        }
        writeln!(f, "{:<20} {} of {}", "planted bugs caught", planted.caught, crate::planted::COUNT)?;
        for missed in &planted.missed {
            writeln!(f, "  not caught: {missed}")?;
        }
        if let Some(first) = self.violations.first() {
            writeln!(f, "\nseed {}: {first}", self.seed)?;
        }
        for violation in self.violations.iter().skip(1).take(20) {
            writeln!(f, "  {violation}")?;
        }
        if let Some(kept) = &self.kept {
            writeln!(f, "kept: {}", kept.display())?;
        }
        Ok(())
    }
}
