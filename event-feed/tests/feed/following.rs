//! What a follower gets while the bus is there, is not, or lies.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::stream;
use event_feed::relay::Relay;
use event_feed::{Commit, FeedError, FeedSettings, Follow, Head, Log};
use local_stack::Stack;
use runtime::shutdown::Shutdown;
use tokio::time::{Instant, timeout};

use crate::ledger::{Follower, Ledger, PATIENCE, Running, check_numbers, sealed};
use crate::proxy::Proxy;

#[tokio::test]
async fn a_live_follower_gets_events_from_the_bus() {
    let mut ledger = Ledger::open().await;
    let relay = ledger.relay().await;
    let before = ledger.append_many(20).await;
    let postgres = Proxy::before(&ledger.url).await;
    let log = Log::new(event_store::connect(&postgres.url(&ledger.url), "daybook_reader", 1).await.unwrap());
    let mut follower = Follower::start(log, ledger.settings.clone(), 0).await;
    follower.has(before).await;
    ledger.stream_where("the follower listens", |info| info.state.consumer_count == 1).await;
    let first = ledger.append(1, 10).await;
    follower.has(first).await;

    let all = comes_over_the_bus(&mut ledger, &mut follower, &postgres).await;
    let log = ledger.log().await.commits_after(0, 1_000).await.unwrap();
    assert!(all.iter().map(|commit| &**commit).eq(&log), "what was followed is what the log holds");
    relay.stop().await;
}

/// Some 2 MB of events reach the follower while Postgres tells it little more than heads and hashes.
async fn comes_over_the_bus(ledger: &mut Ledger, follower: &mut Follower, postgres: &Proxy) -> Vec<Arc<Commit>> {
    let before = postgres.carried();
    for _ in 0..20 {
        let number = ledger.append(1, 100_000).await;
        follower.has(number).await;
    }
    let carried = postgres.carried() - before;
    assert!(carried < 1_000_000, "{carried} bytes were read in Postgres");
    follower.has(ledger.head.commit).await
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
    ledger.stream_where("a stream that begins at the beginning", |_| true).await;
    let postgres = Proxy::before(&ledger.url).await;
    let log = Log::new(event_store::connect(&postgres.url(&ledger.url), "daybook_reader", 1).await.unwrap());
    let mut follower = Follower::start(log, ledger.settings.clone(), 0).await;
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
    comes_over_the_bus(&mut ledger, &mut follower, &postgres).await;
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
    ledger.stream_where("a stream", |_| true).await;
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
    for _ in 0..60 {
        ledger.append(90, 10).await;
    }
    let last = ledger.append(6_000, 10).await; // one commit beyond the bound comes alone
    let mut follow = Follow::start(ledger.log().await, ledger.settings.clone(), 0).await;
    let mut pages = Vec::new();
    let mut seen = 0;
    while seen < last {
        let page = timeout(PATIENCE, follow.next()).await.unwrap().unwrap();
        seen = page.last().unwrap().number;
        pages.push(page.iter().map(|commit| commit.events.len()).sum::<usize>());
    }
    assert_eq!(pages, [4_950, 450, 6_000]);
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
        while relay.check().is_ok() != wanted {
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

#[tokio::test]
async fn a_log_with_a_hole_ends_the_following_and_the_relay_says_why_it_does_not_go_on() {
    let mut ledger = Ledger::open().await;
    let relay = ledger.relay().await;
    ledger.stream_where("a stream", |_| true).await;
    ledger.append_many(5).await;
    ledger.stream_where("relayed", |info| info.state.last_sequence == 5).await;
    relay.stop().await;
    ledger.append_many(1).await;
    // As a disk or a careless hand would do it: no role may.
    let owner = sqlx::PgPool::connect(&ledger.url).await.unwrap();
    let hole = "set session_replication_role = replica; delete from ledger.events where position = 12";
    sqlx::raw_sql(hole).execute(&owner).await.unwrap();

    let mut follow = Follow::start(ledger.log().await, ledger.settings.clone(), 5).await;
    let error = timeout(PATIENCE, follow.next()).await.unwrap().unwrap_err();
    assert!(error.is_final() && error.to_string().contains("position 12"), "{error}");

    let relay = Relay::new(ledger.log().await, ledger.settings.clone());
    let shutdown = Shutdown::new();
    let running = tokio::spawn({
        let (relay, shutdown) = (relay.clone(), shutdown.clone());
        async move { relay.run(shutdown).await }
    });
    let deadline = Instant::now() + PATIENCE;
    while !relay.check().is_err_and(|reason| reason.contains("position 12")) {
        assert!(Instant::now() < deadline, "last said: {:?}", relay.check());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Running { shutdown, task: running }.stop().await;
}
