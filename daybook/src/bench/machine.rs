//! What the processes use of the machine: CPU, memory and log of Postgres, read from `/proc` and from Postgres.
//!
//! Where there is no `/proc` the figures of processes are zero; rates and latencies need none of it.

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

use serde::Serialize;
use sqlx::{Connection, PgConnection};

use super::figures::ratio;

/// What a workload has used, from a [`Meter`]'s beginning to its end.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Used {
    /// Cores, on average: the process under test, which in-process is this one and makes the load as well.
    pub(crate) server_cores: f64,
    /// Nothing here, as with the others, where only the process under test was looked at.
    pub(crate) postgres_cores: Option<f64>,
    pub(crate) nats_cores: Option<f64>,
    /// This process, which makes the load.
    pub(crate) load_cores: Option<f64>,
    /// At the end.
    pub(crate) server_rss_mib: u64,
    pub(crate) wal_bytes_per_command: Option<u64>,
}

/// Reads the counters at a workload's beginning, and again at its end.
pub(crate) struct Meter {
    server: u32,
    database_url: String,
    begun: Instant,
    ticks: Ticks,
    wal_bytes: i64,
}

/// CPU time until now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ticks {
    server: u64,
    postgres: u64,
    nats: u64,
    us: u64,
    /// Of the whole machine, ours included.
    all: u64,
}

/// Linux counts CPU time for `/proc` in hundredths of a second, whatever the kernel's own clock.
const TICK: Duration = Duration::from_millis(10);

impl Meter {
    /// `server` is the process under test: a child of ours, or we ourselves.
    pub(crate) async fn start(server: u32, database_url: &str) -> anyhow::Result<Self> {
        let wal_bytes = wal_bytes(database_url).await?;
        let ticks = Ticks::read(server);
        Ok(Self { server, database_url: database_url.to_owned(), begun: Instant::now(), ticks, wal_bytes })
    }

    pub(crate) async fn stop(self, commands: u64) -> anyhow::Result<Used> {
        let took = self.begun.elapsed();
        let ticks = Ticks::read(self.server);
        let wal_bytes = wal_bytes(&self.database_url).await?.saturating_sub(self.wal_bytes);
        let cores = |of: fn(&Ticks) -> u64| cores(of(&ticks).saturating_sub(of(&self.ticks)), took);
        let (server_cores, us) = (cores(|ticks| ticks.server), cores(|ticks| ticks.us));
        Ok(Used {
            server_cores,
            postgres_cores: Some(cores(|ticks| ticks.postgres)),
            nats_cores: Some(cores(|ticks| ticks.nats)),
            load_cores: Some(us),
            server_rss_mib: rss_mib(self.server),
            wal_bytes_per_command: Some(u64::try_from(wal_bytes).unwrap_or(0) / commands.max(1)),
        })
    }
}

impl Used {
    /// Of a process from its beginning until now. Of the others nobody knows what they had used before.
    pub(crate) fn since_start(pid: u32, took: Duration) -> Self {
        let ticks = Process::read(pid).map_or(0, |process| process.ticks);
        Self {
            server_cores: cores(ticks, took),
            postgres_cores: None,
            nats_cores: None,
            load_cores: None,
            server_rss_mib: rss_mib(pid),
            wal_bytes_per_command: None,
        }
    }
}

/// On average.
fn cores(ticks: u64, took: Duration) -> f64 {
    ratio((TICK * u32::try_from(ticks).unwrap_or(u32::MAX)).as_secs_f64(), took.as_secs_f64())
}

/// Resident memory of a process.
pub(crate) fn rss_mib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

/// What the report says about where it was made.
pub(crate) fn description() -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, model)| model);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib =
        memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().split(' ').next()?.parse::<u64>().ok());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!(
        "{cores} × {}, {} GiB, {} {}",
        model.unwrap_or("an unknown processor"),
        kib.unwrap_or(0) / (1024 * 1024),
        std::env::consts::OS,
        kernel.trim(),
    )
}

/// How much somebody else is at work here: the average number of runnable processes in the last minute.
pub(crate) fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("unknown").to_owned()
}

impl Ticks {
    /// CPU time since an earlier look that was nobody's of ours: what the neighbours took.
    pub(crate) fn of_others_since(&self, before: &Self, took: Duration) -> f64 {
        let ours = |ticks: &Self| ticks.server + ticks.postgres + ticks.nats + ticks.us;
        let all = self.all.saturating_sub(before.all);
        cores(all.saturating_sub(ours(self).saturating_sub(ours(before))), took)
    }

    /// Of the process under test, of us, and of the servers among our descendants.
    pub(crate) fn read(server: u32) -> Self {
        let mut all: HashMap<u32, Process> = HashMap::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if let Some((pid, process)) = pid.and_then(|pid| Some((pid, Process::read(pid)?))) {
                all.insert(pid, process);
            }
        }
        let us = std::process::id();
        let ours = |pid: u32| {
            let parents = std::iter::successors(Some(pid), |pid| all.get(pid).map(|process| process.parent));
            parents.take(32).any(|pid| pid == us)
        };
        let mut ticks = Self::default();
        for (pid, process) in &all {
            match process.name.as_str() {
                // Whoever ended meanwhile is counted by the postmaster, who waited for it.
                "postgres" if ours(*pid) => ticks.postgres += process.ticks + process.ended,
                "nats-server" if ours(*pid) => ticks.nats += process.ticks,
                _ => {}
            }
        }
        ticks.server = all.get(&server).map_or(0, |process| process.ticks);
        ticks.us = if us == server { 0 } else { all.get(&us).map_or(0, |process| process.ticks) };
        ticks.all = busy();
        ticks
    }
}

/// CPU time of the whole machine that was not idle, and what its host gave to others.
fn busy() -> u64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields = stat.lines().next().unwrap_or_default().split_ascii_whitespace().skip(1);
    let ticks: Vec<u64> = fields.filter_map(|field| field.parse().ok()).collect();
    // user, nice, system, (idle, iowait,) irq, softirq, steal; guests are in the first two already
    [0, 1, 2, 5, 6, 7].iter().filter_map(|at| ticks.get(*at)).sum()
}

/// What the kernel has yet to write to the disk, in MiB: pages that are dirty or on their way.
pub(crate) fn unwritten_mib() -> u64 {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| {
        let line = memory.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    (kib("Dirty:") + kib("Writeback:")) / 1024
}

struct Process {
    name: String,
    parent: u32,
    ticks: u64,
    /// Of children that it has waited for.
    ended: u64,
}

impl Process {
    fn read(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (head, rest) = stat.rsplit_once(") ")?; // a name may hold anything
        let name = head.split_once('(')?.1.to_owned();
        let fields: Vec<&str> = rest.split(' ').collect();
        let number = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
        Some(Self {
            name,
            parent: u32::try_from(number(1)?).ok()?,
            ticks: number(11)? + number(12)?,
            ended: number(13)? + number(14)?,
        })
    }
}

/// Everything that Postgres has ever written to its log.
async fn wal_bytes(database_url: &str) -> anyhow::Result<i64> {
    let mut connection = PgConnection::connect(database_url).await?;
    let bytes = sqlx::query_scalar("select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint");
    let bytes = bytes.fetch_one(&mut connection).await?;
    connection.close().await?;
    Ok(bytes)
}
