//! `daybook demo`: what it plays has one outcome, and it notices any other.

use std::process::{Command, Stdio};

use reqwest::StatusCode;
use serde_json::json;

use crate::lifecycle::processes;
use crate::process::{DataDirectory, Daybook, PROGRAM, answer, eventually};

/// Whether it succeeded, and what it said.
async fn demo(options: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(PROGRAM);
    command.arg("demo").args(options).env_remove("DAYBOOK_DATABASE_URL").env_remove("DAYBOOK_NATS_URL");
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (output.status.code(), text)
}

fn digest(said: &str) -> &str {
    let after = said.rsplit_once("digest ").unwrap_or_else(|| panic!("{said}")).1;
    after.split_whitespace().next().unwrap()
}

#[tokio::test]
async fn the_same_seed_has_the_same_outcome_on_any_ledger_and_again_on_the_same_one() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &["--allow-local-webhooks"]).await;
    let data_dir = directory.path().to_str().unwrap();
    let play = ["--seed", "5", "--seconds", "2", "--rate", "80"];
    let (code, first) = demo(&[&play[..], &["--data-dir", data_dir]].concat()).await;
    assert_eq!(code, Some(0), "{first}");
    assert!(first.contains("everything is as it was computed beforehand"), "{first}");
    assert!(!first.contains(" 0 webhooks") && !first.contains("\x1b"), "{first}");
    let slower = ["--seed", "5", "--seconds", "4", "--rate", "40"];
    let (code, again) = demo(&[&slower[..], &["--data-dir", data_dir]].concat()).await;
    assert_eq!(code, Some(0), "{again}");
    let (code, elsewhere) = demo(&[&play[..], &["--fresh"]].concat()).await;
    assert_eq!(code, Some(0), "{elsewhere}");
    assert_eq!([digest(&again), digest(&elsewhere)], [digest(&first); 2], "timing and place do not matter");
    let (code, other) = demo(&["--seed", "6", "--seconds", "2", "--rate", "80", "--data-dir", data_dir]).await;
    assert_eq!(code, Some(0), "{other}");
    assert_ne!(digest(&other), digest(&first));

    // It leaves no endpoint behind that nobody answers at.
    let admin = daybook.login("admin").await;
    let partners = answer(daybook.get(&admin, "/v1/partners?limit=100"), StatusCode::OK).await;
    assert_eq!(partners["data"].as_array().unwrap().len(), 1 + 3 * 3, "each run has partners of its own");
    use sqlx::Connection;
    let mut owner = sqlx::PgConnection::connect(daybook.database_url()).await.unwrap();
    let left: i64 = sqlx::query_scalar("select count(*) from webhooks.endpoints where deleted_at is null")
        .fetch_one(&mut owner)
        .await
        .unwrap();
    assert_eq!(left, 0);
    owner.close().await.unwrap();
}

#[tokio::test]
async fn somebody_who_moves_its_money_meanwhile_is_noticed() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &[]).await;
    let admin = daybook.login("admin").await;
    let data_dir = directory.path().to_str().unwrap().to_owned();
    let playing =
        tokio::spawn(
            async move { demo(&["--seed", "7", "--seconds", "4", "--rate", "20", "--data-dir", &data_dir]).await },
        );
    // A shop's wallet, which only takes: nothing else comes out otherwise.
    let shops = || async {
        let wallets = answer(daybook.get(&admin, "/v1/wallets?userId=Green%20Grocer&limit=1"), StatusCode::OK).await;
        wallets["data"][0].clone()
    };
    let shop = eventually("there is a shop", shops, |shop| shop["id"].is_string()).await;
    let body = json!({
        "walletId": shop["id"], "direction": "CREDIT", "amount": "1", "currency": shop["currency"], "reason": "a gift"
    });
    let gift = daybook.post_with_key(&admin, "/v1/transactions/adjustment", "gift", body);
    answer(gift, StatusCode::CREATED).await;
    let (code, said) = playing.await.unwrap();
    assert_eq!(code, Some(1), "{said}");
    let different: Vec<_> = said.lines().filter(|line| line.contains("DIFFERENT  ")).collect();
    assert_eq!(different.len(), 2, "{said}");
    assert!(different[0].contains("Green Grocer") && different[0].contains(shop["id"].as_str().unwrap()), "{said}");
    assert!(different[1].contains("transactions of") && different[1].contains("ADJUSTMENT"), "{said}");
    assert!(said.contains("webhooks are not looked at"), "{said}");
}

#[tokio::test]
async fn a_killed_demo_leaves_no_system_of_its_own_behind() {
    let directory = DataDirectory::new();
    let mut demo = Command::new(PROGRAM)
        .args(["demo", "--fresh", "--seconds", "600"])
        .env("TMPDIR", directory.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let servers = || async { processes(directory.path()).into_iter().filter(|line| line.contains("postgres")).count() };
    eventually("its servers run", servers, |count| 0 < *count).await;
    demo.kill().unwrap();
    demo.wait().unwrap();
    eventually("no process is left", || async { processes(directory.path()) }, Vec::is_empty).await;
}
