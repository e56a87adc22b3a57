//! A stream that somebody else lays hands on, while a relay and a consumer are at work and nothing else happens.

use async_nats::jetstream::stream;
use event_feed::Head;

use crate::ledger::{Ledger, Running, sealed};
use crate::outages::{base, relayed};
use crate::recorder::Recorder;

/// A ledger of ten commits, all in the stream and all applied, with everyone idle.
async fn idle() -> (Ledger, Running, Recorder, stream::Stream) {
    let mut ledger = Ledger::open().await;
    let relay = ledger.relay().await;
    let recorder = Recorder::start(&ledger, "one").await;
    ledger.stream_where("it listens", |info| info.state.consumer_count == 1).await;
    ledger.append_many(10).await;
    let stream = ledger.stream_where("relayed", |info| relayed(info) == 10).await;
    recorder.has_applied_all_once(&ledger).await;
    (ledger, relay, recorder, stream)
}

/// Everything goes on: the consumer listens again, and the next commits come over a stream that is right.
async fn goes_on(mut ledger: Ledger, relay: Running, recorder: Recorder) {
    ledger.append_many(10).await;
    recorder.has_applied_all_once(&ledger).await;
    let head = ledger.head.commit;
    ledger.stream_where("relayed", |info| relayed(info) == head).await;
    ledger.stream_where("it listens again", |info| info.state.consumer_count == 1).await;
    ledger.append_many(10).await;
    recorder.has_applied_all_once(&ledger).await;
    relay.stop().await;
}

#[tokio::test]
async fn a_stream_deleted_under_an_idle_relay_is_made_again() {
    let (ledger, relay, recorder, _) = idle().await;
    ledger.jetstream().await.delete_stream(&ledger.settings.stream).await.unwrap();
    ledger.stream_where("made again from the head", |info| base(info) == 10).await;
    goes_on(ledger, relay, recorder).await;
}

#[tokio::test]
async fn a_stream_that_was_made_to_take_nothing_is_made_anew() {
    type Change = fn(&mut stream::Config);
    let changes: [(&str, Change); 4] = [
        ("message size", |config| config.max_message_size = 10),
        ("subjects", |config| config.subjects = vec!["elsewhere".to_owned()]),
        ("discard", |config| config.discard = stream::DiscardPolicy::New),
        ("sealed", |config| config.sealed = true),
    ];
    for (what, change) in changes {
        let (ledger, relay, recorder, stream) = idle().await;
        let mut config = stream.cached_info().config.clone();
        change(&mut config);
        if what == "subjects" {
            config.subjects = vec![format!("elsewhere.{}", config.name)];
        }
        ledger.jetstream().await.update_stream(&config).await.unwrap();
        ledger.stream_where(what, |info| base(info) == 10).await;
        goes_on(ledger, relay, recorder).await;
    }
}

#[tokio::test]
async fn messages_that_are_not_the_relays_are_found_while_idle_and_believed_by_nobody() {
    let (ledger, relay, recorder, stream) = idle().await;
    let last = stream.get_raw_message(10).await.unwrap().payload;
    let next = serde_json::to_vec(&sealed(&ledger.head, 1, 10)).unwrap();
    let elsewhere = Head { chain: [7; 32], ..ledger.head };
    let other = serde_json::to_vec(&sealed(&elsewhere, 1, 10)).unwrap();
    let subject = stream.cached_info().config.subjects[0].clone();
    let jetstream = ledger.jetstream().await;
    for lie in [last, next.into(), other.into(), "{}x".into()] {
        jetstream.publish(subject.clone(), lie).await.unwrap().await.unwrap();
    }
    ledger.stream_where("made anew from the head", |info| base(info) == 10).await;
    goes_on(ledger, relay, recorder).await;
}

#[tokio::test]
async fn messages_missing_from_the_middle_are_read_in_postgres() {
    let (mut ledger, relay, recorder, stream) = idle().await;
    let mut follow = event_feed::Follow::start(ledger.log().await, ledger.settings.clone(), 10).await;
    {
        let mut next = std::pin::pin!(follow.next());
        tokio::select! {
            _ = &mut next => panic!("nothing was appended"),
            _ = ledger.stream_where("both listen", |info| info.state.consumer_count == 2) => {}
        }
    }
    // While this one does not ask, more messages go missing than wait on its way.
    let last = ledger.append_many(400).await;
    ledger.stream_where("relayed", |info| relayed(info) == last).await;
    for sequence in (150..250).chain([300, 302]) {
        stream.delete_message(sequence).await.unwrap();
    }
    let mut seen = 10;
    while seen < last {
        let page = tokio::time::timeout(crate::ledger::PATIENCE, follow.next()).await.unwrap().unwrap();
        for commit in page {
            assert_eq!(commit.number, seen + 1);
            seen = commit.number;
        }
    }
    drop(follow);
    ledger.stream_where("one listens", |info| info.state.consumer_count <= 2).await;
    recorder.has_applied_all_once(&ledger).await;
    relay.stop().await;
}
