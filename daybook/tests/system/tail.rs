//! `daybook tail`: the log in order, live, through an outage, and safe to look at.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};

use crate::process::{DataDirectory, Daybook, PROGRAM, answer, eventually, run};

const PATIENCE: Duration = Duration::from_secs(60);

fn spawn(directory: &DataDirectory, options: &[&str]) -> Child {
    let mut command = Command::new(PROGRAM);
    command.args(["tail", "--data-dir"]).arg(directory.path()).args(options);
    command.env_remove("DAYBOOK_DATABASE_URL").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn ended(mut tail: Child) -> (std::process::ExitStatus, String) {
    let began = Instant::now();
    loop {
        if let Some(status) = tail.try_wait().unwrap() {
            return (status, std::io::read_to_string(tail.stderr.take().unwrap()).unwrap());
        }
        if PATIENCE < began.elapsed() {
            tail.kill().unwrap();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Lines as they come, on a thread, so that waiting for one has a bound.
fn lines(stdout: ChildStdout) -> mpsc::Receiver<String> {
    let (line, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for text in BufReader::new(stdout).lines().map_while(Result::ok) {
            if line.send(text).is_err() {
                return;
            }
        }
    });
    lines
}

async fn transfer(daybook: &Daybook, partner: &str, from: &str, to: &str, key: &str, description: &str) -> Value {
    let body = json!({
        "fromWalletId": from, "toWalletId": to, "amount": "1.00", "currency": "EUR", "description": description
    });
    let began = Instant::now();
    loop {
        let call = daybook.post_with_key(partner, "/v1/transactions/transfer", key, body.clone()).send().await.unwrap();
        let (status, body) = (call.status(), call.text().await.unwrap());
        if status == StatusCode::CREATED {
            return serde_json::from_str(&body).unwrap();
        }
        assert!(status == StatusCode::SERVICE_UNAVAILABLE && began.elapsed() < PATIENCE, "{status} {body}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn events_are_told_in_order_filtered_and_without_what_a_terminal_would_obey() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &[]).await;
    let (alice, bob) = (daybook.wallet("alice", "100.00").await, daybook.wallet("bob", "0").await);
    let carol = daybook.wallet("carol", "3.00").await;
    let sent = transfer(&daybook, &daybook.login("demoPartner").await, &alice, &bob, "t1", "lunch\nwith ünï ✓").await;
    let id = sent["id"].as_str().unwrap();
    let data_dir = directory.path().to_str().unwrap();
    let tail = |options: &[&str]| {
        let (done, text) = run(&[&["tail", "--no-follow", "--data-dir", data_dir], options].concat());
        assert!(done, "{text}");
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let position = |line: &str| line.split_whitespace().next().unwrap().parse::<i64>().unwrap();

    let all: Vec<_> = tail(&["--from", "1"]).iter().map(|line| position(line)).collect();
    assert_eq!(all, (1..=sent["ledgerPosition"].as_i64().unwrap()).collect::<Vec<_>>());
    let last: Vec<_> = tail(&["--last", "3"]).iter().map(|line| position(line)).collect();
    assert_eq!(last, all[all.len() - 3..]);
    let line = &tail(&["--last", "1"])[0];
    let words = format!("transfer 1.00 EUR  {alice} → {bob}  {id}  description \"lunch\\nwith ünï ✓\"");
    assert!(line.ends_with(&words), "{line}\n{words}");

    assert_eq!(tail(&["--transaction", id]).len(), 1);
    let of_bob = tail(&["--wallet", &bob, "--from", "1"]);
    assert_eq!(of_bob.len(), 2, "{of_bob:?}");
    assert!(of_bob[0].contains("wallet opened, EUR") && of_bob[1].contains("transfer 1.00 EUR"), "{of_bob:?}");
    let opened = tail(&["--type", "WalletOpened", "--wallet", &carol, "--from", "1", "--json"]);
    let opened: Value = serde_json::from_str(&opened[0]).unwrap();
    let admin = daybook.login("admin").await;
    let filter = [("after", opened["position"].as_i64().unwrap() - 1), ("limit", 1)];
    let events = answer(daybook.get(&admin, "/v1/events").query(&filter), StatusCode::OK).await;
    assert_eq!(events["data"][0], opened, "the form of the API");
    let partner = tail(&["--type", "PartnerRegistered", "--from", "1", "--json"]);
    let partner: Value = serde_json::from_str(&partner[0]).unwrap();
    let partner = partner["aggregateId"].as_str().unwrap();
    let freeze = daybook.post(&admin, &format!("/v1/wallets/{carol}/freeze"), json!({"reason": "lost"}));
    answer(freeze, StatusCode::OK).await;
    let of_partner = tail(&["--partner", partner, "--from", "1"]);
    assert!(
        of_partner.last().unwrap().contains("wallet frozen"),
        "whose it is stands in its first event: {of_partner:?}"
    );
    let nobody = tail(&["--partner", "par_0192f0c1-2d3e-7abc-8def-0123456789ad", "--from", "1"]);
    assert!(nobody.is_empty(), "{nobody:?}");
    let (known, said) = run(&["tail", "--no-follow", "--data-dir", data_dir, "--type", "WalletStolen"]);
    assert!(!known && said.contains("WalletFrozen"), "{said}");

    // What the API refuses can still be in a log that somebody has tampered with.
    let mut owner = PgConnection::connect(daybook.database_url()).await.unwrap();
    let forge = "set session_replication_role = replica; update ledger.events
                 set payload = replace(payload::text, 'ünï', '\\u001b]0;gotcha\\u0007\\u009b2J\\u202e')::json
                 where event_type = 'TransactionPosted'";
    owner.execute(forge).await.unwrap();
    let text = tail(&["--from", "1"]).join("\n");
    assert!(text.contains(r"\u{1b}]0;gotcha\u{7}\u{9b}2J\u{202e}"), "{text}");
    assert!(!text.contains(['\x1b', '\x07', '\u{9b}', '\u{202e}']), "{text:?}");
    owner.close().await.unwrap();
}

#[tokio::test]
async fn it_follows_through_a_restart_of_postgres_without_a_gap_or_a_repetition_until_ctrl_c() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &[]).await;
    let (alice, bob) = (daybook.wallet("alice", "100.00").await, daybook.wallet("bob", "0").await);
    let mut tail = spawn(&directory, &["--last", "1", "--json"]);
    let lines = lines(tail.stdout.take().unwrap());
    let next = || {
        let line = lines.recv_timeout(PATIENCE).unwrap();
        serde_json::from_str::<Value>(&line).unwrap()["position"].as_i64().unwrap()
    };
    let mut at = next();
    let partner = daybook.login("demoPartner").await;
    for call in 0..12 {
        if call == 6 {
            let file = directory.path().join("servers/postgres/postmaster.pid");
            let text = std::fs::read_to_string(file).unwrap();
            let postgres = Pid::from_raw(text.lines().next().unwrap().parse().unwrap()).unwrap();
            kill_process(postgres, Signal::KILL).unwrap();
        }
        let sent = transfer(&daybook, &partner, &alice, &bob, &format!("t{call}"), "lunch").await;
        let position = sent["ledgerPosition"].as_i64().unwrap();
        while at < position {
            let seen = next();
            assert_eq!(seen, at + 1, "call {call}");
            at = seen;
        }
    }
    kill_process(Pid::from_child(&tail), Signal::INT).unwrap();
    let (status, said) = ended(tail);
    assert!(status.success(), "{status}: {said}");
    assert!(lines.try_recv().is_err(), "nothing comes twice");
    assert!(said.contains("the log cannot be read") && said.contains("can be read again"), "{said}");
}

#[tokio::test]
async fn a_reader_that_leaves_ends_it_quietly_though_nothing_happens() {
    let directory = DataDirectory::new();
    let _daybook = Daybook::start(&directory, &[]).await;
    let mut tail = spawn(&directory, &[]);
    let mut reader = BufReader::new(tail.stdout.take().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.contains("wallet opened"), "{line}");
    drop(reader);
    let (status, said) = ended(tail);
    assert!(status.success() && said.is_empty(), "{status}: {said}");
    let (found, said) = run(&["tail", "--data-dir", directory.path().join("nowhere").to_str().unwrap()]);
    assert!(!found && said.contains("no daybook runs on"), "{said}");
    eventually(
        "no tail is left",
        || async { crate::lifecycle::processes(directory.path()) },
        |all| all.iter().all(|line| !line.contains(" tail ")),
    )
    .await;
}
