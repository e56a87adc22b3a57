//! The installation of `daybook up`: its directory, whose files they are, whether a system runs on it and answers, and
//! who else could reach it.
//!
//! Whether it runs is read from the kernel's list of locks: taking the lock to see would be in the way of a start.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use api_contract::Seal;
use serde_json::Value;
use tokio::net::TcpListener;

use super::{Finding, Findings, Options, is_local, millis, read_if_there};
use crate::connection::Connection;
use crate::installation::Installation;

/// What there is, as far as files tell.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) data_dir: PathBuf,
    pub(super) database_url: Option<String>,
    pub(super) nats_url: Option<String>,
    /// Under which secrets are sealed, if that can be known.
    pub(super) seal: Option<Seal>,
    /// Of the running system.
    pub(super) pid: Option<u32>,
    state: State,
    base_url: Option<String>,
    demo_partner: bool,
    listen: SocketAddr,
    key_file: Option<PathBuf>,
    servers_given: bool,
}

#[derive(Clone, Debug)]
enum State {
    /// There is no data directory, or nothing of ours in it.
    None,
    Stopped,
    /// The lock is held, and there is no connection.json: on the way up or down.
    Between(Option<u32>),
    Running(u32),
    /// connection.json names a process that is gone.
    Crashed(u32),
    /// Of connection.json: whether anything runs here nobody knows.
    Unreadable {
        why: String,
        advice: &'static str,
    },
}

/// What is unreadable is so mostly for another user.
const AS_ITS_USER: &str = "Run doctor as the user who runs daybook.";

impl Place {
    pub(super) fn find(options: &Options) -> Self {
        let data_dir = options.data_dir.clone();
        let connection = Connection::read(&data_dir);
        let held = lock_is_held(&data_dir);
        let state = match &connection {
            // What could not be parsed would be quoted, and it holds secrets.
            Err(error) => match error.root_cause().downcast_ref::<std::io::Error>() {
                Some(cause) => State::Unreadable { why: format!("{error}: {cause}"), advice: AS_ITS_USER },
                None => State::Unreadable {
                    why: error.to_string(),
                    advice: "Stop daybook and start it again, which writes this file anew.",
                },
            },
            Ok(Some(found)) if held.unwrap_or_else(|| is_alive(found.pid)) => State::Running(found.pid),
            Ok(Some(found)) => State::Crashed(found.pid),
            Ok(None) if held == Some(true) => State::Between(pid_in_lock(&data_dir)),
            Ok(None) if data_dir.join("lock").exists() => State::Stopped,
            Ok(None) => State::None,
        };
        let running = connection.ok().flatten().filter(|_| matches!(state, State::Running(_)));
        // Between, the private servers may be what keeps it from coming up.
        let private = matches!(state, State::Between(_)).then(|| private_servers(&data_dir)).flatten();
        let given = |url: &Option<String>| url.clone().filter(|url| !url.is_empty());
        let of_running = |pick: fn(&Connection) -> &String| running.as_ref().map(|found| pick(found).clone());
        Self {
            database_url: given(&options.database_url)
                .or_else(|| of_running(|found| &found.database_url))
                .or_else(|| private.as_ref().map(|urls| urls.0.clone())),
            nats_url: given(&options.nats_url)
                .or_else(|| of_running(|found| &found.nats_url))
                .or_else(|| private.as_ref().map(|urls| urls.1.clone())),
            seal: seal_of(options, &data_dir),
            pid: running.as_ref().map(|found| found.pid),
            base_url: of_running(|found| &found.base_url),
            demo_partner: running.as_ref().is_some_and(|found| found.demo_partner.is_some()),
            servers_given: given(&options.database_url).is_some(),
            listen: options.listen,
            key_file: options.secrets_key_file.clone(),
            state,
            data_dir,
        }
    }

    /// Why nothing is known of a running system, where nothing is.
    pub(super) fn why_no_system(&self) -> String {
        match self.state {
            State::Unreadable { .. } => "connection.json, which would tell, cannot be read".to_owned(),
            _ => format!("no daybook runs on {}", self.data_dir.display()),
        }
    }
}

/// Only a key of which it is certain that the database's secrets are sealed with it.
fn seal_of(options: &Options, data_dir: &Path) -> Option<Seal> {
    if let Some(file) = &options.secrets_key_file {
        return Seal::from_key_file(file).ok();
    }
    let content = std::fs::read(data_dir.join("installation.json")).ok()?;
    serde_json::from_slice::<Installation>(&content).ok()?.seal().ok()
}

/// Postgres' and NATS' addresses, from what the private servers were last started with.
fn private_servers(data_dir: &Path) -> Option<(String, String)> {
    let content = std::fs::read(data_dir.join("private-servers.json")).ok()?;
    let access: Value = serde_json::from_slice(&content).ok()?;
    let (text, port) = (|name: &str| access[name].as_str(), |name: &str| access[name].as_u64());
    let (postgres, nats) = (text("postgres_password")?, text("nats_password")?);
    Some((
        format!("postgres://daybook:{postgres}@127.0.0.1:{}/daybook", port("postgres_port")?),
        format!("nats://daybook:{nats}@127.0.0.1:{}", port("nats_port")?),
    ))
}

/// `None` where the kernel does not list locks.
fn lock_is_held(data_dir: &Path) -> Option<bool> {
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let Ok(lock) = std::fs::metadata(data_dir.join("lock")) else { return Some(false) };
    let inode = lock.ino().to_string();
    // 1: FLOCK  ADVISORY  WRITE 1234 fd:01:5678 0 EOF
    Some(locks.lines().any(|line| {
        let mut fields = line.split_whitespace();
        fields.nth(1) == Some("FLOCK") && fields.nth(3).and_then(|id| id.rsplit(':').next()) == Some(&inode)
    }))
}

fn pid_in_lock(data_dir: &Path) -> Option<u32> {
    std::fs::read_to_string(data_dir.join("lock")).ok()?.trim().parse().ok()
}

fn is_alive(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

/// The state of the installation, and who may read or change its files.
pub(super) async fn files(place: Place) -> anyhow::Result<Findings> {
    const CHECK: &str = "data-directory";
    let at = place.data_dir.display();
    let mut findings = vec![match &place.state {
        State::None => Finding::ok(CHECK, format!("there is no installation in {at} yet")),
        State::Stopped => Finding::ok(CHECK, format!("{at}: stopped cleanly")),
        State::Running(pid) => Finding::ok(CHECK, format!("{at}: running as process {pid}")),
        State::Between(pid) => Finding::warning(
            CHECK,
            format!(
                "{at}: {} holds the lock, and it is not ready",
                pid.map_or_else(|| "a process".to_owned(), |pid| format!("process {pid}"))
            ),
            "If it stays so, read what it logs, and servers/postgres.log and servers/nats.log in the data directory.",
        ),
        State::Crashed(pid) => Finding::warning(
            CHECK,
            format!("{at}: connection.json names process {pid}, which is gone: the system was killed"),
            "Start it again: it recovers by itself, and nothing that was acknowledged is lost.",
        ),
        State::Unreadable { why, advice } => Finding::unknown(CHECK, why.as_str(), advice),
    }];
    if matches!(place.state, State::Stopped | State::Crashed(_)) {
        findings.extend(left_behind(&place.data_dir));
    }
    findings.extend(rights(&place.data_dir));
    Ok(findings)
}

/// What servers leave that were not stopped.
fn left_behind(data_dir: &Path) -> Option<Finding> {
    let pid_file = data_dir.join("servers/postgres/postmaster.pid");
    let text = std::fs::read_to_string(&pid_file).ok()?;
    let pid: u32 = text.lines().next()?.trim().parse().ok()?;
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(if !is_alive(pid) {
        Finding::warning(
            "left-behind",
            format!("servers/postgres/postmaster.pid names process {pid}, which is gone"),
            "Start daybook again: Postgres recovers by itself.",
        )
    } else if name.trim() == "postgres" {
        Finding::wrong(
            "left-behind",
            format!("Postgres still runs as process {pid}, though no daybook holds the directory"),
            &format!("Stop it with `kill -INT {pid}` before the next start."),
        )
    } else {
        Finding::warning(
            "left-behind",
            format!("servers/postgres/postmaster.pid names process {pid}, which is another program now"),
            "If Postgres refuses to start, see that none runs on this directory, and remove that file.",
        )
    })
}

/// Files with secrets are their owner's alone; directories are changed by their owner alone.
fn rights(data_dir: &Path) -> Findings {
    const CHECK: &str = "file-rights";
    const SECRET: [&str; 4] =
        ["connection.json", "installation.json", "private-servers.json", "servers/nats/nats.conf"];
    const PRIVATE: [&str; 3] = ["servers", "servers/postgres", "servers/nats"];
    let mut findings = Vec::new();
    let mut unreadable = Vec::new();
    let mut looked = 0;
    let mut look = |name: &str, forbidden: u32, means: &str, mode: &str| {
        let path = if name.is_empty() { data_dir.to_owned() } else { data_dir.join(name) };
        let found = match std::fs::metadata(&path) {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound => return,
            Err(error) => return unreadable.push(format!("{}: {error}", path.display())),
        };
        looked += 1;
        if found.mode() & forbidden != 0 {
            findings.push(Finding::wrong(
                CHECK,
                format!("{} has mode {:04o}: {means}", path.display(), found.mode() & 0o7777),
                &format!("Do `chmod {mode} {}`, and replace what may have been read.", path.display()),
            ));
        }
    };
    look("", 0o022, "others may put files into it or take them away", "go-w");
    for name in SECRET {
        look(name, 0o077, "others may read its secrets", "600");
    }
    for name in PRIVATE {
        look(name, 0o077, "others may get at the servers' data", "700");
    }
    if !unreadable.is_empty() {
        findings.push(Finding::unknown(CHECK, unreadable.join("; "), AS_ITS_USER));
    } else if findings.is_empty() && 0 < looked {
        findings.push(Finding::ok(CHECK, format!("{looked} files and directories are their owner's alone")));
    }
    findings
}

/// The sealing key and what is beside it.
pub(super) async fn secrets(place: Place) -> anyhow::Result<Findings> {
    let mut findings = Vec::new();
    let restore = "Bring it back from a backup: without its key, what is sealed in the database opens for nobody.";
    let path = place.data_dir.join("installation.json");
    match read_if_there(&path) {
        Ok(Some(content)) => {
            findings.push(match serde_json::from_slice::<Installation>(&content).map(|it| it.seal()) {
                Ok(Ok(_)) => Finding::ok("sealing-key", "installation.json has one"),
                Ok(Err(error)) => Finding::wrong("sealing-key", format!("{error:#}"), restore),
                // The error would quote what it could not read.
                Err(_) => Finding::wrong("sealing-key", format!("{} is damaged", path.display()), restore),
            })
        }
        Ok(None) if place.data_dir.join("servers/postgres").exists() => findings.push(Finding::wrong(
            "sealing-key",
            format!("there is a database, and {} is gone", path.display()),
            restore,
        )),
        Ok(None) => {}
        Err(error) => findings.push(Finding::unknown("sealing-key", format!("{error:#}"), AS_ITS_USER)),
    }
    if let Some(file) = &place.key_file {
        findings.push(match Seal::from_key_file(file) {
            Err(error) => Finding::wrong("sealing-key", error.to_string(), restore),
            Ok(_) => match std::fs::metadata(file) {
                Ok(found) if found.mode() & 0o077 != 0 => Finding::wrong(
                    "file-rights",
                    format!("{} has mode {:04o}: others may read the key", file.display(), found.mode() & 0o7777),
                    &format!("Do `chmod 600 {}`, put a new key before it, and let services take both.", file.display()),
                ),
                _ => Finding::ok("sealing-key", format!("{} holds one", file.display())),
            },
        });
    }
    if findings.is_empty() {
        findings.push(Finding::ok("sealing-key", "the first start makes one"));
    }
    Ok(findings)
}

/// Who can reach the product, and whether the address is free where it does not run.
pub(super) async fn listening(place: Place) -> anyhow::Result<Findings> {
    const CHECK: &str = "listening";
    let Some(pid) = place.pid else {
        return Ok(match place.state {
            State::None | State::Stopped | State::Crashed(_) if !place.servers_given => {
                vec![could_listen(place.listen).await]
            }
            _ => vec![Finding::not_looked_at(CHECK, "no running daybook says where it listens")],
        });
    };
    let port = place.base_url.as_deref().and_then(|url| url::Url::parse(url).ok()?.port_or_known_default());
    let Some(addresses) = port.and_then(listening_at) else {
        return Ok(vec![Finding::not_looked_at(CHECK, "this system has no /proc/net/tcp")]);
    };
    let open: Vec<_> = addresses.iter().filter(|address| !address.is_loopback()).map(IpAddr::to_string).collect();
    if open.is_empty() {
        return Ok(vec![Finding::ok(CHECK, "on this machine alone")]);
    }
    let open = open.join(", ");
    let mut findings = vec![Finding::warning(
        CHECK,
        format!("at {open}, without TLS: tokens and client secrets pass the network in clear"),
        "Listen at 127.0.0.1, and put a proxy with TLS before it.",
    )];
    if place.demo_partner {
        findings.push(Finding::warning(
            "demo-partner",
            format!("the demo partner may log in from wherever {open} can be reached"),
            "Start with --no-demo, and suspend that partner.",
        ));
    }
    let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    if arguments.split(|byte| *byte == 0).any(|argument| argument == b"--allow-local-webhooks") {
        findings.push(Finding::wrong(
            "local-webhooks",
            "partners from outside may have this machine send requests to itself and to private networks",
            "Start without --allow-local-webhooks.",
        ));
    }
    Ok(findings)
}

async fn could_listen(address: SocketAddr) -> Finding {
    const CHECK: &str = "listening";
    match TcpListener::bind(address).await {
        Err(error) => Finding::wrong(
            CHECK,
            format!("{address}, where daybook would listen, cannot be had: {error}"),
            "Stop what has it, or choose another address with --listen or DAYBOOK_LISTEN.",
        ),
        Ok(_) if !address.ip().is_loopback() => Finding::warning(
            CHECK,
            format!("{address} is free; others could reach it without TLS"),
            "Listen at 127.0.0.1, and put a proxy with TLS before it.",
        ),
        Ok(_) => Finding::ok(CHECK, format!("{address} is free")),
    }
}

/// Where something listens at a port, from the kernel's tables: addresses stand there in hex, each 32 bits of them in the
/// machine's order.
fn listening_at(port: u16) -> Option<Vec<IpAddr>> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let mut found = Vec::new();
    for line in tables.iter().flat_map(|table| table.lines().skip(1)) {
        let mut fields = line.split_whitespace().skip(1);
        let (Some(local), Some("0A")) = (fields.next(), fields.nth(1)) else { continue }; // 0A: listening
        let Some((address, at)) = local.split_once(':') else { continue };
        if u16::from_str_radix(at, 16) == Ok(port) {
            found.extend(address_of(address));
        }
    }
    (!found.is_empty()).then_some(found)
}

fn address_of(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| u32::from_str_radix(hex.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    let bytes: Vec<u8> = (0..hex.len()).step_by(8).map(word).collect::<Option<Vec<_>>>()?.concat();
    if let Ok(four) = <[u8; 4]>::try_from(bytes.as_slice()) {
        return Some(four.into());
    }
    let six = std::net::Ipv6Addr::from(<[u8; 16]>::try_from(bytes.as_slice()).ok()?);
    Some(six.to_ipv4_mapped().map_or(IpAddr::V6(six), IpAddr::V4))
}

/// Whether the running system answers, and that it is ready.
pub(super) async fn answers(place: Place) -> anyhow::Result<Findings> {
    const CHECK: &str = "answers";
    let Some(base_url) = &place.base_url else {
        return Ok(vec![Finding::not_looked_at(CHECK, &place.why_no_system())]);
    };
    let advice = "Read what it logs; the other findings may say why.";
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build()?;
    let asked = Instant::now();
    let answer = match client.get(format!("{base_url}/readyz")).send().await {
        Ok(answer) => answer,
        Err(error) => {
            let error = anyhow::Error::from(error.without_url());
            return Ok(vec![Finding::wrong(CHECK, format!("{base_url} does not answer: {error:#}"), advice)]);
        }
    };
    let (status, time) = (answer.status(), asked.elapsed());
    let body: String = answer.text().await.unwrap_or_default().chars().take(300).collect();
    Ok(vec![if status.is_success() {
        let local = if is_local(base_url) { "" } else { ", over the network" };
        Finding::ok(CHECK, format!("{base_url} is ready, after {}{local}", millis(time)))
    } else {
        Finding::wrong(CHECK, format!("{base_url} is not ready: {status} {body}"), advice)
    }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_way_of_writing_addresses_is_read() {
        let loopback = format!("{:08X}", u32::from_ne_bytes([127, 0, 0, 1]));
        assert_eq!(address_of(&loopback), Some("127.0.0.1".parse().unwrap()));
        assert_eq!(address_of("00000000"), Some("0.0.0.0".parse().unwrap()));
        let one = format!("{}{:08X}", "0".repeat(24), u32::from_ne_bytes([0, 0, 0, 1]));
        assert_eq!(address_of(&one), Some("::1".parse().unwrap()));
        assert_eq!(address_of("0000"), None);
    }
}
