//! The house itself: what a program can check of the rules that ARCHITECTURE.md, CONTRIBUTING.md and the files at the
//! repository's root state.
//!
//! Left out: what the rooms do. Their own tests say that.

#![allow(
    clippy::unwrap_used,
    reason = "a test may panic wherever it stands; clippy.toml knows only those inside #[test]"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use api_contract::{Access, Seal, Secret};
use async_nats::jetstream;
use async_nats::jetstream::consumer::{AckPolicy, pull};
use event_feed::{Commit, FeedSettings, Follow, Log, relay};
use event_store::{Draft, Writer};
use futures::StreamExt;
use ledger_core::{CommandEvent, CommandId, Event, Failure, NewEvent, Timestamp};
use local_stack::testing;
use runtime::shutdown::Shutdown;
use serde_json::Value;
use sqlx::Connection;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(20);

// The rooms and what they may use.

/// Every room in the order an event travels: what of ours it uses, and what else it must not reach by any path.
/// A room that needs another line here needs a reason in `docs/adr/` too.
const ROOMS: [(&str, &[&str], &[&str]); 16] = [
    ("ledger-core", &[], &["sqlx", "async-nats", "axum", "reqwest", "hyper"]),
    ("event-store", &["ledger-core"], &["async-nats", "axum", "reqwest"]),
    ("ledger-engine", &["ledger-core", "event-store"], &["async-nats", "axum", "reqwest"]),
    ("api-contract", &["ledger-core", "runtime"], &["async-nats", "event-store", "reqwest"]),
    // It cannot publish, so it cannot half-publish; it cannot read a view, so it cannot decide on one.
    (
        "command-api",
        &["ledger-core", "event-store", "ledger-engine", "api-contract", "runtime"],
        &["async-nats", "event-feed", "projector", "reqwest"],
    ),
    ("event-feed", &["event-store", "runtime"], &["ledger-engine", "api-contract"]),
    (
        "projector",
        &["ledger-core", "event-store", "api-contract", "event-feed", "runtime"],
        &["ledger-engine", "webhook-dispatcher", "reqwest"],
    ),
    (
        "webhook-dispatcher",
        &["ledger-core", "api-contract", "event-feed", "runtime"],
        &["ledger-engine", "projector", "command-api"],
    ),
    // It issues commands over HTTP, like anyone.
    (
        "workflows",
        &["ledger-core", "api-contract", "event-feed", "runtime"],
        &["ledger-engine", "projector", "command-api", "bank-simulator"],
    ),
    // What shares our mistakes could not show them.
    ("bank-simulator", &["runtime"], &["sqlx", "async-nats", "rust_decimal", "ledger-core"]),
    ("auditor", &[], &["async-nats", "axum", "cqrs-es"]),
    // No word of the business.
    ("runtime", &[], &["sqlx", "async-nats", "rust_decimal"]),
    ("migrations", &[], &["async-nats", "axum"]),
    ("local-stack", &[], &["axum"]),
    // What shares the code that it judges could not see its mistakes.
    ("torture", &["local-stack"], &["ledger-core", "event-store", "auditor", "runtime", "cqrs-es"]),
    (
        "daybook",
        &[
            "ledger-core",
            "event-store",
            "ledger-engine",
            "api-contract",
            "command-api",
            "event-feed",
            "projector",
            "webhook-dispatcher",
            "workflows",
            "bank-simulator",
            "auditor",
            "runtime",
            "migrations",
            "local-stack",
            "torture",
        ],
        &[],
    ),
];

/// Outside crates that nothing of ours may bring in; `deny.toml` says why.
const BANNED: [&str; 5] = ["aws-lc-rs", "aws-lc-sys", "native-tls", "openssl", "openssl-sys"];

#[test]
fn each_room_uses_of_ours_what_its_place_on_the_road_allows_and_nothing_else() {
    let metadata = Metadata::read();
    for (room, uses, _) in ROOMS {
        let found: BTreeSet<_> = metadata.uses_of_ours(room).into_iter().collect();
        assert_eq!(found, uses.iter().map(|name| (*name).to_owned()).collect(), "{room}");
    }
}

#[test]
fn no_room_reaches_by_any_path_what_it_must_not() {
    let metadata = Metadata::read();
    for (room, _, must_not) in ROOMS {
        let reached = metadata.reached_from(room);
        for name in must_not.iter().chain(&BANNED) {
            assert!(!reached.contains(*name), "{room} reaches {name}");
        }
    }
}

#[test]
fn there_is_one_sqlx_and_everything_from_outside_is_from_crates_io() {
    let lock = read("Cargo.lock");
    assert_eq!(lock.lines().filter(|line| *line == "name = \"sqlx\"").count(), 1);
    for banned in BANNED {
        assert!(!lock.contains(&format!("name = \"{banned}\"\n")), "{banned} is in Cargo.lock");
    }
    for line in lock.lines().filter(|line| line.starts_with("source = ")) {
        assert!(line.starts_with("source = \"registry+") && line.ends_with("/crates.io-index\""), "{line}");
    }
}

#[test]
fn members_are_listed_in_the_order_an_event_travels_and_all_keep_the_workspaces_lints() {
    let manifest = read("Cargo.toml");
    let members = manifest.split_once("members = [").unwrap().1.split_once(']').unwrap().0;
    let members: Vec<_> = members.lines().filter_map(|line| line.split('"').nth(1)).collect();
    assert_eq!(members, ROOMS.map(|(room, ..)| room));
    for member in members {
        assert!(read(&format!("{member}/Cargo.toml")).contains("[lints]\nworkspace = true\n"), "{member}");
    }
}

/// What cargo knows of the workspace.
struct Metadata {
    ours: BTreeMap<String, BTreeSet<String>>,
    /// Names by package id, and the ids that each uses outside of its tests and its build.
    graph: BTreeMap<String, (String, Vec<String>)>,
}

impl Metadata {
    fn read() -> Self {
        // For this machine's kind alone, or cargo would want the crates of all others.
        let version = Command::new(env!("CARGO")).arg("-vV").output().unwrap();
        let version = String::from_utf8(version.stdout).unwrap();
        let host = version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
        let output = Command::new(env!("CARGO"))
            .args(["metadata", "--format-version", "1", "--offline", "--filter-platform", host])
            .current_dir(root())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
        let packages = metadata["packages"].as_array().unwrap();
        let ours = packages.iter().filter(|package| package["source"].is_null()).map(|package| {
            let uses = package["dependencies"].as_array().unwrap().iter();
            let uses = uses.filter(|used| used["kind"].is_null() && used["source"].is_null());
            (text(&package["name"]), uses.map(|used| text(&used["name"])).collect())
        });
        let names: BTreeMap<_, _> =
            packages.iter().map(|package| (text(&package["id"]), text(&package["name"]))).collect();
        let graph = metadata["resolve"]["nodes"].as_array().unwrap().iter().map(|node| {
            let normal =
                |used: &&Value| used["dep_kinds"].as_array().unwrap().iter().any(|kind| kind["kind"].is_null());
            let uses = node["deps"].as_array().unwrap().iter().filter(normal).map(|used| text(&used["pkg"])).collect();
            let id = text(&node["id"]);
            (id.clone(), (names[&id].clone(), uses))
        });
        Self { ours: ours.collect(), graph: graph.collect() }
    }

    fn uses_of_ours(&self, room: &str) -> BTreeSet<String> {
        self.ours.get(room).unwrap_or_else(|| panic!("no room {room}")).clone()
    }

    fn reached_from(&self, room: &str) -> BTreeSet<String> {
        let start = self.graph.iter().find(|(_, (name, _))| name == room).unwrap().0;
        let (mut seen, mut next) = (BTreeSet::from([start]), vec![start]);
        while let Some(id) = next.pop() {
            next.extend(self.graph[id].1.iter().filter(|used| seen.insert(used)));
        }
        seen.remove(start);
        seen.into_iter().map(|id| self.graph[id].0.clone()).collect()
    }
}

// The files.

#[test]
fn every_source_file_opens_with_its_job() {
    let sources: Vec<_> = files().into_iter().filter(|file| has_extension(file, "rs")).collect();
    assert!(100 < sources.len(), "only {} source files were found", sources.len());
    for file in sources {
        let content = std::fs::read_to_string(&file).unwrap();
        assert!(content.starts_with("//! "), "{}", file.display());
    }
}

#[test]
fn no_file_names_a_place_on_somebodys_machine() {
    // Put together here, so that this file does not hold them.
    let places = ["work", "root", "Users", "mnt"].map(|name| format!("/{name}/"));
    for file in files() {
        let Ok(content) = std::fs::read_to_string(&file) else { continue }; // not a text
        for (number, line) in content.lines().enumerate() {
            let named = places.iter().find(|place| line.contains(place.as_str()));
            assert!(named.is_none(), "{}:{}: {line}", file.display(), number + 1);
        }
    }
}

#[test]
fn every_link_in_a_document_to_a_file_of_the_repository_leads_to_one() {
    let mut links = 0;
    for document in files().into_iter().filter(|file| has_extension(file, "md")) {
        let content = std::fs::read_to_string(&document).unwrap();
        for target in content.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = target.split(['#', ' ']).next().unwrap();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            links += 1;
            let led_to = document.parent().unwrap().join(file);
            assert!(led_to.exists(), "{}: {target}", document.display());
        }
    }
    assert!(0 < links, "no link was found at all");
}

#[test]
fn every_source_file_that_a_document_names_exists() {
    let everything: Vec<_> = files().iter().map(|file| file.to_str().unwrap().to_owned()).collect();
    for document in ["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"] {
        for code in read(document).split('`').skip(1).step_by(2) {
            let is_file = code.contains('.') && !code.contains(char::is_whitespace) && !code.contains(['*', '<', ':']);
            let is_source = [".rs", ".sql", ".toml"].iter().any(|ending| code.ends_with(ending));
            if is_file && is_source {
                let named = format!("/{}", code.trim_start_matches('/'));
                assert!(everything.iter().any(|file| file.ends_with(&named)), "{document} names {code}");
            }
        }
    }
}

/// Every file of the repository: what is here, less what `.gitignore` names.
fn files() -> Vec<PathBuf> {
    let ignored: Vec<_> = read(".gitignore").lines().map(|line| line.trim_start_matches('/').to_owned()).collect();
    let (mut files, mut next) = (Vec::new(), vec![root()]);
    while let Some(folder) = next.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_ignored = name == ".git" || (folder == root() && ignored.contains(&name));
            let kind = entry.file_type().unwrap();
            match (is_ignored, kind.is_dir()) {
                (true, _) => {}
                (_, true) => next.push(entry.path()),
                _ if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files.sort();
    files
}

fn has_extension(file: &Path, extension: &str) -> bool {
    file.extension().is_some_and(|found| found == extension)
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

// The bus of a deployment.

#[tokio::test]
async fn on_the_bus_of_a_deployment_the_relay_publishes_and_followers_follow_and_can_do_nothing_else() {
    let bus = Bus::start().await;
    let database = testing::database(|url| async move { migrations::run(&url).await }).await;
    let settings =
        |user: &str| FeedSettings { nats_url: Some(bus.url(user)), stream: "daybook-house".to_owned(), beside: None };
    let log = || async { Log::new(event_store::connect(database.url(), "daybook_reader", 2).await.unwrap()) };

    let shutdown = Shutdown::new();
    let relaying = tokio::spawn(relay::run(log().await, settings("relay"), shutdown.clone()));
    let relay = jetstream::new(bus.connect("relay").await.unwrap());
    let stream =
        eventually("the relay's user makes the stream", async || relay.get_stream("daybook-house").await.ok()).await;
    assert_eq!(stream.cached_info().state.messages, 0);

    let mut follows = Vec::new();
    for user in ["projector", "webhook-dispatcher", "workflows"] {
        follows.push(Follow::start(log().await, settings(user), 0).await);
    }
    let mut writer = Writer::new(database.url()).unwrap();
    let mut head = log().await.head().await.unwrap();
    // A follower listens once it has seen the end of the log, which is now.
    let mut waiting = follows.iter_mut().map(|follow| Box::pin(follow.next())).collect::<Vec<_>>();
    let listening = async || {
        let all = futures::future::select_all(waiting.iter_mut());
        assert!(timeout(Duration::from_millis(20), all).await.is_err(), "nothing has been appended yet");
        let info = relay.get_stream("daybook-house").await.ok()?.cached_info().state.consumer_count;
        (info == 3).then_some(())
    };
    eventually("each of the three users has a consumer", listening).await;
    let commit = declined(&head);
    writer.append(&commit).await.unwrap();
    head = commit.head();
    for follow in waiting {
        let page = timeout(PATIENCE, follow).await.unwrap().unwrap();
        assert_eq!(page.last().unwrap().number, head.commit);
    }

    let subject = stream.cached_info().config.subjects[0].clone();
    let relayed =
        async || (relay.get_stream("daybook-house").await.ok()?.cached_info().state.last_sequence == 1).then_some(());
    eventually("the relay's user publishes the commit", relayed).await;
    for user in ["projector", "webhook-dispatcher", "workflows"] {
        let client = bus.connect(user).await.unwrap();
        let seen = consume(&client).await;
        assert_eq!(serde_json::from_slice::<Commit>(&seen).unwrap(), commit, "{user}");

        let refused = async |subject: String| {
            let answer = timeout(Duration::from_millis(500), client.request(subject.clone(), "{}".into())).await;
            assert!(answer.is_err(), "{user} got an answer to {subject}");
        };
        let forbidden = ["STREAM.CREATE", "STREAM.UPDATE", "STREAM.PURGE", "STREAM.DELETE"];
        let forbidden = forbidden.iter().map(|request| format!("$JS.API.{request}.daybook-house"));
        futures::future::join_all(forbidden.chain([subject.clone()]).map(refused)).await;
    }
    let state = relay.get_stream("daybook-house").await.unwrap().cached_info().state.clone();
    assert_eq!((state.messages, state.last_sequence), (1, 1), "nobody but the relay has published or deleted");
    // What a relay needs beside publishing: the stream's end, to see that it is this log's, and making it anew.
    assert!(stream.get_raw_message(1).await.is_ok(), "the relay's user reads the stream's end");
    assert!(relay.delete_stream("daybook-house").await.is_ok(), "the relay's user deletes the stream");

    shutdown.trigger();
    timeout(PATIENCE, relaying).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn nobody_comes_onto_the_bus_of_a_deployment_without_a_name_and_its_password() {
    let bus = Bus::start().await;
    assert!(async_nats::connect(&bus.address).await.is_err(), "without a name");
    let wrong = async_nats::ConnectOptions::with_user_and_password("relay".to_owned(), "wrong".to_owned());
    assert!(wrong.connect(&bus.address).await.is_err(), "with a wrong password");
    assert!(bus.connect("relay").await.is_ok());
}

#[tokio::test]
async fn the_bus_of_a_deployment_does_not_start_with_a_password_missing() {
    let output = Command::new(testing::nats_program().await)
        .arg("-t")
        .arg("-c")
        .arg(root().join("nats.conf"))
        .env_clear()
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("PASSWORD"));
}

/// A nats-server with the repository's nats.conf, that ends with this process however that ends.
struct Bus {
    address: String,
    guardian: Child,
    _directory: tempfile::TempDir,
}

impl Bus {
    async fn start() -> Self {
        // The pipe closes when we are gone, even if we are killed.
        const SCRIPT: &str = r#""$@" </dev/null & server=$!; cat; kill -KILL "$server""#;
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", SCRIPT, "guardian"])
            .arg(testing::nats_program().await)
            .arg("-c")
            .arg(root().join("nats.conf"))
            .args(["-p", "-1", "--store_dir", ".", "--ports_file_dir", ".", "-l"])
            .arg(&log)
            .current_dir(directory.path())
            .stdin(Stdio::piped());
        for user in ["relay", "projector", "webhooks", "workflows"] {
            command.env(format!("DAYBOOK_NATS_{}_PASSWORD", user.to_uppercase()), password(user));
        }
        let guardian = command.spawn().unwrap();
        let ports = async || {
            let folder = std::fs::read_dir(directory.path()).unwrap();
            let mut files = folder.map(|entry| entry.unwrap().path());
            let file = files.find(|file| has_extension(file, "ports"))?;
            let ports: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).ok()?;
            Some(text(&ports["nats"][0]))
        };
        let address = match within(Duration::from_secs(10), ports).await {
            Some(address) => address,
            None => panic!("nats-server did not start: {}", std::fs::read_to_string(log).unwrap_or_default()),
        };
        assert!(address.starts_with("nats://127.0.0.1:"), "{address}: open to others");
        Self { address, guardian, _directory: directory }
    }

    fn url(&self, user: &str) -> String {
        self.address.replace("nats://", &format!("nats://{user}:{}@", password(user)))
    }

    async fn connect(&self, user: &str) -> Result<async_nats::Client, async_nats::ConnectError> {
        let options = async_nats::ConnectOptions::with_user_and_password(user.to_owned(), password(user));
        options.connect(&self.address).await
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        drop(self.guardian.stdin.take());
        self.guardian.wait().ok(); // the script ends when the server is told to
    }
}

fn password(user: &str) -> String {
    let user = if user == "webhook-dispatcher" { "webhooks" } else { user };
    format!("pass{user}")
}

/// The first message of the stream, as a follower asks for it.
async fn consume(client: &async_nats::Client) -> Vec<u8> {
    let stream = jetstream::new(client.clone()).get_stream("daybook-house").await.unwrap();
    let config = pull::Config { ack_policy: AckPolicy::None, ..Default::default() };
    let mut messages = stream.create_consumer(config).await.unwrap().messages().await.unwrap();
    timeout(PATIENCE, messages.next()).await.unwrap().unwrap().unwrap().payload.to_vec()
}

/// A commit of one event that moves nothing.
fn declined(head: &event_feed::Head) -> Commit {
    let id = CommandId::from_uuid(Uuid::now_v7());
    let failure = Failure { code: "wallet-frozen".to_owned(), detail: "the wallet is frozen".to_owned() };
    let event = Event::Command(id, CommandEvent::Declined { partner_id: None, failure });
    Commit::seal(head, Timestamp::EPOCH, &[Draft::new(id, None, "{}", NewEvent { sequence: 1, event })])
}

// The deployment.

#[tokio::test]
async fn daybook_migrate_makes_an_empty_database_ready_and_lets_the_named_clients_in_and_can_be_repeated() {
    let url = empty_database("house_migrate").await;
    let directory = tempfile::tempdir().unwrap();
    let key_file = directory.path().join("key");
    std::fs::write(&key_file, [7; 32]).unwrap();
    let id = "cli_0192f0c1-2d3e-7abc-8def-0123456789ab";
    let migrate = |secret: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_daybook"));
        command.args(["migrate", "--database-url", &url, "--admin-client-id", id, "--secrets-key-file"]).arg(&key_file);
        command.env("DAYBOOK_ADMIN_CLIENT_SECRET", secret).output().unwrap()
    };
    let short = migrate("short");
    assert!(!short.status.success());
    assert!(String::from_utf8_lossy(&short.stderr).contains("DAYBOOK_ADMIN_CLIENT_SECRET"));

    let secret = "0123456789abcdef0123456789abcdef";
    for _ in 0..2 {
        let output = migrate(secret);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let access = Access::connect(&url, Seal::from_key([7; 32])).await.unwrap();
    assert!(access.issue(id, &Secret::new(secret)).await.is_ok());
    assert!(access.issue(id, &Secret::new("another")).await.is_err());
}

#[tokio::test]
async fn a_login_that_is_a_member_of_a_services_roles_alone_may_act_as_these_and_as_no_other() {
    let database = testing::database(|url| async move { migrations::run(&url).await }).await;
    let mut connection = sqlx::PgConnection::connect(database.url()).await.unwrap();
    let all = [
        "daybook_reader",
        "daybook_ledger",
        "daybook_access",
        "daybook_projector",
        "daybook_webhooks",
        "daybook_workflows",
    ];
    // As SECURITY.md names them. Whoever follows the log is a reader by way of its own role.
    for (login, roles, may) in [
        ("house_command_api", "daybook_ledger, daybook_access", [true, true, true, false, false, false]),
        ("house_relay", "daybook_reader", [true, false, false, false, false, false]),
        ("house_projector", "daybook_projector, daybook_access", [true, false, true, true, false, false]),
        ("house_dispatcher", "daybook_webhooks, daybook_access", [true, false, true, false, true, false]),
        ("house_workflows", "daybook_workflows", [true, false, false, false, false, true]),
    ] {
        let create = format!("create role {login} login password 'house' in role {roles}");
        sqlx::query(&create).execute(&mut connection).await.unwrap();
        let (_, address) = database.url().rsplit_once('@').unwrap();
        let url = format!("postgres://{login}:house@{address}");
        for (role, may) in all.into_iter().zip(may) {
            let connected = event_store::connect(&url, role, 1).await;
            assert_eq!(connected.is_ok(), may, "{login} as {role}: {:?}", connected.err());
        }
    }
}

#[test]
fn every_service_of_compose_yaml_starts_a_binary_of_ours_with_options_that_it_knows_and_all_that_it_needs() {
    let services = services(&read("compose.yaml"));
    let ours: BTreeMap<_, _> = services.iter().filter(|(_, service)| service.program.is_some()).collect();
    let started: BTreeSet<_> = ours.values().map(|service| service.program.as_deref().unwrap()).collect();
    let expected =
        ["bank-simulator", "command-api", "daybook", "projector", "relay", "webhook-dispatcher", "workflows"];
    assert_eq!(started, expected.into());
    for (name, service) in ours {
        let help = help(service);
        let options = options(&help);
        for argument in service.arguments.iter().filter(|argument| argument.starts_with("--")) {
            assert!(options.iter().any(|option| option.flag == *argument), "{name}: {argument} is not in:\n{help}");
        }
        for variable in service.environment.iter().filter(|variable| variable.starts_with("DAYBOOK_")) {
            assert!(help.contains(variable.as_str()), "{name}: {variable} is not in:\n{help}");
        }
        let usage = help.lines().find(|line| line.starts_with("Usage:")).unwrap();
        for option in options.iter().filter(|option| usage.contains(&format!(" {} ", option.flag))) {
            let given = service.arguments.contains(&option.flag)
                || option.variable.as_ref().is_some_and(|variable| service.environment.contains(variable));
            assert!(given, "{name}: {} is needed and not given", option.flag);
        }
    }
}

#[test]
fn compose_yaml_has_no_secret_of_its_own() {
    let compose = read("compose.yaml");
    for line in compose.lines().filter(|line| !line.trim_start().starts_with('#')) {
        let Some((name, value)) = line.split_once(": ") else { continue };
        let is_secret =
            ["PASSWORD", "SECRET", "API_KEY", "DATABASE_URL", "NATS_URL"].iter().any(|part| name.contains(part));
        if is_secret && !name.ends_with("_FILE") {
            assert!(value.contains(":?"), "{line}");
        }
    }
}

/// What compose.yaml says of a service, as far as it matters here.
#[derive(Debug, Default)]
struct Service {
    /// A binary of ours, if its command is one.
    program: Option<String>,
    arguments: Vec<String>,
    /// Names only.
    environment: Vec<String>,
}

/// Enough of YAML for a file that keeps to two spaces a level and to a command on one line.
fn services(compose: &str) -> BTreeMap<String, Service> {
    let mut services: BTreeMap<String, Service> = BTreeMap::new();
    let (mut section, mut name, mut key) = ("", "", "");
    for line in compose.lines().filter(|line| !line.trim_start().starts_with('#') && !line.trim().is_empty()) {
        let level = (line.len() - line.trim_start().len()) / 2;
        let (left, right) = line.trim().split_once(':').unwrap_or((line.trim(), ""));
        match level {
            0 => section = left,
            1 => name = left,
            2 => key = left,
            _ => {}
        }
        if section != "services" {
            continue;
        }
        let service = services.entry(name.to_owned()).or_default();
        match (level, key) {
            (2, "command") => {
                let command: Vec<String> = serde_json::from_str(right.trim()).unwrap_or_else(|_| panic!("{line}"));
                service.program = command[0].strip_prefix("/target/release/").map(str::to_owned);
                service.arguments = command[1..].to_vec();
            }
            (3, "environment") => service.environment.push(left.to_owned()),
            _ => {}
        }
    }
    services
}

fn help(service: &Service) -> String {
    let program = program(service.program.as_deref().unwrap());
    let subcommand = service.arguments.iter().take_while(|argument| !argument.starts_with('-'));
    let output = Command::new(&program).args(subcommand).arg("--help").output().unwrap();
    assert!(output.status.success(), "{} --help: {}", program.display(), String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A binary of the workspace. `cargo test --workspace` has built it beside ours; a test of this package alone has not.
fn program(name: &str) -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_daybook")).with_file_name(name);
    if !program.exists() {
        let built = Command::new(env!("CARGO")).args(["build", "--workspace", "--bins"]).current_dir(root()).status();
        assert!(built.unwrap().success(), "the workspace's binaries could not be built");
    }
    assert!(program.exists(), "the workspace has no binary {name}");
    program
}

struct HelpOption {
    flag: String,
    variable: Option<String>,
}

/// The options in what a program says of itself.
fn options(help: &str) -> Vec<HelpOption> {
    let mut options: Vec<HelpOption> = Vec::new();
    for line in help.lines() {
        let words = line.trim_start().trim_start_matches("-h, ").trim_start_matches("-V, ");
        if line.starts_with(' ') && words.starts_with("--") {
            options.push(HelpOption { flag: words.split([' ', '=']).next().unwrap().to_owned(), variable: None });
        }
        if let (Some(option), Some((_, rest))) = (options.last_mut(), line.split_once("[env: ")) {
            option.variable = rest.split(['=', ']']).next().map(str::to_owned);
        }
    }
    options
}

async fn empty_database(name: &str) -> String {
    let url = testing::stack().await.database_url();
    let mut connection = sqlx::PgConnection::connect(url).await.unwrap();
    sqlx::query(&format!("create database {name}")).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    let (server, _) = url.rsplit_once('/').unwrap();
    format!("{server}/{name}")
}

/// What `look` finds, as soon as it finds something.
async fn eventually<T>(claim: &str, look: impl AsyncFnMut() -> Option<T>) -> T {
    match within(PATIENCE, look).await {
        Some(found) => found,
        None => panic!("not in time: {claim}"),
    }
}

async fn within<T>(patience: Duration, mut look: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if let Some(found) = look().await {
            return Some(found);
        }
        sleep(Duration::from_millis(10)).await;
    }
    None
}
