//! An audit: the whole log of a database, and the views beside it, in one snapshot.

use crate::check::Check;
use crate::report::Report;
use crate::rows::Rows;
use crate::views::Views;

/// Re-derives everything in the database and compares. `Err` means that it could not be read; what is wrong with
/// what was read is in the report. `progress` gets the position reached and the head's.
pub async fn audit(database_url: &str, mut progress: impl FnMut(i64, i64)) -> anyhow::Result<Report> {
    let mut rows = Rows::open(database_url).await?;
    let head = rows.head;
    let mut views = Views::open(rows.connection(), head).await?;
    let mut check = Check::begin(rows.ledger);
    if rows.ledger.is_none() {
        check.findings.add(0, Some(0), "genesis", "the ledger has no id");
    }
    let mut next = rows.next_commit().await?;
    match &next {
        Some(commit) if commit.number <= 0 => {
            check.genesis(commit);
            next = rows.next_commit().await?;
        }
        _ => check.findings.add(0, Some(0), "genesis", "commit 0 is missing"),
    }
    let mut shown = 0_i64;
    while let Some(commit) = next {
        while let Some(event) = rows.next_event(commit.last).await? {
            check.event(&event)?;
        }
        check.commit(&commit);
        views.reached(check.position, &check.fold);
        if 1_000 <= check.position.saturating_sub(shown) {
            shown = check.position;
            progress(shown, head);
        }
        next = rows.next_commit().await?;
    }
    // What lies behind the last commit is in no commit.
    while let Some(event) = rows.next_event(i64::MAX).await? {
        check.event(&event)?;
    }
    progress(head, head);
    let compared = views.compare(rows.connection(), &check.fold, &mut check.findings).await?;
    rows.close().await;
    Ok(check.end(compared)?)
}
