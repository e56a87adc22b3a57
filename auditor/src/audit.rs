//! An audit: the whole log of a database, and the views beside it, in one snapshot.

use crate::check::Check;
use crate::report::Report;
use crate::rows::{Next, Rows};
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
    let mut begun = false;
    let mut reading = rows.read();
    while let Some(page) = reading.next().await {
        for next in page {
            let genesis = !std::mem::replace(&mut begun, true);
            match next {
                Next::Commit(commit) if genesis && commit.number <= 0 => check.genesis(&commit),
                next => {
                    if genesis {
                        check.findings.add(0, Some(0), "genesis", "commit 0 is missing");
                    }
                    match next {
                        Next::Event(event) => check.event(&event)?,
                        Next::Commit(commit) => {
                            check.commit(&commit);
                            views.reached(check.position, &check.fold);
                        }
                    }
                }
            }
        }
        progress(check.position, head);
    }
    let mut rows = reading.end().await?;
    if !begun {
        check.findings.add(0, Some(0), "genesis", "commit 0 is missing");
    }
    progress(head, head);
    let compared = views.compare(rows.connection(), &check.fold, &mut check.findings).await?;
    rows.close().await;
    Ok(check.end(compared)?)
}
