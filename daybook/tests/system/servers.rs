//! Its private servers die under it, and come back.

use std::path::Path;
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::{Value, json};

use crate::lifecycle::processes;
use crate::process::{DataDirectory, Daybook, answer, eventually, run};
use crate::road::receiver;

/// From a server's death until the product works as before; the rest is for a busy machine.
const BACK_MAX: Duration = Duration::from_secs(30);

/// A server's process, from the file that it writes about itself.
fn server(directory: &Path, file: &str) -> Pid {
    let text = std::fs::read_to_string(directory.join("servers").join(file)).unwrap();
    Pid::from_raw(text.lines().next().unwrap().trim().parse().unwrap()).unwrap()
}

async fn kill(server: Pid) {
    kill_process(server, Signal::KILL).unwrap();
    eventually("it is gone", || async { test_kill_process(server).is_err() }, |gone| *gone).await;
}

#[tokio::test]
async fn a_private_server_that_dies_comes_back_and_everything_goes_on() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &["--allow-local-webhooks", "--webhook-schedule", "1s,1s,1s,1s,1s"]).await;
    let partner = daybook.login("demoPartner").await;
    let (url, received) = receiver().await;
    let webhook = daybook.post(&partner, "/v1/webhooks", json!({"url": url, "events": ["transaction.completed"]}));
    answer(webhook, StatusCode::CREATED).await;
    let (alice, bob) = (daybook.wallet("alice", "100.00").await, daybook.wallet("bob", "0").await);
    let mut transfers = 0;

    for (what, file, wiped) in [
        ("nats-server", "nats/nats.pid", false),
        ("Postgres", "postgres/postmaster.pid", false),
        ("nats-server without its data", "nats/nats.pid", true),
        ("Postgres again", "postgres/postmaster.pid", false),
    ] {
        let killed = Instant::now();
        kill(server(directory.path(), file)).await;
        if wiped {
            std::fs::remove_dir_all(directory.path().join("servers/nats")).unwrap();
        }
        // As any client does it: again with the same key, until there is an answer.
        let mut positions = Vec::new();
        for _ in 0..5 {
            transfers += 1;
            let body = json!({"fromWalletId": alice, "toWalletId": bob, "amount": "1.00", "currency": "EUR"});
            let call = async || {
                let route = "/v1/transactions/transfer";
                let call = daybook.post_with_key(&partner, route, &format!("t-{transfers}"), body.clone());
                let call = call.timeout(Duration::from_secs(15)).send().await.unwrap();
                (call.status(), call.headers().get("ledger-position").cloned(), call.text().await.unwrap())
            };
            let done = |answer: &(StatusCode, Option<_>, String)| answer.0 == StatusCode::CREATED;
            let (_, position, body) = loop {
                let answer = call().await;
                if done(&answer) {
                    break answer;
                }
                assert_eq!(answer.0, StatusCode::SERVICE_UNAVAILABLE, "{what}: {}", answer.2);
                assert!(killed.elapsed() < BACK_MAX, "{what}: still {}", answer.2);
                tokio::time::sleep(Duration::from_millis(100)).await;
            };
            let id = serde_json::from_str::<Value>(&body).unwrap()["id"].clone();
            positions.push((position.unwrap().to_str().unwrap().to_owned(), id));
        }
        eprintln!("{what}: five transfers were done after {:?}", killed.elapsed());

        let (position, _) = positions.last().unwrap();
        let shown = || async {
            let balance = daybook.get(&partner, &format!("/v1/wallets/{bob}/balance"));
            let balance = balance.query(&[("minPosition", position)]).send().await.unwrap();
            (balance.status(), balance.text().await.unwrap())
        };
        eventually("the view shows them", shown, |seen| seen.0 == StatusCode::OK).await;
        eprintln!("{what}: the views had them after {:?}", killed.elapsed());
        let told = || async { received.lock().unwrap().clone() };
        let all = |seen: &Vec<Value>| positions.iter().all(|(_, id)| seen.iter().any(|body| body["data"]["id"] == *id));
        eventually("webhooks tell of them", told, all).await;
        eprintln!("{what}: the webhooks were there after {:?}", killed.elapsed());
        assert!(killed.elapsed() < BACK_MAX, "{what}: {:?}", killed.elapsed());
    }

    let log = directory.log();
    let said = |text: &str| log.lines().filter(|line| line.contains(text)).count();
    assert_eq!(said("a server died; it is started again"), 4, "{log}");
    let balance = daybook.get(&partner, &format!("/v1/wallets/{bob}/balance"));
    assert_eq!(answer(balance, StatusCode::OK).await["balance"], format!("{transfers}.00"));
    let (sound, report) = run(&["audit", "--database-url", daybook.database_url()]);
    assert!(sound, "{report}");
    let status = daybook.terminate().await;
    assert!(status.success(), "{status}\n{}", directory.log());
    eventually("no process is left", || async { processes(directory.path()) }, Vec::is_empty).await;
}

#[tokio::test]
async fn a_stop_while_a_server_is_coming_back_leaves_no_process_behind() {
    for file in ["nats/nats.pid", "postgres/postmaster.pid"] {
        let directory = DataDirectory::new();
        let daybook = Daybook::start(&directory, &["--no-demo"]).await;
        kill(server(directory.path(), file)).await;
        let status = daybook.terminate().await;
        assert!(status.success(), "{file}: {status}\n{}", directory.log());
        eventually("no process is left", || async { processes(directory.path()) }, Vec::is_empty).await;
    }
}
