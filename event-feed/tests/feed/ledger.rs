//! A ledger of a test's own, its relay, and a consumer that keeps what it is given.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use async_nats::jetstream::{self, stream};
use event_feed::{Commit, FeedSettings, Follow, Head, Log};
use event_store::{Draft, Writer};
use ledger_core::{CommandEvent, CommandId, Event, Failure, NewEvent, Timestamp};
use local_stack::testing;
use runtime::shutdown::Shutdown;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A ledger of the test's own, with a hand on the log and one on the bus.
pub(crate) struct Ledger {
    pub(crate) url: String,
    pub(crate) nats_url: String,
    pub(crate) settings: FeedSettings,
    pub(crate) writer: Writer,
    pub(crate) head: Head,
}

impl Ledger {
    pub(crate) async fn open() -> Self {
        let database = testing::database(|url| async move { migrations::run(&url).await }).await;
        Self::on(database.url(), testing::stack().await.nats_url(), database.name()).await
    }

    pub(crate) async fn on(url: &str, nats_url: &str, stream: &str) -> Self {
        let writer = Writer::new(url).unwrap();
        let log = Log::new(event_store::connect(url, "daybook_reader", 1).await.unwrap());
        let head = log.head().await.unwrap();
        let settings = FeedSettings { nats_url: Some(nats_url.to_owned()), stream: stream.to_owned(), beside: None };
        Self { url: url.to_owned(), nats_url: nats_url.to_owned(), settings, writer, head }
    }

    /// A commit of `events` events that each carry `bytes` bytes; returns its number.
    pub(crate) async fn append(&mut self, events: usize, bytes: usize) -> i64 {
        let commit = sealed(&self.head, events, bytes);
        self.writer.append(&commit).await.unwrap();
        self.head = commit.head();
        commit.number
    }

    pub(crate) async fn append_many(&mut self, commits: usize) -> i64 {
        for _ in 0..commits {
            self.append(2, 10).await;
        }
        self.head.commit
    }

    /// Appends small commits until it is told to stop, and remembers when each was in the log.
    pub(crate) fn load(mut self) -> Load {
        let stop = CancellationToken::new();
        let appended = Arc::new(Mutex::new(Vec::new()));
        let task = tokio::spawn({
            let (stop, appended) = (stop.clone(), appended.clone());
            async move {
                while !stop.is_cancelled() {
                    let number = self.append(2, 10).await;
                    appended.lock().unwrap().push((number, Instant::now()));
                    tokio::time::sleep(Duration::from_millis(3)).await;
                }
                self
            }
        });
        Load { stop, appended, task }
    }

    /// The log over connections of its own.
    pub(crate) async fn log(&self) -> Log {
        Log::new(event_store::connect(&self.url, "daybook_reader", 2).await.unwrap())
    }

    pub(crate) async fn relay(&self) -> Running {
        let shutdown = Shutdown::new();
        let relay = event_feed::relay::run(self.log().await, self.settings.clone(), shutdown.clone());
        Running { shutdown, task: tokio::spawn(relay) }
    }

    pub(crate) async fn follow(&self, after: i64) -> Follower {
        Follower::start(self.log().await, self.settings.clone(), after).await
    }

    pub(crate) async fn jetstream(&self) -> jetstream::Context {
        let address: async_nats::ServerAddr = self.nats_url.parse().unwrap();
        let (user, password) = (address.username().unwrap().to_owned(), address.password().unwrap().to_owned());
        let options = async_nats::ConnectOptions::with_user_and_password(user, password);
        jetstream::new(options.connect(address).await.unwrap())
    }

    /// The stream's state, as soon as it is as wanted.
    pub(crate) async fn stream_where(&self, claim: &str, wanted: impl Fn(&stream::Info) -> bool) -> stream::Stream {
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

pub(crate) fn sealed(head: &Head, events: usize, bytes: usize) -> Commit {
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

/// A ledger at work.
pub(crate) struct Load {
    stop: CancellationToken,
    pub(crate) appended: Arc<Mutex<Vec<(i64, Instant)>>>,
    task: JoinHandle<Ledger>,
}

impl Load {
    pub(crate) fn head(&self) -> i64 {
        self.appended.lock().unwrap().last().map_or(0, |(number, _)| *number)
    }

    /// Waits for so many more commits.
    pub(crate) async fn goes_on_for(&self, commits: i64) {
        let wanted = self.head() + commits;
        let deadline = Instant::now() + PATIENCE;
        while self.head() < wanted {
            assert!(Instant::now() < deadline, "the load stands still at commit {}", self.head());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) async fn end(self) -> Ledger {
        self.stop.cancel();
        self.task.await.unwrap()
    }
}

pub(crate) struct Running {
    pub(crate) shutdown: Shutdown,
    pub(crate) task: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    pub(crate) async fn stop(self) {
        self.shutdown.trigger();
        timeout(PATIENCE, self.task).await.expect("a relay stops when it is asked to").unwrap().unwrap();
    }
}

/// A consumer that keeps everything and checks that it is contiguous.
pub(crate) struct Follower {
    pub(crate) commits: watch::Receiver<Vec<Arc<Commit>>>,
    pub(crate) task: JoinHandle<()>,
}

impl Follower {
    pub(crate) async fn start(log: Log, settings: FeedSettings, after: i64) -> Self {
        let mut follow = Follow::start(log, settings, after).await;
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
        Self { commits, task }
    }

    pub(crate) async fn has(&mut self, number: i64) -> Vec<Arc<Commit>> {
        let reached = self.commits.wait_for(|all| all.last().is_some_and(|last| last.number == number));
        let reached = timeout(PATIENCE, reached).await.map(|all| all.map(|all| all.clone()));
        match reached {
            Ok(Ok(all)) => all,
            Ok(Err(_)) => panic!("the follower failed: {:?}", (&mut self.task).await),
            Err(_) => panic!("commit {number} did not come; last: {:?}", self.commits.borrow().last()),
        }
    }
}

/// Every message lies where its number says.
pub(crate) async fn check_numbers(stream: &stream::Stream, base: i64) {
    let info = stream.cached_info();
    assert_eq!(info.config.subjects, [format!("daybook.{}.commits.{base}", info.config.name)]);
    for sequence in info.state.last_sequence + 1 - info.state.messages..=info.state.last_sequence {
        let message = stream.get_raw_message(sequence).await.unwrap();
        let commit: Commit = serde_json::from_slice(&message.payload).unwrap();
        assert_eq!(commit.number, base + i64::try_from(sequence).unwrap());
    }
}
