//! Outages: the servers that the dispatcher stands on go away and come back.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use ledger_core::{Action, Metadata, WalletId};
use local_stack::{Options, Stack};
use reqwest::Method;
use tokio::sync::Notify;
use uuid::Uuid;

use crate::receiver::{Receiver, Reply};
use crate::system::{System, eventually, text};

#[tokio::test]
async fn the_dispatcher_outlives_postgres_and_nats_and_records_what_came_of_an_attempt_meanwhile() {
    let directory = tempfile::tempdir().unwrap();
    // The servers may run as another user, who has to pass through.
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    let stack = Stack::start(&directory.path().join("data"), Options::default()).await.unwrap();
    migrations::run(stack.database_url()).await.unwrap();
    let mut system = System::on(stack.database_url(), stack.nats_url(), "daybook-outage".to_owned(), "6h").await;
    system.dispatch();

    let answer = Arc::new(Notify::new());
    let notified = answer.clone();
    let receiver =
        Receiver::start(move |n| if n == 0 { Reply::StatusAfter(notified.clone(), 200) } else { Reply::Status(200) })
            .await;
    let partner = system.partner().await;
    let webhook = partner.register(&receiver).await;
    system.wallet(&partner).await;
    receiver.wait_for(1).await;

    stack.kill_postgres().await.unwrap();
    stack.kill_nats().await.unwrap();
    answer.notify_one();
    stack.start_postgres().await.unwrap();
    let path = format!("/v1/webhooks/{}/deliveries", text(&webhook["id"]));
    let answer = eventually(
        "the outcome",
        || partner.call(Method::GET, &path, None),
        |answer| answer.body["data"][0]["status"] == "DELIVERED",
    )
    .await;
    let delivered = &answer.body["data"][0];
    assert_eq!(delivered["attempts"].as_array().unwrap().len(), 1, "the outcome was known, and nothing sent twice");

    stack.start_nats().await.unwrap();
    let open = || Action::OpenWallet {
        wallet: WalletId::from_uuid(Uuid::now_v7()),
        user: "bob".into(),
        currency: "EUR".parse().unwrap(),
        metadata: Metadata::new(),
    };
    let written =
        eventually("the ledger writes again", || system.try_execute(partner.caller(), open(), None), Result::is_ok)
            .await;
    assert!(written.is_ok());
    let seen = receiver.wait_for(2).await;
    assert_eq!(seen[1].header("x-daybook-event"), "wallet.opened");
    stack.stop().await.unwrap();
}

#[tokio::test]
async fn an_event_that_cannot_be_read_shows_in_readiness_until_it_is_repaired() {
    let system = System::start_without_dispatching("6h").await;
    let receiver = Receiver::start(|_| Reply::Status(200)).await;
    let partner = system.partner().await;
    partner.register(&receiver).await;
    system.wallet(&partner).await;
    let dispatcher = system.another_dispatcher(true);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ready = format!("http://{}/readyz", listener.local_addr().unwrap());
    let router = webhook_dispatcher::health(&dispatcher).router();
    let (limits, shutdown) = (runtime::http::Limits::default(), runtime::shutdown::Shutdown::new());
    tokio::spawn(runtime::http::serve(listener, router, limits, shutdown.clone()));
    let readiness = || async {
        let answer = reqwest::get(&ready).await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    assert_eq!(readiness().await.0, 200);

    // As a disk or a careless hand would do it: no role may.
    let forge = |from: &str, to: &str| {
        format!(
            "do $$ begin
                 perform set_config('session_replication_role', 'replica', true);
                 update ledger.events set payload = replace(payload::text, '{from}', '{to}')::json
                 where event_type = 'WalletOpened';
             end $$"
        )
    };
    system.sql(&forge("\"WalletOpened\"", "\"WalletOpenedd\"")).await;
    let running = system.run(dispatcher);
    let seen = eventually("it is not ready", readiness, |(status, _)| *status == 503).await;
    assert!(seen.1.contains(r#""name":"webhooks-log","status":"failed""#), "{}", seen.1);
    assert_eq!(receiver.seen().len(), 0);

    system.sql(&forge("\"WalletOpenedd\"", "\"WalletOpened\"")).await;
    eventually("it is ready again", readiness, |(status, _)| *status == 200).await;
    receiver.wait_for(1).await;
    shutdown.trigger();
    running.abort();
}
