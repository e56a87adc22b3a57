//! `daybook doctor`: what is wrong with this machine, these servers, these settings, and what to do about it.
//!
//! It works while things are broken, which is when it is needed: every probe has a time limit and a connection of its own,
//! none hides another, and a server that is away is a finding. It changes nothing: sessions are read-only, and the one
//! file that it writes, to measure the disk, has no name.
//!
//! ```text
//! machine.rs       cores, memory, open files, the disk and how fast it syncs, the environment
//! installation.rs  the data directory: files and their rights, whether a system runs there, where it listens
//! postgres.rs      the database server and its settings
//! schema.rs        what is applied to the database: migrations, roles, rights, what keeps the log append-only
//! log.rs           the log's end: hashes, gaps, snapshot, clocks
//! followers.rs     what follows from the log: views, webhooks, workflows, credentials
//! bus.rs           NATS and the ledger's stream
//! ```
//! Left out: the whole log (`daybook audit`), and repairing anything.
//!
//! # What is no good news
//! Where there is nothing to look at, as before the first start, nothing can be wrong. What is there, or was named, and
//! could not be looked at is another thing: doctor does not know, says so, and has an exit code for it.

mod bus;
mod followers;
mod installation;
mod log;
mod machine;
mod postgres;
mod schema;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::error::Elapsed;
use tokio::time::timeout;
use url::Url;

use crate::terminal::{Colour, Lines, shown, unless_reader_left};

#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Exit code 0: nothing is wrong, warnings aside. 1: something is wrong. 2: doctor itself failed. \
                  3: nothing is known to be wrong, and something that is there or was named could not be looked at."
)]
pub(crate) struct Options {
    /// Where `daybook up` keeps its data.
    #[arg(long, env = "DAYBOOK_DATA_DIR", default_value = "data")]
    data_dir: PathBuf,
    /// The database; without it, that of the `daybook up` which runs on --data-dir.
    #[arg(long, env = "DAYBOOK_DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// The NATS server; likewise.
    #[arg(long, env = "DAYBOOK_NATS_URL", hide_env_values = true)]
    nats_url: Option<String>,
    /// Where `daybook up` is to listen; looked at while it does not run.
    #[arg(long, env = "DAYBOOK_LISTEN", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// The file of the key under which secrets are sealed, for services that are started each by itself.
    #[arg(long, env = "DAYBOOK_SECRETS_KEY_FILE")]
    secrets_key_file: Option<PathBuf>,
    /// Print the findings as JSON.
    #[arg(long)]
    json: bool,
}

/// How bad something is. What is wrong is a reason to fail, and what is unknown is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    Ok,
    /// There is nothing to look at, nobody has said where it is, or this system does not tell.
    NotLookedAt,
    Warning,
    /// It is there, or was named, and could not be looked at.
    Unknown,
    Wrong,
}

/// What one check found.
#[derive(Debug, Serialize)]
struct Finding {
    area: &'static str,
    check: &'static str,
    verdict: Verdict,
    /// What was found, with its numbers; or why it was not, or could not be, looked at.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

#[derive(Serialize)]
struct Report {
    /// The worst of all.
    verdict: Verdict,
    wrong: usize,
    unknown: usize,
    warnings: usize,
    ok: usize,
    not_looked_at: usize,
    findings: Vec<Finding>,
}

type Findings = Vec<Finding>;

/// For one probe. What a probe waits for inside has a shorter bound of its own.
const PROBE_TIME: Duration = Duration::from_secs(20);

/// Exit codes. 2 is that of a command that fails.
const WRONG: u8 = 1;
const UNKNOWN: u8 = 3;

pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let report = examine(options.clone()).await;
    let mut lines = Lines::new();
    let mut print = || {
        if options.json {
            lines.line(&serde_json::to_string_pretty(&report).map_err(std::io::Error::from)?)?;
        } else {
            print(&report, &mut lines)?;
        }
        lines.flush()
    };
    unless_reader_left(print())?;
    Ok(match report.verdict {
        Verdict::Wrong => ExitCode::from(WRONG),
        Verdict::Unknown => ExitCode::from(UNKNOWN),
        Verdict::Ok | Verdict::NotLookedAt | Verdict::Warning => ExitCode::SUCCESS,
    })
}

async fn examine(options: Options) -> Report {
    // Which servers belong to this installation decides what else is looked at.
    let place = installation::Place::find(&options);
    let database = place.database_url.clone();
    let nats = place.nats_url.clone();
    let unnamed = |what: &str| format!("no {what} is named, and {}", place.why_no_system());

    let machine = Area::new("machine");
    let mut probes = vec![
        machine.probe("cores", async { Ok(machine::cores()) }),
        machine.probe("memory", async { Ok(machine::memory()) }),
        machine.probe("open-files", machine::open_files(place.pid)),
        machine.probe("disk-space", machine::disk_space(place.data_dir.clone())),
        machine.probe("disk-sync", machine::disk_sync(place.data_dir.clone())),
        machine.probe("environment", async { Ok(machine::environment()) }),
        machine.probe("traces", machine::traces()),
    ];
    let installation = Area::new("installation");
    probes.extend([
        installation.probe("data-directory", installation::files(place.clone())),
        installation.probe("secrets", installation::secrets(place.clone())),
        installation.probe("listening", installation::listening(place.clone())),
        installation.probe("answers", installation::answers(place.clone())),
    ]);
    let [postgres, schema, log, followers] = ["postgres", "schema", "log", "followers"].map(Area::new);
    let server = match &database {
        Some(url) => postgres::Server::reach(url).await,
        None => Err(Finding::not_looked_at("reachable", &unnamed("database"))),
    };
    match server {
        Err(finding) => {
            probes.push(postgres.probe("reachable", async { Ok(vec![finding]) }));
            for area in [schema, log, followers] {
                let reason = Finding::not_looked_at("all", "there is no database to look at");
                probes.push(area.probe("all", async { Ok(vec![reason]) }));
            }
        }
        Ok(server) => probes.extend([
            postgres.probe("reachable", postgres::version(server.clone())),
            postgres.probe("durability", postgres::durability(server.clone())),
            postgres.probe("settings", postgres::settings(server.clone())),
            postgres.probe("connections", postgres::connections(server.clone())),
            postgres.probe("health", postgres::health(server.clone())),
            schema.probe("migrations", schema::migrations(server.clone())),
            schema.probe("roles", schema::roles(server.clone())),
            schema.probe("rights", schema::rights(server.clone())),
            schema.probe("append-only", schema::append_only(server.clone())),
            log.probe("chain", log::tail(server.clone())),
            log.probe("snapshot", log::snapshot(server.clone())),
            log.probe("clock", log::clock(server.clone())),
            followers.probe("views", followers::views(server.clone())),
            followers.probe("webhooks", followers::webhooks(server.clone())),
            followers.probe("workflows", followers::workflows(server.clone())),
            followers.probe("credentials", followers::credentials(server, place.seal.clone())),
        ]),
    }
    let bus = Area::new("bus");
    probes.push(match nats {
        Some(nats) => bus.probe("nats", bus::look(nats, database)),
        None => {
            let finding = Finding::not_looked_at("reachable", &unnamed("NATS server"));
            bus.probe("nats", async { Ok(vec![finding]) })
        }
    });

    let mut findings = Vec::new();
    for probe in probes {
        findings.extend(probe.findings().await);
    }
    Report::of(findings)
}

/// What belongs together. Its probes run side by side, but few at a time: a server that is short of connections should
/// not lose its last ones to us.
struct Area {
    name: &'static str,
    places: Arc<Semaphore>,
}

/// A probe at work.
struct Probe {
    area: &'static str,
    check: &'static str,
    task: JoinHandle<Result<anyhow::Result<Findings>, Elapsed>>,
}

impl Area {
    fn new(name: &'static str) -> Self {
        Self { name, places: Arc::new(Semaphore::new(2)) }
    }

    fn probe(
        &self,
        check: &'static str,
        work: impl Future<Output = anyhow::Result<Findings>> + Send + 'static,
    ) -> Probe {
        let places = self.places.clone();
        let task = tokio::spawn(async move {
            let _place = places.acquire().await.expect("it is never closed");
            timeout(PROBE_TIME, work).await
        });
        Probe { area: self.name, check, task }
    }
}

impl Probe {
    /// Whatever became of it, there is an answer in time.
    async fn findings(self) -> Findings {
        let check = self.check;
        let mut findings = match self.task.await {
            Ok(Ok(Ok(findings))) => findings,
            Ok(Ok(Err(error))) => vec![Finding::unknown(
                check,
                format!("{error:#}"),
                "See to that, or run doctor as a user who may look here.",
            )],
            Ok(Err(_)) => vec![Finding::unknown(
                check,
                format!("there was no answer within {} s", PROBE_TIME.as_secs()),
                "Run doctor again; what is looked at here may be overloaded, or stuck.",
            )],
            Err(_) => vec![Finding::unknown(check, "the probe itself failed", "Please report this.")],
        };
        for finding in &mut findings {
            finding.area = self.area;
        }
        findings
    }
}

impl Finding {
    fn new(check: &'static str, verdict: Verdict, found: String, advice: Option<&str>) -> Self {
        // Servers, files and clients have a say in these texts.
        Self { area: "", check, verdict, found: shown(&found), advice: advice.map(shown) }
    }

    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, Verdict::Ok, found.into(), None)
    }

    fn not_looked_at(check: &'static str, why: &str) -> Self {
        Self::new(check, Verdict::NotLookedAt, why.to_owned(), None)
    }

    fn warning(check: &'static str, found: impl Into<String>, advice: &str) -> Self {
        Self::new(check, Verdict::Warning, found.into(), Some(advice))
    }

    fn unknown(check: &'static str, why: impl Into<String>, advice: &str) -> Self {
        Self::new(check, Verdict::Unknown, why.into(), Some(advice))
    }

    fn wrong(check: &'static str, found: impl Into<String>, advice: &str) -> Self {
        Self::new(check, Verdict::Wrong, found.into(), Some(advice))
    }
}

impl Report {
    fn of(findings: Findings) -> Self {
        let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
        let (wrong, unknown, warnings) = (count(Verdict::Wrong), count(Verdict::Unknown), count(Verdict::Warning));
        let (ok, not_looked_at) = (count(Verdict::Ok), count(Verdict::NotLookedAt));
        let verdict = match (wrong, unknown, warnings) {
            (0, 0, 0) => Verdict::Ok,
            (0, 0, _) => Verdict::Warning,
            (0, _, _) => Verdict::Unknown,
            _ => Verdict::Wrong,
        };
        Self { verdict, wrong, unknown, warnings, ok, not_looked_at, findings }
    }
}

/// By area, and at the end the numbers, which is where the eye of whoever is in a hurry rests.
fn print(report: &Report, lines: &mut Lines) -> std::io::Result<()> {
    let mut area = "";
    for finding in &report.findings {
        if finding.area != area {
            area = finding.area;
            lines.line(area)?;
        }
        let (colour, verdict) = match finding.verdict {
            Verdict::Ok => (Colour::Green, "ok"),
            Verdict::NotLookedAt => (Colour::Faint, "not looked at"),
            Verdict::Warning => (Colour::Yellow, "warning"),
            Verdict::Unknown => (Colour::Red, "UNKNOWN"),
            Verdict::Wrong => (Colour::Red, "WRONG"),
        };
        let verdict = lines.paint(colour, &format!("{verdict:<13}"));
        lines.line(&format!("  {verdict}  {:<19}  {}", finding.check, finding.found))?;
        if let Some(advice) = &finding.advice {
            lines.line(&format!("  {:<13}  {:<19}  → {advice}", "", ""))?;
        }
    }
    let plural = if report.warnings == 1 { "" } else { "s" };
    let Report { wrong, unknown, warnings, ok, not_looked_at, .. } = report;
    lines.line(&format!(
        "{wrong} wrong, {unknown} unknown, {warnings} warning{plural}, {ok} ok, {not_looked_at} not looked at"
    ))
}

/// An address as it may be shown: without its password, and without what else may be secret in its query.
fn without_password(address: &str) -> String {
    let Ok(mut url) = Url::parse(address) else { return "(an address that cannot be read)".to_owned() };
    if url.password().is_some() {
        url.set_password(Some("***")).ok(); // fails only where there can be no password
    }
    url.set_query(None);
    url.to_string()
}

/// Whether an address is on this machine, so that what goes there passes no network.
fn is_local(address: &str) -> bool {
    let host = Url::parse(address).ok().and_then(|url| url.host_str().map(str::to_owned)).unwrap_or_default();
    let host = host.trim_matches(['[', ']']);
    // Postgres' addresses may name a socket's directory, or nothing.
    host.is_empty()
        || host == "localhost"
        || host.starts_with("%2F")
        || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Milliseconds with three digits after the point.
fn millis(time: Duration) -> String {
    format!("{}.{:03} ms", time.as_millis(), time.as_micros() % 1_000)
}

/// A file's content, if it is there.
fn read_if_there(path: &std::path::Path) -> anyhow::Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_shown_without_what_is_secret() {
        let shown = without_password("postgres://daybook:hunter2@db.example/daybook?password=hunter3");
        assert!(shown.contains("db.example/daybook") && !shown.contains("hunter"), "{shown}");
        assert!(!without_password("hunter2@:not an address").contains("hunter2"));
    }

    #[test]
    fn only_what_passes_no_network_is_local() {
        for local in ["postgres://d:p@127.0.0.1:5432/d", "nats://[::1]:4222", "postgres://localhost/d", "postgres:///d"]
        {
            assert!(is_local(local), "{local}");
        }
        for remote in ["postgres://db.example/d", "nats://10.0.0.1", "postgres://127.0.0.1.example/d"] {
            assert!(!is_local(remote), "{remote}");
        }
    }

    #[tokio::test]
    async fn a_probe_that_fails_or_panics_is_told_and_hides_nothing() {
        let area = Area::new("a");
        let (failed, panicked) = (
            area.probe("fails", async { anyhow::bail!("for a reason") }),
            area.probe("panics", async { panic!("on purpose") }),
        );
        let failed = failed.findings().await;
        assert_eq!((failed[0].verdict, &*failed[0].found), (Verdict::Unknown, "for a reason"));
        let panicked = panicked.findings().await;
        assert_eq!(panicked[0].verdict, Verdict::Unknown);
    }

    #[test]
    fn what_is_unknown_is_worse_than_a_warning_and_what_is_not_there_is_nothing() {
        let finding = |verdict| Finding::new("check", verdict, String::new(), None);
        for (verdicts, expected) in [
            (vec![Verdict::Ok, Verdict::NotLookedAt], Verdict::Ok),
            (vec![Verdict::NotLookedAt, Verdict::Warning], Verdict::Warning),
            (vec![Verdict::Warning, Verdict::Unknown, Verdict::Ok], Verdict::Unknown),
            (vec![Verdict::Unknown, Verdict::Wrong], Verdict::Wrong),
        ] {
            assert_eq!(Report::of(verdicts.iter().copied().map(finding).collect()).verdict, expected, "{verdicts:?}");
        }
    }
}
