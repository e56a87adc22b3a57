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
    let changes = "create temp table changes as
        select substr(e ->> 'walletId', 5)::uuid as wallet_id, (e ->> 'walletVersion')::bigint as version, position, id as transaction_id,
            (e ->> 'amount')::numeric * case e ->> 'direction' when 'DEBIT' then -1 else 1 end as change,
            (e ->> 'balanceAfter')::numeric as balance_after, recorded_at
        from log, json_array_elements(body -> 'entries') e where body -> 'entries' is not null
        union all
        select id, (body ->> 'walletVersion')::bigint, position, null, null, (body ->> 'balanceAfter')::numeric, recorded_at
        from log where aggregate_type = 'wallet'";
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
    let balances = "insert into views.balances
        select distinct on (wallet_id) wallet_id, version, balance_after from changes order by wallet_id, version desc";
    let entries = "insert into views.entries
        select wallet_id, version, position, transaction_id, 'TRANSFER', change, balance_after, recorded_at, recorded_at, null
        from changes where change is not null";
    let transactions = "insert into views.transactions
        select id, position, null, substr(asked ->> 'walletId', 5)::uuid, null, null, asked ->> 'type', status, null, null, recorded_at,
            json_build_object('status', status, 'amount', asked ->> 'amount', 'currency', asked ->> 'currency')
        from (
            select *, body -> 'instruction' as asked, (
                select case event_type when 'TransactionPosted' then 'SUCCESS' when 'TransactionSettled' then 'SUCCESS'
                    when 'TransactionRequested' then 'PENDING' when 'TransactionExpired' then 'EXPIRED' else 'FAILED' end
                from log last where last.id = log.id order by sequence desc limit 1) as status
            from log where aggregate_type = 'transaction' and sequence = 1
        ) first";
    let checkpoints = format!("update views.checkpoints set position = {up_to}");
    let statements =
        [&log, changes, partners, wallets, balances, entries, transactions, &checkpoints].map(str::to_owned);
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
    assert_eq!(names, ["balances", "entries", "partners", "transactions", "wallets"]);
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
    assert_eq!(compared(&report, 0), [0; 5]);
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
    tamper(&database, &["update views.checkpoints set position = 2 where view = 'balances'".to_owned()]).await;
    caught(&audited(&database).await, 2, "view");
}

#[tokio::test]
async fn a_changed_view_is_caught_where_the_wallet_changed_last() {
    let (_, story) = told().await;
    // What alice has came with the last event; bob's wallet was closed before it.
    let (alice, bob) = (story.position("TransactionPosted", 12), story.position("WalletClosed", 0));
    assert_eq!(alice, head(&story));
    for (set, position) in [
        ("views.balances set balance = balance + 0.01 where wallet_id = $alice", alice),
        ("views.balances set version = version - 1 where wallet_id = $bob", bob),
        ("views.wallets set status = 'ACTIVE' where id = $bob", bob),
        ("views.wallets set partner_id = null where id = $alice", alice),
        ("views.entries set change = change + 0.01 where wallet_id = $bob and wallet_version = 3", bob),
        ("views.entries set position = position - 1 where wallet_id = $bob and wallet_version = 3", bob),
        (
            "views.entries set wallet_id = $alice, wallet_version = 99 where wallet_id = $bob and wallet_version = 3",
            bob,
        ),
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
        "delete from views.entries where position = (select max(position) from views.entries)",
        "delete from views.balances where version = 1",
        "delete from views.wallets where kind = 'BANK'",
        "delete from views.partners",
        "delete from views.transactions where status = 'EXPIRED'",
        "insert into views.partners select gen_random_uuid(), 99, name, currencies, client_id, status, created_at from views.partners",
        "update views.partners set status = 'ACTIVE'",
        "insert into views.balances values (gen_random_uuid(), 1, 0)",
        "update views.transactions set status = 'SUCCESS' where status = 'EXPIRED'",
        // As many of each status as before, but not the same ones.
        "update views.transactions set id = gen_random_uuid() where status = 'EXPIRED'",
        "update views.transactions set body = replace(body::text, '20.00', '20.01')::json where status = 'EXPIRED'",
        "update views.transactions set body = replace(body::text, 'EXPIRED', 'SUCCESS')::json where status = 'EXPIRED'",
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
