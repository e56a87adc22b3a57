//! Starting, stopping and dying.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use reqwest::StatusCode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::process::{DataDirectory, Daybook, answer, eventually, run};

#[tokio::test]
async fn a_stop_is_clean_and_a_second_start_continues_where_it_was() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &[]).await;
    let mode = std::fs::metadata(directory.connection_file()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "connection.json holds credentials");
    let partner = daybook.login("demoPartner").await;
    let wallet = daybook.wallet("alice", "12.00").await;
    let first = daybook.connection.clone();

    assert!(daybook.terminate().await.success(), "SIGTERM ends with exit code 0");
    assert!(!directory.connection_file().exists(), "a clean stop removes connection.json");
    eventually("every process is gone", || async { processes(directory.path()) }, Vec::is_empty).await;

    let daybook = Daybook::start(&directory, &[]).await;
    for same in ["admin", "demoPartner", "bankUrl", "databaseUrl"] {
        assert_eq!(daybook.connection[same], first[same], "{same}");
    }
    let balance = daybook.get(&partner, &format!("/v1/wallets/{wallet}/balance"));
    assert_eq!(answer(balance, StatusCode::OK).await["balance"], "12.00", "also with the token of before");
    let again = daybook.wallet("alice", "1.00").await;
    assert_ne!(again, wallet);
}

#[tokio::test]
async fn kill_9_loses_nothing_acknowledged_and_leaves_no_process_behind() {
    let directory = DataDirectory::new();
    let mut daybook = Daybook::start(&directory, &[]).await;
    let (from, to) = (daybook.wallet("alice", "100.00").await, daybook.wallet("bob", "0").await);
    let partner = daybook.login("demoPartner").await;
    let transfer = |daybook: &Daybook, call: usize| {
        let body = json!({"fromWalletId": from, "toWalletId": to, "amount": "0.01", "currency": "EUR"});
        daybook.post_with_key(&partner, "/v1/transactions/transfer", &format!("t-{call}"), body)
    };

    // Calls go on until the kill; whatever was answered 201 is remembered.
    let calls: Vec<_> = (0..400).map(|call| tokio::spawn(transfer(&daybook, call).send())).collect();
    eventually(
        "a part of the calls is answered",
        || async { calls.iter().filter(|call| call.is_finished()).count() },
        |n| 50 < *n,
    )
    .await;
    daybook.kill();
    let mut acknowledged = Vec::new();
    for (call, answered) in calls.into_iter().enumerate() {
        if answered.await.unwrap().is_ok_and(|answer| answer.status() == StatusCode::CREATED) {
            acknowledged.push(call);
        }
    }
    eventually("no process is left", || async { processes(directory.path()) }, Vec::is_empty).await;

    let daybook = Daybook::start(&directory, &[]).await;
    for call in &acknowledged {
        let replay = transfer(&daybook, *call).send().await.unwrap();
        assert_eq!(replay.status(), StatusCode::CREATED);
        assert!(
            replay.headers().contains_key("idempotent-replayed"),
            "call {call} was acknowledged and is not in the log"
        );
    }
    for call in 0..400 {
        answer(transfer(&daybook, call), StatusCode::CREATED).await; // those whose outcome was unknown settle under their keys
    }
    let balance = daybook.get(&partner, &format!("/v1/wallets/{to}"));
    let head = answer(daybook.get(&partner, "/v1/head"), StatusCode::OK).await["position"].clone();
    let balance = balance.query(&[("minPosition", head.to_string())]);
    assert_eq!(answer(balance, StatusCode::OK).await["balance"], "4.00", "400 calls moved 0.01 once each");
    let (sound, report) = run(&["audit", "--database-url", daybook.database_url()]);
    assert!(sound, "{report}");
}

#[tokio::test]
async fn a_stop_during_the_start_is_clean_too() {
    let directory = DataDirectory::new();
    for delay in [0, 300, 600, 1_000, 1_500, 2_500] {
        let starting = Daybook::begin(&directory, &[], Stdio::null());
        // From then on it listens to signals; and then not waiting for anything, since any moment will do.
        let owner = || async { std::fs::read_to_string(directory.path().join("lock")).unwrap_or_default() };
        eventually("it owns the directory", owner, |owner| *owner == starting.id().to_string()).await;
        tokio::time::sleep(Duration::from_millis(delay)).await;
        let status = starting.terminate().await;
        assert!(status.success(), "stopped after {delay} ms: {status}\n{}", directory.log());
        assert!(!directory.connection_file().exists(), "stopped after {delay} ms");
    }
    eventually("every process is gone", || async { processes(directory.path()) }, Vec::is_empty).await;
    Daybook::start(&directory, &[]).await;
}

#[tokio::test]
async fn a_stop_does_not_wait_for_clients_that_will_not_end() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &[]).await;
    let (admin, partner) = (daybook.login("admin").await, daybook.login("demoPartner").await);
    let wallet = daybook.wallet("alice", "5.00").await;
    let address = daybook.base_url().strip_prefix("http://").unwrap().to_owned();

    // A stream that nobody reads, a head and a body that do not end, a call that waits, and a load of commands.
    let stream = daybook.get(&admin, "/v1/events").header("accept", "application/x-ndjson").send().await.unwrap();
    let mut unfinished = Vec::new();
    for text in [
        "GET /v1/head HTTP/1.1\r\nhost: d\r\n".to_owned(),
        format!(
            "POST /v1/wallets HTTP/1.1\r\nhost: d\r\nauthorization: Bearer {partner}\r\n\
             content-type: application/json\r\ncontent-length: 100\r\n\r\n{{"
        ),
    ] {
        let mut socket = std::net::TcpStream::connect(&address).unwrap();
        socket.write_all(text.as_bytes()).unwrap();
        unfinished.push(socket);
    }
    let top_up = json!({"walletId": wallet, "amount": "1.00", "currency": "EUR"});
    let pending = daybook.post_with_key(&partner, "/v1/transactions/top-up", "t", top_up);
    let pending = answer(pending, StatusCode::ACCEPTED).await["id"].as_str().unwrap().to_owned();
    let waiting = daybook.get(&partner, &format!("/v1/transactions/{pending}?waitMs=30000")).send();
    let waiting = tokio::spawn(waiting);
    let open = |call: usize| json!({"userId": format!("user-{call}"), "currency": "EUR"});
    let load: Vec<_> =
        (0..200).map(|call| tokio::spawn(daybook.post(&partner, "/v1/wallets", open(call)).send())).collect();

    let status = daybook.terminate().await;
    assert!(status.success(), "{status}\n{}", directory.log());
    for call in load {
        call.await.unwrap().ok(); // answered or cut off, but not left hanging
    }
    drop((stream, unfinished, waiting.await.unwrap().ok()));
}

#[tokio::test]
async fn nobody_reading_what_it_prints_does_not_end_it() {
    let directory = DataDirectory::new();
    let (reader, writer) = std::io::pipe().unwrap();
    let starting = Daybook::begin(&directory, &["--no-demo"], writer.into());
    drop(reader);
    let daybook = starting.ready(&directory).await;
    let status = daybook.terminate().await;
    assert!(status.success(), "{status}\n{}", directory.log());
}

#[tokio::test]
async fn what_a_killed_system_left_is_not_taken_for_a_ready_one() {
    let directory = DataDirectory::new();
    let mut daybook = Daybook::start(&directory, &["--no-demo"]).await;
    daybook.kill();
    assert!(directory.connection_file().exists());
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (started, said) = run(&["up", "--listen", &address, "--data-dir", directory.path().to_str().unwrap()]);
    assert!(!started && said.contains("another daybook?"), "{said}");
    assert!(!directory.connection_file().exists(), "there is nothing that it could connect to");
}

#[tokio::test]
async fn kill_9_leaves_no_process_behind_though_one_was_paused() {
    let directory = DataDirectory::new();
    let mut daybook = Daybook::start(&directory, &["--no-demo"]).await;
    let file = std::fs::read_to_string(directory.path().join("servers/postgres/postmaster.pid")).unwrap();
    let postgres = Pid::from_raw(file.lines().next().unwrap().parse().unwrap()).unwrap();
    kill_process(postgres, Signal::STOP).unwrap();
    daybook.kill();
    eventually("no process is left", || async { processes(directory.path()) }, Vec::is_empty).await;
}

#[tokio::test]
async fn a_data_directory_has_one_owner() {
    let directory = DataDirectory::new();
    let _daybook = Daybook::start(&directory, &["--no-demo"]).await;
    let path = directory.path().to_str().unwrap();
    let (started, said) = run(&["up", "--listen", "127.0.0.1:0", "--data-dir", path]);
    assert!(!started && said.contains("is in use by"), "{said}");
}

#[tokio::test]
async fn audits_end_with_the_code_that_scripts_look_at() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &[]).await;
    let wallet = daybook.wallet("alice", "5.00").await;
    let partner = daybook.login("demoPartner").await;
    let head = answer(daybook.get(&partner, "/v1/head"), StatusCode::OK).await["position"].as_i64().unwrap();
    let seen = daybook.get(&partner, &format!("/v1/wallets/{wallet}")).query(&[("minPosition", head)]);
    answer(seen, StatusCode::OK).await;
    let url = daybook.database_url().to_owned();
    let export = directory.path().join("ledger.ndjson").to_str().unwrap().to_owned();

    let (sound, report) = run(&["audit", "--database-url", &url]);
    assert!(sound && report.starts_with("sound"), "{report}");
    let (written, said) = run(&["export", "--database-url", &url, "--out", &export]);
    assert!(written, "{said}");
    let (sound, report) = run(&["verify", &export, "--json"]);
    assert!(sound, "{report}");
    let (rebuilt, said) = run(&["rebuild", "--database-url", &url]);
    assert!(rebuilt && !said.contains("DIFFERED"), "{said}");

    let lines = std::fs::read_to_string(&export).unwrap().replacen("\"5.00\"", "\"6.00\"", 1);
    std::fs::write(&export, lines).unwrap();
    let (sound, report) = run(&["verify", &export]);
    assert!(!sound && report.contains(&format!("position {head}")), "{report}");

    use sqlx::{Connection, PgConnection};
    let mut owner = PgConnection::connect(&url).await.unwrap();
    sqlx::query("set session_replication_role = replica").execute(&mut owner).await.unwrap();
    let forge = "update ledger.events set payload = replace(payload::text, '5.00', '6.00')::json where position = $1";
    sqlx::query(forge).bind(head).execute(&mut owner).await.unwrap();
    let (sound, report) = run(&["audit", "--database-url", &url]);
    assert!(!sound && report.contains(&format!("position {head}")), "{report}");
    tokio::time::timeout(Duration::from_secs(5), owner.close()).await.unwrap().unwrap();
}

/// The processes that run on a data directory, by their command lines.
pub(crate) fn processes(directory: &Path) -> Vec<String> {
    let directory = directory.to_str().unwrap();
    let output = std::process::Command::new("ps").args(["-eww", "-o", "pid=,args="]).output().unwrap();
    let all = String::from_utf8_lossy(&output.stdout).into_owned();
    all.lines().filter(|line| line.contains(directory)).map(str::to_owned).collect()
}
