//! Outages: servers that crash and come back, and a log that cannot be read.

use std::os::unix::fs::PermissionsExt;

use local_stack::{Options, Stack};
use projector::rebuild;

use crate::system::{System, eventually};

#[tokio::test]
async fn after_crashes_of_postgres_and_nats_the_views_are_again_what_the_log_says() {
    let directory = tempfile::tempdir().unwrap();
    // The servers may run as another user, who has to pass through.
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    let stack = Stack::start(&directory.path().join("data"), Options::default()).await.unwrap();
    migrations::run(stack.database_url()).await.unwrap();
    let mut system = System::on(stack.database_url(), stack.nats_url(), "daybook-outage".to_owned()).await;
    system.project();
    let partner = system.partner().await;
    let (from, to) = (system.wallet(&partner, "alice").await, system.wallet(&partner, "bob").await);
    system.fund(&partner, from, "100.00").await;
    for _ in 0..20 {
        system.transfer(&partner, from, to, "1.00").await;
    }
    stack.kill_postgres().await.unwrap(); // what the views had written just now may be lost
    stack.start_postgres().await.unwrap();
    stack.kill_nats().await.unwrap();
    let path = format!("/v1/wallets/{to}");
    let shown = || async { partner.call(&path).await };
    eventually("the views are back", shown, |answer| answer.status == 200 && answer.json()["balance"] == "20.00").await;
    let again = || async { system.try_transfer(&partner, from, to, "1.00").await };
    eventually("the ledger writes again", again, Result::is_ok).await.unwrap();
    system.caught_up().await;
    stack.start_nats().await.unwrap();
    system.transfer(&partner, from, to, "1.00").await;
    system.caught_up().await;
    for report in rebuild(&system.database_url, None, |_, _| {}).await.unwrap() {
        assert_eq!(report.differed, 0, "{report:?}");
    }
    drop(system);
    stack.stop().await.unwrap();
}

#[tokio::test]
async fn what_a_crash_took_from_the_views_comes_back_also_when_nothing_new_happens() {
    let system = System::start().await;
    let partner = system.partner().await;
    let wallet = system.wallet(&partner, "alice").await;
    system.fund(&partner, wallet, "20.00").await;
    system.caught_up().await;
    // As after a crash that is over before the projector asks Postgres for anything: no connection of its has failed.
    system
        .sql(
            "begin;
             truncate views.partners, views.wallets, views.postings;
             update views.checkpoints set position = 0, commit_number = 0;
             commit;",
        )
        .await;
    let path = format!("/v1/wallets/{wallet}");
    let shown = || async { partner.call(&path).await };
    eventually("the views are back", shown, |answer| answer.status == 200 && answer.json()["balance"] == "20.00").await;
}

#[tokio::test]
async fn a_log_that_cannot_be_read_ends_the_projecting_and_is_named() {
    let mut system = System::start_without_projecting().await;
    let partner = system.partner().await;
    let wallet = system.wallet(&partner, "alice").await;
    let position = system.fund(&partner, wallet, "1.00").await.position();
    system
        .sql(&format!(
            "alter table ledger.events disable trigger append_only;
             update ledger.events set payload = '{{\"TransactionPosted\": {{}}}}' where position = {position};
             alter table ledger.events enable trigger append_only;"
        ))
        .await;
    system.project();
    let error = format!("{:#}", system.projecting_ended().await);
    assert!(error.contains(&format!("position {position}")), "{error}");
}
