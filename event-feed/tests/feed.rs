//! The feed on a real Postgres and a real nats-server: what a follower gets while the bus is there, is not, or lies.

#![allow(
    clippy::unwrap_used,
    reason = "a test may panic wherever it stands; clippy.toml knows only those inside #[test]"
)]

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::{self, stream};
use event_feed::relay::Relay;
use event_feed::{Commit, FeedError, FeedSettings, Follow, Head, Log};
use event_store::{Draft, Writer};
use ledger_core::{CommandEvent, CommandId, Event, Failure, NewEvent, Timestamp};
use local_stack::{Stack, testing};
use runtime::shutdown::Shutdown;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(20);

/// A ledger of the test's own, with a hand on the log and one on the bus.
struct Ledger {
    url: String,
    nats_url: String,
    settings: FeedSettings,
    writer: Writer,
    head: Head,
}

impl Ledger {
    async fn open() -> Self {
        let database = testing::database(|url| async move { migrations::run(&url).await }).await;
        Self::on(database.url(), testing::stack().await.nats_url(), database.name()).await
    }

    async fn on(url: &str, nats_url: &str, stream: &str) -> Self {
        let writer = Writer::new(url).unwrap();
        let log = Log::new(event_store::connect(url, "daybook_reader", 1).await.unwrap());
        let head = log.head().await.unwrap();
        let settings = FeedSettings { nats_url: Some(nats_url.to_owned()), stream: stream.to_owned() };
        Self { url: url.to_owned(), nats_url: nats_url.to_owned(), settings, writer, head }
    }

    /// A commit of `events` events that each carry `bytes` bytes; returns its number.
    async fn append(&mut self, events: usize, bytes: usize) -> i64 {
        let commit = sealed(&self.head, events, bytes);
        self.writer.append(&commit).await.unwrap();
        self.head = commit.head();
        commit.number
    }

    async fn append_many(&mut self, commits: usize) -> i64 {
        for _ in 0..commits {
            self.append(2, 10).await;
        }
        self.head.commit
    }

    /// The log over connections of its own.
    async fn log(&self) -> Log {
        Log::new(event_store::connect(&self.url, "daybook_reader", 2).await.unwrap())
    }

    async fn relay(&self) -> Running {
        let shutdown = Shutdown::new();
        let relay = event_feed::relay::run(self.log().await, self.settings.clone(), shutdown.clone());
        Running { shutdown, task: tokio::spawn(relay) }
    }

    async fn follow(&self, after: i64) -> Follower {
        Follower::start(self.log().await, self.settings.clone(), after).await
    }

    async fn jetstream(&self) -> jetstream::Context {
        let address: async_nats::ServerAddr = self.nats_url.parse().unwrap();
        let (user, password) = (address.username().unwrap().to_owned(), address.password().unwrap().to_owned());
        let options = async_nats::ConnectOptions::with_user_and_password(user, password);
        jetstream::new(options.connect(address).await.unwrap())
    }

    /// The stream's state, as soon as it is as wanted.
    async fn stream_where(&self, claim: &str, wanted: impl Fn(&stream::Info) -> bool) -> stream::Stream {
        let jetstream = self.jetstream().await;
        let deadline = Instant::now() + PATIENCE;
        let mut seen = None;
        while Instant::now() < deadline {
            if let Ok(stream) = jetstream.get_stream(&self.settings.stream).await {
                if wanted(stream.cached_info()) {
                    return stream;
                }
                seen = Some(stream.cached_info().clone());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not in time: {claim}; last seen: {seen:?}");
    }
}

fn sealed(head: &Head, events: usize, bytes: usize) -> Commit {
    let drafts: Vec<_> = (0..events)
        .map(|_| {
            let id = CommandId::from_uuid(Uuid::now_v7());
            let failure = Failure { code: "wallet-frozen".to_owned(), detail: "x".repeat(bytes) };
            let event = Event::Command(id, CommandEvent::Declined { partner_id: None, failure });
            Draft::new(id, None, "{}", NewEvent { sequence: 1, event })
        })
        .collect();
    Commit::seal(head, Timestamp::from_micros(0).unwrap(), &drafts)
}

struct Running {
    shutdown: Shutdown,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    async fn stop(self) {
        self.shutdown.trigger();
        timeout(PATIENCE, self.task).await.expect("a relay stops when it is asked to").unwrap().unwrap();
    }
}

/// A consumer that keeps everything and checks that it is contiguous.
struct Follower {
    log: Log,
    commits: watch::Receiver<Vec<Arc<Commit>>>,
    task: JoinHandle<()>,
}

impl Follower {
    async fn start(log: Log, settings: FeedSettings, after: i64) -> Self {
        let mut follow = Follow::start(log.clone(), settings, after).await;
        let (sender, commits) = watch::channel(Vec::<Arc<Commit>>::new());
        let task = tokio::spawn(async move {
            loop {
                match follow.next().await {
                    Ok(page) => sender.send_modify(|all| {
                        for commit in page {
                            let last = all.last().map_or(after, |last| last.number);
                            assert_eq!(commit.number, last + 1, "a gap or a repetition");
                            let count = i64::try_from(commit.events.len()).unwrap();
                            assert_eq!(count, commit.last - commit.first + 1, "a commit that is not whole");
                            all.push(commit);
                        }
                    }),
                    Err(error) => assert!(!error.is_final(), "{error}"),
                }
            }
        });
        Self { log, commits, task }
    }

    async fn has(&mut self, number: i64) -> Vec<Arc<Commit>> {
        let reached = self.commits.wait_for(|all| all.last().is_some_and(|last| last.number == number));
        let reached = timeout(PATIENCE, reached).await.map(|all| all.map(|all| all.clone()));
        match reached {
            Ok(Ok(all)) => all,
            Ok(Err(_)) => panic!("the follower failed: {:?}", (&mut self.task).await),
            Err(_) => panic!("commit {number} did not come; last: {:?}", self.commits.borrow().last()),
        }
    }
}

#[tokio::test]
async fn a_live_follower_is_fed_by_the_bus_alone() {
    let mut ledger = Ledger::open().await;
    let relay = ledger.relay().await;
    let before = ledger.append_many(20).await;
    let mut follower = ledger.follow(0).await;
    follower.has(before).await;
    ledger.stream_where("the follower listens", |info| info.state.consumer_count == 1).await;
    let first = ledger.append(1, 10).await;
    follower.has(first).await;

    follower.log.pool().close().await; // from here on the follower has nothing but the bus
    let last = ledger.append_many(20).await;
    let all = follower.has(last).await;
    let log = ledger.log().await.commits_after(0, 1_000).await.unwrap();
    assert!(all.iter().map(|commit| &**commit).eq(&log), "what was followed is what the log holds");
    relay.stop().await;
}

#[tokio::test]
async fn the_stream_numbers_commits_from_its_base() {
    let mut ledger = Ledger::open().await;
    let base = ledger.append_many(5).await;
    let relay = ledger.relay().await;
    ledger.stream_where("made from the head", |info| info.state.last_sequence == 0).await;
    ledger.append_many(5).await;
    let stream = ledger.stream_where("all is relayed", |info| info.state.last_sequence == 5).await;
    check_numbers(&stream, base).await;
    relay.stop().await;
}

/// Every message lies where its number says.
async fn check_numbers(stream: &stream::Stream, base: i64) {
    let info = stream.cached_info();
    assert_eq!(info.config.subjects, [format!("daybook.{}.commits.{base}", info.config.name)]);
    for sequence in info.state.first_sequence..=info.state.last_sequence {
        let message = stream.get_raw_message(sequence).await.unwrap();
        let commit: Commit = serde_json::from_slice(&message.payload).unwrap();
        assert_eq!(commit.number, base + i64::try_from(sequence).unwrap());
    }
}

#[tokio::test]
async fn of_two_relays_each_commit_is_published_by_one() {
    let mut ledger = Ledger::open().await;
    let relays = (ledger.relay().await, ledger.relay().await);
    let mut follower = ledger.follow(0).await;
    let stream = ledger.stream_where("a stream", |_| true).await;
    let base = ledger.head.commit;
    drop(stream);
    let last = ledger.append_many(300).await;
    follower.has(last).await;
    let relayed = u64::try_from(last - base).unwrap();
    let stream = ledger.stream_where("all is relayed", |info| info.state.last_sequence == relayed).await;
    assert_eq!(stream.cached_info().state.messages, relayed);
    check_numbers(&stream, base).await;

    relays.0.stop().await; // the one that is left goes on alone
    let last = ledger.append_many(50).await;
    let relayed = u64::try_from(last - base).unwrap();
    ledger.stream_where("the other one relays", |info| info.state.last_sequence == relayed).await;
    follower.has(last).await;
    relays.1.stop().await;
}

#[tokio::test]
async fn a_bus_that_is_wiped_in_the_middle_loses_nothing() {
    let mut ledger = Ledger::open().await;
    let relay = ledger.relay().await;
    let mut follower = ledger.follow(0).await;
    let wiped_at = ledger.append_many(50).await;
    let relayed = u64::try_from(wiped_at).unwrap();
    ledger.stream_where("the first half is relayed", |info| info.state.last_sequence == relayed).await;
    ledger.jetstream().await.delete_stream(&ledger.settings.stream).await.unwrap();
    let last = ledger.append_many(50).await;
    follower.has(last).await;

    ledger.stream_where("the bus is made anew", |info| info.config.subjects.iter().all(|s| !s.ends_with(".0"))).await;
    ledger.stream_where("the follower listens again", |info| info.state.consumer_count == 1).await;
    let one_more = ledger.append(1, 10).await;
    follower.has(one_more).await;
    follower.log.pool().close().await;
    let last = ledger.append_many(10).await;
    follower.has(last).await;
    relay.stop().await;
}

#[tokio::test]
async fn a_purged_stream_goes_on_where_it_was() {
    let mut ledger = Ledger::open().await;
    let relay = ledger.relay().await;
    let stream = ledger.stream_where("a stream", |_| true).await;
    ledger.append_many(10).await;
    ledger.stream_where("relayed", |info| info.state.last_sequence == 10).await;
    relay.stop().await;
    stream.purge().await.unwrap();
    let relay = ledger.relay().await;
    ledger.append_many(10).await;
    let stream = ledger.stream_where("goes on", |info| info.state.last_sequence == 20).await;
    assert_eq!(stream.cached_info().state.messages, 10);
    check_numbers(&stream, 0).await;
    relay.stop().await;
}

#[tokio::test]
async fn without_a_bus_postgres_is_enough() {
    let mut ledger = Ledger::open().await;
    let nobody = "nats://127.0.0.1:1".to_owned();
    for nats_url in [None, Some(nobody)] {
        let settings = FeedSettings { nats_url, ..ledger.settings.clone() };
        let mut follower = Follower::start(ledger.log().await, settings, 0).await;
        let last = ledger.append_many(5).await;
        follower.has(last).await;
        let appended = Instant::now();
        let last = ledger.append_many(1).await;
        follower.has(last).await;
        assert!(appended.elapsed() < Duration::from_secs(1), "{:?}", appended.elapsed());
    }
}

#[tokio::test]
async fn a_commit_too_long_for_a_message_is_read_in_postgres() {
    let mut ledger = Ledger::open().await;
    let relay = ledger.relay().await;
    let mut follower = ledger.follow(0).await;
    ledger.stream_where("the follower listens", |info| info.state.consumer_count == 1).await;
    ledger.append(1, 10).await;
    ledger.append(30, 10_000).await;
    let last = ledger.append(1, 10).await;
    let all = follower.has(last).await;
    assert_eq!(all[1].events.len(), 30);
    let stream = ledger.stream_where("relayed", |info| info.state.last_sequence == 3).await;
    let message = stream.get_raw_message(2).await.unwrap();
    assert!(message.payload.len() < 1_000);
    let bare: Commit = serde_json::from_slice(&message.payload).unwrap();
    assert_eq!((bare.number, bare.chain, bare.events.len()), (2, all[1].chain, 0));
    relay.stop().await;
}

#[tokio::test]
async fn a_message_lost_while_idle_is_found_within_a_second() {
    let mut ledger = Ledger::open().await;
    let relay = ledger.relay().await;
    let mut follower = ledger.follow(0).await;
    ledger.stream_where("the follower listens", |info| info.state.consumer_count == 1).await;
    let last = ledger.append_many(3).await;
    follower.has(last).await;
    relay.stop().await;
    let appended = Instant::now();
    let lost = ledger.append(1, 10).await;
    follower.has(lost).await;
    // A follower looks twice a second; the rest is for a busy machine.
    assert!(appended.elapsed() < Duration::from_millis(1_500), "{:?}", appended.elapsed());
}

#[tokio::test]
async fn what_does_not_follow_from_the_log_is_not_believed() {
    let mut ledger = Ledger::open().await;
    let relay = ledger.relay().await;
    let mut follower = ledger.follow(0).await;
    let last = ledger.append_many(3).await;
    follower.has(last).await;
    ledger.stream_where("the follower listens", |info| info.state.consumer_count == 1).await;
    ledger.stream_where("all is relayed", |info| info.state.last_sequence == 3).await;
    relay.stop().await;

    let jetstream = ledger.jetstream().await;
    let subject = format!("daybook.{}.commits.0", ledger.settings.stream);
    let elsewhere = Head { chain: [7; 32], ..ledger.head };
    let mut altered = sealed(&ledger.head, 1, 10);
    altered.events[0].payload = altered.events[0].payload.replace("wallet-frozen", "wallet-closed");
    let lies = [sealed(&elsewhere, 1, 10), altered];
    for lie in &lies {
        let body = serde_json::to_vec(lie).unwrap();
        jetstream.publish(subject.clone(), body.into()).await.unwrap().await.unwrap();
    }
    jetstream.publish(subject, "{}x".into()).await.unwrap().await.unwrap();
    let truth = ledger.append(1, 20).await;
    let all = follower.has(truth).await;
    assert_eq!(all.last().unwrap().chain, ledger.head.chain);

    let relay = ledger.relay().await; // it will not go on with such a stream
    ledger.stream_where("made anew", |info| info.config.subjects.iter().all(|s| s.ends_with(".4"))).await;
    relay.stop().await;
}

#[tokio::test]
async fn a_consumer_goes_on_after_its_checkpoint() {
    let mut ledger = Ledger::open().await;
    let relay = ledger.relay().await;
    ledger.stream_where("a stream", |_| true).await;
    let last = ledger.append_many(30).await;
    for after in [0, 1, 17, 29] {
        let all = ledger.follow(after).await.has(last).await;
        assert_eq!(all[0].number, after + 1);
    }
    let mut at_head = ledger.follow(last).await;
    let next = ledger.append(1, 10).await;
    assert_eq!(at_head.has(next).await.len(), 1);
    relay.stop().await;
}

#[tokio::test]
async fn a_checkpoint_that_is_not_in_the_log_ends_the_following() {
    let mut ledger = Ledger::open().await;
    let last = ledger.append_many(3).await;
    let mut follow = Follow::start(ledger.log().await, ledger.settings.clone(), last + 5).await;
    let error = timeout(PATIENCE, follow.next()).await.unwrap().unwrap_err();
    assert!(matches!(error, FeedError::WentBack { commit } if commit == last + 5), "{error}");
    assert!(error.is_final());
}

#[tokio::test]
async fn a_backlog_comes_in_pages_of_bounded_size() {
    let mut ledger = Ledger::open().await;
    for _ in 0..30 {
        ledger.append(90, 10).await;
    }
    let last = ledger.append(1_500, 10).await; // one commit beyond the bound comes alone
    let mut follow = Follow::start(ledger.log().await, ledger.settings.clone(), 0).await;
    let mut pages = Vec::new();
    let mut seen = 0;
    while seen < last {
        let page = timeout(PATIENCE, follow.next()).await.unwrap().unwrap();
        seen = page.last().unwrap().number;
        pages.push(page.iter().map(|commit| commit.events.len()).sum::<usize>());
    }
    assert_eq!(pages, [990, 990, 720, 1_500]);
}

#[tokio::test]
async fn a_stream_whose_base_is_no_commits_is_made_anew() {
    let mut ledger = Ledger::open().await;
    let relay = ledger.relay().await;
    let stream = ledger.stream_where("a stream", |_| true).await;
    relay.stop().await;
    let jetstream = ledger.jetstream().await;
    jetstream.delete_stream(&ledger.settings.stream).await.unwrap();
    let made = &stream.cached_info().config;
    let description = made.description.as_ref().map(|text| text.replace("base=0", &format!("base={}", i64::MAX)));
    let subject = made.subjects[0].replace("commits.0", &format!("commits.{}", i64::MAX));
    let absurd = stream::Config {
        name: made.name.clone(),
        description,
        subjects: vec![subject.clone()],
        max_age: made.max_age,
        max_bytes: made.max_bytes,
        ..stream::Config::default()
    };
    jetstream.create_stream(absurd).await.unwrap();
    jetstream.publish(subject, "{}".into()).await.unwrap().await.unwrap();
    let mut follower = ledger.follow(0).await;
    let last = ledger.append_many(3).await;
    follower.has(last).await;
    let relay = ledger.relay().await;
    ledger.stream_where("made anew", |info| info.config.subjects.iter().all(|s| s.ends_with(".3"))).await;
    ledger.stream_where("the follower listens", |info| info.state.consumer_count == 1).await;
    relay.stop().await;
}

/// Servers of the test's own, which it kills.
#[tokio::test]
async fn a_relay_without_its_bus_says_so_also_while_nothing_happens() {
    let directory = tempfile::tempdir().unwrap();
    let stack = Stack::start(&directory.path().join("data"), local_stack::Options::default()).await.unwrap();
    migrations::run(stack.database_url()).await.unwrap();
    let ledger = Ledger::on(stack.database_url(), stack.nats_url(), "idle").await;
    let relay = Relay::new(ledger.log().await, ledger.settings.clone());
    let shutdown = Shutdown::new();
    let running = tokio::spawn({
        let (relay, shutdown) = (relay.clone(), shutdown.clone());
        async move { relay.run(shutdown).await }
    });
    let says = async |wanted: bool| {
        let deadline = Instant::now() + PATIENCE;
        while relay.is_connected() != wanted {
            assert!(Instant::now() < deadline, "not in time: connected = {wanted}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    says(true).await;
    stack.kill_nats().await.unwrap();
    says(false).await;
    stack.start_nats().await.unwrap();
    says(true).await;
    Running { shutdown, task: running }.stop().await;
    stack.stop().await.unwrap();
}

/// Servers of the test's own, which it kills.
#[tokio::test]
async fn a_bus_and_a_database_that_crash_and_return_are_followed_again() {
    let directory = tempfile::tempdir().unwrap();
    let stack = Stack::start(&directory.path().join("data"), local_stack::Options::default()).await.unwrap();
    migrations::run(stack.database_url()).await.unwrap();
    let mut ledger = Ledger::on(stack.database_url(), stack.nats_url(), "crashing").await;
    let relay = ledger.relay().await;
    let mut follower = ledger.follow(0).await;
    ledger.stream_where("the follower listens", |info| info.state.consumer_count == 1).await;
    let last = ledger.append_many(20).await;
    follower.has(last).await;

    stack.kill_nats().await.unwrap();
    let last = ledger.append_many(20).await;
    follower.has(last).await;
    stack.start_nats().await.unwrap();
    let relayed = u64::try_from(last).unwrap();
    ledger.stream_where("the relay has caught up", |info| info.state.last_sequence == relayed).await;
    let last = ledger.append_many(20).await;
    follower.has(last).await;

    stack.kill_postgres().await.unwrap();
    stack.start_postgres().await.unwrap();
    ledger.writer.disconnect();
    let last = ledger.append_many(20).await;
    follower.has(last).await;
    let relayed = u64::try_from(last).unwrap();
    ledger.stream_where("the relay works again", |info| info.state.last_sequence == relayed).await;
    relay.stop().await;
    stack.stop().await.unwrap();
}
