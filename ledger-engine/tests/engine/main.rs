//! The engine on a real Postgres: what a caller is told is what the log holds.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

mod adversity;
mod chaos;
mod memory;
mod world;

use std::sync::Arc;
use std::time::{Duration, Instant};

use event_store::EventFilter;
use ledger_core::*;
use ledger_engine::{CommandError, Ledger, Settings};
use sqlx::{Connection, PgConnection};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use world::*;

#[tokio::test]
async fn a_transfer_is_one_event_in_the_log_before_it_is_answered() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    let receipt = ledger.execute(world.transfer(Some("k"), a, b, "0.70")).await.unwrap();
    assert_eq!(event_types(&receipt), ["TransactionPosted"]);
    let (head, last) =
        world.log().await.events_after(receipt.position() - 1, 10, &EventFilter::default()).await.unwrap();
    assert_eq!((head, last), (receipt.position(), receipt.events().to_vec()));
    assert_eq!((world.balance(a).await, world.balance(b).await), ("9.30".to_owned(), "0.70".to_owned()));
}

#[tokio::test]
async fn a_refusal_is_kept_under_its_key_and_moves_nothing() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "0.50").await, world.wallet(&ledger, "0").await);
    let first = ledger.execute(world.transfer(Some("k"), a, b, "0.70")).await.unwrap();
    assert_eq!(event_types(&first), ["TransactionDeclined"]);
    let funded = instruction(TransactionKind::Adjustment, a, None, Some(Direction::Credit), "5.00");
    let adjust = Action::Adjust { transaction: TransactionId::from_uuid(Uuid::now_v7()), instruction: funded };
    ledger.execute(command(None, Caller::Admin, adjust)).await.unwrap();

    let again = ledger.execute(world.transfer(Some("k"), a, b, "0.70")).await.unwrap();
    assert!(again.replayed && !first.replayed);
    assert_eq!(again.events(), first.events(), "a refusal is final for its key");
    assert_eq!(world.balance(a).await, "5.50");
}

#[tokio::test]
async fn without_a_key_a_refusal_leaves_no_trace() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "0.50").await, world.wallet(&ledger, "0").await);
    let before = world.log().await.head().await.unwrap();
    let refused = ledger.execute(world.transfer(None, a, b, "0.70")).await.unwrap_err();
    assert!(matches!(refused, CommandError::Refused(Refusal::InsufficientFunds { .. })), "{refused:?}");
    assert_eq!(world.log().await.head().await.unwrap(), before);
}

#[tokio::test]
async fn a_key_moves_money_once_across_restarts_and_after_memory_has_forgotten_it() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    let first = ledger.execute(world.transfer(Some("k"), a, b, "1.00")).await.unwrap();
    ledger.stop(Duration::from_secs(5)).await;
    assert!(!ledger.is_running());
    let after = ledger.execute(world.transfer(Some("k2"), a, b, "1.00")).await;
    assert!(matches!(after, Err(CommandError::Unavailable)), "{after:?}");

    let ledger = world.engine(Settings { keys_max: 1, ..Settings::default() }).await;
    ledger.execute(world.transfer(Some("other"), a, b, "2.00")).await.unwrap(); // "k" is out of the window now
    let again = ledger.execute(world.transfer(Some("k"), a, b, "1.00")).await.unwrap();
    assert!(again.replayed);
    assert_eq!(again.events(), first.events());
    let other = ledger.execute(world.transfer(Some("k"), a, b, "9.00")).await;
    assert!(matches!(other, Err(CommandError::KeyReused)), "{other:?}");
    assert_eq!(world.balance(b).await, "3.00");
}

#[tokio::test]
async fn fifty_equal_calls_at_once_move_money_once() {
    let (world, ledger) = World::new().await;
    let other = world.engine(Settings::default()).await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    let calls = (0..50).map(|call| {
        let ledger = if call % 2 == 0 { ledger.clone() } else { other.clone() };
        let command = world.transfer(Some("k"), a, b, "1.00");
        tokio::spawn(async move { ledger.execute(command).await })
    });
    let mut ids = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        ids.push(call.await.unwrap().unwrap().events()[0].aggregate_id.clone());
    }
    ids.dedup();
    assert_eq!(ids.len(), 1, "all fifty are told of the same transaction, by either engine");
    assert_eq!(world.balance(b).await, "1.00");
}

/// So many callers come `times` times, the first at once again, each other one a pause later; how many commits that made, and
/// how long it took.
async fn call(world: &World, ledger: &Ledger, callers: i64, times: i64, pause: Duration) -> (i64, Duration) {
    let (a, b) = (world.wallet(ledger, "1000.00").await, world.wallet(ledger, "0").await);
    let before = world.log().await.head().await.unwrap();
    let begun = Instant::now();
    let mut calls = JoinSet::new();
    for place in 0..u32::try_from(callers).unwrap() {
        let commands: Vec<_> = (0..times).map(|_| world.transfer(None, a, b, "1.00")).collect();
        let ledger = ledger.clone();
        calls.spawn(async move {
            for command in commands {
                ledger.execute(command).await.unwrap();
                sleep(pause * place).await;
            }
        });
    }
    calls.join_all().await;
    let took = begun.elapsed();
    let head = world.log().await.head().await.unwrap();
    assert_eq!(head.position - before.position, callers * times);
    (head.commit - before.commit, took)
}

#[tokio::test]
async fn many_callers_who_come_again_share_commits_and_few_do_not_wait_for_each_other() {
    let (world, first) = World::new().await;
    first.stop(PATIENCE).await;
    let gather_within = Duration::from_secs(3);
    let ledger = world.engine(Settings { gather_min: 8, gather_within, ..Settings::default() }).await;
    let (commits, took) = call(&world, &ledger, 8, 20, Duration::from_millis(4)).await;
    assert!(commits <= 25, "eight callers came twenty times in {commits} commits");
    // Whoever is the last to come again waits in vain, once for each that has left.
    assert!(took < 8 * gather_within, "{took:?}");
    let (commits, _) = call(&world, &ledger, 2, 20, Duration::from_millis(4)).await;
    assert!(25 < commits, "of two callers one waited for the other's pause: {commits} commits");
    ledger.stop(PATIENCE).await;
}

#[tokio::test]
async fn a_small_commit_goes_when_its_time_is_over_or_the_engine_is_stopped() {
    let (world, first) = World::new().await;
    first.stop(PATIENCE).await;
    let patient = |gather_within| Settings { gather_min: 8, gather_within, ..Settings::default() };
    for (gather_within, stop) in [(Duration::from_millis(300), false), (Duration::from_secs(3_600), true)] {
        let ledger = world.engine(patient(gather_within)).await;
        let (a, b) = (world.wallet(&ledger, "20.00").await, world.wallet(&ledger, "0").await);
        let spawn_all =
            |count| (0..count).map(|_| spawn(&ledger, world.transfer(None, a, b, "1.00"))).collect::<Vec<_>>();
        for call in spawn_all(8) {
            timeout(PATIENCE, call).await.expect("nobody is waited for").unwrap().unwrap();
        }
        let three = spawn_all(3); // which wait for five more
        if stop {
            sleep(Duration::from_millis(100)).await; // whether they wait by then or not: they are executed
            assert!(three.iter().all(|call| !call.is_finished()), "they wait");
            ledger.stop(PATIENCE).await;
        }
        for call in three {
            let receipt = timeout(PATIENCE, call).await.expect("in time").unwrap().unwrap();
            assert_eq!(event_types(&receipt), ["TransactionPosted"]);
        }
        assert_eq!(world.balance(b).await, "11.00");
        if !stop {
            ledger.stop(PATIENCE).await;
        }
    }
}

#[tokio::test]
async fn an_answer_is_rebuilt_from_the_whole_stream() {
    let (world, ledger) = World::new().await;
    let wallet = world.wallet(&ledger, "0").await;
    let (transaction, request) = world.top_up(wallet, "12.00");
    ledger.execute(request).await.unwrap();
    let settle = |key| {
        let money = Money::parse("12.00", eur()).unwrap();
        let action = Action::Settle { transaction, money, provider_reference: "bank-1".to_owned() };
        command(Some((key, "settle")), Caller::Workflow, action)
    };
    let settled = ledger.execute(settle("s1")).await.unwrap();
    let types: Vec<_> = settled.stream().map(|event| event.event_type.as_ref()).collect();
    assert_eq!(types, ["TransactionRequested", "TransactionSettled"]);
    let replay = ledger.execute(settle("s1")).await.unwrap();
    assert!(replay.replayed);
    assert!(replay.stream().eq(settled.stream()));
    assert_eq!(replay.happened().unwrap(), settled.happened().unwrap(), "what was decided is what was written");

    let late = ledger.execute(settle("s2")).await.unwrap();
    let Event::Command(_, CommandEvent::Declined { failure, .. }) = late.events()[0].read().unwrap() else {
        panic!("{late:?}")
    };
    assert_eq!(failure.code, "invalid-transition", "a transaction that is no longer in memory is looked up");
    assert_eq!(world.balance(wallet).await, "12.00");
    let unknown = Action::Expire { transaction: TransactionId::from_uuid(Uuid::now_v7()) };
    let unknown = ledger.execute(command(None, Caller::Workflow, unknown)).await;
    assert!(matches!(unknown, Err(CommandError::Refused(Refusal::TransactionNotFound))), "{unknown:?}");
}

#[tokio::test]
async fn a_wallet_that_money_is_on_its_way_to_cannot_be_closed() {
    let (world, ledger) = World::new().await;
    let wallet = world.wallet(&ledger, "0").await;
    let (transaction, request) = world.top_up(wallet, "12.00");
    ledger.execute(request).await.unwrap();
    let close = || {
        let caller = Caller::Partner { partner: world.partner, user: None };
        command(None, caller, Action::CloseWallet { wallet, reason: "gone".to_owned() })
    };
    let refused = ledger.execute(close()).await;
    assert!(matches!(refused, Err(CommandError::Refused(Refusal::MoneyExpected))), "{refused:?}");
    ledger.execute(command(None, Caller::Workflow, Action::Expire { transaction })).await.unwrap();
    ledger.execute(close()).await.unwrap();
}

#[tokio::test]
async fn two_engines_on_one_log_decide_against_each_others_commits() {
    let (world, ledger) = World::new().await;
    let other = world.engine(Settings::default()).await;
    let (a, b) = (world.wallet(&ledger, "5.00").await, world.wallet(&ledger, "0").await);
    let spend = |ledger: Ledger, engine: usize| {
        let commands: Vec<_> =
            (0..40).map(|call| world.transfer(Some(&format!("{engine}-{call}")), a, b, "0.10")).collect();
        tokio::spawn(async move {
            let mut posted = 0;
            for command in commands {
                let receipt = ledger.execute(command).await.unwrap();
                posted += usize::from(receipt.events()[0].event_type == "TransactionPosted");
            }
            posted
        })
    };
    let (one, two) = (spend(ledger.clone(), 1), spend(other.clone(), 2));
    let (one, two) = (one.await.unwrap(), two.await.unwrap());
    assert_eq!(one + two, 50, "exactly what the wallet held was spent: {one} and {two}");
    assert_eq!((world.balance(a).await, world.balance(b).await), ("0.00".to_owned(), "5.00".to_owned()));

    // What one engine refuses without writing is refused upon the other's commits too.
    let back = other.execute(world.transfer(Some("back"), b, a, "1.00")).await.unwrap();
    assert_eq!(event_types(&back), ["TransactionPosted"]);
    ledger.execute(world.transfer(None, a, b, "1.00")).await.unwrap();
}

#[tokio::test]
async fn what_one_engine_requested_another_settles_at_its_place_in_the_stream() {
    let (world, ledger) = World::new().await;
    let wallet = world.wallet(&ledger, "0").await;
    let other = world.engine(Settings::default()).await;
    let (transaction, request) = world.top_up(wallet, "12.00");
    ledger.execute(request).await.unwrap(); // the other engine has not read this yet
    let money = Money::parse("12.00", eur()).unwrap();
    let settle = Action::Settle { transaction, money, provider_reference: "bank-1".to_owned() };
    let settled = other.execute(command(Some(("s", "settle")), Caller::Workflow, settle)).await.unwrap();
    let stream: Vec<_> = settled.stream().map(|event| (event.sequence, event.event_type.as_ref())).collect();
    assert_eq!(stream, [(1, "TransactionRequested"), (2, "TransactionSettled")]);
    assert_eq!(world.balance(wallet).await, "12.00");
}

#[tokio::test]
async fn old_keys_of_one_batch_are_all_found_however_few_are_remembered() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    let old = ["k1", "k2", "k3"].map(|key| world.transfer(Some(key), a, b, "1.00"));
    for command in &old {
        ledger.execute(command.clone()).await.unwrap();
    }
    let ledger = world.engine(Settings { keys_max: 1, ..Settings::default() }).await;
    let mut held = Held::take(&world).await;
    let first = spawn(&ledger, world.transfer(Some("first"), a, b, "1.00"));
    held.append_waits().await;
    // These gather, and are the very commands that were done, ids included, as a caller in this process may repeat them.
    let again: Vec<_> = old.iter().map(|command| spawn(&ledger, command.clone())).collect();
    tokio::task::yield_now().await;
    held.let_go().await;
    first.await.unwrap().unwrap();
    for call in again {
        let receipt = timeout(PATIENCE, call).await.expect("an answer").unwrap().unwrap();
        assert!(receipt.replayed);
    }
    assert_eq!(world.balance(b).await, "4.00");
}

#[tokio::test]
async fn an_append_that_was_sent_is_not_called_undone_because_a_later_attempt_was_refused() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    let mut held = Held::take(&world).await;
    let call = spawn(&ledger, world.transfer(Some("k"), a, b, "1.00"));
    let sent_to = held.append_waits().await;

    // As after a failover, new connections meet a server that does not write. What the first attempt did is open.
    let name = world.database.name();
    let read_only = format!("alter database {name} set default_transaction_read_only = on");
    sqlx::query(&read_only).execute(&mut owner).await.unwrap();
    sqlx::query("select pg_terminate_backend($1)").bind(sent_to).execute(&mut owner).await.unwrap();
    held.let_go().await;
    let before = rolled_back(&mut owner).await;
    eventually("a second and a third attempt, refused", async || {
        before + 3 <= rolled_back(&mut owner).await || call.is_finished()
    })
    .await;
    assert!(!call.is_finished(), "it was answered before it was known: {:?}", call.await);

    let writes = format!("alter database {name} reset default_transaction_read_only");
    sqlx::query(&writes).execute(&mut owner).await.unwrap();
    assert_eq!(event_types(&call.await.unwrap().unwrap()), ["TransactionPosted"]);
    assert_eq!(world.balance(b).await, "1.00");
}

#[tokio::test]
async fn an_engine_stops_when_the_log_went_on_without_what_it_acknowledged() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    ledger.execute(world.transfer(Some("k"), a, b, "1.00")).await.unwrap();
    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    let head = world.log().await.head().await.unwrap().commit;
    restore(&mut owner, head - 1).await;
    let restored = world.engine(Settings::default()).await;
    for key in ["r1", "r2"] {
        restored.execute(world.transfer(Some(key), a, b, "2.00")).await.unwrap();
    }
    let answer = ledger.execute(world.transfer(Some("k2"), a, b, "1.00")).await;
    assert!(matches!(answer, Err(CommandError::OutcomeUnknown)), "{answer:?}");
    assert!(!ledger.is_running(), "an engine that can never append again says that it is ready");
    assert_eq!(world.balance(b).await, "4.00");
}

#[tokio::test]
async fn cut_connections_lose_nothing_and_double_nothing() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "100.00").await, world.wallet(&ledger, "0").await);
    let url = world.database.url().to_owned();
    let cutter = tokio::spawn(async move {
        let mut owner = PgConnection::connect(&url).await.unwrap();
        let mut cut = 0;
        for _ in 0..40 {
            let query = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                         where datname = current_database() and application_name = 'daybook_ledger'";
            let count: i64 = sqlx::query_scalar(query).fetch_one(&mut owner).await.unwrap();
            cut += count;
            tokio::time::sleep(Duration::from_millis(15)).await; // the load goes on meanwhile
        }
        cut
    });
    let mut done = 0;
    while !cutter.is_finished() || done < 100 {
        let calls: Vec<_> = (0..8)
            .map(|call| {
                let (ledger, command) = (ledger.clone(), world.transfer(Some(&format!("{done}-{call}")), a, b, "0.01"));
                tokio::spawn(async move {
                    // An unknown outcome is settled by repeating the call under its key.
                    for _ in 0..20 {
                        match ledger.execute(command.clone()).await {
                            Ok(receipt) => return receipt,
                            Err(
                                CommandError::OutcomeUnknown | CommandError::Unavailable | CommandError::KeyInFlight,
                            ) => {}
                            Err(error) => panic!("{error:?}"),
                        }
                    }
                    panic!("not settled in 20 calls")
                })
            })
            .collect();
        for call in calls {
            assert_eq!(event_types(&call.await.unwrap()), ["TransactionPosted"]);
            done += 1;
        }
    }
    assert!(0 < cutter.await.unwrap(), "no connection was cut");
    assert_eq!(world.balance(b).await, format!("{}.{:02}", done / 100, done % 100));
}

#[tokio::test]
async fn what_was_appended_last_stays_in_memory_for_those_who_follow() {
    let (world, other) = World::new().await;
    assert!(other.recent().is_none(), "nobody asked for it");
    let ledger = world.engine(Settings { keep_recent: true, ..Settings::default() }).await;
    let recent = ledger.recent().unwrap();
    let follows = async |commit: i64| {
        let in_log = world.log().await.commits_after(commit, 1_000).await.unwrap();
        let here = recent.after(commit, 1_000, usize::MAX);
        assert!(!here.is_empty() && here.iter().map(|commit| &**commit).eq(&in_log), "{here:?}");
    };
    let before = world.log().await.head().await.unwrap().commit;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    ledger.execute(world.transfer(None, a, b, "1.00")).await.unwrap();
    follows(before).await;

    // Of what another engine appends in between nothing is told, and so nothing before it is left.
    let receipt = other.execute(world.transfer(None, a, b, "1.00")).await.unwrap();
    let between = receipt.events()[0].commit;
    ledger.execute(world.transfer(None, a, b, "1.00")).await.unwrap();
    follows(between).await;
    assert!(recent.after(before, 1_000, usize::MAX).is_empty());

    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    let head = world.log().await.head().await.unwrap().commit;
    restore(&mut owner, head - 1).await;
    ledger.execute(world.transfer(None, a, b, "1.00")).await.unwrap_err();
    assert!(recent.after(between, 1_000, usize::MAX).is_empty(), "it is not what the log holds");
}

#[tokio::test]
async fn an_engine_whose_head_is_gone_stops() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    ledger.execute(world.transfer(Some("k"), a, b, "1.00")).await.unwrap();
    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    let head = world.log().await.head().await.unwrap().commit;
    restore(&mut owner, head - 1).await;
    let answer = ledger.execute(world.transfer(Some("k2"), a, b, "1.00")).await;
    assert!(matches!(answer, Err(CommandError::OutcomeUnknown)), "{answer:?}");
    assert!(!ledger.is_running());
    assert_eq!(world.balance(b).await, "0.00");
}

#[tokio::test]
async fn beyond_its_bounds_the_ledger_refuses_before_any_work() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    let small = world.engine(Settings { queue_max: 1, batch_max: 1, ..Settings::default() }).await;
    let calls: Vec<_> = (0..200)
        .map(|call| {
            let (small, command) = (small.clone(), world.transfer(Some(&format!("{call}")), a, b, "0.01"));
            tokio::spawn(async move { small.execute(command).await })
        })
        .collect();
    let (mut posted, mut overloaded) = (0, 0);
    for call in calls {
        match call.await.unwrap() {
            Ok(_) => posted += 1,
            Err(CommandError::Overloaded) => overloaded += 1,
            Err(error) => panic!("{error:?}"),
        }
    }
    assert!(0 < overloaded && 0 < posted, "{posted} posted, {overloaded} refused");
    assert_eq!(
        world.balance(b).await,
        format!("{}.{:02}", posted / 100, posted % 100),
        "what was refused was not done"
    );
}

#[tokio::test]
async fn waiting_commands_are_bounded_in_memory_and_the_room_comes_back() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    let described = |key: &str| {
        let mut command = world.transfer(Some(key), a, b, "1.00");
        let Action::Transfer { instruction, .. } = &mut command.action else { unreachable!("it is a transfer") };
        Arc::make_mut(instruction).description = Some("x".repeat(10_000));
        command
    };
    let small = world.engine(Settings { bytes_max: 25_000, ..Settings::default() }).await;
    let mut held = Held::take(&world).await;
    let first = spawn(&small, described("k1"));
    held.append_waits().await;
    let mut second = std::pin::pin!(small.execute(described("k2")));
    let third = tokio::select! {
        biased;
        second = &mut second => panic!("the log is held: {second:?}"),
        third = small.execute(described("k3")) => third,
    };
    assert!(matches!(third, Err(CommandError::Overloaded)), "{third:?}");
    held.let_go().await;
    first.await.unwrap().unwrap();
    second.await.unwrap();
    small.execute(described("k3")).await.unwrap();
    assert_eq!(world.balance(b).await, "3.00");
}

#[tokio::test]
async fn who_waits_too_long_to_be_taken_up_is_told_so_and_is_not_executed() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    let engine = world.engine(Settings { wait_max: Duration::from_millis(100), ..Settings::default() }).await;
    let mut held = Held::take(&world).await;
    let first = spawn(&engine, world.transfer(Some("k1"), a, b, "1.00"));
    held.append_waits().await;
    let second = engine.execute(world.transfer(Some("k2"), a, b, "2.00")).await;
    assert!(matches!(second, Err(CommandError::Overloaded)), "{second:?}");
    held.let_go().await;
    first.await.unwrap().unwrap();
    engine.execute(world.transfer(Some("k3"), a, b, "4.00")).await.unwrap(); // behind the second in the queue
    assert_eq!(world.balance(b).await, "5.00");
}

#[tokio::test]
async fn what_the_database_does_not_take_for_long_is_answered_as_not_executed() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    let name = world.database.name();
    let read_only = format!("alter database {name} set default_transaction_read_only = on");
    sqlx::query(&read_only).execute(&mut owner).await.unwrap();
    let engine = world.engine(Settings::default()).await;
    let refused = engine.execute(world.transfer(Some("k"), a, b, "1.00")).await;
    assert!(matches!(refused, Err(CommandError::Unavailable)), "{refused:?}");
    assert_eq!(world.balance(b).await, "0.00");

    let writes = format!("alter database {name} reset default_transaction_read_only");
    sqlx::query(&writes).execute(&mut owner).await.unwrap();
    let receipt = engine.execute(world.transfer(Some("k"), a, b, "1.00")).await.unwrap();
    assert!(!receipt.replayed);
    assert_eq!(world.balance(b).await, "1.00");
}
