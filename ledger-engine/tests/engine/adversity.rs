//! Engines among engines that read, snapshot, stop and are restored at the worst moment.

use ledger_engine::Receipt;
use tokio::task::JoinSet;

use super::memory::{open_many, snapshot_position};
use super::*;

fn settle(transaction: TransactionId, amount: &str) -> Command {
    let money = Money::parse(amount, eur()).unwrap();
    let action = Action::Settle { transaction, money, provider_reference: "bank-1".to_owned() };
    command(None, Caller::Workflow, action)
}

fn nobodys() -> WalletId {
    WalletId::from_uuid(Uuid::now_v7())
}

#[tokio::test]
async fn a_transaction_that_another_engine_ends_while_it_is_read_here_has_ended() {
    let (world, other) = World::new().await;
    let (a, b) = (world.wallet(&other, "1.00").await, world.wallet(&other, "0").await);
    let (transaction, request) = world.top_up(a, "1.00");
    other.execute(request).await.unwrap();
    world.engine(Settings::default()).await.stop(PATIENCE).await; // leaves a snapshot
    let ledger = world.engine(Settings::default()).await; // and this one begins with nothing in memory but that
    let (second, request) = world.top_up(a, "1.00");
    ledger.execute(request).await.unwrap();
    ledger.execute(settle(second, "1.00")).await.unwrap();
    ledger.execute(world.transfer(None, a, b, "0.01")).await.unwrap();

    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    sqlx::raw_sql("begin; lock table ledger.book_wallets").execute(&mut owner).await.unwrap();
    let waits = spawn(&ledger, settle(transaction, "1.00"));
    let reading =
        "select exists (select from pg_locks where not granted and relation = 'ledger.book_wallets'::regclass)";
    eventually("the reading", async || sqlx::query_scalar(reading).fetch_one(&mut owner).await.unwrap()).await;
    other.execute(settle(transaction, "1.00")).await.unwrap();
    ledger.execute(world.transfer(None, a, b, "0.01")).await.unwrap(); // it reads that on the way
    sqlx::raw_sql("rollback").execute(&mut owner).await.unwrap();
    let told = timeout(PATIENCE, waits).await.expect("an answer").unwrap();
    assert!(matches!(told, Err(CommandError::Refused(Refusal::TransactionEnded { .. }))), "{told:?}");
    assert_eq!(world.balance(a).await, "2.98");
}

#[tokio::test]
async fn a_start_folds_nothing_whose_hash_does_not_hold() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    let changed = ledger.execute(world.transfer(None, a, b, "4.00")).await.unwrap().position();
    ledger.stop(PATIENCE).await;
    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    let exchange = |from: &str, to: &str| {
        format!(
            "set session_replication_role = replica; -- the triggers rest
             update ledger.events set payload = replace(payload::text, '{from}', '{to}')::json where position = {changed};
             delete from ledger.book_wallets; delete from ledger.book_partners; delete from ledger.book_snapshot;
             set session_replication_role = origin"
        )
    };
    sqlx::raw_sql(&exchange("\"4.00\"", "\"5.00\"")).execute(&mut owner).await.unwrap();
    let refused = Ledger::start(world.database.url(), Settings::default()).await.unwrap_err().to_string();
    assert!(refused.contains(&format!("position {changed}")), "{refused}");

    sqlx::raw_sql(&exchange("\"5.00\"", "\"4.00\"")).execute(&mut owner).await.unwrap();
    let ledger = world.engine(Settings::default()).await;
    ledger.execute(world.transfer(None, a, b, "6.00")).await.unwrap();
    assert_eq!(world.balance(b).await, "10.00", "without a snapshot the log says it all");
}

#[tokio::test]
async fn an_engine_left_on_an_abandoned_history_leaves_no_snapshot_of_it() {
    let (world, abandoned) = World::new().await;
    let (a, b) = (world.wallet(&abandoned, "10.00").await, world.wallet(&abandoned, "0").await);
    let kept = world.log().await.head().await.unwrap().commit;
    for _ in 0..80 {
        abandoned.execute(world.transfer(None, a, b, "0.10")).await.unwrap();
    }
    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    restore(&mut owner, kept).await;
    let restored = world.engine(Settings { wallets_max: 4, snapshot_every: 8, ..Settings::default() }).await;
    restored.execute(world.transfer(None, a, b, "1.00")).await.unwrap();
    abandoned.stop(PATIENCE).await; // politely, and with all it believes
    for _ in 0..12 {
        world.wallet(&restored, "1.00").await; // other things are in memory now
    }
    restored.execute(world.transfer(None, a, b, "9.00")).await.expect("it was never spent");
    assert_eq!(world.balance(a).await, "0.00");
    restored.stop(PATIENCE).await;
    world.engine(Settings::default()).await;
}

#[tokio::test]
async fn an_engine_stops_when_the_snapshot_no_longer_has_what_it_let_go() {
    let (world, first) = World::new().await;
    let (a, b) = (world.wallet(&first, "10.00").await, world.wallet(&first, "0").await);
    first.stop(PATIENCE).await;
    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    let ledger = world.engine(Settings::default()).await;
    sqlx::raw_sql("truncate ledger.book_snapshot, ledger.book_wallets, ledger.book_partners")
        .execute(&mut owner)
        .await
        .unwrap();
    let told = ledger.execute(world.transfer(Some("k"), a, b, "1.00")).await;
    assert!(matches!(told, Err(CommandError::Unavailable | CommandError::OutcomeUnknown)), "{told:?}");
    assert!(!ledger.is_running(), "it cannot read what it let go");
    ledger.stop(PATIENCE).await;
    let ledger = world.engine(Settings::default()).await;
    let receipt = ledger.execute(world.transfer(Some("k"), a, b, "1.00")).await.unwrap();
    assert_eq!(event_types(&receipt), ["TransactionPosted"]);
}

#[tokio::test]
async fn what_is_decided_again_since_a_caller_gave_up_is_decided_on_all_it_needs() {
    let (world, first) = World::new().await;
    let mut wallets = Vec::new();
    for _ in 0..6 {
        wallets.push(world.wallet(&first, "10.00").await);
    }
    first.stop(PATIENCE).await;
    let wait_max = Duration::from_secs(2);
    let ledger = world.engine(Settings { wallets_max: 4, wait_max, ..Settings::default() }).await;
    let mut held = Held::take(&world).await;
    let sent = spawn(&ledger, world.transfer(None, wallets[0], wallets[1], "1.00"));
    held.append_waits().await;
    let given_up = ledger.execute(world.transfer(Some("k1"), wallets[2], wallets[3], "1.00")).await;
    assert!(matches!(given_up, Err(CommandError::Overloaded)), "{given_up:?}");
    // Refused, so it changes nothing, and what it looked at may leave memory.
    let again = spawn(&ledger, world.transfer(Some("k2"), wallets[4], wallets[5], "10.01"));
    sleep(Duration::from_millis(300)).await; // whether it is decided by now or not: the claim holds either way
    held.let_go().await;
    sent.await.unwrap().unwrap();
    let receipt = timeout(PATIENCE, again).await.expect("an answer").unwrap().unwrap();
    let Event::Transaction(_, TransactionEvent::Declined { failure, .. }) = receipt.events()[0].read().unwrap() else {
        panic!("{receipt:?}")
    };
    assert_eq!(failure.code, "insufficient-funds");
    assert_eq!(world.balance(wallets[2]).await, "10.00", "given up is not done");
}

#[tokio::test]
async fn what_was_read_before_an_engines_own_first_snapshot_may_leave_memory_too() {
    let (world, other) = World::new().await;
    let ledger = world.engine(Settings { wallets_max: 100, ..Settings::default() }).await; // there is no snapshot yet
    let (a, b) = (world.wallet(&other, "10.00").await, world.wallet(&other, "10.00").await);
    other.stop(PATIENCE).await;
    let other = world.engine(Settings::default()).await;
    let (c, d) = (world.wallet(&other, "10.00").await, world.wallet(&other, "10.00").await);
    let refused = ledger.execute(world.transfer(None, a, nobodys(), "1.00")).await.unwrap_err();
    assert!(matches!(refused, CommandError::Refused(Refusal::WalletNotFound)), "{refused:?}");
    for _ in 0..600 {
        let refused = ledger.execute(world.transfer(None, nobodys(), nobodys(), "1.00")).await.unwrap_err();
        assert!(matches!(refused, CommandError::Refused(Refusal::WalletNotFound)), "{refused:?}");
    }
    other.execute(world.transfer(None, a, b, "1.00")).await.unwrap();
    ledger.execute(world.transfer(None, c, d, "1.00")).await.unwrap();
    ledger.execute(world.transfer(None, a, b, "9.00")).await.unwrap();
    assert!(ledger.is_running());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn others_go_on_while_an_engine_reads_a_long_tail() {
    let (world, other) = World::new().await;
    let (a, b) = (world.wallet(&other, "100.00").await, world.wallet(&other, "0").await);
    let look_every = Duration::from_secs(3_600); // as if it had been paused
    let idle = world.engine(Settings { look_every, ..Settings::default() }).await;
    open_many(&world, 60_000).await;
    other.execute(world.transfer(None, a, b, "0.01")).await.unwrap(); // this one has read it
    let tail = world.log().await.head().await.unwrap().commit;
    let late = spawn(&idle, world.transfer(Some("late"), a, b, "1.00"));
    let mut meanwhile = 0;
    while !late.is_finished() {
        match other.execute(world.transfer(None, a, b, "0.01")).await {
            Ok(_) => meanwhile += 1,
            Err(error) => panic!("after {meanwhile}: {error:?}"),
        }
    }
    let receipt = late.await.unwrap().unwrap();
    let before = receipt.events()[0].commit - tail - 1;
    assert!(10 <= before, "only {before} commits of the other engine while this one read");
}

#[tokio::test]
async fn an_engine_that_falls_silent_amid_its_snapshot_lets_the_others_write_theirs() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    world.engine(Settings::default()).await.stop(PATIENCE).await; // leaves a snapshot
    let before = snapshot_position(&world).await;
    let mut silent = ledger.log().pool().acquire().await.unwrap();
    sqlx::raw_sql("begin; select from ledger.book_snapshot for update").execute(&mut *silent).await.unwrap();
    let other = world.engine(Settings { snapshot_every: 2, ..Settings::default() }).await;
    eventually("a snapshot", async || {
        other.execute(world.transfer(None, a, b, "0.01")).await.unwrap();
        before < snapshot_position(&world).await
    })
    .await;
}

#[tokio::test]
async fn memory_is_bounded_while_another_engine_appends_too() {
    let (world, other) = World::new().await;
    let (a, b) = (world.wallet(&other, "100.00").await, world.wallet(&other, "0").await);
    let ledger = world.engine(Settings { wallets_max: 50, ..Settings::default() }).await;
    let mut most = 0;
    for _ in 0..40 {
        other.execute(world.transfer(None, a, b, "0.01")).await.unwrap();
        let mut calls = JoinSet::new();
        for _ in 0..20 {
            let (ledger, command) = (ledger.clone(), world.transfer(None, nobodys(), nobodys(), "1.00"));
            calls.spawn(async move { ledger.execute(command).await });
        }
        for told in calls.join_all().await {
            assert!(matches!(told, Err(CommandError::Refused(Refusal::WalletNotFound))), "{told:?}");
        }
        most = most.max(ledger.in_memory());
    }
    assert!(most <= 200, "{most} things in memory, with room for 50 of a kind and 40 in each group");
}

/// A batch command brings an append beyond its bound by its own size only, not by that of many.
#[tokio::test]
async fn large_batches_that_come_together_are_not_one_append() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "1000.00").await, world.wallet(&ledger, "0").await);
    let small = world.engine(Settings { batch_max: 10, wait_expected_max: PATIENCE, ..Settings::default() }).await;
    let mut held = Held::take(&world).await;
    let first = spawn(&small, world.transfer(None, a, b, "0.01"));
    held.append_waits().await;
    let batch = |_| {
        let one = |_| {
            let transfer = instruction(TransactionKind::Transfer, a, Some(b), None, "0.01");
            (TransactionId::from_uuid(Uuid::now_v7()), transfer)
        };
        let action = Action::Batch { atomic: false, transfers: (0..10).map(one).collect() };
        let caller = Caller::Partner { partner: world.partner, user: None };
        spawn(&small, command(None, caller, action))
    };
    let batches: Vec<_> = (0..20).map(batch).collect();
    sleep(Duration::from_millis(100)).await;
    held.let_go().await;
    first.await.unwrap().unwrap();
    let mut largest = 0;
    for call in batches {
        let receipt: Receipt = call.await.unwrap().unwrap();
        assert_eq!(receipt.events().len(), 10);
    }
    for commit in world.log().await.commits_after(0, 1_000_000).await.unwrap() {
        largest = largest.max(commit.events.len());
    }
    assert!(largest <= 20, "{largest} events in one commit of at most 10 decisions and one batch more");
}

#[tokio::test]
async fn large_batches_that_were_read_together_are_not_one_append_either() {
    let (world, first) = World::new().await;
    let (a, b) = (world.wallet(&first, "1000.00").await, world.wallet(&first, "0").await);
    first.stop(PATIENCE).await;
    let small = world.engine(Settings { batch_max: 10, wait_expected_max: PATIENCE, ..Settings::default() }).await;
    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    sqlx::raw_sql("begin; lock table ledger.book_wallets").execute(&mut owner).await.unwrap();
    let batch = |_| {
        let one = |_| {
            let transfer = instruction(TransactionKind::Transfer, a, Some(b), None, "0.01");
            (TransactionId::from_uuid(Uuid::now_v7()), transfer)
        };
        let action = Action::Batch { atomic: false, transfers: (0..10).map(one).collect() };
        let caller = Caller::Partner { partner: world.partner, user: None };
        spawn(&small, command(None, caller, action))
    };
    let batches: Vec<_> = (0..20).map(batch).collect();
    sleep(Duration::from_millis(100)).await; // however many of them wait by now: the claim holds
    sqlx::raw_sql("rollback").execute(&mut owner).await.unwrap();
    for call in batches {
        assert_eq!(call.await.unwrap().unwrap().events().len(), 10);
    }
    let largest = world.log().await.commits_after(0, 1_000_000).await.unwrap();
    let largest = largest.iter().map(|commit| commit.events.len()).max().unwrap();
    assert!(largest <= 30, "{largest} events in one commit of at most 10 decisions, as many read and one batch more");
}

#[tokio::test]
async fn an_engine_on_an_abandoned_history_refuses_nothing_from_it() {
    let (world, abandoned) = World::new().await;
    let (a, b) = (world.wallet(&abandoned, "10.00").await, world.wallet(&abandoned, "0").await);
    let kept = world.log().await.head().await.unwrap().commit;
    abandoned.execute(world.transfer(None, a, b, "9.00")).await.unwrap();
    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    restore(&mut owner, kept).await;
    let told = abandoned.execute(world.transfer(None, a, b, "5.00")).await;
    assert!(matches!(told, Err(CommandError::OutcomeUnknown)), "there is enough in the log: {told:?}");
    assert!(!abandoned.is_running());
}
