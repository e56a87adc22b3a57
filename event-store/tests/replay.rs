//! Reading much of the log in one pass: all of it comes, in order and as it was written, or an error names what is wrong.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use event_store::{Commit, Draft, Head, Log, RecordedEvent, StoreError, Writer, connect};
use ledger_core::*;
use local_stack::testing::TestDatabase;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

async fn database() -> TestDatabase {
    local_stack::testing::database(|url| async move { migrations::run(&url).await }).await
}

async fn log(database: &TestDatabase) -> Log {
    Log::new(connect(database.url(), "daybook_reader", 2).await.unwrap())
}

/// An event with metadata of about so many bytes.
fn draft(size: usize) -> Draft {
    let currency = "EUR".parse().unwrap();
    let opened = WalletEvent::Opened {
        kind: WalletKind::Customer,
        partner_id: None,
        user_id: Some("user-1".into()),
        currency,
        metadata: Metadata::new(),
        wallet_version: 1,
        balance_after: Balance::zero(currency),
    };
    let event = NewEvent { sequence: 1, event: Event::Wallet(WalletId::from_uuid(Uuid::now_v7()), opened) };
    let id = Uuid::now_v7();
    let key = size.is_multiple_of(2).then(|| Key { hash: *id.as_bytes(), request: [7; 32] });
    Draft::new(CommandId::from_uuid(id), key, &format!(r#"{{"é":"{}"}}"#, "x".repeat(size)), event)
}

/// Appends a commit for each of these, with events of these sizes.
async fn append(database: &TestDatabase, sizes: &[Vec<usize>]) -> (Head, Vec<Commit>) {
    let mut writer = Writer::new(database.url()).unwrap();
    let genesis = log(database).await.head().await.unwrap();
    let (mut head, mut commits) = (genesis, Vec::new());
    for sizes in sizes {
        let drafts: Vec<_> = sizes.iter().map(|size| draft(*size)).collect();
        let now = Timestamp::from_micros(1_800_000_000_000_000 + head.commit).unwrap();
        let commit = Commit::seal(&head, now, &drafts);
        writer.append(&commit).await.unwrap();
        head = commit.head();
        commits.push(commit);
    }
    (genesis, commits)
}

/// All that a replay tells, and where it ends.
async fn replayed(log: &Log, after: Head) -> Result<(Vec<Commit>, Head), StoreError> {
    let mut replay = log.replay(after).await?;
    let mut commits = Vec::new();
    while let Some(page) = replay.next().await? {
        for (commit, events) in page.commits() {
            commits.push(Commit {
                number: commit.number,
                first: commit.first,
                last: commit.last,
                previous_chain: commit.previous_chain,
                root: commit.root,
                chain: commit.chain,
                events: events.map(RecordedEvent::from).collect(),
            });
        }
        assert_eq!(commits.last().unwrap().head(), replay.head(), "it stands where its pages end");
    }
    Ok((commits, replay.head()))
}

#[tokio::test]
async fn a_replay_tells_every_commit_as_it_was_written_and_ends_at_the_head() {
    let database = database().await;
    let log = log(&database).await;
    let begin = log.head().await.unwrap();
    assert_eq!(replayed(&log, begin).await.unwrap(), (vec![], begin), "an empty log");

    // Commits of one event and of many, one alone above a page, pages that end at a commit and amid the next.
    let large = vec![vec![1], vec![300_000; 4], vec![2, 3], vec![100_000; 20], vec![1; 40], vec![600_000]];
    let (genesis, commits) = append(&database, &large).await;
    let end = commits.last().unwrap().head();
    assert_eq!(replayed(&log, genesis).await.unwrap(), (commits.clone(), end));
    assert_eq!(replayed(&log, commits[2].head()).await.unwrap(), (commits[3..].to_vec(), end), "from within");
    assert_eq!(replayed(&log, end).await.unwrap(), (vec![], end), "nothing is left");
}

#[tokio::test]
async fn a_replay_goes_on_beyond_what_is_asked_of_the_database_at_once() {
    let database = database().await;
    let (genesis, commits) = append(&database, &vec![vec![10; 1_700]; 11]).await; // more than 16,384 events
    let (read, head) = replayed(&log(&database).await, genesis).await.unwrap();
    assert_eq!(head, commits.last().unwrap().head());
    assert!(read == commits, "all of it came, as it was written");
}

#[tokio::test]
async fn whatever_was_changed_behind_our_back_ends_a_replay_and_is_named() {
    for (change, named) in [
        (
            "update ledger.events set payload = replace(payload::text, 'EUR', 'USD')::json where position = 3",
            "position 3",
        ),
        ("update ledger.events set metadata = '{}' where position = 2", "position 2"),
        ("update ledger.events set leaf_hash = sha256('x') where position = 4", "position 4"),
        (
            "update ledger.events set recorded_at = recorded_at + interval '1 microsecond' where position = 1",
            "position 1",
        ),
        ("update ledger.events set recorded_at = 'infinity' where position = 1", "recorded_at"),
        ("update ledger.events set request_hash = sha256('x') where position = 3", "position 3"),
        ("update ledger.events set commit_number = 1 where position = 4", "position 4"),
        ("delete from ledger.events where position = 3", "position 3"),
        ("delete from ledger.events where position = 5", "position 5"),
        ("update ledger.commits set root = sha256('x') where number = 2", "commit 2"),
        ("update ledger.commits set chain = sha256('x') where number = 3", "commit 3"),
        ("update ledger.commits set last_position = 9 where number = 3", "position 6"),
        ("delete from ledger.commits where number = 2", "commit 3"),
        ("update ledger.commits set chain = sha256('x') where number = 0", "commit 0"),
    ] {
        let database = database().await;
        append(&database, &[vec![2, 3], vec![4, 5], vec![6]]).await;
        let log = log(&database).await;
        let mut owner = PgConnection::connect(database.url()).await.unwrap();
        sqlx::raw_sql(&format!("set session_replication_role = replica; {change}")).execute(&mut owner).await.unwrap();
        let mut begin = log.head().await.unwrap();
        let chain: Vec<u8> = sqlx::query_scalar("select chain from ledger.commits where number = 0")
            .fetch_one(&mut owner)
            .await
            .unwrap();
        (begin.position, begin.commit, begin.chain) = (0, 0, chain.try_into().unwrap());
        match replayed(&log, begin).await {
            Err(StoreError::Corrupt(what)) => assert!(what.contains(named), "{change}: {what}"),
            other => panic!("{change}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_replay_from_a_head_that_the_log_does_not_have_tells_nothing() {
    let database = database().await;
    let (_, commits) = append(&database, &[vec![1], vec![2]]).await;
    let stranger = Head { chain: [1; 32], ..commits[0].head() };
    let told = replayed(&log(&database).await, stranger).await;
    assert!(matches!(told, Err(StoreError::Corrupt(_))), "{told:?}");
}

#[tokio::test]
async fn pages_of_any_size_are_whole_commits_without_a_gap() {
    let database = database().await;
    let sizes: Vec<_> = [1, 2, 1, 5, 3, 1, 1, 8, 2].map(|events| vec![3; events]).into();
    let (_, commits) = append(&database, &sizes).await;
    let log = log(&database).await;
    for events_max in [i64::MIN, 0, 1, 2, 3, 4, 5, 7, 8, 9, 23, 24, 25, i64::MAX] {
        let (mut read, mut pages) = (Vec::new(), 0);
        loop {
            let page =
                log.commits_after(read.last().map_or(0, |commit: &Commit| commit.number), events_max).await.unwrap();
            let events: usize = page.iter().map(|commit| commit.events.len()).sum();
            let within = i64::try_from(events).unwrap() <= events_max.max(1);
            assert!(
                within || page.len() == 1,
                "{events} events in {} commits where {events_max} are wanted",
                page.len()
            );
            if page.is_empty() {
                break;
            }
            pages += 1;
            read.extend(page);
        }
        assert_eq!(read, commits, "{events_max} at a time, {pages} pages");
        assert!(events_max < 24 || pages == 1, "what fits comes at once");
    }
}
