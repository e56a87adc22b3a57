//! Floors: what a figure must reach, written beside the workload that makes it and judged in the run that made it.
//!
//! Rates are judged as ratios to the yardstick, one caller's wait as a multiple of a bare `insert` and `commit`: without
//! a yardstick in the same run they stay unjudged. Everything else is judged by itself. Left out: comparing runs.

use serde::Serialize;

use super::figures::{Figure, ratio};

/// A bound, and what it was compared with.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Floor {
    measure: Measure,
    bound: f64,
    /// Nothing where there was nothing to compare with.
    #[serde(skip_serializing_if = "Option::is_none")]
    is: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    met: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Measure {
    /// Of the yardstick's rate, at least.
    Ratio,
    /// Of a bare commit's p50, at most.
    BareCommits,
    /// Of the rate on ten thousand wallets, at least.
    OfManyWallets,
    P50Millis,
    P99Millis,
    P999Millis,
    LagP99Millis,
    RssMib,
    ReadySeconds,
    /// Memory at the end of a long run against its middle, at most.
    Growth,
}

/// What others are compared with.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Yardstick {
    /// The best of `pgbench`.
    pub(crate) per_second: Option<f64>,
    pub(crate) bare_commit_millis: Option<f64>,
}

impl Floor {
    pub(crate) fn new(measure: Measure, bound: f64) -> Self {
        Self { measure, bound, is: None, met: None }
    }

    /// With what it is compared with, where the figure itself does not say that.
    pub(crate) fn of(measure: Measure, bound: f64, is: f64) -> Self {
        Self { is: Some(is), ..Self::new(measure, bound) }
    }

    pub(crate) fn met(&self) -> Option<bool> {
        self.met
    }

    fn judge(&mut self, figure: &Figure, yardstick: Yardstick) {
        let latency = figure.latency.as_ref();
        self.is = match self.measure {
            Measure::Ratio => figure.ratio,
            Measure::BareCommits => {
                latency.zip(yardstick.bare_commit_millis).map(|(latency, bare)| ratio(latency.p50, bare))
            }
            Measure::P50Millis => latency.map(|latency| latency.p50),
            Measure::P99Millis => latency.map(|latency| latency.p99),
            Measure::P999Millis => latency.map(|latency| latency.p999),
            Measure::LagP99Millis => figure.lag.as_ref().map(|lag| lag.p99_millis),
            Measure::RssMib => {
                figure.used.as_ref().and_then(|used| u32::try_from(used.server_rss_mib).ok()).map(f64::from)
            }
            Measure::OfManyWallets | Measure::ReadySeconds | Measure::Growth => self.is,
        };
        let at_least = matches!(self.measure, Measure::Ratio | Measure::OfManyWallets);
        self.met = self.is.map(|is| if at_least { self.bound <= is } else { is <= self.bound });
    }
}

/// Judges every floor of every figure.
pub(crate) fn judge(figures: &mut [Figure], yardstick: Yardstick) {
    for figure in figures {
        let rated = figure.workload != "yardstick" && 0.0 < figure.per_second;
        figure.ratio = yardstick.per_second.filter(|_| rated).map(|best| ratio(figure.per_second, best));
        let mut floors = std::mem::take(&mut figure.floors);
        floors.iter_mut().for_each(|floor| floor.judge(figure, yardstick));
        figure.floors = floors;
    }
}

/// `≥ 12× met`, `lag p99 ≤ 1000 ms MISSED (1830)`, `≥ 4× not judged`.
impl std::fmt::Display for Floor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bound = self.bound;
        match self.measure {
            Measure::Ratio => write!(f, "≥ {bound}×"),
            Measure::BareCommits => write!(f, "p50 ≤ {bound} bare commits"),
            Measure::OfManyWallets => write!(f, "≥ {bound} of many wallets"),
            Measure::P50Millis => write!(f, "p50 ≤ {bound} ms"),
            Measure::P99Millis => write!(f, "p99 ≤ {bound} ms"),
            Measure::P999Millis => write!(f, "p99.9 ≤ {bound} ms"),
            Measure::LagP99Millis => write!(f, "lag p99 ≤ {bound} ms"),
            Measure::RssMib => write!(f, "RSS ≤ {bound} MiB"),
            Measure::ReadySeconds => write!(f, "ready ≤ {bound} s"),
            Measure::Growth => write!(f, "RSS at the end ≤ {bound} of half-way"),
        }?;
        match (self.met, self.is) {
            (Some(true), Some(is)) => write!(f, " met ({is:.2})"),
            (Some(false), Some(is)) => write!(f, " MISSED ({is:.2})"),
            _ => f.write_str(" not judged"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::figures::Parts;
    use super::*;

    #[test]
    fn a_floor_on_a_ratio_is_judged_only_beside_a_yardstick() {
        let told = |per_second| {
            let mut figure = Figure::new("http", Parts::EngineAlone, "64 connections", 5_000, Duration::from_secs(1));
            figure.floors.push(Floor::new(Measure::Ratio, 4.0));
            let mut figures = [figure];
            judge(&mut figures, Yardstick { per_second, bare_commit_millis: None });
            figures[0].floors[0].to_string()
        };
        assert_eq!(told(None), "≥ 4× not judged");
        assert_eq!(told(Some(1_000.0)), "≥ 4× met (5.00)");
        assert_eq!(told(Some(2_000.0)), "≥ 4× MISSED (2.50)");
    }

    #[test]
    fn what_may_not_be_passed_is_met_at_its_bound() {
        let mut figure = Figure::new("start", Parts::EngineAlone, "", 1, Duration::from_secs(2));
        figure.floors = [2.0, 2.5].map(|is| Floor::of(Measure::ReadySeconds, 2.0, is)).into();
        let mut figures = [figure];
        judge(&mut figures, Yardstick::default());
        let met: Vec<_> = figures[0].floors.iter().map(Floor::met).collect();
        assert_eq!(met, [Some(true), Some(false)]);
    }
}
