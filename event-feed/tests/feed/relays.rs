//! Several relays at once, as processes: of each commit one message, in order, whoever is paused and comes back.

use std::process::{Child, Command, Stdio};

use crate::ledger::{Ledger, check_numbers};
use crate::outages::{Bus, base, relayed};
use crate::recorder::Recorder;

/// The relay's own program. It ends with this value.
struct Process(Child);

impl Process {
    fn start(ledger: &Ledger) -> Self {
        let mut relay = Command::new(env!("CARGO_BIN_EXE_relay"));
        relay.env("DAYBOOK_DATABASE_URL", &ledger.url).env("DAYBOOK_NATS_URL", &ledger.nats_url);
        relay.args(["--listen", "127.0.0.1:0"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(relay.spawn().unwrap())
    }

    fn signal(&self, name: &str) {
        let id = self.0.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// A ledger on a bus of its own, with the stream's name that the program gives it.
async fn open() -> (Bus, Ledger) {
    let (bus, mut ledger) = Bus::start().await;
    ledger.settings = event_feed::FeedSettings::of(&ledger.log().await, Some(ledger.nats_url.clone())).await.unwrap();
    (bus, ledger)
}

#[tokio::test]
async fn a_relay_that_was_paused_under_load_comes_back_with_an_old_cursor_and_does_no_harm() {
    let (bus, ledger) = open().await;
    let recorder = Recorder::start(&ledger, "one").await;
    let relays = [Process::start(&ledger), Process::start(&ledger), Process::start(&ledger)];
    ledger.stream_where("it listens", |info| info.state.consumer_count == 1).await;
    let (url, stream) = (ledger.url.clone(), ledger.settings.stream.clone());
    let beside = Ledger::on(&url, &ledger.nats_url, &stream).await;
    let load = ledger.load();
    for (round, paused) in (0..6).zip([0, 1, 2].iter().cycle()) {
        relays[*paused].signal("STOP");
        load.goes_on_for(60).await;
        if round == 3 {
            // What the paused one remembers is a stream that is there no more.
            beside.jetstream().await.delete_stream(&stream).await.unwrap();
            load.goes_on_for(60).await;
        }
        relays[*paused].signal("CONT");
        load.goes_on_for(40).await;
    }
    let ledger = load.end().await;
    recorder.has_applied_all_once(&ledger).await;
    let head = ledger.head.commit;
    let stream = ledger.stream_where("relayed", |info| relayed(info) == head).await;
    let info = stream.cached_info();
    assert_eq!(info.state.messages, info.state.last_sequence, "nothing was taken back, nothing published twice");
    check_numbers(&stream, base(info)).await;
    bus.stack.stop().await.unwrap();
}

#[tokio::test]
async fn a_relay_that_is_killed_is_replaced_by_the_one_that_waits() {
    let (bus, ledger) = open().await;
    let recorder = Recorder::start(&ledger, "one").await;
    let mut relays = vec![Process::start(&ledger), Process::start(&ledger)];
    ledger.stream_where("it listens", |info| info.state.consumer_count == 1).await;
    let (url, nats_url, stream) = (ledger.url.clone(), ledger.nats_url.clone(), ledger.settings.stream.clone());
    let beside = Ledger::on(&url, &nats_url, &stream).await;
    let load = ledger.load();
    for _ in 0..4 {
        load.goes_on_for(50).await;
        drop(relays.remove(0)); // SIGKILL
        relays.push(Process::start(&beside));
    }
    load.goes_on_for(50).await;
    let ledger = load.end().await;
    recorder.has_applied_all_once(&ledger).await;
    let head = ledger.head.commit;
    let stream = ledger.stream_where("relayed", |info| relayed(info) == head).await;
    let info = stream.cached_info();
    assert_eq!(info.state.messages, info.state.last_sequence);
    check_numbers(&stream, base(info)).await;
    bus.stack.stop().await.unwrap();
}
