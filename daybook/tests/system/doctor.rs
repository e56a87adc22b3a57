//! `daybook doctor` on systems that are well, and on systems that are really broken.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use async_nats::jetstream;
use local_stack::testing;
use serde_json::Value;
use sqlx::{Connection, Executor, PgConnection};

use crate::process::{DataDirectory, Daybook, PROGRAM};

/// Its exit code, and its findings.
async fn doctor(options: &[&str]) -> (i32, Value) {
    doctor_within(&[], options).await
}

/// As [`doctor`], with these variables in its environment.
async fn doctor_within(environment: &[(&str, &str)], options: &[&str]) -> (i32, Value) {
    let mut command = Command::new(PROGRAM);
    command.args(["doctor", "--json"]).args(options);
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("OTEL_") {
            command.env_remove(variable);
        }
    }
    command.env_remove("DAYBOOK_DATABASE_URL").env_remove("DAYBOOK_NATS_URL").envs(environment.iter().copied());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let report = serde_json::from_str(&text);
    let report = report.unwrap_or_else(|_| panic!("{text}\n{}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code().unwrap(), report)
}

/// `area/check` of what has this verdict.
fn of_verdict(report: &Value, verdict: &str) -> BTreeSet<String> {
    let findings = report["findings"].as_array().unwrap().iter().filter(|finding| finding["verdict"] == verdict);
    let name =
        |finding: &Value| format!("{}/{}", finding["area"].as_str().unwrap(), finding["check"].as_str().unwrap());
    findings.map(name).collect()
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Several statements, of which each is a transaction of its own, stand between `;;`.
async fn execute(owner: &mut PgConnection, statements: &str) {
    for statement in statements.split(";;") {
        owner.execute(statement).await.unwrap();
    }
}

async fn owner(daybook: &Daybook) -> PgConnection {
    PgConnection::connect(daybook.database_url()).await.unwrap()
}

#[tokio::test]
async fn a_system_that_is_well_has_nothing_wrong_and_is_left_as_it_was() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &[]).await;
    daybook.wallet("alice", "5.00").await;
    let mut owner = owner(&daybook).await;
    let state = "select (select count(*) from ledger.events)::text || (select count(*) from access.audit)
                 || (select count(*) from pg_roles) || (select count(*) from pg_class)";
    let files = || {
        let entries = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name());
        entries.collect::<BTreeSet<_>>()
    };
    let before: (String, _) = (sqlx::query_scalar(state).fetch_one(&mut owner).await.unwrap(), files());

    let (code, report) = doctor(&["--data-dir", directory.path().to_str().unwrap()]).await;
    assert_eq!((code, &report["wrong"]), (0, &Value::from(0)), "{report:#}");
    assert_eq!(of_verdict(&report, "not-looked-at"), names(&[]), "{report:#}");
    assert_eq!(of_verdict(&report, "unknown"), names(&[]), "{report:#}");
    let ok = of_verdict(&report, "ok");
    for area in ["machine", "installation", "postgres", "schema", "log", "followers", "bus"] {
        assert!(ok.iter().any(|name| name.starts_with(area)), "{area}: {report:#}");
    }
    // The disk of a machine that runs tests may well be slow, and nearly full.
    let warnings: Vec<_> =
        of_verdict(&report, "warning").into_iter().filter(|name| !name.starts_with("machine/")).collect();
    assert!(warnings.is_empty(), "{report:#}");
    let after: (String, _) = (sqlx::query_scalar(state).fetch_one(&mut owner).await.unwrap(), files());
    assert_eq!(before, after);
    let password = daybook.database_url().split(['@', ':']).nth(2).unwrap();
    assert!(!report.to_string().contains(password), "secrets are not shown");
}

#[tokio::test]
async fn what_is_broken_is_named_and_nothing_else() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &[]).await;
    daybook.wallet("alice", "5.00").await;
    let mut owner = owner(&daybook).await;
    let data_dir = directory.path().to_str().unwrap();
    let forge = "set session_replication_role = replica; update ledger.events set payload = replace(payload::text, ";
    let last = "::json where position = (select max(position) from ledger.events); reset session_replication_role";
    let refuse: String = sqlx::query_scalar("select pg_get_functiondef('ledger.refuse_change'::regproc)")
        .fetch_one(&mut owner)
        .await
        .unwrap();
    let forged = [format!("{forge}'5.00', '6.00'){last}"), format!("{forge}'6.00', '5.00'){last}")];
    for (broken, mended, wrong) in [
        (
            "alter system set fsync = off;; select pg_reload_conf(), pg_sleep(0.5)",
            "alter system reset fsync;; select pg_reload_conf(), pg_sleep(0.5)",
            names(&["postgres/fsync"]),
        ),
        (
            "alter role daybook set synchronous_commit = off",
            "alter role daybook reset synchronous_commit",
            names(&["postgres/synchronous_commit", "postgres/settings-of-roles"]),
        ),
        (
            "update _sqlx_migrations set checksum = checksum || '\\x00' where version = 1",
            "update _sqlx_migrations set checksum = substr(checksum, 1, length(checksum) - 1) where version = 1",
            names(&["schema/migrations"]),
        ),
        (
            "insert into _sqlx_migrations select 9999, 'later', now(), true, checksum, 1 from _sqlx_migrations limit 1",
            "delete from _sqlx_migrations where version = 9999",
            names(&["schema/migrations"]),
        ),
        (
            "grant update on ledger.events to daybook_webhooks",
            "revoke update on ledger.events from daybook_webhooks",
            names(&["schema/rights", "schema/append-only"]),
        ),
        (
            "create role meddler; grant pg_write_all_data to meddler",
            "drop role meddler",
            names(&["schema/append-only"]),
        ),
        (
            "grant daybook_access to daybook_projector",
            "revoke daybook_access from daybook_projector",
            names(&["schema/roles"]),
        ),
        (
            "revoke select on ledger.events from daybook_reader",
            "grant select on ledger.events to daybook_reader",
            names(&["schema/rights"]),
        ),
        (
            "alter table ledger.commits disable trigger append_only",
            "alter table ledger.commits enable trigger append_only",
            names(&["schema/append-only"]),
        ),
        (
            "create or replace function ledger.refuse_change() returns trigger language plpgsql as 'begin return null; end'",
            refuse.as_str(),
            names(&["schema/append-only"]),
        ),
        (forged[0].as_str(), forged[1].as_str(), names(&["log/chain"])),
        (
            "update access.clients set suspended = true where 'admin' = any(scopes)",
            "update access.clients set suspended = false where 'admin' = any(scopes)",
            names(&["followers/administrator"]),
        ),
    ] {
        execute(&mut owner, broken).await;
        let (code, report) = doctor(&["--data-dir", data_dir]).await;
        execute(&mut owner, mended).await;
        assert_eq!((code, of_verdict(&report, "wrong")), (1, wrong), "{broken}: {report:#}");
    }

    let file = directory.connection_file();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let (code, report) = doctor(&["--data-dir", data_dir]).await;
    assert_eq!((code, of_verdict(&report, "wrong")), (1, names(&["installation/file-rights"])), "{report:#}");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();

    // Slow, or for a person to look at, and not wrong.
    let warned_about = [
        (
            "alter database daybook set wal_compression = 'pglz'",
            "alter database daybook reset wal_compression",
            "postgres/tuning",
        ),
        (
            "insert into workflows.top_ups
                 (transaction_id, wallet_id, requested_position, token, amount, currency, state, expire_at, word,
                  outcome, alert)
             values (gen_random_uuid(), gen_random_uuid(), -1, 'ended otherwise', 10, 'EUR', 'ENDED', now(), 'success',
                     'EXPIRED', 'the bank said success, the ledger has ended it as EXPIRED')",
            "delete from workflows.top_ups where token = 'ended otherwise'",
            "followers/top-ups",
        ),
        (
            "insert into workflows.callbacks
                 (id, bank_reference, token, status, amount, currency, body, signed_at, verdict)
             values (gen_random_uuid(), 'another', 'paid again', 'success', 10, 'EUR', '{}', now(), 'SECOND')",
            "delete from workflows.callbacks where token = 'paid again'",
            "followers/callbacks",
        ),
    ];
    for (broken, mended, warning) in warned_about {
        execute(&mut owner, broken).await;
        let (code, report) = doctor(&["--data-dir", data_dir]).await;
        execute(&mut owner, mended).await;
        assert!(code == 0 && of_verdict(&report, "warning").contains(warning), "{broken}: {report:#}");
    }

    let (code, report) = doctor(&["--data-dir", data_dir]).await;
    assert_eq!((code, of_verdict(&report, "wrong")), (0, names(&[])), "all is mended: {report:#}");
    let warnings = of_verdict(&report, "warning");
    assert!(warned_about.iter().all(|(.., warning)| !warnings.contains(*warning)), "{report:#}");
    owner.close().await.unwrap();
}

#[tokio::test]
async fn what_is_there_and_cannot_be_looked_at_is_not_taken_for_well() {
    let directory = DataDirectory::new();
    let options = ["--data-dir", directory.path().to_str().unwrap(), "--listen", "127.0.0.1:0"];
    let (code, report) = doctor(&options).await;
    assert_eq!((code, of_verdict(&report, "unknown")), (0, names(&[])), "nothing is there yet: {report:#}");
    assert!(of_verdict(&report, "not-looked-at").contains("postgres/reachable"), "{report:#}");

    // Root may read every file, and no directory as one.
    let file = directory.connection_file();
    std::fs::create_dir(&file).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o700)).unwrap();
    let (code, report) = doctor(&options).await;
    assert_eq!((code, &report["verdict"], &report["unknown"]), (3, &"unknown".into(), &1.into()), "{report:#}");
    assert_eq!(of_verdict(&report, "unknown"), names(&["installation/data-directory"]), "{report:#}");
}

#[tokio::test]
async fn traces_are_said_to_arrive_only_where_services_would_send_them() {
    let directory = DataDirectory::new();
    let data_dir = directory.path().join("none");
    let options = ["--data-dir", data_dir.to_str().unwrap(), "--listen", "127.0.0.1:0"];
    let collector = std::net::TcpListener::bind("127.0.0.1:0").unwrap(); // the kernel connects, nobody reads
    let url = format!("http://{}", collector.local_addr().unwrap());
    let all = ("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str());
    for (environment, verdict, found) in [
        (vec![], "ok", "off: "),
        (vec![("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", url.as_str())], "ok", "the collector at http://"),
        (vec![all, ("OTEL_SDK_DISABLED", "true")], "ok", "off: OTEL_SDK_DISABLED "),
        (vec![all, ("OTEL_TRACES_EXPORTER", "none")], "ok", "off: OTEL_TRACES_EXPORTER "),
        (vec![all, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")], "warning", "off: OTEL_EXPORTER_OTLP_PROTOCOL "),
        (vec![(all.0, "grpc://127.0.0.1:4317")], "warning", "off: OTEL_EXPORTER_OTLP_ENDPOINT "),
    ] {
        let (code, report) = doctor_within(&environment, &options).await;
        let findings = report["findings"].as_array().unwrap();
        let said = findings.iter().find(|finding| finding["check"] == "traces").unwrap();
        assert_eq!((code, &said["verdict"]), (0, &verdict.into()), "{environment:?}: {report:#}");
        assert!(said["found"].as_str().unwrap().starts_with(found), "{environment:?}: {said:#}");
    }
}

#[tokio::test]
async fn a_killed_system_and_servers_that_are_away_or_silent_are_findings() {
    let directory = DataDirectory::new();
    let mut daybook = Daybook::start(&directory, &["--no-demo"]).await;
    daybook.kill();
    let data_dir = directory.path().to_str().unwrap();
    let gone = |path: &str| crate::lifecycle::processes(directory.path()).iter().all(|line| !line.contains(path));
    crate::process::eventually("its servers are gone", || async { gone("servers") }, |gone| *gone).await;
    let killed = |(_, report): &(i32, Value)| of_verdict(report, "warning").contains("installation/data-directory");
    let options = ["--data-dir", data_dir, "--listen", "127.0.0.1:0"];
    let look = || doctor(&options);
    // Whatever was started by it may hold its lock a moment longer.
    let (code, report) = crate::process::eventually("it is seen to be gone", look, killed).await;
    assert_eq!(code, 0, "nothing is to be mended: {report:#}");

    let (database, nats) = (daybook.database_url(), daybook.connection["natsUrl"].as_str().unwrap());
    let (code, report) = doctor(&["--data-dir", data_dir, "--database-url", database, "--nats-url", nats]).await;
    let away = names(&["postgres/reachable", "bus/reachable"]);
    assert_eq!((code, of_verdict(&report, "wrong")), (1, away.clone()), "{report:#}");
    assert!(of_verdict(&report, "ok").contains("machine/cores"), "what can be looked at is: {report:#}");

    // They take the connection, and say nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let (database, nats) = (format!("postgres://a:b@127.0.0.1:{port}/c"), format!("nats://127.0.0.1:{port}"));
    let began = Instant::now();
    let (code, report) = doctor(&["--data-dir", data_dir, "--database-url", &database, "--nats-url", &nats]).await;
    assert_eq!((code, of_verdict(&report, "wrong")), (1, away), "{report:#}");
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    drop(silent);
}

#[tokio::test]
async fn servers_that_do_not_keep_what_they_take_and_a_stream_of_another_shape_are_named() {
    let directory = DataDirectory::new();
    let data_dir = directory.path().join("none");
    let database = testing::database(|url| async move { migrations::run(&url).await }).await;
    let nats = testing::stack().await.nats_url();
    let mut owner = PgConnection::connect(database.url()).await.unwrap();
    let ledger: sqlx::types::Uuid =
        sqlx::query_scalar("select id from ledger.identity").fetch_one(&mut owner).await.unwrap();
    let jetstream = jetstream::new(testing::nats().await);
    let subjects = |name: &str| vec![format!("{name}.>")];
    for name in [format!("daybook-{ledger}"), "daybook-0192f0c1-2d3e-7abc-8def-0123456789ab".to_owned()] {
        let config = jetstream::stream::Config { subjects: subjects(&name), name, ..Default::default() };
        jetstream.create_stream(config).await.unwrap();
    }
    let options = ["--data-dir", data_dir.to_str().unwrap(), "--listen", "127.0.0.1:0"];
    let options = [&options[..], &["--database-url", database.url(), "--nats-url", nats]].concat();
    let (code, report) = doctor(&options).await;
    let wrong = [
        "postgres/fsync",
        "postgres/full_page_writes",
        "postgres/synchronous_commit",
        "bus/stream",
        "followers/administrator",
    ];
    assert_eq!((code, of_verdict(&report, "wrong")), (1, names(&wrong)), "{report:#}");
    assert!(of_verdict(&report, "warning").contains("bus/other-ledgers"), "{report:#}");

    // A stream that is further than the log belongs to a history that the log does not have.
    let name = format!("daybook-{ledger}");
    jetstream.delete_stream(&name).await.unwrap();
    let log = event_feed::Log::new(event_store::connect(database.url(), "daybook_reader", 1).await.unwrap());
    let settings = event_feed::FeedSettings::of(&log, Some(nats.to_owned())).await.unwrap();
    let stop = runtime::shutdown::Shutdown::new();
    let relay = tokio::spawn(event_feed::relay::run(log, settings, stop.clone()));
    let made = || async { jetstream.get_stream(&name).await.is_ok() };
    crate::process::eventually("the relay made the stream", made, |made| *made).await;
    stop.trigger();
    relay.await.unwrap().unwrap();
    let (_, report) = doctor(&options).await;
    assert!(of_verdict(&report, "ok").contains("bus/stream"), "{report:#}");
    let subject = format!("daybook.{name}.commits.0");
    jetstream.publish(subject, "invented".into()).await.unwrap().await.unwrap();
    let (_, report) = doctor(&options).await;
    assert!(of_verdict(&report, "wrong").contains("bus/stream"), "{report:#}");
}
