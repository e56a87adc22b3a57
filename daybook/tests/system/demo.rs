//! `daybook demo`: what it plays has one outcome, it notices any other, and however it ends it takes its webhooks back.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use sqlx::PgPool;

use crate::lifecycle::processes;
use crate::process::{DataDirectory, Daybook, PROGRAM, answer, eventually};

/// For an end that was asked for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether it succeeded, and what it said.
async fn demo(options: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(PROGRAM);
    command.arg("demo").args(options).env_remove("DAYBOOK_DATABASE_URL").env_remove("DAYBOOK_NATS_URL");
    told(tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap())
}

fn told(output: Output) -> (Option<i32>, String) {
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (output.status.code(), text)
}

/// One that nobody waits for, against the system on a directory.
fn begin(directory: &DataDirectory) -> Child {
    let mut command = Command::new(PROGRAM);
    command.args(["demo", "--seconds", "600", "--data-dir"]).arg(directory.path());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits for the end of a process, and takes what nobody has read yet.
pub(crate) async fn end(mut child: Child) -> Output {
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if PATIENCE < began.elapsed() {
            child.kill().unwrap();
            panic!("it does not end: {:?}", child.wait_with_output().unwrap());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    child.wait_with_output().unwrap()
}

/// How many endpoints there are.
async fn endpoints(owner: &PgPool) -> i64 {
    let count = "select count(*) from webhooks.endpoints where deleted_at is null";
    sqlx::query_scalar(count).fetch_one(owner).await.unwrap()
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
    let owner = PgPool::connect(daybook.database_url()).await.unwrap();
    assert_eq!(endpoints(&owner).await, 0);
}

#[tokio::test]
async fn one_that_is_interrupted_or_fails_while_it_prepares_takes_its_endpoints_back() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &["--allow-local-webhooks"]).await;
    let admin = daybook.login("admin").await;
    let owner = PgPool::connect(daybook.database_url()).await.unwrap();
    // A registration waits for whoever has the checkpoint. All partners are registered by then, and no wallet is open.
    let checkpoint = "select from webhooks.checkpoint for update";
    let registering = || async {
        let waiting = "select count(*) from pg_stat_activity where query = $1 and wait_event_type = 'Lock'";
        sqlx::query_scalar::<_, i64>(waiting).bind(checkpoint).fetch_one(&owner).await.unwrap()
    };
    let registered = || endpoints(&owner);

    let mut fan_out = owner.begin().await.unwrap();
    sqlx::query(checkpoint).execute(&mut *fan_out).await.unwrap();
    let demo = begin(&directory);
    eventually("a webhook is asked for", registering, |count| 0 < *count).await;
    let mut log = owner.begin().await.unwrap(); // and from now on no wallet can be opened
    sqlx::query("lock table ledger.events in exclusive mode").execute(&mut *log).await.unwrap();
    fan_out.rollback().await.unwrap();
    eventually("the webhooks are registered", registered, |count| *count == 3).await;
    kill_process(Pid::from_child(&demo), Signal::INT).unwrap();
    let (code, said) = told(end(demo).await);
    assert_eq!(code, Some(130), "{said}");
    assert!(said.contains("nothing was compared") && !said.contains("stay registered"), "{said}");
    assert_eq!(registered().await, 0);
    log.rollback().await.unwrap();

    let mut fan_out = owner.begin().await.unwrap();
    sqlx::query(checkpoint).execute(&mut *fan_out).await.unwrap();
    let demo = begin(&directory);
    eventually("a webhook is asked for", registering, |count| 0 < *count).await;
    // Who opens the wallets may do that; who funds them may nothing any more.
    sqlx::query(
        "update access.clients set suspended = true, generation = generation + 1, revoked_at = clock_timestamp()
         where 'admin' = any(scopes)",
    )
    .execute(&owner)
    .await
    .unwrap();
    let refused = || async { daybook.get(&admin, "/v1/partners").send().await.unwrap().status() };
    eventually("the administrator is refused", refused, |status| *status == StatusCode::UNAUTHORIZED).await;
    fan_out.rollback().await.unwrap();
    let (code, said) = told(end(demo).await);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("preparing the demo: ") && !said.contains("stay registered"), "{said}");
    let made = "select count(*) from webhooks.endpoints";
    assert_eq!(sqlx::query_scalar::<_, i64>(made).fetch_one(&owner).await.unwrap(), 6, "{said}");
    assert_eq!(registered().await, 0);
}

#[tokio::test]
async fn a_reader_that_leaves_ends_it_and_it_takes_its_endpoints_back() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &["--allow-local-webhooks"]).await;
    let owner = PgPool::connect(daybook.database_url()).await.unwrap();
    // While it prepares, and while it plays.
    for lines in [1, 2] {
        let mut demo = begin(&directory);
        let mut reader = BufReader::new(demo.stdout.take().unwrap());
        let mut read = String::new();
        for _ in 0..lines {
            reader.read_line(&mut read).unwrap();
        }
        assert!(read.starts_with("demo: seed 1, ") && read.lines().count() == lines, "{read}");
        drop(reader);
        let (code, said) = told(end(demo).await);
        assert_eq!((code, said.as_str()), (Some(141), ""), "after {lines} lines");
        assert_eq!(endpoints(&owner).await, 0, "after {lines} lines");
    }
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
