//! Audits of real databases, broken by somebody who may do anything in Postgres.

use auditor::{Report, audit, export, verify};
use event_store::{EventFilter, Log, RecordedEvent, Writer, connect, hash};
use local_stack::testing::TestDatabase;
use sqlx::{Connection, PgConnection};

use crate::story::Story;

/// A database with the whole story in it.
pub(crate) async fn told() -> (TestDatabase, Story) {
    let database = local_stack::testing::database(|url| async move { migrations::run(&url).await }).await;
    let log = Log::new(connect(database.url(), "daybook_reader", 1).await.unwrap());
    let mut story = Story::told(log.ledger_id().await.unwrap());
    let mut writer = Writer::new(database.url()).unwrap();
    story.write(&mut writer).await;
    writer.close().await;
    (database, story)
}

pub(crate) async fn audited(database: &TestDatabase) -> Report {
    audit(database.url(), |_, _| {}).await.unwrap()
}

/// Does what nobody may: as superuser, with triggers and foreign keys asleep.
pub(crate) async fn tamper(database: &TestDatabase, statements: &[String]) {
    let mut connection = PgConnection::connect(database.url()).await.unwrap();
    sqlx::query("set session_replication_role = replica").execute(&mut connection).await.unwrap();
    for statement in statements {
        sqlx::raw_sql(statement).execute(&mut connection).await.unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
    connection.close().await.unwrap();
}

#[track_caller]
pub(crate) fn caught(report: &Report, position: i64, check: &str) {
    assert_eq!(report.first_bad_position(), Some(position), "{report}");
    assert!(report.findings.iter().any(|found| found.check == check), "{check} is silent:\n{report}");
    assert!(!report.is_sound());
    assert!(report.to_string().starts_with(&format!("NOT SOUND: first bad position {position}: ")), "{report}");
}

/// Tells the story, breaks it, and expects the audit to name the position and the check.
async fn breaking(check: &str, how: impl FnOnce(&Story) -> (i64, Vec<String>)) -> Report {
    let (database, story) = told().await;
    let (position, statements) = how(&story);
    tamper(&database, &statements).await;
    let report = audited(&database).await;
    caught(&report, position, check);
    report
}

/// What sets an event's payload, and its leaf hash to what the payload gives: the work of somebody who knows the format.
fn rewritten(story: &Story, position: i64, change: impl Fn(&str) -> String) -> (RecordedEvent, String) {
    let events = story.commits.iter().flat_map(|commit| &commit.events);
    let mut event = events.clone().find(|event| event.position == position).unwrap().clone();
    let changed = change(&event.payload);
    assert_ne!(changed, event.payload, "the story has what is to be changed");
    event.payload = changed;
    event.leaf_hash = event.leaf();
    let leaf = hash::hex(&event.leaf_hash);
    let payload = event.payload.replace('\'', "''");
    let statement =
        format!("update ledger.events set payload = '{payload}', leaf_hash = '\\x{leaf}' where position = {position}");
    (event, statement)
}

#[tokio::test]
async fn an_untouched_log_is_sound_and_exports_as_the_store_writes_it() {
    let (database, story) = told().await;
    let report = audited(&database).await;
    assert!(report.is_sound(), "{report}");
    let last = story.commits.last().unwrap();
    assert_eq!((report.position, report.commit, report.chain), (last.last, last.number, last.chain));
    assert_eq!(report.events, last.last);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["chain"], hash::hex(&last.chain));
    assert_eq!(json["currencies"]["EUR"]["customers"], "120.01");

    let mut out = Vec::new();
    let summary = export(database.url(), &mut out, |_, _| {}).await.unwrap();
    assert_eq!(String::from_utf8(out.clone()).unwrap(), story.export(), "the same bytes by two writers");
    assert_eq!((summary.position, summary.chain), (last.last, hash::hex(&last.chain)));
    assert_eq!(summary.bytes, u64::try_from(out.len()).unwrap());
    let verified = verify(out.as_slice(), |_| {}).unwrap();
    assert!(verified.is_sound(), "{verified}");
    assert_eq!((verified.position, verified.chain), (report.position, report.chain));
    assert_eq!(verified.currencies, report.currencies);
}

#[tokio::test]
async fn a_ledger_without_events_is_sound() {
    let database = local_stack::testing::database(|url| async move { migrations::run(&url).await }).await;
    let report = audited(&database).await;
    assert!(report.is_sound(), "{report}");
    assert_eq!((report.position, report.commit, report.events), (0, 0, 0));
}

#[tokio::test]
async fn a_database_that_is_not_a_ledger_is_an_error_and_not_sound() {
    let stack = local_stack::testing::stack().await;
    let error = audit(stack.database_url(), |_, _| {}).await.unwrap_err();
    assert!(format!("{error:#}").contains("is this a Daybook database?"), "{error:#}");
}

#[tokio::test]
async fn progress_ends_at_the_head() {
    let (database, story) = told().await;
    let mut seen = Vec::new();
    audit(database.url(), |done, total| seen.push((done, total))).await.unwrap();
    let head = story.commits.last().unwrap().last;
    assert_eq!(seen.last(), Some(&(head, head)));
}

#[tokio::test]
async fn a_flipped_byte_in_a_payload_whichever_it_is() {
    let (database, story) = told().await;
    let events: Vec<_> = story.commits.iter().flat_map(|commit| &commit.events).collect();
    let mut flipped = 0;
    for (at, event) in events.iter().enumerate() {
        for byte in (at..event.payload.len()).step_by(211) {
            let mut bytes = event.payload.clone().into_bytes();
            bytes[byte] ^= 1;
            // The column holds only what is text and JSON.
            let Ok(payload) = String::from_utf8(bytes) else { continue };
            if serde_json::from_str::<serde_json::Value>(&payload).is_err() {
                continue;
            }
            let position = event.position;
            let set = |payload: &str| {
                let payload = payload.replace('\'', "''");
                vec![format!("update ledger.events set payload = '{payload}' where position = {position}")]
            };
            tamper(&database, &set(&payload)).await;
            caught(&audited(&database).await, position, "leaf");
            tamper(&database, &set(&event.payload)).await;
            flipped += 1;
        }
    }
    assert!(30 < flipped, "{flipped} bytes were tried");
    let report = audited(&database).await;
    assert!(report.is_sound(), "all is as it was: {report}");
}

#[tokio::test]
async fn changed_metadata_times_keys_and_commands() {
    for (column, value) in [
        ("metadata", "'{\"clientId\":\"cli_2\",\"requestId\":\"req_1\"}'"),
        ("recorded_at", "recorded_at + interval '1 microsecond'"),
        ("recorded_at", "'infinity'"),
        ("key_hash", "'\\x000102030405060708090a0b0c0d0e0f'"),
        ("command_id", "gen_random_uuid()"),
        ("event_version", "'1.0.1'"),
    ] {
        breaking("leaf", |story| {
            let position = story.position("TransactionPosted", 0);
            (position, vec![format!("update ledger.events set {column} = {value} where position = {position}")])
        })
        .await;
    }
}

#[tokio::test]
async fn a_deleted_row() {
    let (_, story) = told().await;
    let head = story.commits.last().unwrap().last;
    for position in [1, 5, 12, head] {
        breaking("position", |_| (position, vec![format!("delete from ledger.events where position = {position}")]))
            .await;
    }
}

#[tokio::test]
async fn two_rows_swapped() {
    for (one, other) in [(0, 1), (1, 3), (4, 6)] {
        breaking("root", |story| {
            let [one, other] = [one, other].map(|nth| story.position("TransactionPosted", nth));
            let swap = ["position = -1", &format!("position = {one}"), &format!("position = {other}")];
            let at = [one, other, -1];
            let statements =
                swap.iter().zip(at).map(|(set, at)| format!("update ledger.events set {set} where position = {at}"));
            (one, statements.collect())
        })
        .await;
    }
}

#[tokio::test]
async fn another_balance_with_a_leaf_to_match() {
    let report = breaking("balance-after", |story| {
        let position = story.position("TransactionPosted", 3);
        let (_, statement) =
            rewritten(story, position, |payload| payload.replacen("\"balanceAfter\":\"", "\"balanceAfter\":\"1", 1));
        (position, vec![statement])
    })
    .await;
    assert!(report.findings.iter().any(|found| found.check == "root"), "{report}");
    assert!(report.findings.iter().all(|found| found.check != "leaf"), "the leaf was made to match: {report}");
}

#[tokio::test]
async fn another_text_with_leaf_root_and_chain_to_match_breaks_the_next_commit() {
    breaking("chain", |story| {
        let commit = story
            .commits
            .iter()
            .find(|commit| commit.events.len() == 1 && commit.events[0].event_type == "TransactionPosted")
            .unwrap();
        let (event, statement) = rewritten(story, commit.first, |payload| payload.replace("order 7", "order 8"));
        let root = hash::root(&[event.leaf_hash]);
        let chain = hash::chain(&commit.previous_chain, &root, commit.first, commit.last);
        let (root, chain, number) = (hash::hex(&root), hash::hex(&chain), commit.number);
        let seal =
            format!("update ledger.commits set root = '\\x{root}', chain = '\\x{chain}' where number = {number}");
        // The event itself is as good as any; what follows it was decided upon another log.
        (commit.last + 1, vec![statement, seal])
    })
    .await;
}

#[tokio::test]
async fn the_last_commit_s_events_deleted() {
    breaking("position", |story| {
        let last = story.commits.last().unwrap();
        (last.first, vec![format!("delete from ledger.events where commit_number = {}", last.number)])
    })
    .await;
}

#[tokio::test]
async fn a_commit_row_deleted() {
    breaking("commit", |story| {
        let commit = &story.commits[4];
        (commit.first, vec![format!("delete from ledger.commits where number = {}", commit.number)])
    })
    .await;
}

#[tokio::test]
async fn events_behind_the_last_commit() {
    breaking("commit", |story| {
        let last = story.commits.last().unwrap();
        (last.first, vec![format!("delete from ledger.commits where number = {}", last.number)])
    })
    .await;
}

#[tokio::test]
async fn another_genesis() {
    breaking("genesis", |_| (0, vec!["update ledger.identity set id = gen_random_uuid()".to_owned()])).await;
    breaking("genesis", |_| (0, vec!["delete from ledger.identity".to_owned()])).await;
    breaking("genesis", |_| (0, vec!["delete from ledger.commits where number = 0".to_owned()])).await;
}

#[tokio::test]
async fn a_key_used_twice() {
    let report = breaking("key", |story| {
        let position = story.position("TransactionDeclined", 1);
        let drop = "drop index ledger.events_key".to_owned();
        let copy = format!(
            "update ledger.events set key_hash = (select key_hash from ledger.events where position = 1) where position = {position}"
        );
        (position, vec![drop, copy])
    })
    .await;
    assert!(report.findings.iter().any(|found| found.detail == "the key was used before, at position 1"), "{report}");
}

#[tokio::test]
async fn a_row_that_is_there_twice() {
    breaking("position", |story| {
        let position = story.position("TransactionPosted", 2);
        let drop = "alter table ledger.events drop constraint events_position;
             drop index ledger.events_stream, ledger.events_stream_of_transaction, ledger.events_key";
        let copy = format!("insert into ledger.events select * from ledger.events where position = {position}");
        (position, vec![drop.to_owned(), copy])
    })
    .await;
}

#[tokio::test]
async fn a_row_before_the_first_position() {
    breaking("position", |_| {
        let drop = "drop index ledger.events_stream, ledger.events_key".to_owned();
        let copy = "create temp table copy as select * from ledger.events where position = 1;
                    update copy set position = -7; insert into ledger.events select * from copy"
            .to_owned();
        (-7, vec![drop, copy])
    })
    .await;
}

#[tokio::test]
async fn what_is_read_after_the_log_was_read_is_the_same_log() {
    let (database, mut story) = told().await;
    let log = Log::new(connect(database.url(), "daybook_reader", 1).await.unwrap());
    let (_, events) = log.events_after(0, i64::MAX, &EventFilter::default()).await.unwrap();
    let before = story.commits.len();
    story.fund(story.alice, "5.00");
    let mut writer = Writer::new(database.url()).unwrap();
    writer.append(&story.commits[before]).await.unwrap();
    let report = audited(&database).await;
    assert!(report.is_sound(), "{report}");
    assert_eq!(report.events, i64::try_from(events.len()).unwrap() + 1);
}
