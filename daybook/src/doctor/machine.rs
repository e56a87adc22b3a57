//! The machine: what it has, and what its disk does when it is asked to keep something.
//!
//! What only Linux tells is not looked at elsewhere.

use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use runtime::otlp::{self, Wanted};
use rustix::process::{Resource, getrlimit};
use tokio::net::TcpStream;
use tokio::time::timeout;
use url::Url;

use super::{Finding, Findings, is_local, millis, without_password};

/// Below these it starts, and is not happy.
const CORES_MIN: usize = 2;
const MEMORY_MIN: u64 = 1024 * MIB;
const MEMORY_FREE_MIN: u64 = 256 * MIB;
const MIB: u64 = 1024 * 1024;

/// Below the first, there is soon no room for what a checkpoint leaves to be written; below the second, the next append
/// may fail.
const DISK_LOW: u64 = 5 * 1024 * MIB;
const DISK_FULL: u64 = 512 * MIB;
const INODES_LOW: u64 = 10_000;

/// Files beside those of clients' connections: to servers, of webhooks, journals.
const FILES_BESIDE: u64 = 512;

pub(super) fn cores() -> Findings {
    let found = match std::thread::available_parallelism() {
        Ok(cores) if cores.get() < CORES_MIN => Finding::warning(
            "cores",
            format!("{cores} core"),
            "Give it two cores or more: the engine, Postgres and everything that follows the log share this one.",
        ),
        Ok(cores) => Finding::ok("cores", format!("{cores} cores")),
        Err(error) => Finding::not_looked_at("cores", &error.to_string()),
    };
    vec![found]
}

pub(super) fn memory() -> Findings {
    let Ok(info) = std::fs::read_to_string("/proc/meminfo") else {
        return vec![Finding::not_looked_at("memory", "this system has no /proc/meminfo")];
    };
    let of = |name: &str| -> Option<u64> {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').trim().split(' ').next()?.parse::<u64>().ok().map(|kib| kib * 1024)
    };
    let (Some(mut total), Some(available)) = (of("MemTotal"), of("MemAvailable")) else {
        return vec![Finding::not_looked_at("memory", "/proc/meminfo does not say")];
    };
    // A container's limit, where the machine has more.
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    total = limit.map_or(total, |limit: u64| total.min(limit));
    let found = format!("{} MiB, of which {} MiB are available", total / MIB, available.min(total) / MIB);
    vec![if total < MEMORY_MIN || available < MEMORY_FREE_MIN {
        Finding::warning(
            "memory",
            found,
            "Free some memory, or give it more: what runs out of memory is killed, and each restart costs seconds.",
        )
    } else {
        Finding::ok("memory", found)
    }]
}

/// Of the running system, or of what would be started from here.
pub(super) async fn open_files(pid: Option<u32>) -> anyhow::Result<Findings> {
    let limits = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/limits")).ok());
    let running = limits.as_deref().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
        line.split_whitespace().nth(1).map(|hard| hard.parse().unwrap_or(u64::MAX)) // or "unlimited"
    });
    // Services raise their own limit to what the hard one gives.
    let hard = running.unwrap_or_else(|| getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX));
    let connections = runtime::http::Limits::default().connections as u64;
    let wanted = connections + FILES_BESIDE;
    let whose = if running.is_some() { "the running system's" } else { "the" };
    let limit = if hard == u64::MAX { "none".to_owned() } else { hard.to_string() };
    Ok(vec![if hard < wanted {
        Finding::warning(
            "open-files",
            format!("{whose} hard limit is {limit}; {connections} connections and what is beside them want {wanted}"),
            "Raise it before the start, with `ulimit -Hn` or the service manager's LimitNOFILE.",
        )
    } else {
        Finding::ok("open-files", format!("{whose} hard limit is {limit}; {wanted} are wanted at most"))
    }])
}

pub(super) async fn disk_space(data_dir: PathBuf) -> anyhow::Result<Findings> {
    let work = tokio::task::spawn_blocking(move || {
        let directory = match where_data_lies(&data_dir, "disk-space") {
            Ok(directory) => directory,
            Err(finding) => return Ok(vec![finding]),
        };
        let disk = rustix::fs::statvfs(&directory).with_context(|| format!("asking for {}", directory.display()))?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let found = format!("{} MiB are free where {} lies", free / MIB, directory.display());
        let low = "Make room, or move the data directory: Postgres stops when it cannot write.";
        let mut findings = vec![if free < DISK_FULL {
            Finding::wrong("disk-space", found, low)
        } else if free < DISK_LOW {
            Finding::warning("disk-space", found, low)
        } else {
            Finding::ok("disk-space", found)
        }];
        if 0 < disk.f_files && disk.f_favail < INODES_LOW {
            findings.push(Finding::warning("disk-files", format!("{} more files fit", disk.f_favail), low));
        }
        if let Some(kind) = file_system(&directory) {
            findings.push(match &*kind {
                "tmpfs" | "ramfs" => Finding::warning(
                    "file-system",
                    format!("{kind}, which is memory"),
                    "Put the data directory on a disk: here everything is lost with the next boot.",
                ),
                "nfs" | "nfs4" | "cifs" | "smb3" | "9p" | "fuse.sshfs" => Finding::warning(
                    "file-system",
                    format!("{kind}, which is on another machine"),
                    "Put the data directory on a local disk: what a sync promises here is for that machine to keep.",
                ),
                _ => Finding::ok("file-system", kind),
            });
        }
        Ok(findings)
    });
    work.await?
}

/// As Postgres does with its log: a page is written, and waited for until the disk has it.
pub(super) async fn disk_sync(data_dir: PathBuf) -> anyhow::Result<Findings> {
    const PAGE: [u8; 8192] = [0x5a; 8192];
    const TIMES: usize = 300;
    const TIME_MAX: Duration = Duration::from_secs(3);
    const SLOW: Duration = Duration::from_millis(20);
    const VERY_SLOW: Duration = Duration::from_millis(100);
    const TOO_QUICK: Duration = Duration::from_micros(8);
    let work = tokio::task::spawn_blocking(move || {
        let directory = match where_data_lies(&data_dir, "disk-sync") {
            Ok(directory) => directory,
            Err(finding) => return Ok(vec![finding]),
        };
        // Without a name: nothing stays behind, whatever happens to us.
        let mut file = tempfile::tempfile_in(&directory)
            .with_context(|| format!("a file to measure with, in {}", directory.display()))?;
        file.write_all(&PAGE)?;
        file.sync_all()?;
        let (began, mut times) = (Instant::now(), Vec::with_capacity(TIMES));
        while times.len() < TIMES && (times.is_empty() || began.elapsed() < TIME_MAX) {
            file.rewind()?;
            file.write_all(&PAGE)?;
            let asked = Instant::now();
            file.sync_data()?;
            times.push(asked.elapsed());
        }
        times.sort_unstable();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100];
        let (p50, p99, max) = (at(50), at(99), at(100));
        let rate = 1_000_000_000 / p50.as_nanos().max(1);
        let found = format!(
            "{} syncs of 8 KiB in {}: p50 {}, p99 {}, max {}; some {rate} commits/s one after another, each for as many \
             transactions as came meanwhile",
            times.len(),
            directory.display(),
            millis(p50),
            millis(p99),
            millis(max)
        );
        Ok(vec![if p50 < TOO_QUICK {
            Finding::warning(
                "disk-sync",
                found,
                "No disk is so quick: see that this is one, and that no cache without a battery answers for it.",
            )
        } else if VERY_SLOW < p50 {
            Finding::warning("disk-sync", found, "Use a faster disk: every answer waits for a sync.")
        } else if SLOW < p50 || VERY_SLOW < p99 {
            Finding::warning("disk-sync", found, "See what else writes to this disk: every answer waits for a sync.")
        } else {
            Finding::ok("disk-sync", found)
        }])
    });
    work.await?
}

/// Settings that are misspelt do nothing, and say nothing.
pub(super) fn environment() -> Findings {
    let unknown: Vec<_> = std::env::vars_os()
        .filter_map(|(name, _)| name.into_string().ok())
        .filter(|name| name.starts_with("DAYBOOK_") && !KNOWN.contains(&&**name))
        .collect();
    vec![if unknown.is_empty() {
        Finding::ok("environment", "every DAYBOOK_… variable that is set is one of ours")
    } else {
        Finding::warning(
            "environment",
            format!("no program of ours reads {}", unknown.join(", ")),
            "See `--help` of the program that it is meant for; a misspelt setting does nothing.",
        )
    }]
}

/// Whether traces, where they are asked for, arrive anywhere.
pub(super) async fn traces() -> anyhow::Result<Findings> {
    const CHECK: &str = "traces";
    let endpoint = match otlp::wanted() {
        Wanted::Off(why) => return Ok(vec![Finding::ok(CHECK, format!("off: {why}"))]),
        Wanted::Wrong(why) => {
            let advice = "Correct the variable, or unset the collector's address: services start without traces.";
            return Ok(vec![Finding::warning(CHECK, format!("off: {why}"), advice)]);
        }
        Wanted::At(endpoint) => endpoint,
    };
    let advice = "Start the collector, or unset its address: traces are lost meanwhile, and nothing else.";
    let target = Url::parse(&endpoint).ok().and_then(|url| {
        let host = url.host_str()?.trim_matches(['[', ']']).to_owned();
        Some((host, url.port_or_known_default()?, url.scheme() == "http"))
    });
    let Some((host, port, in_clear)) = target else {
        return Ok(vec![Finding::warning(CHECK, "the collector's address has no host and port to connect to", advice)]);
    };
    let shown = without_password(&endpoint);
    Ok(vec![match timeout(Duration::from_secs(3), TcpStream::connect((host.as_str(), port))).await {
        Ok(Ok(_)) if in_clear && !is_local(&endpoint) => Finding::warning(
            CHECK,
            format!("the collector at {shown} is there, and reached without TLS"),
            "Use https: spans name requests, transactions and webhooks' hosts, and a key may go with them.",
        ),
        Ok(Ok(_)) => Finding::ok(CHECK, format!("the collector at {shown} is there")),
        Ok(Err(error)) => Finding::warning(CHECK, format!("nobody answers at {shown}: {error}"), advice),
        Err(_) => Finding::warning(CHECK, format!("nobody answers at {shown} within 3 s"), advice),
    }])
}

/// Where the servers' files are or would be: behind the link if there is one, and in the nearest directory that exists.
/// The finding is that there is none.
fn where_data_lies(data_dir: &Path, check: &'static str) -> Result<PathBuf, Finding> {
    let advice = "Run doctor as the user who runs daybook.";
    let absolute = std::path::absolute(data_dir)
        .map_err(|error| Finding::unknown(check, format!("the data directory's path: {error}"), advice))?;
    let servers = absolute.join("servers");
    let found = servers.ancestors().find_map(|directory| {
        let directory = directory.canonicalize().ok()?;
        // What we may not write into says nothing about the disk.
        let writable = rustix::fs::access(&directory, rustix::fs::Access::WRITE_OK).is_ok();
        (directory.is_dir() && writable).then_some(directory)
    });
    found.ok_or_else(|| {
        let why = format!("neither {} nor any directory above it can be written to", absolute.display());
        match absolute.try_exists() {
            Ok(false) => Finding::not_looked_at(check, &why), // nothing is there yet, nor can be made from here
            Ok(true) | Err(_) => Finding::unknown(check, why, advice),
        }
    })
}

/// The file system that holds a path, by the longest mount point that it lies under.
fn file_system(path: &Path) -> Option<String> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    let mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (at, kind) = (fields.next()?.replace("\\040", " "), fields.next()?);
        path.starts_with(&at).then(|| (at.len(), kind.to_owned()))
    });
    mounts.max_by_key(|(length, _)| *length).map(|(_, kind)| kind) // of equals the last, which lies over the others
}

/// Every variable that a program of ours, a test or a file for starting them reads; a test looks for them there.
const KNOWN: [&str; 34] = [
    "DAYBOOK_ADMIN_CLIENT_ID",
    "DAYBOOK_ADMIN_CLIENT_SECRET",
    "DAYBOOK_ALLOW_LOCAL_WEBHOOKS",
    "DAYBOOK_BANK_API_KEY",
    "DAYBOOK_BANK_CALLBACK_SECRET",
    "DAYBOOK_BANK_CALLBACK_URL",
    "DAYBOOK_BANK_JOURNAL",
    "DAYBOOK_BANK_LISTEN",
    "DAYBOOK_BANK_URL",
    "DAYBOOK_COMMANDS_LISTEN",
    "DAYBOOK_COMMAND_URL",
    "DAYBOOK_DATABASE_URL",
    "DAYBOOK_DATA_DIR",
    "DAYBOOK_LISTEN",
    "DAYBOOK_LOG_FORMAT",
    "DAYBOOK_NATS_PROJECTOR_PASSWORD",
    "DAYBOOK_NATS_RELAY_PASSWORD",
    "DAYBOOK_NATS_URL",
    "DAYBOOK_NATS_WEBHOOKS_PASSWORD",
    "DAYBOOK_NATS_WORKFLOWS_PASSWORD",
    "DAYBOOK_POSTGRES_PASSWORD",
    "DAYBOOK_QUERIES_LISTEN",
    "DAYBOOK_RELAY_LISTEN",
    "DAYBOOK_SECRETS_KEY",
    "DAYBOOK_SECRETS_KEY_FILE",
    "DAYBOOK_TOP_UP_ASK_AFTER",
    "DAYBOOK_TOP_UP_EXPIRE_AFTER",
    "DAYBOOK_TORTURE_SEED",
    "DAYBOOK_WEBHOOKS_LISTEN",
    "DAYBOOK_WEBHOOK_SCHEDULE",
    "DAYBOOK_WEBHOOK_SECRET",
    "DAYBOOK_WORKFLOWS_CLIENT_ID",
    "DAYBOOK_WORKFLOWS_CLIENT_SECRET",
    "DAYBOOK_WORKFLOWS_LISTEN",
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_variable_that_is_read_anywhere_is_known_and_no_other() {
        let mut found = BTreeSet::new();
        look(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")), 0, &mut found);
        assert_eq!(found.into_iter().collect::<Vec<_>>(), KNOWN);
    }

    /// Rust, compose.yaml and nats.conf, but for this file.
    fn look(directory: &Path, depth: usize, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let (path, name) = entry.map(|entry| (entry.path(), entry.file_name().into_string().unwrap())).unwrap();
            if path.is_dir() {
                let ours = depth != 0 || path.join("Cargo.toml").exists();
                if ours && depth < 6 && name != "target" && !name.starts_with('.') {
                    look(&path, depth + 1, found);
                }
            } else if (name.ends_with(".rs") && !path.ends_with("doctor/machine.rs"))
                || name == "compose.yaml"
                || name == "nats.conf"
            {
                let text = std::fs::read_to_string(&path).unwrap();
                for rest in text.split("DAYBOOK_").skip(1) {
                    let is_of_name = |c: char| c == '_' || c.is_ascii_uppercase();
                    let name = rest.split(|c| !is_of_name(c)).next().unwrap();
                    if !name.is_empty() && !name.ends_with('_') {
                        found.insert(format!("DAYBOOK_{name}"));
                    }
                }
            }
        }
    }
}
