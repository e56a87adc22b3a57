//! What the process itself takes: under the names that all of Prometheus' libraries use for it.
//!
//! Read from `/proc` whenever it is asked for; elsewhere than on Linux these are not there.

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Gauge, IntGauge, opts};
use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};

pub(super) fn register() {
    if usage().is_none() {
        return;
    }
    let known = "a good name";
    let process = Process {
        cpu: Counter::with_opts(opts!("process_cpu_seconds_total", "CPU time, user and system, in seconds."))
            .expect(known),
        resident: IntGauge::with_opts(opts!("process_resident_memory_bytes", "Memory in RAM, in bytes.")).expect(known),
        open_files: IntGauge::with_opts(opts!("process_open_fds", "Open file descriptors.")).expect(known),
        files_max: IntGauge::with_opts(opts!("process_max_fds", "File descriptors that may be open.")).expect(known),
        threads: IntGauge::with_opts(opts!("process_threads", "Threads.")).expect(known),
        begun: Gauge::with_opts(opts!("process_start_time_seconds", "When it started, in seconds since 1970."))
            .expect(known),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    process.begun.set(now.saturating_sub(age().unwrap_or_default()).as_secs_f64());
    prometheus::register(Box::new(process)).expect("each name is registered once, here");
}

struct Process {
    cpu: Counter,
    resident: IntGauge,
    open_files: IntGauge,
    files_max: IntGauge,
    threads: IntGauge,
    begun: Gauge,
}

struct Usage {
    cpu: Duration,
    resident_bytes: i64,
    threads: i64,
    /// After the machine's start.
    begun: Duration,
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        let parts: [&dyn Collector; 6] =
            [&self.cpu, &self.resident, &self.open_files, &self.files_max, &self.threads, &self.begun];
        parts.into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        if let Some(usage) = usage() {
            let counted = Duration::try_from_secs_f64(self.cpu.get()).unwrap_or_default();
            self.cpu.inc_by(usage.cpu.saturating_sub(counted).as_secs_f64());
            self.resident.set(usage.resident_bytes);
            self.threads.set(usage.threads);
        }
        if let Ok(open) = fs::read_dir("/proc/self/fd") {
            self.open_files.set(i64::try_from(open.count()).unwrap_or(i64::MAX));
        }
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        self.files_max.set(i64::try_from(limit).unwrap_or(i64::MAX));
        let parts: [&dyn Collector; 6] =
            [&self.cpu, &self.resident, &self.open_files, &self.files_max, &self.threads, &self.begun];
        parts.into_iter().flat_map(Collector::collect).collect()
    }
}

/// `/proc/self/stat`, see proc(5). Its second field is the program's name, which may hold anything.
fn usage() -> Option<Usage> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number.checked_sub(3)?)?.parse::<u64>().ok();
    let ticks = |count: u64| Some(Duration::from_millis(count.checked_mul(1000)? / clock_ticks_per_second().max(1)));
    Some(Usage {
        cpu: ticks(field(14)?.checked_add(field(15)?)?)?,
        threads: i64::try_from(field(20)?).ok()?,
        begun: ticks(field(22)?)?,
        resident_bytes: i64::try_from(field(24)?.checked_mul(u64::try_from(page_size()).ok()?)?).ok()?,
    })
}

fn age() -> Option<Duration> {
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    Duration::try_from_secs_f64(uptime).ok()?.checked_sub(usage()?.begun)
}
