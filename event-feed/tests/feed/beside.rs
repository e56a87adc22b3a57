//! Relay and followers in one process: commits are handed over, and nothing depends on it.

use std::sync::Arc;

use async_nats::jetstream::stream;
use event_feed::{Follow, Log};
use event_store::Recent;
use runtime::shutdown::Shutdown;

use crate::ledger::{Follower, Ledger, Running, sealed};
use crate::proxy::Proxy;

#[tokio::test]
async fn a_follower_beside_the_relay_gets_what_the_relay_has_read() {
    let mut ledger = Ledger::open().await;
    ledger.settings = ledger.settings.clone().in_one_process();
    let relay = ledger.relay().await;
    ledger.stream_where("there is a stream", |_| true).await;
    let before = ledger.append_many(20).await;
    ledger.stream_where("the relay works", |info| info.state.last_sequence == 20).await;
    let postgres = Proxy::before(&ledger.url).await;
    let log = Log::new(event_store::connect(&postgres.url(&ledger.url), "daybook_reader", 1).await.unwrap());
    let mut follower = Follower::start(log, ledger.settings.clone(), 0).await;
    follower.has(before).await;

    // More than a message on the bus may carry, and more of it than Postgres tells the follower.
    let carried = postgres.carried();
    for _ in 0..20 {
        let number = ledger.append(3, 100_000).await;
        follower.has(number).await;
    }
    let carried = postgres.carried() - carried;
    assert!(carried < 1_000_000, "{carried} bytes were read in Postgres");
    ledger.stream_where("nobody listens on the bus", |info| info.state.consumer_count == 0).await;
    let all = follower.has(ledger.head.commit).await;
    let log = ledger.log().await.commits_after(0, 1_000).await.unwrap();
    assert!(all.iter().take(log.len()).map(|commit| &**commit).eq(&log), "what was followed is what the log holds");
    relay.stop().await;
}

#[tokio::test]
async fn when_the_relay_beside_it_ends_a_follower_goes_on_with_the_bus() {
    let mut ledger = Ledger::open().await;
    let apart = ledger.settings.clone();
    let together = apart.clone().in_one_process();
    ledger.settings = together.clone();
    let relay = ledger.relay().await;
    let mut follower = ledger.follow(0).await;
    let number = ledger.append_many(10).await;
    follower.has(number).await;
    relay.stop().await;
    let number = ledger.append_many(10).await;
    follower.has(number).await;
    // Another process' relay: of it only the bus tells.
    ledger.settings = apart;
    let other = ledger.relay().await;
    ledger.stream_where("the follower listens", |info| info.state.consumer_count == 1).await;
    let number = ledger.append_many(10).await;
    follower.has(number).await;
    other.stop().await;
    ledger.settings = together;
    let relay = ledger.relay().await;
    let number = ledger.append_many(10).await;
    follower.has(number).await;
    relay.stop().await;
}

#[tokio::test]
async fn a_follower_that_is_slower_than_what_is_kept_for_it_reads_the_log() {
    let mut ledger = Ledger::open().await;
    ledger.settings = ledger.settings.clone().in_one_process();
    let relay = ledger.relay().await;
    ledger.stream_where("there is a stream", |_| true).await;
    let first = ledger.append_many(1).await;
    ledger.stream_where("the relay works", |info| info.state.last_sequence == 1).await;
    let mut follow = Follow::start(ledger.log().await, ledger.settings.clone(), 0).await;
    let page = follow.next().await.unwrap();
    assert_eq!(page.last().unwrap().number, first);
    for _ in 0..24 {
        ledger.append(8, 100_000).await; // 19 MB in all
    }
    let head = u64::try_from(ledger.head.commit).unwrap();
    ledger.stream_where("all is relayed", |info| info.state.last_sequence == head).await;
    let mut last = first;
    while last < ledger.head.commit {
        for commit in follow.next().await.unwrap() {
            assert_eq!((commit.number, commit.events.len()), (last + 1, 8));
            last = commit.number;
        }
    }
    relay.stop().await;
}

/// A relay that has an engine's memory.
async fn relay_with(ledger: &Ledger, recent: &Recent) -> Running {
    let log = ledger.log().await.with_recent(Some(recent.clone()));
    let shutdown = Shutdown::new();
    let relay = event_feed::relay::run(log, ledger.settings.clone(), shutdown.clone());
    Running { shutdown, task: tokio::spawn(relay) }
}

#[tokio::test]
async fn a_relay_beside_an_engine_takes_from_memory_what_is_there_and_the_rest_from_the_log() {
    let mut ledger = Ledger::open().await;
    ledger.settings = ledger.settings.clone().in_one_process();
    let recent = Recent::default();
    let relay = relay_with(&ledger, &recent).await;
    ledger.stream_where("there is a stream", |_| true).await;
    ledger.append_many(5).await; // another process' engine: nobody here tells
    for number in 6..=10 {
        let commit = sealed(&ledger.head, 2, 10);
        assert_eq!(commit.number, number);
        ledger.writer.append(&commit).await.unwrap();
        ledger.head = commit.head();
        recent.push(Arc::new(commit));
    }
    ledger.append_many(5).await;
    ledger.stream_where("all is relayed, nothing twice", |info| info.state.last_sequence == 15).await;
    let mut follower = ledger.follow(0).await; // what the relay had is handed over
    let followed = follower.has(15).await;
    let in_log = ledger.log().await.commits_after(0, 1_000).await.unwrap();
    assert!(followed.iter().map(|commit| &**commit).eq(&in_log), "what was followed is what the log holds");

    // That this is relayed at all shows that memory was asked first: the log does not have it.
    let next = sealed(&ledger.head, 2, 10);
    recent.push(Arc::new(next.clone()));
    let stream = ledger.stream_where("it came from memory", |info| info.state.last_sequence == 16).await;
    let message = stream.get_raw_message(16).await.unwrap();
    let told: serde_json::Value = serde_json::from_slice(&message.payload).unwrap();
    assert_eq!(told, serde_json::to_value(&next).unwrap());
    relay.stop().await;
}

#[tokio::test]
async fn a_relay_that_begins_believes_no_memory_of_what_the_log_has_lost() {
    let mut ledger = Ledger::open().await;
    ledger.append_many(3).await;
    let recent = Recent::default();
    let mut lost = ledger.head;
    for _ in 0..3 {
        let commit = sealed(&lost, 2, 10);
        lost = commit.head();
        recent.push(Arc::new(commit)); // acknowledged, and gone with a restored backup
    }
    let relay = relay_with(&ledger, &recent).await;
    let made = |info: &stream::Info| info.config.description.as_ref().is_some_and(|base| base.ends_with("base=3"));
    ledger.stream_where("there is a stream", made).await;
    let number = ledger.append_many(2).await;
    ledger.stream_where("they are relayed", |info| info.state.last_sequence == 2).await;
    let mut follower = ledger.follow(0).await;
    let followed = follower.has(number).await;
    let in_log = ledger.log().await.commits_after(0, 1_000).await.unwrap();
    assert!(followed.iter().map(|commit| &**commit).eq(&in_log), "what was followed is what the log holds");
    assert!(recent.last().is_none());

    // A stream that was led on by what is lost is not gone on with, whatever memory says.
    let mut lost = ledger.head;
    for _ in 0..2 {
        let commit = sealed(&lost, 2, 10);
        lost = commit.head();
        recent.push(Arc::new(commit));
    }
    ledger.stream_where("it is relayed from memory", |info| info.state.last_sequence == 4).await;
    relay.stop().await;
    ledger.append_many(3).await;
    let relay = relay_with(&ledger, &recent).await;
    let number = ledger.append_many(1).await;
    let anew = |info: &stream::Info| info.config.description.as_ref().is_some_and(|base| !base.ends_with("base=3"));
    let stream = ledger.stream_where("the stream is made anew", anew).await;
    let base: i64 =
        stream.cached_info().config.description.as_ref().unwrap().rsplit_once('=').unwrap().1.parse().unwrap();
    let all = u64::try_from(number - base).unwrap();
    ledger.stream_where("and goes on", |info| info.state.last_sequence == all).await;
    relay.stop().await;
}
