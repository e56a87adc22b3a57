//! A bus that dies, loses its disk or goes back in time, under load.
//!
//! Each test has a nats-server of its own, which it kills. What consumers applied is looked up in their own tables.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use async_nats::jetstream::stream;
use local_stack::{Options, Stack, testing};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::ledger::{Ledger, Load, PATIENCE, check_numbers, sealed};
use crate::recorder::Recorder;

/// What the issue asks for is 5 s; the rest is for a busy machine.
const BACK_MAX: Duration = Duration::from_secs(15);

/// A nats-server of the test's own.
pub(crate) struct Bus {
    pub(crate) stack: Stack,
    directory: TempDir,
}

impl Bus {
    pub(crate) async fn start() -> (Self, Ledger) {
        let database = testing::database(|url| async move { migrations::run(&url).await }).await;
        let directory = tempfile::tempdir().unwrap();
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        let options = Options { database_url: Some(database.url().to_owned()), ..Options::default() };
        let stack = Stack::start(&directory.path().join("data"), options).await.unwrap();
        let ledger = Ledger::on(database.url(), stack.nats_url(), database.name()).await;
        (Self { stack, directory }, ledger)
    }

    /// Where the streams are on the disk.
    fn streams(&self) -> PathBuf {
        self.directory.path().join("data/servers/nats/jetstream")
    }
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
}

/// Until all that is in the log by now is in the stream too.
async fn is_relayed(ledger: &Ledger) -> stream::Stream {
    let head = ledger.head.commit;
    ledger.stream_where("the relay is at the head", |info| relayed(info) == head).await
}

/// The commit that the last sequence of a stream stands for.
pub(crate) fn relayed(info: &stream::Info) -> i64 {
    base(info) + i64::try_from(info.state.last_sequence).unwrap()
}

pub(crate) fn base(info: &stream::Info) -> i64 {
    info.config.description.as_ref().unwrap().rsplit_once("base=").unwrap().1.parse().unwrap()
}

/// How long after `since` the last commit was appended that reached the consumer more than a second later, and the
/// longest way of a commit behind that.
fn lag_back(load: &Load, recorder: &Recorder, since: Instant) -> (Duration, Duration) {
    let applied = recorder.applied.lock().unwrap();
    let (mut back, mut longest) = (Duration::ZERO, Duration::ZERO);
    for (number, appended) in load.appended.lock().unwrap().iter().filter(|(_, at)| since <= *at) {
        let Ok(found) = applied.binary_search_by_key(number, |(number, _)| *number) else { continue };
        let lag = applied[found].1.saturating_duration_since(*appended);
        if Duration::from_secs(1) < lag {
            (back, longest) = (*appended - since, Duration::ZERO);
        } else {
            longest = longest.max(lag);
        }
    }
    (back, longest)
}

/// Puts a ledger with two consumers under load, does something to the bus, and expects everything to be as if nothing
/// had been, soon after the bus is back.
async fn check(what: &str, harm: impl AsyncFnOnce(&Bus, &Load)) {
    let (bus, ledger) = Bus::start().await;
    let relay = ledger.relay().await;
    let mut recorders = [Recorder::start(&ledger, "one").await, Recorder::start(&ledger, "two").await];
    ledger.stream_where("both listen", |info| info.state.consumer_count == 2).await;
    let (nats_url, settings, url) = (ledger.nats_url.clone(), ledger.settings.clone(), ledger.url.clone());
    let load = ledger.load();
    load.goes_on_for(50).await;
    harm(&bus, &load).await;

    let back = Instant::now();
    let beside = Ledger::on(&url, &nats_url, &settings.stream).await;
    let head = load.head();
    beside.stream_where("the relay has caught up", |info| head <= relayed(info)).await;
    let caught_up = back.elapsed();
    beside.stream_where("both listen again", |info| info.state.consumer_count == 2).await;
    let listening = back.elapsed();
    recorders[1].crash().await; // one of them begins anew in the middle
    load.goes_on_for(200).await;
    let (lag_back, longest) = lag_back(&load, &recorders[0], back);
    eprintln!(
        "{what}: relayed after {caught_up:?}, followed after {listening:?}, lag under 1 s after {lag_back:?}, then {longest:?} at most"
    );
    for figure in [caught_up, listening, lag_back] {
        assert!(figure < BACK_MAX, "{what}: {figure:?}");
    }

    let mut ledger = load.end().await;
    ledger.append_many(5).await;
    for recorder in &recorders {
        recorder.has_applied_all_once(&ledger).await;
    }
    let stream = is_relayed(&ledger).await;
    check_numbers(&stream, base(stream.cached_info())).await;
    relay.stop().await;
    bus.stack.stop().await.unwrap();
}

#[tokio::test]
async fn a_bus_that_is_killed_under_load_is_in_use_again_within_seconds_of_its_return() {
    check("killed", async |bus, load| {
        bus.stack.kill_nats().await.unwrap();
        load.goes_on_for(100).await;
        bus.stack.start_nats().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_bus_that_lost_its_disk_under_load_is_in_use_again_within_seconds_of_its_return() {
    check("wiped", async |bus, load| {
        bus.stack.kill_nats().await.unwrap();
        std::fs::remove_dir_all(bus.streams()).unwrap();
        load.goes_on_for(100).await;
        bus.stack.start_nats().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_bus_whose_whole_directory_is_gone_is_in_use_again_within_seconds_of_its_return() {
    check("directory removed", async |bus, load| {
        bus.stack.kill_nats().await.unwrap();
        std::fs::remove_dir_all(bus.streams().parent().unwrap()).unwrap();
        load.goes_on_for(100).await;
        bus.stack.start_nats().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_bus_that_went_back_in_time_under_load_is_in_use_again_within_seconds_of_its_return() {
    check("rolled back", async |bus, load| {
        let older = bus.streams().with_extension("older");
        bus.stack.kill_nats().await.unwrap();
        copy(&bus.streams(), &older);
        bus.stack.start_nats().await.unwrap();
        load.goes_on_for(200).await;
        bus.stack.kill_nats().await.unwrap();
        std::fs::remove_dir_all(bus.streams()).unwrap();
        std::fs::rename(&older, bus.streams()).unwrap();
        load.goes_on_for(50).await;
        bus.stack.start_nats().await.unwrap();
    })
    .await;
}

/// The stream's last sequence is the right one, and what lies there is another story.
#[tokio::test]
async fn a_bus_that_went_back_and_was_then_told_another_story_misleads_nobody() {
    let (bus, mut ledger) = Bus::start().await;
    let relay = ledger.relay().await;
    let recorder = Recorder::start(&ledger, "one").await;
    ledger.stream_where("it listens", |info| info.state.consumer_count == 1).await;
    ledger.append_many(20).await;
    is_relayed(&ledger).await;
    let fork = ledger.head;
    bus.stack.kill_nats().await.unwrap();
    let older = bus.streams().with_extension("older");
    copy(&bus.streams(), &older);
    bus.stack.start_nats().await.unwrap();
    ledger.append_many(20).await;
    is_relayed(&ledger).await;
    recorder.has_applied_all_once(&ledger).await;
    relay.stop().await;

    bus.stack.kill_nats().await.unwrap();
    std::fs::remove_dir_all(bus.streams()).unwrap();
    std::fs::rename(&older, bus.streams()).unwrap();
    bus.stack.start_nats().await.unwrap();
    // A relay of a log that took another turn after commit 20: well-formed, and three commits longer than ours.
    let stream = ledger.stream_where("the older stream", |info| relayed(info) == fork.commit).await;
    let (jetstream, subject) = (ledger.jetstream().await, stream.cached_info().config.subjects[0].clone());
    let mut other = fork;
    for _ in 0..23 {
        let commit = sealed(&other, 2, 10);
        other = commit.head();
        let body = serde_json::to_vec(&commit).unwrap();
        jetstream.publish(subject.clone(), body.into()).await.unwrap().await.unwrap();
    }
    let newcomer = Recorder::start(&ledger, "two").await;
    let late = Recorder::start(&ledger, "three").await;
    let relay = ledger.relay().await;
    ledger.append_many(30).await;
    for recorder in [&recorder, &newcomer, &late] {
        recorder.has_applied_all_once(&ledger).await;
    }
    ledger.stream_where("made anew, not gone on with", |info| fork.commit < base(info)).await;
    ledger.append_many(10).await;
    let stream = is_relayed(&ledger).await;
    check_numbers(&stream, base(stream.cached_info())).await;
    relay.stop().await;
    bus.stack.stop().await.unwrap();
}

/// As after a quiet night. The age is changed for the test and changed back, and the server does the rest.
#[tokio::test]
async fn a_stream_whose_messages_have_all_expired_goes_on_with_its_next_number() {
    let mut ledger = Ledger::open().await;
    let relay = ledger.relay().await;
    let recorder = Recorder::start(&ledger, "one").await;
    ledger.stream_where("it listens", |info| info.state.consumer_count == 1).await;
    ledger.append_many(30).await;
    let stream = is_relayed(&ledger).await;
    relay.stop().await;
    let jetstream = ledger.jetstream().await;
    let config = stream.cached_info().config.clone();
    let moment = Duration::from_millis(200);
    let short = stream::Config { max_age: moment, duplicate_window: moment, ..config.clone() };
    jetstream.update_stream(&short).await.unwrap();
    ledger.stream_where("all have expired", |info| info.state.messages == 0).await;
    jetstream.update_stream(&config).await.unwrap();

    let relay = ledger.relay().await;
    ledger.append_many(10).await;
    recorder.has_applied_all_once(&ledger).await;
    let stream = is_relayed(&ledger).await;
    let info = stream.cached_info();
    assert_eq!((base(info), info.state.first_sequence, info.state.messages), (0, 31, 10), "the same stream");
    check_numbers(&stream, 0).await;
    relay.stop().await;
}

/// 50 messages of some 250 kB are more than half of what the stream keeps: a paused consumer wakes up to a stream that
/// has forgotten what it wants.
#[tokio::test]
async fn a_slow_consumer_that_the_stream_has_left_behind_skips_nothing() {
    let mut ledger = Ledger::open().await;
    let relay = ledger.relay().await;
    let mut follow = event_feed::Follow::start(ledger.log().await, ledger.settings.clone(), 0).await;
    ledger.append_many(3).await;
    let mut seen = 0;
    while seen < 3 {
        seen = follow.next().await.unwrap().last().unwrap().number;
    }
    {
        let mut next = std::pin::pin!(follow.next());
        let listening = ledger.stream_where("it listens", |info| info.state.consumer_count == 1);
        tokio::select! {
            _ = &mut next => panic!("nothing was appended"),
            _ = listening => {}
        }
    }
    for _ in 0..200 {
        ledger.append(1, 240_000).await;
    }
    let last = ledger.append_many(300).await;
    ledger.stream_where("all is relayed", |info| relayed(info) == last && 3 < info.state.first_sequence).await;

    let deadline = Instant::now() + PATIENCE;
    while seen < last {
        let page = tokio::time::timeout_at(deadline, follow.next()).await.expect("it comes in time").unwrap();
        for commit in &page {
            assert_eq!(commit.number, seen + 1);
            seen = commit.number;
        }
        let bytes: usize = page.iter().flat_map(|commit| &commit.events).map(|event| event.payload.len()).sum();
        assert!(bytes < 5 * 1024 * 1024, "{bytes} bytes in a page");
    }
    relay.stop().await;
}
