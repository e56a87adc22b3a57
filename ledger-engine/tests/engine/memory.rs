//! The engine's memory is a part of the ledger: bounded, begun with a snapshot, and right all the same.

use std::collections::HashMap;

use event_store::{Commit, Draft, Writer};
use tokio::task::JoinSet;

use super::*;

/// Room for a few things only, and a snapshot after every few events.
fn small() -> Settings {
    Settings { wallets_max: 4, snapshot_every: 16, keys_max: 4, ..Settings::default() }
}

/// SplitMix64: what it gives is a function of the seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % end as u64).unwrap()
    }
}

pub(crate) async fn snapshot_position(world: &World) -> i64 {
    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    let query = "select coalesce(max(position), 0) from ledger.book_snapshot";
    sqlx::query_scalar(query).fetch_one(&mut owner).await.unwrap()
}

async fn head_position(world: &World) -> i64 {
    world.log().await.head().await.unwrap().position
}

#[tokio::test]
async fn what_left_memory_is_read_again_as_it_was() {
    let (world, first) = World::new().await;
    first.stop(PATIENCE).await;
    let ledger = world.engine(small()).await;
    let mut wallets = Vec::new();
    for _ in 0..40 {
        wallets.push(world.wallet(&ledger, "10.00").await);
    }
    let (top_up, request) = world.top_up(wallets[7], "1.00");
    ledger.execute(request).await.unwrap();
    for round in 0..3 {
        for pair in wallets.chunks(2) {
            let receipt = ledger.execute(world.transfer(None, pair[0], pair[1], "1.00")).await.unwrap();
            assert_eq!(event_types(&receipt), ["TransactionPosted"], "round {round}");
        }
    }
    // A top-up's own stream, and the wallet that expects it, have long left memory.
    let close = |wallet| command(None, Caller::Admin, Action::CloseWallet { wallet, reason: "r".to_owned() });
    let refused = ledger.execute(close(wallets[7])).await.unwrap_err();
    assert!(matches!(refused, CommandError::Refused(Refusal::WalletNotEmpty { .. })), "{refused:?}");
    let settle = Action::Settle {
        transaction: top_up,
        money: Money::parse("1.00", eur()).unwrap(),
        provider_reference: "bank-1".to_owned(),
    };
    ledger.execute(command(None, Caller::Workflow, settle.clone())).await.unwrap();
    let again = ledger.execute(command(None, Caller::Workflow, settle)).await.unwrap_err();
    assert!(matches!(again, CommandError::Refused(Refusal::TransactionEnded { .. })), "{again:?}");
    let nowhere = WalletId::from_uuid(Uuid::now_v7());
    let refused = ledger.execute(world.transfer(None, wallets[0], nowhere, "1.00")).await.unwrap_err();
    assert!(matches!(refused, CommandError::Refused(Refusal::WalletNotFound)), "{refused:?}");
    ledger.stop(PATIENCE).await;
    for (place, wallet) in wallets.iter().enumerate() {
        let expected = if place == 7 { "14.00" } else { ["7.00", "13.00"][place % 2] };
        assert_eq!(world.balance(*wallet).await, expected);
    }
}

#[tokio::test]
async fn a_start_is_the_snapshot_and_the_tail_whether_the_engine_was_stopped_or_lost() {
    let (world, first) = World::new().await;
    let (a, b) = (world.wallet(&first, "10.00").await, world.wallet(&first, "0").await);
    let (top_up, request) = world.top_up(a, "1.00");
    first.execute(request).await.unwrap();
    first.stop(PATIENCE).await;
    assert_eq!(snapshot_position(&world).await, head_position(&world).await, "a clean stop leaves no tail");

    let never = Settings { snapshot_every: 1_000_000, ..Settings::default() };
    let lost = world.engine(never).await;
    lost.execute(world.transfer(Some("k"), a, b, "3.00")).await.unwrap();
    let before = snapshot_position(&world).await;
    drop(lost); // it has no time for a snapshot: another one starts at once
    let ledger = world.engine(never).await;
    assert!(before < head_position(&world).await);
    let replayed = ledger.execute(world.transfer(Some("k"), a, b, "3.00")).await.unwrap();
    assert!(replayed.replayed);
    let refused = ledger.execute(world.transfer(None, a, b, "7.01")).await.unwrap_err();
    assert!(matches!(refused, CommandError::Refused(Refusal::InsufficientFunds { .. })), "{refused:?}");
    ledger.execute(world.transfer(None, a, b, "7.00")).await.unwrap();
    let close = command(None, Caller::Admin, Action::CloseWallet { wallet: a, reason: "r".to_owned() });
    let refused = ledger.execute(close.clone()).await.unwrap_err();
    assert!(matches!(refused, CommandError::Refused(Refusal::MoneyExpected)), "from before the snapshot: {refused:?}");
    ledger.execute(command(None, Caller::Workflow, Action::Expire { transaction: top_up })).await.unwrap();
    ledger.execute(Command { id: CommandId::from_uuid(Uuid::now_v7()), ..close }).await.unwrap();
}

#[tokio::test]
async fn a_snapshot_of_another_log_is_refused_and_without_one_the_log_is_folded_anew() {
    let (world, ledger) = World::new().await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    ledger.stop(PATIENCE).await;
    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    sqlx::raw_sql(
        "set session_replication_role = replica; -- foreign keys rest
         update ledger.book_snapshot set chain = sha256('another');
         set session_replication_role = origin",
    )
    .execute(&mut owner)
    .await
    .unwrap();
    let refused = Ledger::start(world.database.url(), Settings::default()).await.unwrap_err();
    assert!(refused.to_string().contains("ledger.book_snapshot"), "it says what to do: {refused}");
    sqlx::raw_sql("truncate ledger.book_snapshot, ledger.book_wallets, ledger.book_partners")
        .execute(&mut owner)
        .await
        .unwrap();
    let ledger = world.engine(Settings::default()).await;
    ledger.execute(world.transfer(None, a, b, "10.00")).await.unwrap();
    assert_eq!(world.balance(b).await, "10.00");
}

/// Both write snapshots, at positions where the other one is behind or ahead, and read what the other one wrote.
#[tokio::test]
async fn two_engines_share_a_snapshot_and_none_decides_on_what_the_other_changed_since() {
    let (world, first) = World::new().await;
    first.stop(PATIENCE).await;
    let engines = [world.engine(small()).await, world.engine(small()).await];
    let mut wallets = Vec::new();
    for number in 0..12 {
        wallets.push(world.wallet(&engines[number % 2], "5.00").await);
    }
    let seed = Uuid::now_v7().as_u128() as u64;
    println!("seed {seed}");
    let mut random = Random(seed);
    let mut money: HashMap<WalletId, i64> = wallets.iter().map(|wallet| (*wallet, 500)).collect();
    let (mut done, mut refused) = (0, 0);
    for _ in 0..400 {
        let (from, to) = (wallets[random.below(12)], wallets[random.below(12)]);
        let cents = 1 + i64::try_from(random.below(400)).unwrap();
        let engine = &engines[random.below(2)];
        if from == to {
            continue;
        }
        let amount = format!("{}.{:02}", cents / 100, cents % 100);
        match engine.execute(world.transfer(None, from, to, &amount)).await {
            Ok(_) => {
                *money.get_mut(&from).unwrap() -= cents;
                *money.get_mut(&to).unwrap() += cents;
                done += 1;
            }
            Err(CommandError::Refused(Refusal::InsufficientFunds { .. })) => {
                assert!(money[&from] < cents, "refused although there was enough");
                refused += 1;
            }
            Err(error) => panic!("{error:?}"),
        }
        assert!(0 <= money[&from], "spent what was not there");
    }
    assert!(0 < done && 0 < refused);
    assert!(0 < snapshot_position(&world).await);
    for (wallet, cents) in money {
        assert_eq!(world.balance(wallet).await, format!("{}.{:02}", cents / 100, cents % 100));
    }
}

/// While a snapshot cannot be written, nothing waits for it, and nothing of what it should hold is forgotten.
#[tokio::test]
async fn an_engine_that_nobody_asks_follows_what_another_appends() {
    let (world, busy) = World::new().await;
    let idle = world.engine(Settings::default()).await;
    let before = idle.in_memory();
    for _ in 0..20 {
        world.wallet(&busy, "0").await;
    }
    eventually("the idle engine has them too", async || before + 20 <= idle.in_memory()).await;
}

#[tokio::test]
async fn a_snapshot_that_cannot_be_written_holds_nobody_up() {
    let (world, first) = World::new().await;
    first.stop(PATIENCE).await;
    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    sqlx::raw_sql("revoke insert on ledger.book_wallets from daybook_ledger").execute(&mut owner).await.unwrap();
    let before = snapshot_position(&world).await;
    let ledger = world.engine(Settings { wallets_max: 1_000, ..small() }).await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    for _ in 0..50 {
        ledger.execute(world.transfer(None, a, b, "0.01")).await.unwrap();
    }
    assert_eq!(snapshot_position(&world).await, before);
    sqlx::raw_sql("grant insert on ledger.book_wallets to daybook_ledger").execute(&mut owner).await.unwrap();
    eventually("a snapshot", async || {
        ledger.execute(world.transfer(None, a, b, "0.01")).await.unwrap();
        before < snapshot_position(&world).await
    })
    .await;
}

#[tokio::test]
async fn while_no_snapshot_can_be_written_no_more_wallets_are_opened_than_memory_has_room_for() {
    let (world, first) = World::new().await;
    drop(first);
    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    let wait_max = Duration::from_millis(300);
    let settings = Settings { wallets_max: 40, wait_max, ..small() };
    let ledger = world.engine(settings).await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    sqlx::raw_sql("revoke insert on ledger.book_wallets from daybook_ledger").execute(&mut owner).await.unwrap();
    let mut refused = 0;
    for _ in 0..100 {
        match ledger.execute(world.opening()).await {
            Ok(_) => assert_eq!(refused, 0, "there is no more room"),
            Err(CommandError::Overloaded) => refused += 1,
            Err(other) => panic!("{other}"),
        }
        if refused == 3 {
            break;
        }
    }
    assert_eq!(refused, 3);
    assert!(ledger.in_memory() <= 3 * 40, "{} things in memory", ledger.in_memory());
    ledger.execute(world.transfer(None, a, b, "0.01")).await.expect("who adds nothing goes on");
    sqlx::raw_sql("grant insert on ledger.book_wallets to daybook_ledger").execute(&mut owner).await.unwrap();
    eventually("a snapshot and room", async || ledger.execute(world.opening()).await.is_ok()).await;
}

/// The figures of the promise: 300,000 wallets, room for 20,000.
#[tokio::test]
async fn three_hundred_thousand_wallets_are_served_with_room_for_twenty_thousand() {
    const WALLETS: usize = 300_000;
    const ROOM: usize = 20_000;
    let (world, first) = World::new().await;
    let bank = world.wallet(&first, "9000000.00").await;
    let wallets = open_many(&world, WALLETS).await;
    drop(first); // what it knows of the log is old now

    let ledger = world.engine(Settings { wallets_max: ROOM, ..Settings::default() }).await;
    let at_start = ledger.in_memory();
    assert!(at_start <= 2 * ROOM, "{at_start} things in memory after reading the log");
    let seed = Uuid::now_v7().as_u128() as u64;
    println!("seed {seed}");
    let mut random = Random(seed);
    let touched: Vec<WalletId> = (0..30_000).map(|_| wallets[random.below(WALLETS)]).collect();
    let mut most = 0;
    for group in touched.chunks(1_000) {
        let mut calls = JoinSet::new();
        for wallet in group {
            let (ledger, command) = (ledger.clone(), world.transfer(None, bank, *wallet, "1.00"));
            calls.spawn(async move { ledger.execute(command).await.map(|receipt| receipt.position()) });
        }
        for call in calls.join_all().await {
            call.unwrap();
        }
        most = most.max(ledger.in_memory());
    }
    println!("{most} things in memory at most");
    assert!(most <= 2 * ROOM, "{most} things in memory");
    // Any of them can be spent from, and only what it was given.
    let times = |wallet: &WalletId| touched.iter().filter(|touched| *touched == wallet).count();
    for wallet in [touched[0], touched[15_000], touched[29_999]] {
        let cents = 100 * times(&wallet);
        let more = format!("{}.{:02}", (cents + 1) / 100, (cents + 1) % 100);
        let refused = ledger.execute(world.transfer(None, wallet, bank, &more)).await.unwrap_err();
        assert!(matches!(refused, CommandError::Refused(Refusal::InsufficientFunds { .. })), "{refused:?}");
        ledger.execute(world.transfer(None, wallet, bank, &format!("{}.00", cents / 100))).await.unwrap();
    }
}

/// Opens wallets by appending what an engine would have appended, in large commits.
pub(crate) async fn open_many(world: &World, count: usize) -> Vec<WalletId> {
    let mut writer = Writer::new(world.database.url()).unwrap();
    let mut head = world.log().await.head().await.unwrap();
    let wallets: Vec<_> = (0..count).map(|_| WalletId::from_uuid(Uuid::now_v7())).collect();
    for group in wallets.chunks(5_000) {
        let draft = |wallet: &WalletId| {
            let opened = WalletEvent::Opened {
                kind: WalletKind::Customer,
                partner_id: Some(world.partner),
                user_id: Some("user-1".into()),
                currency: eur(),
                metadata: Metadata::new(),
                wallet_version: 1,
                balance_after: Balance::zero(eur()),
            };
            let event = NewEvent { sequence: 1, event: Event::Wallet(*wallet, opened) };
            Draft::new(CommandId::from_uuid(Uuid::now_v7()), None, "{}", event)
        };
        let drafts: Vec<_> = group.iter().map(draft).collect();
        let commit = Commit::seal(&head, head.recorded_at, &drafts);
        writer.append(&commit).await.unwrap();
        head = commit.head();
    }
    wallets
}

/// Only who needs what is not in memory waits for it to be read.
#[tokio::test]
async fn a_wallet_that_must_be_read_first_holds_up_only_those_who_asked_for_it() {
    let (world, first) = World::new().await;
    let (a, b) = (world.wallet(&first, "10.00").await, world.wallet(&first, "0").await);
    let cold = world.wallet(&first, "10.00").await;
    first.stop(PATIENCE).await;
    let ledger = world.engine(Settings::default()).await;
    ledger.execute(world.transfer(None, a, b, "1.00")).await.unwrap(); // now these two are in memory
    let mut owner = PgConnection::connect(world.database.url()).await.unwrap();
    sqlx::raw_sql("begin; lock table ledger.book_wallets").execute(&mut owner).await.unwrap();
    let waits = spawn(&ledger, world.transfer(None, cold, b, "1.00"));
    let reading =
        "select exists (select from pg_locks where not granted and relation = 'ledger.book_wallets'::regclass)";
    eventually("the reading", async || sqlx::query_scalar(reading).fetch_one(&mut owner).await.unwrap()).await;
    for _ in 0..20 {
        ledger.execute(world.transfer(None, a, b, "0.10")).await.unwrap();
    }
    assert!(!waits.is_finished());
    sqlx::raw_sql("rollback").execute(&mut owner).await.unwrap();
    waits.await.unwrap().unwrap();
    assert_eq!(world.balance(b).await, "4.00");
}

/// The next batch is decided while one is being appended; when that one is lost, both are decided again.
#[tokio::test]
async fn what_was_decided_upon_a_lost_append_is_decided_again() {
    let (world, ledger) = World::new().await;
    let other = world.engine(Settings::default()).await;
    let (a, b) = (world.wallet(&ledger, "10.00").await, world.wallet(&ledger, "0").await);
    other.execute(world.transfer(None, a, b, "1.00")).await.unwrap();
    ledger.execute(world.transfer(None, a, b, "1.00")).await.unwrap();

    let mut held = Held::take(&world).await;
    let foreign = spawn(&other, world.transfer(None, a, b, "8.00"));
    held.append_waits().await;
    let upon_old = spawn(&ledger, world.transfer(Some("k1"), a, b, "8.00"));
    let upon_that = spawn(&ledger, world.transfer(Some("k2"), b, a, "9.50"));
    sleep(Duration::from_millis(50)).await; // whichever of them is decided by now: the claim holds either way
    held.let_go().await;
    foreign.await.unwrap().unwrap();
    let told = upon_old.await.unwrap().unwrap();
    assert_eq!(event_types(&told), ["TransactionDeclined"], "the money was spent by the other engine's callers");
    let told = upon_that.await.unwrap().unwrap();
    assert_eq!(event_types(&told), ["TransactionPosted"]);
    assert_eq!([world.balance(a).await, world.balance(b).await], ["9.50", "0.50"]);
}
