//! What clients are told while the log cannot be written, and what becomes of their commands.
//!
//! The log is held by a lock on its table, as another transaction could hold it: appends wait, nothing fails.

use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use sqlx::{Connection, PgConnection};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use crate::door::{Door, Partner};
use crate::money::transfer;

/// More than any of these tests needs.
const PATIENCE: Duration = Duration::from_secs(20);

/// The log, while nobody can append to it.
pub(crate) struct Held(PgConnection);

impl Held {
    pub(crate) async fn take(door: &Door) -> Self {
        let mut connection = PgConnection::connect(door.database_url()).await.unwrap();
        sqlx::raw_sql("begin; lock table ledger.commits in exclusive mode").execute(&mut connection).await.unwrap();
        Self(connection)
    }

    /// Returns once an append waits for us.
    pub(crate) async fn append_waits(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let waiting: i64 = sqlx::query_scalar(
                "select count(*) from pg_locks where not granted and relation = 'ledger.commits'::regclass
                 and database = (select oid from pg_database where datname = current_database())",
            )
            .fetch_one(&mut self.0)
            .await
            .unwrap();
            if waiting != 0 {
                return;
            }
            assert!(Instant::now() < deadline, "no append came");
            sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) async fn let_go(mut self) {
        sqlx::raw_sql("rollback").execute(&mut self.0).await.unwrap();
        self.0.close().await.unwrap();
    }
}

async fn head_after(door: &Door, before: i64) {
    let deadline = Instant::now() + PATIENCE;
    while door.head().await == before {
        assert!(Instant::now() < deadline, "nothing was written after position {before}");
        sleep(Duration::from_millis(10)).await;
    }
}

fn post<'d>(door: &'d Door, partner: &Partner) -> crate::door::Call<'d> {
    door.post("/v1/transactions/transfer").token(&partner.token).key("k")
}

#[tokio::test]
async fn a_command_that_was_taken_runs_to_its_end_though_its_client_leaves() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let before = door.head().await;
    let mut held = Held::take(&door).await;

    let body = transfer(&alice, &bob, "1.00").to_string();
    let request = format!(
        "POST /v1/transactions/transfer HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\nidempotency-key: k\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        partner.token,
        body.len()
    );
    let mut client = TcpStream::connect(door.address()).await.unwrap();
    client.write_all(request.as_bytes()).await.unwrap();
    held.append_waits().await;
    drop(client);
    held.let_go().await;

    head_after(&door, before).await;
    let again = post(&door, &partner).json(&transfer(&alice, &bob, "1.00")).await;
    again.expect(201);
    assert!(again.replayed());
    assert_eq!(door.balances().await[&bob], 100);
}

#[tokio::test]
async fn a_key_in_flight_is_waited_for_and_then_answered_409() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let body = transfer(&alice, &bob, "1.00");
    let mut held = Held::take(&door).await;

    let second = async {
        held.append_waits().await;
        let begun = Instant::now();
        let answer = post(&door, &partner).json(&body).await;
        answer.problem(409, "idempotency-in-flight");
        assert_eq!(answer.header("retry-after"), Some("1"));
        assert!(Duration::from_secs(2) <= begun.elapsed());
        held.let_go().await;
    };
    let (first, ()) = tokio::join!(post(&door, &partner).json(&body), second);
    first.expect(201);
    post(&door, &partner).json(&body).await.repeats(&first);
    assert_eq!(door.balances().await[&bob], 100);
}

#[tokio::test]
async fn an_unknown_outcome_is_said_to_be_unknown_and_its_key_finds_out() {
    let answer_within = Duration::from_millis(500);
    let door = Door::open_with(ledger_engine::Settings { answer_within, ..Default::default() }).await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let body = transfer(&alice, &bob, "1.00");
    let before = door.head().await;
    let held = Held::take(&door).await;

    let unknown = post(&door, &partner).json(&body).await;
    unknown.problem(503, "outcome-unknown");
    assert!(unknown.header("retry-after").is_some());
    held.let_go().await;

    head_after(&door, before).await;
    let again = post(&door, &partner).json(&body).await;
    again.expect(201);
    assert!(again.replayed(), "it had happened");
    assert_eq!(door.balances().await[&bob], 100);
}

#[tokio::test]
async fn a_full_queue_is_overloaded_and_what_it_refused_was_not_executed() {
    let settings = ledger_engine::Settings { queue_max: 1, batch_max: 1, ..Default::default() };
    let door = Door::open_with(settings).await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let held = Held::take(&door).await;

    // One is being appended and one may wait: of four, two at least are turned away while nothing can end well.
    let body = transfer(&alice, &bob, "1.00");
    let call = |_| door.post("/v1/transactions/transfer").token(&partner.token).new_key().json(&body);
    let mut calls: FuturesUnordered<_> = (0..4).map(call).collect();
    for _ in 0..2 {
        let answer = calls.next().await.unwrap();
        answer.problem(503, "overloaded");
        assert_eq!(answer.header("retry-after"), Some("1"));
    }
    held.let_go().await;
    let rest: Vec<_> = calls.collect().await;
    let done = rest.iter().filter(|answer| answer.status == 201).count();
    assert_ne!(done, 0);
    assert_eq!(door.balances().await[&bob], i64::try_from(done).unwrap() * 100);
}
