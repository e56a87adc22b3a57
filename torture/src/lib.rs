//! torture: the adversary. It runs Daybook as a process under concurrent clients, lets everything happen to it that
//! happens to processes, connections and servers, and judges from outside whether a promise was broken.
//!
//! ```text
//! workload ──HTTP──> daybook ──> wires (faults at named moments) ──> Postgres, NATS
//!     │                 └────────webhooks────> receiver
//!  history ───┐                                  │
//!  the log ───┼──> evidence ──> check <──────────┘
//! ```
//! The script of faults follows from a seed. What clients were told is the only thing that is believed; everything else is
//! held against it. No code is shared with what is judged: amounts, hashes and folds are written again here.
//!
//! Left out: what the product does about any of it.

mod act;
mod check;
mod evidence;
mod fold;
mod history;
mod log;
mod money;
mod nats;
mod planted;
mod postgres;
mod process;
mod random;
mod receiver;
mod report;
mod script;
mod system;
mod wire;
mod workload;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::sleep;

pub use act::Done;
pub use check::{Promise, Violation};
pub use report::{Counts, Planted, Report};
pub use script::Length;

use act::Adversary;
use evidence::{Evidence, Shown};
use history::{History, Known, Verdict};
use log::Log;
use random::Random;
use receiver::Receiver;
use system::{Credentials, Service, System};
use workload::{Workload, World, log_in};

#[derive(Clone, Debug)]
pub struct Options {
    /// The `daybook` to torture. Beside it are `command-api`, `relay`, `projector` and `webhook-dispatcher`.
    pub program: PathBuf,
    pub seed: u64,
    pub length: Length,
}

/// The load before the first fault, and the calm between two at most.
const WARM_UP: Duration = Duration::from_secs(2);
const CALM_MS: (u64, u64) = (200, 1_500);

/// Violations of one promise that a report holds; more say nothing new.
const VIOLATIONS_MAX: usize = 10;

const CURRENCIES: [&str; 3] = ["EUR", "JPY", "KWD"];
const REGISTRATION: &str = "torture-registration";

/// Tortures a system of its own. `Err`: it could not be run; what it found is in the report.
///
/// `progress` gets a line for a person now and then, the script first.
pub async fn run(options: Options, progress: impl Fn(&str)) -> anyhow::Result<Report> {
    let script = script::script(options.seed, options.length);
    progress(&format!("seed {}, {} faults:", options.seed, script.len()));
    for (number, fault) in script.iter().enumerate() {
        progress(&format!("{:>4}  {fault}", number + 1));
    }
    let begin = Instant::now();
    let directory = directory()?;
    let tortured = torture(&options, &script, directory.path(), &progress).await;
    let (mut report, evidence) = match tortured {
        Ok(done) => done,
        // What could not go on may be as bad as what broke a promise: its history and logs stay.
        Err(error) => {
            let kept = directory.keep();
            return Err(error.context(format!("seed {}, kept in {}", options.seed, kept.display())));
        }
    };
    report.seconds = begin.elapsed().as_secs();
    if !report.is_sound() {
        let kept = directory.keep();
        std::fs::write(kept.join("evidence.json"), serde_json::to_vec(&evidence)?).context("keeping the evidence")?;
        report.kept = Some(kept);
    }
    Ok(report)
}

async fn torture(
    options: &Options,
    script: &[script::Fault],
    directory: &Path,
    progress: &impl Fn(&str),
) -> anyhow::Result<(Report, Evidence)> {
    let seed = options.seed;
    rustls::crypto::ring::default_provider().install_default().ok(); // somebody else in this process was first
    let mut system = System::prepare(options.program.clone(), directory).await?;
    system.daybook.spawn().await?;
    let ready = system.ready().await?;
    let programs = options.program.parent().context("a program is in a directory")?;
    system.start_seconds(programs, &ready.bank_url).await.context("starting the second services")?;
    let receiver = Receiver::start(seed).await?;
    let http = reqwest::Client::builder().no_proxy().build()?;
    let partner = Partner::register(&http, &ready, &receiver).await.context("preparing the partner")?;
    let endpoint_after = Log::read(system.stack.database_url()).await?.head();

    let history = Arc::new(History::begin(&directory.join("history.jsonl"), &format!("torture-{seed}"))?);
    let admin = ready.admin.clone();
    let connection = watch::Sender::new(ready);
    let (known, credentials) = (history.clone(), partner.credentials.clone());
    let mut world = World::new(http, connection.subscribe(), known, admin.clone(), credentials);
    world.second_commands = system.url_of_second(Service::Engine);
    world.second_queries = system.url_of_second(Service::Projector);
    let world = Arc::new(world);
    let workload = Workload::start(&world, seed);
    let adversary =
        Adversary { system: &system, receiver: &receiver, history: &history, world: &world, connection: &connection };
    let (mut faults, mut violations) = (Vec::new(), Vec::new());
    let mut random = Random::of(seed, "calm");
    sleep(WARM_UP).await;
    for (number, fault) in script.iter().enumerate() {
        sleep(Duration::from_millis(random.within(CALM_MS.0, CALM_MS.1))).await;
        match adversary.act(fault).await? {
            Ok(done) => {
                progress(&format!("{:>4}  {fault}: back after {} ms", number + 1, done.acknowledged_ms));
                faults.push(done);
            }
            Err(violation) => {
                progress(&format!("{:>4}  {violation}", number + 1));
                violations.push(violation);
            }
        }
    }
    let end = Instant::now();
    workload.finish().await;
    evidence::quiet(system.stack.database_url(), &history, &receiver, &partner.id, endpoint_after).await?;
    let quiet_ms = u64::try_from(end.elapsed().as_millis()).unwrap_or(u64::MAX);
    progress("all is quiet; judging");

    let gave_up = system.times_it_gave_up();
    if 0 < gave_up {
        let what = format!("daybook has ended by itself {gave_up} times");
        violations.push(Violation { promise: Promise::Recovery, what });
    }
    let log = Log::read(system.stack.database_url()).await?;
    let shown = Shown::read(&world, log.head()).await.context("reading what is shown")?;
    let evidence = Evidence {
        known: history.known(),
        log,
        shown,
        received: receiver.received(),
        registration_key: log::key_hash(&admin.client_id, REGISTRATION),
        admin_client: admin.client_id,
        partner_client: partner.credentials.client_id,
        partner: partner.id,
        endpoint_after,
    };
    let found = check::check(&evidence);
    violations.extend(found);
    if let Err(said) = system.command(&["audit"]).await? {
        violations.push(Violation { promise: Promise::Audit, what: said });
    }
    system.end().await?;
    let (planted, missed) = planted::planted(&evidence);
    let report = Report {
        seed,
        length: options.length,
        seconds: 0,
        kills: faults.iter().map(|done: &Done| done.kills).sum(),
        faults,
        counts: count(&evidence),
        violated: Promise::ALL.map(|promise| (promise, of(&violations, promise).count())).into(),
        violations: Promise::ALL
            .iter()
            .flat_map(|promise| of(&violations, *promise).take(VIOLATIONS_MAX).cloned().collect::<Vec<_>>())
            .collect(),
        planted: Planted { planted, caught: planted - missed.len(), missed },
        quiet_ms,
        kept: None,
    };
    Ok((report, evidence))
}

/// Who the clients act for.
struct Partner {
    id: String,
    credentials: Credentials,
}

impl Partner {
    /// Registers it, and its endpoint, before anything goes wrong.
    async fn register(http: &reqwest::Client, ready: &system::Connection, receiver: &Receiver) -> anyhow::Result<Self> {
        let post = async |route: &str, token: &str, body: Value| -> anyhow::Result<Value> {
            let asked = http.post(format!("{}{route}", ready.base_url)).bearer_auth(token).json(&body);
            let answer = asked.header("Idempotency-Key", REGISTRATION).send().await?;
            let (status, text) = (answer.status(), answer.text().await?);
            anyhow::ensure!(status.is_success(), "{route}: {status} {text}");
            Ok(serde_json::from_str(&text)?)
        };
        let token = log_in(http, &ready.base_url, &ready.admin).await?;
        let body = json!({"name": "Tortured", "currencies": CURRENCIES});
        let partner = post("/v1/partners", &token, body).await?;
        let string = |value: &Value| value.as_str().map(str::to_owned).context("a string was expected");
        let credentials =
            Credentials { client_id: string(&partner["clientId"])?, client_secret: string(&partner["clientSecret"])? };
        let token = log_in(http, &ready.base_url, &credentials).await?;
        let events = ["transaction.completed", "transaction.failed", "wallet.opened"];
        let webhook = post("/v1/webhooks", &token, json!({"url": receiver.url, "events": events})).await?;
        receiver.knows(&string(&webhook["secret"])?);
        Ok(Self { id: string(&partner["id"])?, credentials })
    }
}

/// Where all of it happens. When it runs as root, the servers' unprivileged user passes through.
fn directory() -> anyhow::Result<tempfile::TempDir> {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::Builder::new().prefix("daybook-torture-").tempdir().context("making a directory")?;
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o711))?;
    Ok(directory)
}

fn of(violations: &[Violation], promise: Promise) -> impl Iterator<Item = &Violation> {
    violations.iter().filter(move |violation| violation.promise == promise)
}

fn count(evidence: &Evidence) -> Counts {
    let Evidence { known, log, received, .. } = evidence;
    let Known { calls, payments, reads, .. } = known;
    let settled =
        |verdict| calls.iter().filter(|call| call.settled().is_some_and(|answer| answer.verdict() == verdict)).count();
    let unknown = |call: &&history::Call| {
        call.attempts.iter().any(|attempt| match &attempt.outcome {
            None | Some(history::Outcome::NoAnswer(_)) => true,
            Some(history::Outcome::Answered(answer)) => answer.verdict() == Verdict::Unknown,
            Some(history::Outcome::NotSent) => false,
        })
    };
    Counts {
        calls: calls.len(),
        acknowledged: settled(Verdict::Done),
        refused: settled(Verdict::Refused),
        once_unknown: calls.iter().filter(unknown).count(),
        abandoned: calls.iter().filter(|call| call.abandoned).count(),
        replayed: calls.iter().flat_map(history::Call::answers).filter(|answer| answer.replayed).count(),
        reads: reads.len(),
        payments: payments.len(),
        events: log.events.len(),
        commits: log.commits.len(),
        webhooks: received.len(),
        webhooks_repeated: received.values().filter(|came| 1 < came.taken).count(),
    }
}
