//! Rebuilding a view: a new version beside the old one from position 1, compared with it at one position, then switched.
//!
//! The live projector runs on. It is kept waiting only for the switch, when the new version takes the last few commits
//! under the checkpoints' lock and changes places with the old one.
//!
//! It needs the rights of the tables' owner, which the projector itself does not have.

use std::sync::Arc;

use anyhow::Context;
use event_feed::Log;
use serde::Serialize;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection, PgConnection};

use crate::page::Page;
use crate::project::checkpoints;
use crate::{VIEWS, View};

/// What came of rebuilding one view.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RebuildReport {
    pub view: &'static str,
    /// Of the new version, shortly before it was switched in: nobody is kept waiting for the counting.
    pub rows: i64,
    /// Up to where the new version was folded when it was switched in.
    pub position: i64,
    /// Rows that only one of the two versions had, compared at one position. Anything but 0 was an error in the old one.
    pub differed: i64,
}

/// Events that are folded at a time.
const PAGE_EVENTS: i64 = 5_000;

/// How long the switch waits for those who still read the old version. Queries end sooner; a backup reads for as long as
/// it takes, and with the rebuild waiting for it the projector and all queries would wait too. So the rebuild gives up.
const SWITCH_WAIT: &str = "3s";

/// Any number, the same in all versions of this program: held while a view is being rebuilt.
const REBUILD_LOCK: i64 = 0x6461_7962_6f6f_6b01;

/// Rebuilds one view, or all of them, while queries and projector go on. `progress` is told how many of how many events
/// have been folded, over all views.
pub async fn rebuild(
    database_url: &str,
    view: Option<&str>,
    mut progress: impl FnMut(i64, i64),
) -> anyhow::Result<Vec<RebuildReport>> {
    let names = || VIEWS.iter().map(|view| view.name).collect::<Vec<_>>().join(", ");
    let views: Vec<_> = VIEWS.iter().filter(|known| view.is_none_or(|wanted| wanted == known.name)).collect();
    anyhow::ensure!(!views.is_empty(), "there is no such view; there are: {}", names());
    let options: PgConnectOptions = database_url.parse().context("the database's address")?;
    let options = options.application_name("daybook rebuild").options([("jit", "off"), ("lock_timeout", SWITCH_WAIT)]);
    let log = Log::new(PgPoolOptions::new().max_connections(1).connect_with(options.clone()).await?);
    let mut connection = PgConnection::connect_with(&options.options([("search_path", "views_next")])).await?;
    let locked: bool =
        sqlx::query_scalar("select pg_try_advisory_lock($1)").bind(REBUILD_LOCK).fetch_one(&mut connection).await?;
    anyhow::ensure!(locked, "views of this database are being rebuilt already");
    let mut reports = Vec::new();
    for (done, view) in (0..).zip(&views) {
        let mut told = |position: i64, head: i64| {
            let count = i64::try_from(views.len()).unwrap_or(i64::MAX);
            progress(done * head + position, count * head);
        };
        let report = rebuild_one(&mut connection, &log, view, &mut told).await;
        reports.push(report.with_context(|| format!("rebuilding {}", view.name))?);
    }
    // With what a rebuild of other views may have left when it was cut short.
    sqlx::query("drop schema if exists views_next cascade").execute(&mut connection).await?;
    connection.close().await?;
    Ok(reports)
}

/// How far the new version has come.
struct Next {
    view: &'static View,
    position: i64,
    commit: i64,
}

async fn rebuild_one(
    connection: &mut PgConnection,
    log: &Log,
    view: &'static View,
    progress: &mut impl FnMut(i64, i64),
) -> anyhow::Result<RebuildReport> {
    let name = view.name;
    make_table(connection, name).await?;
    let mut next = Next { view, position: 0, commit: 0 };

    // Most of the way in pages of their own, up to where the old version is. It moves on meanwhile, so again the rest,
    // until little is left to be done while somebody waits.
    let old = of(&checkpoints(connection).await?, view);
    next.fold_to(connection, log, old, progress).await?;

    // In one snapshot the old version stands still, at a position that the new one can reach exactly.
    let mut tx = connection.begin_with("begin isolation level repeatable read").await?;
    let old = of(&checkpoints(&mut tx).await?, view);
    next.fold_to(&mut tx, log, old, progress).await?;
    let compared = view.compared;
    let differed: i64 = sqlx::query_scalar(&format!(
        "with old as (select o::text from ({compared} from views.{name}) o),
              new as (select n::text from ({compared} from views_next.{name}) n)
         select count(*) from ((table old except all table new) union all (table new except all table old)) differing"
    ))
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    if 0 < differed {
        tracing::warn!(view = name, position = old.0, rows = differed, "the view was not what the log says");
    }
    let top = top(&checkpoints(connection).await?);
    next.fold_to(connection, log, top, progress).await?;
    sqlx::query(&format!("analyze views_next.{name}")).execute(&mut *connection).await?;

    let rows =
        sqlx::query_scalar(&format!("select count(*) from views_next.{name}")).fetch_one(&mut *connection).await?;

    // The projector moves the checkpoints before anything else, so it waits here, holding nothing. Locked row by row,
    // they could be met in another order than by the projector.
    let mut tx = connection.begin().await?;
    sqlx::query("lock table views.checkpoints in share row exclusive mode").execute(&mut *tx).await?;
    let top = top_of(&mut tx).await?;
    next.fold_to(&mut tx, log, top, progress).await?;
    switch(&mut tx, name).await?;
    sqlx::query("update views.checkpoints set position = $2, commit_number = $3 where view = $1")
        .bind(name)
        .bind(next.position)
        .bind(next.commit)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(RebuildReport { view: name, rows, position: next.position, differed })
}

impl Next {
    /// Folds up to a commit, and not beyond.
    async fn fold_to(
        &mut self,
        connection: &mut PgConnection,
        log: &Log,
        (position, commit): (i64, i64),
        progress: &mut impl FnMut(i64, i64),
    ) -> anyhow::Result<()> {
        while self.commit < commit {
            let commits = log.commits_after(self.commit, PAGE_EVENTS).await?;
            let commits: Vec<_> = commits.into_iter().take_while(|next| next.number <= commit).map(Arc::new).collect();
            anyhow::ensure!(!commits.is_empty(), "the view is at commit {commit}, which is not in the log");
            let page = Page::read(&commits)?;
            (self.view.write)(&page, connection).await?;
            (self.position, self.commit) = (page.position, page.commit);
            progress(self.position, position);
        }
        Ok(())
    }
}

fn of(checkpoints: &[(&'static View, i64, i64)], view: &View) -> (i64, i64) {
    let found = checkpoints.iter().find(|(known, ..)| known.name == view.name);
    found.map(|(_, position, commit)| (*position, *commit)).expect("every view was asked for")
}

fn top(checkpoints: &[(&'static View, i64, i64)]) -> (i64, i64) {
    checkpoints.iter().map(|(_, position, commit)| (*position, *commit)).max().expect("there are views")
}

async fn top_of(connection: &mut PgConnection) -> anyhow::Result<(i64, i64)> {
    Ok(top(&checkpoints(connection).await?))
}

/// An empty table like the old one: its columns, indexes, settings, owner and grants.
async fn make_table(connection: &mut PgConnection, name: &str) -> anyhow::Result<()> {
    let mut tx = connection.begin().await?;
    sqlx::query("create schema if not exists views_next").execute(&mut *tx).await?;
    sqlx::query(&format!("drop table if exists views_next.{name}")).execute(&mut *tx).await?; // of a rebuild that was cut short
    sqlx::query(&format!("create table views_next.{name} (like views.{name} including all)")).execute(&mut *tx).await?;
    // What `like` leaves behind: storage parameters, owner and grants.
    let rest: Vec<String> = sqlx::query_scalar(
        "select format('alter table views_next.%I set (%s)', relname, array_to_string(reloptions, ', '))
         from pg_class where oid = $1::regclass and reloptions is not null
         union all
         select format('alter table views_next.%I owner to %s', relname, relowner::regrole)
         from pg_class where oid = $1::regclass
         union all
         select format('grant %s on views_next.%I to %s', acl.privilege_type, relname, acl.grantee::regrole)
         from pg_class, aclexplode(relacl) acl where oid = $1::regclass and acl.grantee <> 0",
    )
    .bind(format!("views.{name}"))
    .fetch_all(&mut *tx)
    .await?;
    for statement in rest {
        sqlx::query(&statement).execute(&mut *tx).await?;
    }
    tx.commit().await?;
    Ok(())
}

/// The new version takes the old one's place.
async fn switch(connection: &mut PgConnection, name: &str) -> anyhow::Result<()> {
    sqlx::query(&format!("drop table views.{name}")).execute(&mut *connection).await?;
    sqlx::query(&format!("alter table views_next.{name} set schema views")).execute(&mut *connection).await?;
    Ok(())
}
