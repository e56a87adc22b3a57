//! Appends that meet, on a real Postgres: whatever two connections do to each other in `ledger.append`, the log stays one
//! line of whole commits.
//!
//! Nothing here depends on time. A test holds a transaction open, sees in the server's own tables that the other append
//! waits for it, and then lets go. Each meeting is tried twice: with the rows of `ledger.turn`, which make writers
//! queue, and without them, for they may carry no correctness.
//!
//! Left out: what an engine makes of a refusal (ledger-engine), and appends one after another (`log.rs`).
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::time::Duration;

use event_store::{AppendError, Commit, Draft, Head, Log, RecordedEvent, Writer, connect};
use ledger_core::{CommandEvent, CommandId, Event, Failure, Key, NewEvent, Timestamp};
use local_stack::testing::TestDatabase;
use sqlx::{Connection, PgConnection};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

/// More than any of these tests needs.
const PATIENCE: Duration = Duration::from_secs(20);

/// A ledger of the test's own, and the owner's view of it.
struct Ledger {
    database: TestDatabase,
    log: Log,
    owner: PgConnection,
    genesis: Head,
}

/// Whether there is a row that writers queue for.
#[derive(Clone, Copy, Debug)]
enum Turn {
    Kept,
    Gone,
}

/// A connection in the engine's role whose transactions end when the test says so.
struct Session(PgConnection);

/// The arguments of `ledger.append`, so that a test can write what no [`Commit`] can.
struct Arguments {
    number: Option<i64>,
    first: i64,
    previous_last: i64,
    previous_chain: Vec<u8>,
    sequences: Vec<i64>,
    payloads: Vec<String>,
    ahead: bool,
    lane: Option<i32>,
    commit: Commit,
}

impl Ledger {
    async fn new(turn: Turn) -> Self {
        let database = local_stack::testing::database(|url| async move { migrations::run(&url).await }).await;
        let log = Log::new(connect(database.url(), "daybook_reader", 2).await.unwrap());
        let mut owner = PgConnection::connect(database.url()).await.unwrap();
        if matches!(turn, Turn::Gone) {
            let deleted = sqlx::query("delete from ledger.turn").execute(&mut owner).await.unwrap();
            assert_eq!(deleted.rows_affected(), 3);
        }
        let genesis = log.head().await.unwrap();
        Self { database, log, owner, genesis }
    }

    fn writer(&self) -> Writer {
        Writer::new(self.database.url()).unwrap()
    }

    async fn session(&self) -> Session {
        let mut connection = PgConnection::connect(self.database.url()).await.unwrap();
        sqlx::query("set role daybook_ledger").execute(&mut connection).await.unwrap();
        Session(connection)
    }

    /// Returns once some backend's append waits for another one's, and for nothing else.
    async fn one_waits(&mut self) {
        self.wait(1).await;
    }

    /// Returns once so many backends' appends wait.
    async fn wait(&mut self, appends: i64) {
        let query = "select count(*) from pg_stat_activity
                     where datname = current_database() and pid <> pg_backend_pid() and query like '%ledger.append%'
                           and cardinality(pg_blocking_pids(pid)) <> 0";
        let deadline = Instant::now() + PATIENCE;
        loop {
            let waiting: i64 = sqlx::query_scalar(query).fetch_one(&mut self.owner).await.unwrap();
            if waiting == appends {
                return;
            }
            assert!(Instant::now() < deadline, "{waiting} appends wait");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Returns once no backend works at an append any more.
    async fn none_runs(&mut self) {
        let query = "select count(*) from pg_stat_activity
                     where datname = current_database() and pid <> pg_backend_pid() and query like '%ledger.append%'
                           and state <> 'idle'";
        let deadline = Instant::now() + PATIENCE;
        loop {
            let running: i64 = sqlx::query_scalar(query).fetch_one(&mut self.owner).await.unwrap();
            if running == 0 {
                return;
            }
            assert!(Instant::now() < deadline, "{running} appends run");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// The log is exactly these commits: nothing else is in its tables, and every hash holds.
    #[track_caller]
    fn holds<'t>(&'t mut self, expected: &'t [&Commit]) -> impl Future<Output = ()> + 't {
        let caller = std::panic::Location::caller();
        async move {
            let commits = self.log.commits_after(0, 1_000).await.unwrap();
            let expected: Vec<Commit> = expected.iter().map(|commit| (*commit).clone()).collect();
            assert!(commits == expected, "{caller}: the log holds {commits:#?}");
            let mut head = self.genesis;
            for commit in &commits {
                assert_eq!((commit.number, commit.first), (head.commit + 1, head.position + 1), "{caller}");
                assert!(commit.events.iter().all(|event| event.leaf() == event.leaf_hash), "{caller}");
                head = commit.head();
            }
            let rows =
                "select (select count(*) from ledger.commits where 0 < number), (select count(*) from ledger.events)";
            let rows: (i64, i64) = sqlx::query_as(rows).fetch_one(&mut self.owner).await.unwrap();
            assert_eq!(rows, (head.commit, head.position), "{caller}: rows that belong to no commit");
        }
    }
}

impl Session {
    async fn run(&mut self, statement: &str) {
        sqlx::raw_sql(statement).execute(&mut self.0).await.unwrap();
    }

    async fn append(&mut self, commit: &Commit) -> Result<(), sqlx::Error> {
        Arguments::of(commit).append(&mut self.0).await
    }

    async fn append_in_lane(&mut self, commit: &Commit) -> Result<(), sqlx::Error> {
        Arguments { lane: Some(LANE), ..Arguments::of(commit) }.append(&mut self.0).await
    }

    async fn append_ahead_in_lane(&mut self, commit: &Commit) -> Result<(), sqlx::Error> {
        Arguments { lane: Some(LANE), ahead: true, ..Arguments::of(commit) }.append(&mut self.0).await
    }
}

impl Arguments {
    fn of(commit: &Commit) -> Self {
        Self {
            number: Some(commit.number),
            first: commit.first,
            previous_last: commit.first - 1,
            previous_chain: commit.previous_chain.to_vec(),
            sequences: commit.events.iter().map(|event| event.sequence).collect(),
            payloads: commit.events.iter().map(|event| event.payload.clone()).collect(),
            ahead: false,
            lane: None,
            commit: commit.clone(),
        }
    }

    async fn append(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        let events = &self.commit.events;
        let texts = |of: fn(&RecordedEvent) -> &str| events.iter().map(of).collect::<Vec<_>>();
        let append = "select ledger.append(
            p_number => $1, p_first => $2, p_previous_last => $3, p_previous_chain => $4, p_root => $5, p_chain => $6,
            p_recorded_at => $7, p_aggregate_types => $8, p_aggregate_ids => $9, p_sequences => $10, p_event_types => $11,
            p_event_versions => $12, p_payloads => $13::json[], p_metadata => $14::json[], p_command_ids => $15, p_leaf_hashes => $16,
            p_key_hashes => $17, p_request_hashes => $18, p_ahead => $19, p_lane => $20)";
        sqlx::query(append)
            .bind(self.number)
            .bind(self.first)
            .bind(self.previous_last)
            .bind(&self.previous_chain)
            .bind(self.commit.root.as_slice())
            .bind(self.commit.chain.as_slice())
            .bind(at().date_time())
            .bind(texts(|event| &event.aggregate_type))
            .bind(texts(|event| &event.aggregate_id))
            .bind(&self.sequences)
            .bind(texts(|event| &event.event_type))
            .bind(texts(|event| &event.event_version))
            .bind(&self.payloads)
            .bind(texts(|event| &event.metadata))
            .bind(events.iter().map(|event| event.command_id.uuid()).collect::<Vec<_>>())
            .bind(events.iter().map(|event| event.leaf_hash.to_vec()).collect::<Vec<_>>())
            .bind(events.iter().map(|event| event.key_hash.map(|hash| hash.to_vec())).collect::<Vec<_>>())
            .bind(events.iter().map(|event| event.request_hash.map(|hash| hash.to_vec())).collect::<Vec<_>>())
            .bind(self.ahead)
            .bind(self.lane)
            .execute(connection)
            .await?;
        Ok(())
    }
}

fn at() -> Timestamp {
    Timestamp::from_micros(1_800_000_000_000_000).unwrap()
}

/// The first event of a stream.
fn draft(stream: u128, key: Option<u8>) -> Draft {
    let id = CommandId::from_uuid(Uuid::from_u128(stream));
    let failure = Failure { code: "wallet-frozen".to_owned(), detail: "the wallet is frozen".to_owned() };
    let event = Event::Command(id, CommandEvent::Declined { partner_id: None, failure });
    let key = key.map(|key| Key { hash: [key; 16], request: [key; 32] });
    Draft::new(CommandId::from_uuid(Uuid::now_v7()), key, "{}", NewEvent { sequence: 1, event })
}

fn seal(head: &Head, drafts: &[Draft]) -> Commit {
    Commit::seal(head, at(), drafts)
}

/// An append by an engine of its own, which runs until it is let in or refused.
fn spawn(mut writer: Writer, commit: &Commit) -> JoinHandle<(Writer, Result<(), AppendError>)> {
    let commit = commit.clone();
    tokio::spawn(async move {
        let outcome = writer.append(&commit).await;
        (writer, outcome)
    })
}

/// The same, sent before the commit that it follows is through.
fn spawn_ahead(mut writer: Writer, commit: &Commit) -> JoinHandle<(Writer, Result<(), AppendError>)> {
    let commit = commit.clone();
    tokio::spawn(async move {
        let outcome = writer.append_ahead(&commit).await;
        (writer, outcome)
    })
}

async fn ended(append: JoinHandle<(Writer, Result<(), AppendError>)>) -> (Writer, &'static str) {
    let (writer, outcome) = timeout(PATIENCE, append).await.expect("the append ends").unwrap();
    let outcome = match outcome {
        Ok(()) => "appended",
        Err(AppendError::Lost) => "lost",
        Err(AppendError::KeyTaken) => "taken",
        Err(AppendError::WentBack) => "went back",
        Err(other) => panic!("{other:?}"),
    };
    (writer, outcome)
}

/// An engine's lane, and the place in it of whoever inserts events.
const LANE: i32 = 7;
const INSERTING: i32 = 2;

impl Ledger {
    async fn take_lane(&mut self) {
        let take = sqlx::query("select pg_advisory_lock($1, $2)").bind(LANE).bind(INSERTING);
        take.execute(&mut self.owner).await.unwrap();
    }

    async fn give_lane_back(&mut self) {
        sqlx::query("select pg_advisory_unlock_all()").execute(&mut self.owner).await.unwrap();
    }

    /// Whether nobody has the place at which events go in.
    async fn lane_is_free(&mut self) -> bool {
        let free = "select pg_try_advisory_lock($1, $2)";
        let free = sqlx::query_scalar(free).bind(LANE).bind(INSERTING).fetch_one(&mut self.owner).await.unwrap();
        self.give_lane_back().await;
        free
    }
}

/// SQLSTATE and constraint of a refusal.
fn refusal(outcome: Result<(), sqlx::Error>) -> (String, String) {
    let error = outcome.expect_err("refused");
    let refusal = error.as_database_error().unwrap_or_else(|| panic!("{error}"));
    (refusal.code().unwrap().into_owned(), refusal.constraint().unwrap_or_default().to_owned())
}

const UNIQUE: &str = "23505";
const FOREIGN: &str = "23503";
const CHECK: &str = "23514";
const NOT_NULL: &str = "23502";
const CANCELED: &str = "57014";

#[tokio::test]
async fn what_does_not_follow_the_log_or_is_not_whole_is_refused_and_leaves_nothing() {
    for turn in [Turn::Kept, Turn::Gone] {
        let mut ledger = Ledger::new(turn).await;
        let mut session = ledger.session().await;
        let one = seal(&ledger.genesis, &[draft(1, Some(1)), draft(2, None)]);
        let two = seal(&one.head(), &[draft(3, None)]);
        session.append(&one).await.unwrap();
        session.append(&two).await.unwrap();

        let next = || Arguments::of(&seal(&two.head(), &[draft(4, None), draft(5, None)]));
        let on = |head: Head| Arguments::of(&seal(&head, &[draft(4, None)]));
        let ahead = seal(&two.head(), &[draft(4, None)]).head();
        let cases: Vec<(&str, Arguments, &str, &str)> = vec![
            ("a gap in numbers", on(Head { commit: 3, ..two.head() }), FOREIGN, "commits_previous"),
            ("a gap in positions", on(Head { position: 9, ..two.head() }), FOREIGN, "commits_previous"),
            ("positions that are taken", on(Head { position: 2, ..two.head() }), FOREIGN, "commits_previous"),
            ("a fork behind the head", on(one.head()), UNIQUE, "commits_pkey"),
            ("a fork at the beginning", on(ledger.genesis), UNIQUE, "commits_pkey"),
            (
                "another history of the same length",
                on(Head { chain: [7; 32], ..two.head() }),
                FOREIGN,
                "commits_previous",
            ),
            ("an engine whose head is ahead", on(ahead), FOREIGN, "commits_previous"),
            ("the last commit again", Arguments::of(&two), UNIQUE, "commits_pkey"),
            ("an older commit again", Arguments::of(&one), UNIQUE, "commits_pkey"),
            ("the first position skips one", Arguments { first: 5, ..next() }, CHECK, "commits_follow"),
            ("the first position is taken", Arguments { first: 3, ..next() }, CHECK, "commits_follow"),
            ("another genesis", Arguments { number: Some(0), ..next() }, CHECK, "commits_follow"),
            ("a number below zero", Arguments { number: Some(-1), ..next() }, CHECK, "commits_follow"),
            ("no number", Arguments { number: None, ..next() }, NOT_NULL, ""),
            (
                "a commit without events",
                {
                    let mut empty = next();
                    empty.commit.events.clear();
                    Arguments { sequences: vec![], payloads: vec![], ..empty }
                },
                CHECK,
                "commits_follow",
            ),
            ("an event more than the commit counts", Arguments { sequences: vec![1], ..next() }, NOT_NULL, ""),
            ("an event less than the commit counts", Arguments { sequences: vec![1, 1, 1], ..next() }, NOT_NULL, ""),
            ("an event without a payload", Arguments { payloads: vec!["{}".into()], ..next() }, NOT_NULL, ""),
            (
                "a place in a stream below one",
                Arguments { sequences: vec![1, 0], ..next() },
                CHECK,
                "events_sequence_check",
            ),
            (
                "an event that is in the log",
                Arguments::of(&seal(&two.head(), &[draft(4, None), draft(1, None)])),
                UNIQUE,
                "events_stream",
            ),
            (
                "the same event twice",
                Arguments::of(&seal(&two.head(), &[draft(4, None), draft(4, None)])),
                UNIQUE,
                "events_stream",
            ),
            (
                "a key that is in the log",
                Arguments::of(&seal(&two.head(), &[draft(4, None), draft(5, Some(1))])),
                UNIQUE,
                "events_key",
            ),
            (
                "the same key twice",
                Arguments::of(&seal(&two.head(), &[draft(4, Some(2)), draft(5, Some(2))])),
                UNIQUE,
                "events_key",
            ),
        ];
        for (what, arguments, code, constraint) in cases {
            let refused = refusal(arguments.append(&mut session.0).await);
            assert_eq!(refused, (code.to_owned(), constraint.to_owned()), "{what}, turn {turn:?}");
            ledger.holds(&[&one, &two]).await;
        }
        let three = seal(&two.head(), &[draft(4, Some(2)), draft(5, None)]);
        session.append(&three).await.unwrap();
        ledger.holds(&[&one, &two, &three]).await;
    }
}

#[tokio::test]
async fn of_two_appends_with_one_number_the_second_waits_and_leaves_nothing() {
    for turn in [Turn::Kept, Turn::Gone] {
        // Both begin the same stream; the second commit has an event before it and one after it.
        let short = |head: &Head| seal(head, &[draft(1, Some(1))]);
        let long = |head: &Head| seal(head, &[draft(2, Some(2)), draft(1, None), draft(3, None)]);
        for swapped in [false, true] {
            let mut ledger = Ledger::new(turn).await;
            let (mine, yours) = (short(&ledger.genesis), long(&ledger.genesis));
            let (first, second) = if swapped { (yours, mine) } else { (mine, yours) };
            let mut holder = ledger.session().await;
            holder.run("begin").await;
            holder.append(&first).await.unwrap();
            let waiting = spawn(ledger.writer(), &second);
            ledger.one_waits().await;
            ledger.holds(&[]).await;
            holder.run("commit").await;
            assert_eq!(ended(waiting).await.1, "lost", "turn {turn:?}, swapped {swapped}");
            ledger.holds(&[&first]).await;
        }
    }
}

#[tokio::test]
async fn an_append_that_is_taken_back_or_cut_off_leaves_its_place_to_the_one_that_waits() {
    for turn in [Turn::Kept, Turn::Gone] {
        for cut in [false, true] {
            let mut ledger = Ledger::new(turn).await;
            let first = seal(&ledger.genesis, &[draft(1, Some(1)), draft(2, None)]);
            let second = seal(&ledger.genesis, &[draft(2, None), draft(1, Some(1))]);
            let mut holder = ledger.session().await;
            holder.run("begin").await;
            holder.append(&first).await.unwrap();
            let waiting = spawn(ledger.writer(), &second);
            ledger.one_waits().await;
            if cut {
                let holder: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut holder.0).await.unwrap();
                sqlx::query("select pg_terminate_backend($1)").bind(holder).execute(&mut ledger.owner).await.unwrap();
            } else {
                holder.run("rollback").await;
            }
            assert_eq!(ended(waiting).await.1, "appended", "turn {turn:?}, cut {cut}");
            ledger.holds(&[&second]).await;
        }
    }
}

#[tokio::test]
async fn a_commit_that_is_sent_ahead_goes_in_after_the_one_that_it_follows_and_before_whoever_came_later() {
    for turn in [Turn::Kept, Turn::Gone] {
        let mut ledger = Ledger::new(turn).await;
        let first = seal(&ledger.genesis, &[draft(1, Some(1))]);
        let second = seal(&first.head(), &[draft(2, Some(2)), draft(3, None)]);
        let later = seal(&first.head(), &[draft(4, Some(4))]);
        let mut holder = ledger.session().await;
        holder.run("begin").await;
        holder.append(&first).await.unwrap();
        let ahead = spawn_ahead(ledger.writer(), &second);
        if matches!(turn, Turn::Gone) {
            // Nothing tells it to wait: it came too early, and may come again.
            let (mut writer, outcome) = ended(ahead).await;
            assert_eq!(outcome, "went back");
            ledger.holds(&[]).await;
            holder.run("commit").await;
            writer.append(&second).await.unwrap();
        } else {
            ledger.one_waits().await;
            ledger.holds(&[]).await;
            let other = spawn(ledger.writer(), &later);
            ledger.wait(2).await;
            holder.run("commit").await;
            assert_eq!(ended(ahead).await.1, "appended");
            assert_eq!(ended(other).await.1, "lost");
        }
        ledger.holds(&[&first, &second]).await;
    }
}

#[tokio::test]
async fn a_commit_that_is_sent_ahead_leaves_nothing_when_the_one_that_it_follows_does_not_go_in() {
    for end in ["taken back", "cut off", "another took its number"] {
        let mut ledger = Ledger::new(Turn::Kept).await;
        let first = seal(&ledger.genesis, &[draft(1, Some(1))]);
        let second = seal(&first.head(), &[draft(2, Some(2))]);
        let other = seal(&ledger.genesis, &[draft(1, Some(1)), draft(5, None)]);
        let mut holder = ledger.session().await;
        holder.run("begin").await;
        let held = if end == "another took its number" { &other } else { &first };
        holder.append(held).await.unwrap();
        let ahead = spawn_ahead(ledger.writer(), &second);
        ledger.one_waits().await;
        match end {
            "taken back" => holder.run("rollback").await,
            "cut off" => {
                let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut holder.0).await.unwrap();
                sqlx::query("select pg_terminate_backend($1)").bind(pid).execute(&mut ledger.owner).await.unwrap();
            }
            _ => holder.run("commit").await,
        }
        let (mut writer, outcome) = ended(ahead).await;
        // The other one has more events: its own are in the way of what was to follow.
        assert_eq!(outcome, if end == "another took its number" { "lost" } else { "went back" }, "{end}");
        let in_log: &[&Commit] = if end == "another took its number" { &[&other] } else { &[] };
        ledger.holds(in_log).await;
        let upon = in_log.last().map_or(ledger.genesis, |commit| commit.head());
        let again = seal(&upon, &[draft(2, Some(2))]);
        writer.append(&again).await.expect("its keys are free again");
    }
}

#[tokio::test]
async fn of_two_commits_in_a_lane_the_one_that_is_followed_goes_in_first_whichever_came_first() {
    let mut ledger = Ledger::new(Turn::Kept).await;
    let (mut head, mut commits) = (ledger.genesis, Vec::new());
    for ahead_came_first in [false, true] {
        let place = 10 * u128::from(ahead_came_first);
        let first = seal(&head, &[draft(place + 1, None), draft(place + 2, None)]);
        let second = seal(&first.head(), &[draft(place + 3, None)]);
        ledger.take_lane().await;
        let (mut one, mut two) = (ledger.session().await, ledger.session().await);
        let (of_one, of_two) = (first.clone(), second.clone());
        let append = async move { one.append_in_lane(&of_one).await };
        let ahead = async move { two.append_ahead_in_lane(&of_two).await };
        let (append, ahead) = if ahead_came_first {
            let ahead = tokio::spawn(ahead);
            ledger.wait(1).await;
            (tokio::spawn(append), ahead)
        } else {
            let append = tokio::spawn(append);
            ledger.wait(1).await;
            (append, tokio::spawn(ahead))
        };
        ledger.wait(2).await;
        ledger.give_lane_back().await;
        for (what, append) in [("the one that is followed", append), ("the one that follows", ahead)] {
            let outcome = timeout(PATIENCE, append).await.expect("it ends").unwrap();
            outcome.unwrap_or_else(|error| panic!("{what}, came first: {ahead_came_first}: {error}"));
        }
        head = second.head();
        commits.extend([first, second]);
    }
    ledger.holds(&commits.iter().collect::<Vec<_>>()).await;
}

#[tokio::test]
async fn a_commit_whose_forerunner_does_not_come_is_refused_before_it_has_inserted_anything() {
    let mut ledger = Ledger::new(Turn::Kept).await;
    let first = seal(&ledger.genesis, &[draft(1, None)]);
    // Were its events looked at, the missing payload would be what it is refused for.
    let second = Arguments {
        ahead: true,
        lane: Some(LANE),
        payloads: Vec::new(),
        ..Arguments::of(&seal(&first.head(), &[draft(2, None)]))
    };
    let mut session = ledger.session().await;
    let refused = refusal(second.append(&mut session.0).await);
    assert_eq!(refused, (FOREIGN.to_owned(), "commits_previous".to_owned()));
    assert!(ledger.lane_is_free().await);
    ledger.holds(&[]).await;
}

#[tokio::test]
async fn a_lane_is_given_back_when_the_events_are_in_and_however_an_append_ends() {
    let mut ledger = Ledger::new(Turn::Kept).await;
    let mut session = ledger.session().await;
    let first = seal(&ledger.genesis, &[draft(1, Some(1))]);
    let second = seal(&first.head(), &[draft(2, Some(2))]);
    session.run("begin").await;
    session.append_in_lane(&first).await.unwrap();
    assert!(ledger.lane_is_free().await, "while the transaction is open");
    ledger.holds(&[]).await;
    session.run("commit").await;

    let taken = seal(&first.head(), &[draft(9, Some(1))]);
    assert_eq!(refusal(session.append_in_lane(&taken).await).1, "events_key");
    assert!(ledger.lane_is_free().await, "after a refusal");
    assert_eq!(refusal(session.append_in_lane(&first).await).1, "commits_pkey");
    assert!(ledger.lane_is_free().await, "after another");

    // The server ends a statement that takes too long, here one that waits for the turn.
    let mut holder = ledger.session().await;
    holder.run("begin; select from ledger.turn order by place for no key update").await;
    session.run("set statement_timeout = '50ms'").await;
    assert_eq!(refusal(session.append_in_lane(&second).await).0, CANCELED);
    assert!(ledger.lane_is_free().await, "after a cancellation");
    holder.run("rollback").await;

    session.run("reset statement_timeout").await;
    ledger.take_lane().await;
    session.run("set statement_timeout = '50ms'").await;
    assert_eq!(refusal(session.append_in_lane(&second).await).0, CANCELED);
    ledger.give_lane_back().await;
    assert!(ledger.lane_is_free().await, "after a cancellation in the queue");
    session.run("reset statement_timeout").await;
    session.append_in_lane(&second).await.unwrap();
}

#[tokio::test]
async fn who_has_the_turn_meets_nothing_of_a_commit_that_is_sent_ahead() {
    for turn in [Turn::Kept, Turn::Gone] {
        let mut ledger = Ledger::new(turn).await;
        let first = seal(&ledger.genesis, &[draft(1, Some(1))]);
        let second = seal(&first.head(), &[draft(2, Some(2))]);
        let other = seal(&first.head(), &[draft(3, Some(2))]);
        ledger.writer().append(&first).await.unwrap();
        let mut holder = ledger.session().await;
        holder.run("begin; select from ledger.turn order by place for no key update").await;
        if matches!(turn, Turn::Gone) {
            // Then it meets the other's key, and is told who won.
            holder.append(&other).await.unwrap();
        }
        let ahead = spawn_ahead(ledger.writer(), &second);
        ledger.one_waits().await;
        if matches!(turn, Turn::Kept) {
            timeout(PATIENCE, holder.append(&other)).await.expect("nothing is in its way").unwrap();
        }
        holder.run("commit").await;
        assert!(matches!(ended(ahead).await.1, "taken" | "lost"), "{turn:?}");
        ledger.holds(&[&first, &other]).await;
    }
}

#[tokio::test]
async fn the_next_commit_that_meets_an_open_one_on_a_stream_or_a_key_leaves_nothing() {
    for (what, again) in [("a stream", draft(1, None)), ("a key", draft(9, Some(1)))] {
        let mut ledger = Ledger::new(Turn::Kept).await;
        let first = seal(&ledger.genesis, &[draft(1, Some(1))]);
        let second = seal(&first.head(), &[draft(2, None), again.clone()]);

        // Before the commit that it follows is there, it is refused at once.
        let mut early = ledger.writer();
        assert!(matches!(early.append(&second).await, Err(AppendError::WentBack)), "{what}");
        ledger.holds(&[]).await;

        let mut holder = ledger.session().await;
        holder.run("begin").await;
        holder.append(&first).await.unwrap();
        let waiting = spawn(early, &second);
        ledger.one_waits().await;
        holder.run("commit").await;
        let (mut late, outcome) = ended(waiting).await;
        assert_eq!(outcome, "taken", "{what}");
        ledger.holds(&[&first]).await;
        let other = seal(&first.head(), &[draft(2, None)]);
        late.append(&other).await.unwrap();
        ledger.holds(&[&first, &other]).await;
    }
}

#[tokio::test]
async fn a_commit_on_top_of_one_that_is_taken_back_leaves_nothing() {
    for turn in [Turn::Kept, Turn::Gone] {
        let mut ledger = Ledger::new(turn).await;
        let first = seal(&ledger.genesis, &[draft(1, None)]);
        let second = seal(&first.head(), &[draft(2, None)]);
        let mut holder = ledger.session().await;
        holder.run("begin").await;
        holder.append(&first).await.unwrap();
        let waiting = spawn(ledger.writer(), &second);
        if matches!(turn, Turn::Kept) {
            ledger.one_waits().await; // without the turn it is refused at once: what is not committed is not there
            holder.run("rollback").await;
        }
        assert_eq!(ended(waiting).await.1, "went back", "turn {turn:?}");
        if matches!(turn, Turn::Gone) {
            holder.run("rollback").await;
        }
        ledger.holds(&[]).await;
    }
}

#[tokio::test]
async fn a_commit_that_meets_itself_goes_in_once_and_its_chain_says_whose_it_is() {
    for turn in [Turn::Kept, Turn::Gone] {
        let mut ledger = Ledger::new(turn).await;
        let commit = seal(&ledger.genesis, &[draft(1, Some(1)), draft(2, None)]);
        let mut holder = ledger.session().await;
        holder.run("begin").await;
        holder.append(&commit).await.unwrap();
        let waiting = spawn(ledger.writer(), &commit);
        ledger.one_waits().await;
        holder.run("commit").await;
        let (mut writer, outcome) = ended(waiting).await;
        assert_eq!(outcome, "lost", "turn {turn:?}");
        assert_eq!(writer.chain_of(1).await.unwrap(), Some(commit.chain), "turn {turn:?}");
        assert!(matches!(writer.append(&commit).await, Err(AppendError::Lost)), "and ever again");
        ledger.holds(&[&commit]).await;
    }
}

#[tokio::test]
async fn an_append_waits_for_an_open_turn_whatever_becomes_of_it() {
    for end in ["append", "give back", "disconnect"] {
        let mut ledger = Ledger::new(Turn::Kept).await;
        let mut holder = ledger.writer();
        assert!(holder.take_turn(0, 100).await.unwrap().is_empty());
        let (mine, yours) = (seal(&ledger.genesis, &[draft(1, None)]), seal(&ledger.genesis, &[draft(1, None)]));
        let waiting = spawn(ledger.writer(), &yours);
        ledger.one_waits().await;
        let expected = match end {
            "append" => {
                holder.append(&mine).await.unwrap();
                ("lost", &mine)
            }
            "give back" => {
                holder.give_turn_back().await;
                ("appended", &yours)
            }
            _ => {
                holder.disconnect();
                ("appended", &yours)
            }
        };
        assert_eq!(ended(waiting).await.1, expected.0, "{end}");
        ledger.holds(&[expected.1]).await;
    }
}

#[tokio::test]
async fn who_lost_and_takes_the_turn_reads_what_won_and_is_next() {
    let mut ledger = Ledger::new(Turn::Kept).await;
    let (first, lost) = (seal(&ledger.genesis, &[draft(1, None)]), seal(&ledger.genesis, &[draft(2, None)]));
    let mut holder = ledger.session().await;
    holder.run("begin").await;
    holder.append(&first).await.unwrap();
    let waiting = spawn(ledger.writer(), &lost);
    ledger.one_waits().await;
    holder.run("commit").await;
    let (mut loser, _) = ended(waiting).await;
    assert_eq!(loser.take_turn(0, 100).await.unwrap(), std::slice::from_ref(&first));

    // The winner has its next commit ready, and must wait now.
    let greedy = seal(&first.head(), &[draft(3, None)]);
    let waiting = spawn(ledger.writer(), &greedy);
    ledger.one_waits().await;
    let next = seal(&first.head(), &[draft(2, None)]);
    loser.append(&next).await.unwrap();
    assert_eq!(ended(waiting).await.1, "lost");
    ledger.holds(&[&first, &next]).await;
}

/// An append whose client is gone while its backend still waits to work: nobody can take it back.
async fn abandoned(ledger: &mut Ledger, commit: &Commit) {
    let append = spawn(ledger.writer(), commit);
    ledger.one_waits().await;
    append.abort();
    assert!(append.await.is_err_and(|error| error.is_cancelled()), "the client has left, and its connection with it");
    ledger.one_waits().await; // the backend has not noticed
}

#[tokio::test]
async fn an_append_that_was_given_up_goes_in_after_everyone_has_read_that_it_is_absent() {
    let mut ledger = Ledger::new(Turn::Kept).await;
    let commit = seal(&ledger.genesis, &[draft(1, Some(1))]);
    let mut reader = ledger.writer();
    reader.take_turn(0, 100).await.unwrap();
    abandoned(&mut ledger, &commit).await;
    assert_eq!(reader.chain_of(1).await.unwrap(), None, "absent");
    assert!(reader.take_turn(0, 100).await.unwrap().is_empty(), "absent, read with the turn in hand");
    ledger.holds(&[]).await;

    reader.give_turn_back().await;
    ledger.none_runs().await;
    ledger.holds(&[&commit]).await;
    assert!(matches!(reader.append(&commit).await, Err(AppendError::Lost)), "sending it again finds it");
    assert_eq!(reader.chain_of(1).await.unwrap(), Some(commit.chain));
    ledger.holds(&[&commit]).await;
}

#[tokio::test]
async fn an_append_that_was_given_up_comes_too_late_behind_its_own_repetition_or_another_commit() {
    for repeated in [true, false] {
        let mut ledger = Ledger::new(Turn::Kept).await;
        let given_up = seal(&ledger.genesis, &[draft(1, Some(1))]);
        let other = seal(&ledger.genesis, &[draft(1, Some(1)), draft(2, None)]);
        let sent = if repeated { &given_up } else { &other };
        let mut writer = ledger.writer();
        writer.take_turn(0, 100).await.unwrap();
        abandoned(&mut ledger, &given_up).await;
        writer.append(sent).await.unwrap();
        ledger.none_runs().await;
        ledger.holds(&[sent]).await;
        assert_eq!(writer.chain_of(1).await.unwrap() == Some(given_up.chain), repeated);
    }
}
