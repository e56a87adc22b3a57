//! Views beside a sound log: right, behind, ahead and wrong. They are filled here by SQL from the log's own JSON, so
//! that what is tested is the auditor and not the projector.

use auditor::{Report, ViewsChecked};
use local_stack::testing::TestDatabase;

use crate::databases::{audited, caught, tamper, told};
use crate::story::Story;

/// Fills every view with what the log says up to a position.
async fn fill(database: &TestDatabase, up_to: i64) {
    let log = format!(
        "create temp table log as select *, payload -> event_type as body, substr(aggregate_id, 5)::uuid as id
         from ledger.events where position <= {up_to}"
    );
    let partners = "insert into views.partners
        select id, position, body ->> 'name', '{EUR,JPY}', gen_random_uuid(),
            coalesce((select case last.event_type when 'PartnerSuspended' then 'SUSPENDED' else 'ACTIVE' end
             from log last where last.id = log.id and last.event_type in ('PartnerSuspended', 'PartnerResumed')
             order by sequence desc limit 1), 'ACTIVE'), recorded_at
        from log where event_type = 'PartnerRegistered'";
    let wallets = "insert into views.wallets
        select id, position, substr(body ->> 'partnerId', 5)::uuid, body ->> 'userId', body ->> 'kind', body ->> 'currency',
            (select case event_type when 'WalletFrozen' then 'FROZEN' when 'WalletClosed' then 'CLOSED' else 'ACTIVE' end
             from log last where last.id = log.id order by sequence desc limit 1),
            '{}', recorded_at
        from log where event_type = 'WalletOpened'";
    // The terms that are no ids, as projector/src/postings.rs has them.
    let hashed = "create function pg_temp.hashed(word text, bytes bytea) returns uuid language sql as $$
        select encode(substr(sha256(convert_to(word, 'UTF8') || '\\x00'::bytea || bytes), 1, 16), 'hex')::uuid $$";
    let terms = "create temp table terms as
        select position, id as term from log where aggregate_type = 'wallet'
        union all
        select position, substr(e ->> 'walletId', 5)::uuid from log, json_array_elements(body -> 'entries') e
        union all
        select position, pg_temp.hashed('backdated', uuid_send(substr(e ->> 'walletId', 5)::uuid))
        from log, json_array_elements(body -> 'entries') e
        where event_type = 'TransactionSettled' or body -> 'instruction' ->> 'effectiveAt' is not null
        union all
        select position, owner from begun, unnest(array[uuid '00000000-0000-0000-0000-000000000000', partner]) owner
        where owner is not null
        union all
        select position, pg_temp.hashed('unusual', uuid_send(owner))
        from begun, unnest(array[uuid '00000000-0000-0000-0000-000000000000', partner]) owner
        where owner is not null and (event_type <> 'TransactionPosted' or asked ->> 'type' <> 'TRANSFER')
        union all
        select position, pg_temp.hashed('about', uuid_send(substr(wallet, 5)::uuid))
        from begun, unnest(array[asked ->> 'walletId', asked ->> 'toWalletId']) wallet
        where wallet is not null and event_type <> 'TransactionPosted'
        union all
        select position, pg_temp.hashed('user', convert_to(asked ->> 'userId', 'UTF8'))
        from begun where asked ->> 'userId' is not null
        union all
        select position, pg_temp.hashed('reference', convert_to(asked ->> 'reference', 'UTF8'))
        from begun where asked ->> 'reference' is not null";
    let begun = "create temp table begun as
        select position, event_type, body -> 'instruction' as asked,
            substr(body -> 'instruction' ->> 'partnerId', 5)::uuid as partner
        from log where aggregate_type = 'transaction' and sequence = 1";
    // Some alone and some together, as pages happen to be.
    let postings = "insert into views.postings
        select term, max(position), nullif((array_agg(position order by position))[:count(*) - 1], '{}')
        from terms group by term, position / 10";
    let checkpoints = format!("update views.checkpoints set position = {up_to}");
    let statements = [&log, partners, wallets, hashed, begun, terms, postings, &checkpoints].map(str::to_owned);
    tamper(database, &statements).await;
}

async fn shown(up_to: impl FnOnce(&Story) -> i64) -> (TestDatabase, Story) {
    let (database, story) = told().await;
    fill(&database, up_to(&story)).await;
    (database, story)
}

fn head(story: &Story) -> i64 {
    story.commits.last().unwrap().last
}

/// Every view was compared, at this position; answers how many rows each had.
#[track_caller]
fn compared(report: &Report, position: i64) -> Vec<i64> {
    let ViewsChecked::Checked { views } = &report.views else { panic!("not checked:\n{report}") };
    let names: Vec<_> = views.iter().map(|view| view.name.as_str()).collect();
    assert_eq!(names, ["partners", "postings", "wallets"]);
    assert!(views.iter().all(|view| view.position == position), "{report}");
    views
        .iter()
        .map(|view| view.compared.unwrap_or_else(|| panic!("{} was not compared:\n{report}", view.name)))
        .collect()
}

#[tokio::test]
async fn views_that_show_what_the_log_says_are_sound() {
    let (database, story) = shown(head).await;
    let report = audited(&database).await;
    assert!(report.is_sound(), "{report}");
    assert!(compared(&report, head(&story)).iter().all(|rows| 0 < *rows), "{report}");
}

#[tokio::test]
async fn views_behind_the_head_are_compared_where_they_are() {
    let (_, story) = told().await;
    for commit in &story.commits {
        let (database, _) = shown(|story| story.commits[usize::try_from(commit.number).unwrap() - 1].last).await;
        let report = audited(&database).await;
        assert!(report.is_sound(), "{report}");
        compared(&report, commit.last);
    }
    let (database, _) = told().await; // nothing is shown yet
    let report = audited(&database).await;
    assert!(report.is_sound(), "{report}");
    assert_eq!(compared(&report, 0), [0; 3]);
}

#[tokio::test]
async fn views_from_a_longer_log_show_that_the_log_was_cut() {
    let (database, story) = shown(head).await;
    let [.., before, last] = story.commits.as_slice() else { panic!("a story has commits") };
    let cut = ["events where commit_number =", "commits where number ="]
        .map(|what| format!("delete from ledger.{what} {}", last.number));
    tamper(&database, &cut).await;
    caught(&audited(&database).await, before.last + 1, "view");
}

#[tokio::test]
async fn a_view_within_a_commit_is_caught() {
    let (database, _) = shown(head).await;
    tamper(&database, &["update views.checkpoints set position = 2 where view = 'postings'".to_owned()]).await;
    caught(&audited(&database).await, 2, "view");
}

#[tokio::test]
async fn a_changed_view_is_caught_where_the_wallet_changed_last() {
    let (_, story) = told().await;
    // What alice has came with the last event; bob's wallet was closed before it.
    let (alice, bob) = (story.position("TransactionPosted", 12), story.position("WalletClosed", 0));
    assert_eq!(alice, head(&story));
    for (set, position) in [
        ("views.wallets set status = 'ACTIVE' where id = $bob", bob),
        ("views.wallets set partner_id = null where id = $alice", alice),
        ("views.postings set position = position + 1 where term = $bob and earlier is null", bob),
        ("views.postings set earlier = earlier[2:] where term = $bob and earlier is not null", bob),
        ("views.postings set term = gen_random_uuid() where term = $alice and earlier is null", alice),
    ] {
        let (database, story) = shown(head).await;
        let ids = [("$alice", story.alice), ("$bob", story.bob)];
        let statement = ids
            .iter()
            .fold(format!("update {set}"), |text, (name, id)| text.replace(name, &format!("'{}'", id.uuid())));
        tamper(&database, &[statement]).await;
        caught(&audited(&database).await, position, "view");
    }
}

#[tokio::test]
async fn surplus_missing_and_exchanged_rows_of_views_are_caught() {
    for statement in [
        "delete from views.postings where position = (select max(position) from views.postings)",
        "delete from views.wallets where kind = 'BANK'",
        "delete from views.partners",
        "insert into views.partners select gen_random_uuid(), 99, name, currencies, client_id, status, created_at from views.partners",
        "update views.partners set status = 'ACTIVE'",
        "insert into views.postings values (gen_random_uuid(), 1, null)",
        "insert into views.postings select term, position + 1, array[position] from views.postings where earlier is null limit 1",
        "delete from views.postings where term = '00000000-0000-0000-0000-000000000000'",
        // As many as before, but not the same ones.
        "update views.postings set position = position - 1 where term = '00000000-0000-0000-0000-000000000000' and earlier is null",
        "update views.postings set term = gen_random_uuid() where term not in (select id from views.wallets)",
    ] {
        let (database, _) = shown(head).await;
        tamper(&database, &[statement.to_owned()]).await;
        let report = audited(&database).await;
        assert!(report.findings.iter().any(|found| found.check == "view"), "{statement}\n{report}");
        assert!(report.findings.iter().all(|found| found.check == "view"), "the log is sound: {report}");
    }
}

#[tokio::test]
async fn a_database_without_views_is_sound_and_says_that_they_were_not_checked() {
    let (database, _) = told().await;
    tamper(&database, &["drop schema views cascade".to_owned()]).await;
    let report = audited(&database).await;
    assert!(report.is_sound(), "{report}");
    assert!(matches!(report.views, ViewsChecked::NotChecked { .. }));
    assert!(report.to_string().contains("views        not checked: this database has no views"), "{report}");
}

#[tokio::test]
async fn a_view_that_the_auditor_does_not_know_is_said_to_be_not_compared() {
    let (database, _) = shown(head).await;
    tamper(&database, &["insert into views.checkpoints (view) values ('weather')".to_owned()]).await;
    let report = audited(&database).await;
    assert!(report.is_sound(), "{report}");
    let ViewsChecked::Checked { views } = &report.views else { panic!("{report}") };
    assert!(views.iter().any(|view| view.name == "weather" && view.compared.is_none()), "{report}");
    assert!(report.to_string().contains("not compared"), "{report}");
}
