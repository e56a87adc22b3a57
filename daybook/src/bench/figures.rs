//! What was measured: latencies, rates and what they cost, as a table for people and as JSON for programs.

use std::fmt::Write;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;
use serde_json::Value;

use super::floors::Floor;
use super::lag::Lag;
use super::machine::Used;

/// One line of the report: one workload in one variant.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Figure {
    pub(crate) workload: &'static str,
    pub(crate) parts: Parts,
    pub(crate) variant: String,
    /// Commands, or transactions of `pgbench`, that are in the log; events that were read; webhooks that were taken.
    pub(crate) done: u64,
    pub(crate) seconds: f64,
    /// Zero where a rate says nothing.
    pub(crate) per_second: f64,
    /// Against the yardstick of the same run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) latency: Option<Latency>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) used: Option<Used>,
    /// Of the views, with everything on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lag: Option<Lag>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) floors: Vec<Floor>,
    /// What only this workload has to say.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) notes: Vec<String>,
    /// The same for programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) details: Option<Value>,
}

/// What ran beside the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Parts {
    /// No product at all.
    Postgres,
    /// No feed, no views, no webhooks, no workflows.
    EngineAlone,
    EverythingOn,
}

impl Parts {
    fn name(self) -> &'static str {
        match self {
            Self::Postgres => "Postgres",
            Self::EngineAlone => "engine alone",
            Self::EverythingOn => "everything on",
        }
    }
}

impl std::fmt::Display for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// In milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
}

/// How long things took: microseconds up to two minutes, in bounded memory, to three digits.
#[derive(Clone, Debug)]
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(crate) fn new() -> Self {
        Self(Histogram::new_with_bounds(1, MICROS_MAX, 3).expect("bounds that a histogram can have"))
    }

    pub(crate) fn record(&mut self, took: Duration) {
        self.0.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.len()
    }

    pub(crate) fn at(&self, quantile: f64) -> Duration {
        Duration::from_micros(self.0.value_at_quantile(quantile))
    }

    pub(crate) fn summary(&self) -> Option<Latency> {
        let at = |quantile| millis(self.at(quantile));
        (0 < self.count()).then(|| Latency { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: at(1.0) })
    }
}

const MICROS_MAX: u64 = 120_000_000;

impl Figure {
    pub(crate) fn new(
        workload: &'static str,
        parts: Parts,
        variant: impl Into<String>,
        done: u64,
        took: Duration,
    ) -> Self {
        Self {
            workload,
            parts,
            variant: variant.into(),
            done,
            seconds: took.as_secs_f64(),
            per_second: rate(done, took),
            ratio: None,
            latency: None,
            used: None,
            lag: None,
            floors: Vec::new(),
            notes: Vec::new(),
            details: None,
        }
    }
}

/// All figures of one run, one under the other; behind each its floors.
pub(crate) fn table(figures: &[Figure]) -> String {
    let mut text = format!(
        "{:<11} {:<13} {:<30} {:>8} {:>6} {:>8} {:>8} {:>8} {:>8}  {:<27} {:>7} {:>8}  {}\n",
        "workload",
        "parts",
        "",
        "per s",
        "ratio",
        "p50 ms",
        "p99 ms",
        "p99.9",
        "max ms",
        "CPU: us + PG + NATS + load",
        "RSS MiB",
        "WAL B/op",
        "floors"
    );
    for figure in figures {
        let ratio = figure.ratio.map_or_else(String::new, |ratio| format!("{ratio:.1}×"));
        let per_second = if figure.per_second == 0.0 { String::new() } else { format!("{:.0}", figure.per_second) };
        let latency =
            |of: fn(&Latency) -> f64| figure.latency.map_or_else(String::new, |all| format!("{:.2}", of(&all)));
        let used = |of: fn(&Used) -> String| figure.used.as_ref().map_or_else(String::new, of);
        let floors: Vec<_> = figure.floors.iter().map(ToString::to_string).collect();
        let cpu = |used: &Used| {
            let Used { server_cores, postgres_cores, nats_cores, load_cores, .. } = used;
            let others = [postgres_cores, nats_cores, load_cores].into_iter().flatten();
            others.fold(format!("{server_cores:.2}"), |cores, other| format!("{cores} + {other:.2}"))
        };
        let line = format!(
            "{:<11} {:<13} {:<30} {per_second:>8} {ratio:>6} {:>8} {:>8} {:>8} {:>8}  {:<27} {:>7} {:>8}  {}",
            figure.workload,
            figure.parts.name(),
            figure.variant,
            latency(|all| all.p50),
            latency(|all| all.p99),
            latency(|all| all.p999),
            latency(|all| all.max),
            used(cpu),
            used(|used| used.server_rss_mib.to_string()),
            used(|used| used.wal_bytes_per_command.map_or_else(String::new, |bytes| bytes.to_string())),
            floors.join(", "),
        );
        text.push_str(line.trim_end());
        text.push('\n');
        if let Some(lag) = &figure.lag {
            let level = lag.level_after_seconds;
            let level = level.map_or("NOT LEVEL in five minutes".to_owned(), |after| {
                format!("level {after:.2} s after the last answer")
            });
            writeln!(
                text,
                "            views behind by p50 {:.0} ms, p99 {:.0} ms, max {:.0} ms; {}, {}, {} events; {level}",
                lag.p50_millis, lag.p99_millis, lag.max_millis, lag.p50_events, lag.p99_events, lag.max_events,
            )
            .expect("a String takes everything");
        }
        for note in &figure.notes {
            writeln!(text, "            {note}").expect("a String takes everything");
        }
    }
    text
}

#[expect(clippy::float_arithmetic, reason = "a rate, not money")]
pub(crate) fn rate(count: u64, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64().max(f64::MIN_POSITIVE)
}

#[expect(clippy::float_arithmetic, reason = "a ratio, not money")]
pub(crate) fn ratio(one: f64, other: f64) -> f64 {
    one / other.max(f64::MIN_POSITIVE)
}

#[expect(clippy::float_arithmetic, reason = "a duration, not money")]
pub(crate) fn millis(took: Duration) -> f64 {
    took.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_measured_is_blank_in_the_table_and_null_in_the_json() {
        let told = |others: Option<f64>, wal_bytes_per_command| {
            let mut figure = Figure::new("start", Parts::EngineAlone, "a clean end", 1, Duration::from_secs(1));
            figure.used = Some(Used {
                server_cores: 0.5,
                postgres_cores: others,
                nats_cores: others,
                load_cores: others,
                server_rss_mib: 40,
                wal_bytes_per_command,
            });
            let text = table(std::slice::from_ref(&figure));
            let (_, line) = text.split_once("a clean end").unwrap();
            let cells: Vec<_> = line.split_whitespace().collect();
            (cells.join(" "), serde_json::to_string(&figure).unwrap())
        };
        let (line, json) = told(None, None);
        assert_eq!(line, "1 0.50 40");
        assert!(json.contains(r#""natsCores":null"#) && json.contains(r#""walBytesPerCommand":null"#), "{json}");
        let (line, json) = told(Some(0.0), Some(0));
        assert_eq!(line, "1 0.50 + 0.00 + 0.00 + 0.00 40 0");
        assert!(json.contains(r#""natsCores":0.0"#) && json.contains(r#""walBytesPerCommand":0"#), "{json}");
    }
}
