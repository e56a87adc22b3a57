//! Rebuilding: the new view equals the live one, or it says how many rows were wrong and puts them right.

use std::time::Duration;

use projector::{RebuildReport, VIEWS, rebuild};

use crate::system::{Caller, System};

/// A system with some history of every kind.
async fn busy() -> (System, Caller) {
    let system = System::start().await;
    let partner = system.partner().await;
    let (from, to) = (system.wallet(&partner, "alice").await, system.wallet(&partner, "bob").await);
    system.fund(&partner, from, "10.00").await;
    system.transfer(&partner, from, to, "99.00").await;
    let top_up = system.request_top_up(&partner, to, "3.00").await;
    system.caught_up().await; // so that its end comes in a page of its own
    system.settle(top_up, "3.00").await;
    system.request_top_up(&partner, to, "4.00").await;
    for _ in 0..20 {
        system.transfer(&partner, from, to, "0.10").await;
    }
    let freeze = ledger_core::Action::FreezeWallet { wallet: from, reason: "lost".to_owned() };
    system.execute(partner.caller(), freeze).await;
    system.caught_up().await;
    (system, partner)
}

#[tokio::test]
async fn a_rebuilt_view_equals_the_live_one() {
    let (system, _) = busy().await;
    let mut told = Vec::new();
    let reports = rebuild(&system.database_url, None, |done, total| told.push((done, total))).await.unwrap();
    let names: Vec<_> = reports.iter().map(|report| report.view).collect();
    assert_eq!(names, VIEWS.iter().map(|view| view.name).collect::<Vec<_>>());
    for report in &reports {
        assert_eq!(report.differed, 0, "{report:?}");
        assert!(0 < report.rows, "{report:?}");
        assert_eq!(report.position, system.head().await);
    }
    assert!(told.is_sorted() && told.last().is_some_and(|(done, total)| done == total), "{told:?}");
}

#[tokio::test]
async fn a_tampered_row_is_found_and_put_right() {
    let (system, partner) = busy().await;
    let before = partner.all("/v1/transactions", 100).await;
    for (view, tamper) in [
        ("postings", "delete from views.postings where position = (select max(position) from views.postings)"),
        ("postings", "update views.postings set position = position + 1000"),
        ("postings", "update views.postings set earlier = earlier[2:] where 1 < cardinality(earlier)"),
        ("wallets", "update views.wallets set status = 'CLOSED' where user_id = 'alice'"),
        ("partners", "update views.partners set name = 'Acne'"),
    ] {
        system.sql(tamper).await;
        let reports = rebuild(&system.database_url, Some(view), |_, _| {}).await.unwrap();
        assert!(matches!(&reports[..], [RebuildReport { differed: 1.., .. }]), "{view}: {reports:?}");
        let reports = rebuild(&system.database_url, Some(view), |_, _| {}).await.unwrap();
        assert_eq!(reports[0].differed, 0, "{view}");
    }
    assert_eq!(partner.all("/v1/transactions", 100).await, before);
}

#[tokio::test]
async fn a_view_is_rebuilt_while_the_ledger_the_projector_and_queries_go_on() {
    let (system, partner) = busy().await;
    let (from, to) = (system.wallet(&partner, "carol").await, system.wallet(&partner, "dave").await);
    system.fund(&partner, from, "1000.00").await;
    let rebuilding = async {
        for _ in 0..3 {
            for report in rebuild(&system.database_url, None, |_, _| {}).await.unwrap() {
                assert_eq!(report.differed, 0, "{report:?}");
            }
        }
    };
    let working = async {
        for moved in 1..=150_i64 {
            let position = system.transfer(&partner, from, to, "1.00").await.position();
            let path = format!("/v1/wallets/{to}/balance?minPosition={position}&waitMs=10000");
            assert_eq!(partner.get(&path).await["balance"], format!("{moved}.00"));
        }
    };
    tokio::join!(rebuilding, working);
    system.caught_up().await;
    assert_eq!(partner.all(&format!("/v1/wallets/{to}/entries"), 100).await.len(), 150);
    let reports = rebuild(&system.database_url, None, |_, _| {}).await.unwrap();
    assert!(reports.iter().all(|report| report.differed == 0), "{reports:?}");
}

#[tokio::test]
async fn what_a_rebuild_of_another_view_left_when_it_was_cut_short_is_in_nobodys_way() {
    let (system, _) = busy().await;
    system.sql("create schema views_next; create table views_next.postings (like views.postings including all)").await;
    let reports = rebuild(&system.database_url, Some("wallets"), |_, _| {}).await.unwrap();
    assert_eq!(reports[0].differed, 0);
    assert!(!system.scalar::<bool>("select to_regnamespace('views_next') is not null").await);
}

#[tokio::test]
async fn a_long_reader_of_the_old_version_stops_the_rebuild_and_nobody_else() {
    use sqlx::{Connection, PgConnection};
    let (system, partner) = busy().await;
    let mut reader = PgConnection::connect(&system.database_url).await.unwrap(); // such as a backup
    let mut tx = reader.begin().await.unwrap();
    sqlx::query("select from views.postings").execute(&mut *tx).await.unwrap();
    let rebuilding =
        tokio::time::timeout(Duration::from_secs(20), rebuild(&system.database_url, Some("postings"), |_, _| {}));
    let error = rebuilding.await.expect("its waiting has an end").unwrap_err();
    assert!(format!("{error:#}").contains("lock timeout"), "{error:#}");
    system.fund(&partner, partner.settlement, "1.00").await;
    system.caught_up().await;
    tx.rollback().await.unwrap();
    let reports = rebuild(&system.database_url, Some("postings"), |_, _| {}).await.unwrap();
    assert_eq!(reports[0].differed, 0);
}

#[tokio::test]
async fn a_rebuilt_table_is_made_as_the_migration_made_it() {
    let (system, _) = busy().await;
    let shape = "select string_agg(format('%s %s %s %s %s', c.relname, c.reloptions, c.relowner::regrole,
                     (select array_agg(a order by a) from (select (aclexplode(c.relacl))::text a) acl),
                     (select array_agg(regexp_replace(indexdef, '.* USING ', '') order by 1)
                      from pg_indexes where schemaname = 'views' and tablename = c.relname)), E'\\n' order by c.relname)
                 from pg_class c where c.relnamespace = 'views'::regnamespace and c.relkind = 'r'";
    let before: String = system.scalar(shape).await;
    assert!(before.contains("fillfactor"), "{before}");
    rebuild(&system.database_url, None, |_, _| {}).await.unwrap();
    assert_eq!(system.scalar::<String>(shape).await, before);
}

#[tokio::test]
async fn an_unknown_view_is_named_among_those_that_there_are() {
    let system = System::start_without_projecting().await;
    let error = rebuild(&system.database_url, Some("nonsense"), |_, _| {}).await.unwrap_err();
    assert!(error.to_string().contains("postings"), "{error}");
}

#[tokio::test]
async fn a_view_that_is_new_catches_up_with_the_others_by_itself() {
    let (mut system, partner) = busy().await;
    let entries = partner.all(&format!("/v1/wallets/{}/entries", partner.settlement), 100).await;
    system.stop_projecting().await;
    system.sql("truncate views.postings; update views.checkpoints set position = 0, commit_number = 0 where view = 'postings'").await;
    system.project();
    system.caught_up().await;
    assert_eq!(partner.all(&format!("/v1/wallets/{}/entries", partner.settlement), 100).await, entries);
    let reports = rebuild(&system.database_url, Some("postings"), |_, _| {}).await.unwrap();
    assert_eq!(reports[0].differed, 0);
}
