//! Connections that carry nothing any more and never say so, as when a cable is pulled or a firewall forgets.

use std::time::Duration;

use event_feed::{FeedSettings, Log};
use tokio::time::{Instant, timeout};

use crate::ledger::{Follower, Ledger, Running};
use crate::outages::relayed;
use crate::proxy::Proxy;

/// A reader gives Postgres 5 s; the rest is a new connection and a busy machine.
const HEALED_MAX: Duration = Duration::from_secs(18);

async fn log_at(url: &str) -> Log {
    Log::new(event_store::connect(url, "daybook_reader", 2).await.unwrap())
}

#[tokio::test]
async fn a_follower_whose_database_fell_silent_goes_on_over_a_new_connection() {
    let mut ledger = Ledger::open().await;
    let proxy = Proxy::before(&ledger.url).await;
    let settings = FeedSettings { nats_url: None, ..ledger.settings.clone() };
    let mut follower = Follower::start(log_at(&proxy.url(&ledger.url)).await, settings, 0).await;
    let first = ledger.append_many(3).await;
    follower.has(first).await;
    for _ in 0..2 {
        proxy.freeze();
        let began = Instant::now();
        let next = ledger.append_many(3).await;
        follower.has(next).await;
        eprintln!("a follower's silent database: healed after {:?}", began.elapsed());
        assert!(began.elapsed() < HEALED_MAX, "{:?}", began.elapsed());
    }
}

#[tokio::test]
async fn a_follower_whose_bus_fell_silent_reads_postgres_and_then_listens_again() {
    let mut ledger = Ledger::open().await;
    let relay = ledger.relay().await;
    let proxy = Proxy::before(&ledger.nats_url).await;
    let settings = FeedSettings { nats_url: Some(proxy.url(&ledger.nats_url)), ..ledger.settings.clone() };
    let mut follower = Follower::start(ledger.log().await, settings, 0).await;
    ledger.stream_where("it listens", |info| info.state.consumer_count == 1).await;
    proxy.freeze();
    let began = Instant::now();
    let next = ledger.append_many(3).await;
    follower.has(next).await;
    eprintln!("a follower's silent bus: the next commit came after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(3), "Postgres is looked at twice a second");
    // The old consumer stays until the server gives it up.
    ledger.stream_where("it listens again", |info| info.state.consumer_count == 2).await;
    eprintln!("a follower's silent bus: it listened again after {:?}", began.elapsed());
    relay.stop().await;
}

#[tokio::test]
async fn a_relay_whose_bus_or_database_fell_silent_goes_on_over_a_new_connection() {
    let mut ledger = Ledger::open().await;
    let (database, bus) = (Proxy::before(&ledger.url).await, Proxy::before(&ledger.nats_url).await);
    let settings = FeedSettings { nats_url: Some(bus.url(&ledger.nats_url)), ..ledger.settings.clone() };
    let shutdown = runtime::shutdown::Shutdown::new();
    let relay = event_feed::relay::run(log_at(&database.url(&ledger.url)).await, settings, shutdown.clone());
    let relay = Running { shutdown, task: tokio::spawn(relay) };
    let first = ledger.append_many(3).await;
    ledger.stream_where("relayed", |info| relayed(info) == first).await;
    for (what, proxy) in [("database", &database), ("bus", &bus), ("database", &database)] {
        proxy.freeze();
        let began = Instant::now();
        let next = ledger.append_many(3).await;
        ledger.stream_where("relayed", |info| relayed(info) == next).await;
        eprintln!("a relay's silent {what}: healed after {:?}", began.elapsed());
        assert!(began.elapsed() < HEALED_MAX, "{what}: {:?}", began.elapsed());
    }
    relay.stop().await;
}

/// What services other than followers stand on. With sqlx alone its one place would stay taken.
#[tokio::test]
async fn a_pool_whose_only_connection_fell_silent_has_a_new_one_soon() {
    let ledger = Ledger::open().await;
    let proxy = Proxy::before(&ledger.url).await;
    let options: sqlx::postgres::PgConnectOptions = proxy.url(&ledger.url).parse().unwrap();
    let pool = event_feed::pool_options(1).connect_with(options).await.unwrap();
    let ask = || async {
        let ask = sqlx::query_scalar::<_, i32>("select 1").fetch_one(&pool);
        // A new connection has to fit in, beside all other tests on two cores.
        event_feed::within(Duration::from_secs(3), ask).await
    };
    for idle in [Duration::ZERO, Duration::from_millis(1_200)] {
        ask().await.unwrap();
        let returned = async || {
            while pool.num_idle() == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await
            }
        };
        timeout(Duration::from_secs(10), returned()).await.expect("the connection is back in its pool");
        tokio::time::sleep(idle).await; // long enough to be asked for a sign of life first, or not
        proxy.freeze();
        let began = Instant::now();
        while ask().await.is_err() {
            assert!(began.elapsed() < HEALED_MAX, "{:?}", began.elapsed());
        }
        eprintln!("a pool's silent connection: replaced after {:?}", began.elapsed());
    }
}
