//! The log on a real Postgres: what can be appended, what cannot, and who reads it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use cqrs_es::Aggregate;
use cqrs_es::persist::PersistedEventRepository;
use event_store::{AppendError, Commit, Draft, EventFilter, Head, Log, RecordedEvent, Writer, connect, hash};
use ledger_core::*;
use local_stack::testing::TestDatabase;
use postgres_es::PostgresEventRepository;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

async fn database() -> TestDatabase {
    local_stack::testing::database(|url| async move { migrations::run(&url).await }).await
}

async fn log(database: &TestDatabase) -> Log {
    Log::new(connect(database.url(), "daybook_reader", 2).await.unwrap())
}

fn draft(key: Option<u8>) -> Draft {
    let currency = "EUR".parse().unwrap();
    let opened = WalletEvent::Opened {
        kind: WalletKind::Customer,
        partner_id: Some(PartnerId::from_uuid(Uuid::now_v7())),
        user_id: Some("user-1".into()),
        currency,
        metadata: serde_json::from_str(r#"{"zeta": 1, "alpha": "é\u0001"}"#).unwrap(),
        wallet_version: 1,
        balance_after: Balance::zero(currency),
    };
    let event = NewEvent { sequence: 1, event: Event::Wallet(WalletId::from_uuid(Uuid::now_v7()), opened) };
    let key = key.map(|key| Key { hash: [key; 16], request: [key; 32] });
    Draft::new(CommandId::from_uuid(Uuid::now_v7()), key, r#"{"requestId": "req_1",  "clientId":"cli_1"}"#, event)
}

fn seal(head: &Head, drafts: &[Draft]) -> Commit {
    Commit::seal(head, Timestamp::from_micros(1_800_000_000_000_000).unwrap(), drafts)
}

#[tokio::test]
async fn what_is_appended_reads_back_byte_for_byte_and_its_hashes_hold() {
    let database = database().await;
    let (mut writer, log) = (Writer::new(database.url()).unwrap(), log(&database).await);
    let genesis = log.head().await.unwrap();
    assert_eq!(genesis.chain, hash::genesis(log.ledger_id().await.unwrap()));
    let one = seal(&genesis, &[draft(Some(1)), draft(None), draft(None)]);
    let two = seal(&one.head(), &[draft(Some(2))]);
    writer.append(&one).await.unwrap();
    writer.append(&two).await.unwrap();

    let read = log.commits_after(0, 100).await.unwrap();
    assert_eq!(read, [one.clone(), two.clone()]);
    assert!(read.iter().flat_map(|commit| &commit.events).all(|event| event.leaf() == event.leaf_hash));
    assert_eq!(log.head().await.unwrap(), two.head());
    assert_eq!(
        log.commits_after(0, 2).await.unwrap(),
        std::slice::from_ref(&one),
        "a commit is never cut, however small the page"
    );
    assert_eq!(log.commit_of(4).await.unwrap(), Some(2));
    let json = serde_json::to_string(&read).unwrap();
    assert_eq!(serde_json::from_str::<Vec<Commit>>(&json).unwrap(), read, "the bus carries the same bytes");

    let (head, events) = log.events_after(1, 2, &EventFilter::default()).await.unwrap();
    assert_eq!((head, events), (4, one.events[1..].to_vec()));
    let filter = EventFilter { aggregate_id: Some(two.events[0].aggregate_id.clone()), event_type: None };
    assert_eq!(log.events_after(0, 10, &filter).await.unwrap(), (4, two.events.clone()));
    assert_eq!(log.events_after(4, 10, &EventFilter::default()).await.unwrap(), (4, vec![]));
    assert_eq!(log.commands_of_keys(&[[2; 16], [9; 16]]).await.unwrap(), two.events);
    assert_eq!(log.known_keys(&[[2; 16], [9; 16]]).await.unwrap(), [Key { hash: [2; 16], request: [2; 32] }]);
}

/// A transaction that was declined.
fn declined() -> Draft {
    let failure = Failure { code: "insufficient-funds".to_owned(), detail: "no".to_owned() };
    let instruction = serde_json::from_value(serde_json::json!({
        "type": "TRANSFER", "walletId": WalletId::from_uuid(Uuid::now_v7()), "amount": "1.00", "currency": "EUR",
    }));
    let event = TransactionEvent::Declined { instruction: instruction.unwrap(), failure };
    let event = Event::Transaction(TransactionId::from_uuid(Uuid::now_v7()), event);
    Draft::new(CommandId::from_uuid(Uuid::now_v7()), None, "{}", NewEvent { sequence: 1, event })
}

#[tokio::test]
async fn a_stream_is_read_over_an_index_whatever_it_is_of_and_however_often() {
    let database = database().await;
    let (mut writer, log) = (Writer::new(database.url()).unwrap(), log(&database).await);
    let mut owner = PgConnection::connect(database.url()).await.unwrap();
    let before = scans(&mut owner).await;
    // Statements are planned while there is next to nothing in the log, and keep the plan that they come to.
    for kind in ["wallet", "transaction"].repeat(8) {
        log.stream(kind, "none", i64::MAX).await.unwrap();
        log.streams(kind, &["none".to_owned()]).await.unwrap();
    }
    let drafts: Vec<_> = (0..1_500).flat_map(|_| [draft(None), declined()]).collect();
    let commit = seal(&log.head().await.unwrap(), &drafts);
    writer.append(&commit).await.unwrap();
    assert!(matches!(writer.append(&seal(&commit.head(), &drafts[1..2])).await, Err(AppendError::KeyTaken)));
    let mut reader = PgConnection::connect(database.url()).await.unwrap();
    for event in &commit.events[..30] {
        let (kind, id) = (event.aggregate_type.as_ref(), event.aggregate_id.as_str());
        assert_eq!(log.stream(kind, id, i64::MAX).await.unwrap(), std::slice::from_ref(event));
        assert_eq!(log.streams(kind, &[id.to_owned()]).await.unwrap(), std::slice::from_ref(event));
        // As postgres-es asks, which binds the type: planned anew for each value, for a plan for all of them is dear.
        let rows = "select * from ledger.events where aggregate_type = $1 and aggregate_id = $2 order by sequence";
        let rows = sqlx::query(rows).bind(kind).bind(id).fetch_all(&mut reader).await.unwrap();
        assert_eq!(rows.len(), 1);
    }
    // A session tells what it has read when it ends.
    reader.close().await.unwrap();
    drop(log);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    let read = loop {
        let now = scans(&mut owner).await;
        if 122 <= now.1 - before.1 || deadline < std::time::Instant::now() {
            break (now.0 - before.0, now.1 - before.1);
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    };
    assert_eq!(read, (0, 122), "scans of the whole log, and over the indexes on streams");
}

/// How often the events were read from one end to the other, and how often over an index on streams.
async fn scans(owner: &mut PgConnection) -> (i64, i64) {
    let scans = "select (select seq_scan from pg_stat_user_tables where relid = 'ledger.events'::regclass),
        (select sum(idx_scan)::bigint from pg_stat_user_indexes where indexrelname in ('events_stream', 'events_stream_of_transaction'))";
    sqlx::query_as(scans).fetch_one(owner).await.unwrap()
}

#[tokio::test]
async fn a_gap_a_fork_and_a_repeated_number_are_refused() {
    let database = database().await;
    let (mut writer, log) = (Writer::new(database.url()).unwrap(), log(&database).await);
    let genesis = log.head().await.unwrap();
    let one = seal(&genesis, &[draft(Some(1))]);
    writer.append(&one).await.unwrap();

    let refused = |outcome| match outcome {
        Err(AppendError::Lost) => "lost",
        Err(AppendError::KeyTaken) => "key taken",
        Err(AppendError::WentBack) => "went back",
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(writer.append(&one).await), "lost", "the identical commit collides with itself");
    assert_eq!(refused(writer.append(&seal(&genesis, &[draft(None)])).await), "lost", "a fork");
    let ahead = Head { commit: 2, position: 2, ..one.head() };
    assert_eq!(refused(writer.append(&seal(&ahead, &[draft(None)])).await), "went back", "a gap");
    let elsewhere = Head { chain: [7; 32], ..one.head() };
    assert_eq!(refused(writer.append(&seal(&elsewhere, &[draft(None)])).await), "went back", "another history");
    let skips = Head { position: 5, ..one.head() };
    assert_eq!(refused(writer.append(&seal(&skips, &[draft(None)])).await), "went back", "a gap in positions");
    assert_eq!(refused(writer.append(&seal(&one.head(), &[draft(Some(1))])).await), "key taken");
    assert_eq!(log.head().await.unwrap(), one.head(), "and none of them left anything");
    assert_eq!(writer.chain_of(1).await.unwrap(), Some(one.chain));
}

#[tokio::test]
async fn of_two_writers_one_wins_and_the_other_takes_its_turn() {
    let database = database().await;
    let (mut a, mut b) = (Writer::new(database.url()).unwrap(), Writer::new(database.url()).unwrap());
    let genesis = log(&database).await.head().await.unwrap();
    let (mine, yours) = (seal(&genesis, &[draft(None)]), seal(&genesis, &[draft(None)]));
    let (first, second) = tokio::join!(a.append(&mine), b.append(&yours));
    assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
    let (winner, mut loser) = if first.is_ok() { (mine, b) } else { (yours, a) };

    assert_eq!(loser.take_turn(0, 100).await.unwrap(), std::slice::from_ref(&winner));
    let next = seal(&winner.head(), &[draft(None)]);
    loser.append(&next).await.unwrap();
    assert_eq!(log(&database).await.head().await.unwrap(), next.head());
}

#[tokio::test]
async fn a_holder_of_the_turn_that_goes_quiet_holds_nobody_up_and_is_not_told_a_lie() {
    let database = database().await;
    let (mut quiet, mut busy) = (Writer::new(database.url()).unwrap(), Writer::new(database.url()).unwrap());
    let genesis = log(&database).await.head().await.unwrap();
    assert!(quiet.take_turn(0, 100).await.unwrap().is_empty());
    assert!(quiet.has_turn());
    let commit = seal(&genesis, &[draft(None)]);
    busy.append(&commit).await.unwrap(); // waits until the server has ended the other's turn

    let late = quiet.append(&seal(&genesis, &[draft(None)])).await;
    assert!(matches!(late, Err(AppendError::Unknown(_))), "a connection that ended says nothing: {late:?}");
    assert!(!quiet.has_turn());
    assert_eq!(quiet.take_turn(0, 100).await.unwrap(), [commit]);
}

#[tokio::test]
async fn an_append_that_cannot_have_happened_is_told_apart_from_one_that_may_have() {
    let database = database().await;
    let genesis = log(&database).await.head().await.unwrap();
    let commit = seal(&genesis, &[draft(None)]);
    let mut nowhere = Writer::new("postgres://nobody@127.0.0.1:1/nothing").unwrap();
    let unreachable = nowhere.append(&commit).await;
    assert!(matches!(unreachable, Err(AppendError::NotDone(_))), "{unreachable:?}");

    let mut owner = PgConnection::connect(database.url()).await.unwrap();
    let name = database.name();
    let closed = format!("alter database {name} set default_transaction_read_only = on");
    sqlx::query(&closed).execute(&mut owner).await.unwrap();
    let mut writer = Writer::new(database.url()).unwrap();
    let closed = writer.append(&commit).await;
    assert!(matches!(closed, Err(AppendError::NotDone(_))), "an open log would take it: {closed:?}");
    let open = format!("alter database {name} reset default_transaction_read_only");
    sqlx::query(&open).execute(&mut owner).await.unwrap();
    writer.disconnect();

    let broken = Commit {
        events: vec![RecordedEvent { payload: "{".to_owned(), ..commit.events[0].clone() }],
        ..commit.clone()
    };
    let broken = writer.append(&broken).await;
    assert!(matches!(broken, Err(AppendError::Rejected(_))), "no attempt can fare better: {broken:?}");
    writer.append(&commit).await.unwrap();
    let again = seal(&commit.head(), &[Draft { sequence: 1, ..draft(None) }]);
    let again = Commit {
        events: vec![RecordedEvent { aggregate_id: commit.events[0].aggregate_id.clone(), ..again.events[0].clone() }],
        ..again
    };
    let again = writer.append(&again).await;
    assert!(matches!(again, Err(AppendError::KeyTaken)), "the same event again: {again:?}");
}

#[tokio::test]
async fn neither_the_engines_role_nor_the_owner_can_change_the_log() {
    let database = database().await;
    let mut writer = Writer::new(database.url()).unwrap();
    let genesis = log(&database).await.head().await.unwrap();
    writer.append(&seal(&genesis, &[draft(None)])).await.unwrap();
    let mut owner = PgConnection::connect(database.url()).await.unwrap();
    for role in ["none", "daybook_ledger", "daybook_reader"] {
        sqlx::query(&format!("set role {role}")).execute(&mut owner).await.unwrap();
        for change in [
            "update ledger.events set event_type = event_type",
            "delete from ledger.events",
            "truncate ledger.events",
            "update ledger.commits set root = root",
            "delete from ledger.commits where number = -1",
            "truncate ledger.commits cascade",
            "delete from ledger.identity",
        ] {
            let refused = sqlx::query(change).execute(&mut owner).await.unwrap_err();
            let code = refused.as_database_error().unwrap().code().unwrap().into_owned();
            assert_eq!(code, "42501", "{role}: {change}");
        }
    }
    for role in ["daybook_ledger", "daybook_reader"] {
        sqlx::query(&format!("set role {role}")).execute(&mut owner).await.unwrap();
        for table in ["events", "commits", "identity", "turn"] {
            // Past `append`, even the engine's role could leave an event without a commit.
            let insert = format!("insert into ledger.{table} select * from ledger.{table}");
            let refused = sqlx::query(&insert).execute(&mut owner).await.unwrap_err();
            let code = refused.as_database_error().unwrap().code().unwrap().into_owned();
            assert_eq!(code, "42501", "{role}: {insert}");
        }
    }
}

#[tokio::test]
async fn postgres_es_reads_the_table_with_its_own_repository() {
    let database = database().await;
    let mut writer = Writer::new(database.url()).unwrap();
    let genesis = log(&database).await.head().await.unwrap();
    let commit = seal(&genesis, &[draft(Some(1))]);
    writer.append(&commit).await.unwrap();

    let pool = connect(database.url(), "daybook_reader", 1).await.unwrap();
    let repository = PostgresEventRepository::new(pool).with_tables("ledger.events", "ledger.no_snapshots");
    let [stored] = repository.get_events::<Wallet>(&commit.events[0].aggregate_id).await.unwrap().try_into().unwrap();
    assert_eq!((stored.aggregate_type.as_ref(), stored.sequence), (Wallet::TYPE, 1));
    assert_eq!((stored.event_type.as_ref(), stored.event_version.as_ref()), ("WalletOpened", "1.0.0"));
    let mut wallet = Wallet::default();
    wallet.apply(serde_json::from_value(stored.payload).unwrap());
    assert_eq!(wallet.opened.unwrap().user.as_deref(), Some("user-1"));
    assert_eq!(stored.metadata["requestId"], "req_1");
}
