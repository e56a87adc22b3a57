//! An export: the log as lines of JSON that anyone can check. Format: API.md, "The log".
//!
//! It is written as it stands in the tables, right or wrong: judging is for whoever reads it.

use std::io::Write;

use anyhow::Context;
use serde::Serialize;

use crate::hash::hex;
use crate::record::{CheckpointLine, LedgerLine, Line};
use crate::rows::Rows;

/// What was written; `position`, `commit` and `chain` are the checkpoint in its last line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExportSummary {
    pub ledger: uuid::Uuid,
    pub position: i64,
    pub commit: i64,
    /// Lower-case hex.
    pub chain: String,
    pub events: i64,
    pub bytes: u64,
}

/// Writes the log as it is at the start: what is appended meanwhile is not in it. `progress` gets the position
/// reached and the head's.
pub async fn export(
    database_url: &str,
    out: impl Write,
    mut progress: impl FnMut(i64, i64),
) -> anyhow::Result<ExportSummary> {
    let mut rows = Rows::open(database_url).await?;
    let mut out = Lines { out, bytes: 0 };
    let ledger = rows.ledger.context("the ledger has no id")?;
    out.line(&Line::Ledger(LedgerLine { id: ledger.to_string(), format: 1 }))?;
    let genesis = rows.next_commit().await?.filter(|commit| commit.number == 0).context("commit 0 is missing")?;
    let mut summary = ExportSummary { ledger, position: 0, commit: 0, chain: hex(&genesis.chain), events: 0, bytes: 0 };
    let mut shown = 0_i64;
    while let Some(commit) = rows.next_commit().await? {
        while let Some(event) = rows.next_event(commit.last).await? {
            let line = event.to_line().with_context(|| format!("position {} cannot be exported", event.position))?;
            out.text(&line)?;
            summary.events = summary.events.saturating_add(1);
        }
        out.line(&commit.to_line())?;
        (summary.position, summary.commit, summary.chain) = (commit.last, commit.number, hex(&commit.chain));
        if 1_000 <= summary.position.saturating_sub(shown) {
            shown = summary.position;
            progress(shown, rows.head);
        }
    }
    let ExportSummary { position, commit, chain, .. } = &summary;
    out.line(&Line::Checkpoint(CheckpointLine { position: *position, commit: *commit, chain: chain.clone() }))?;
    out.out.flush().context("writing the export")?;
    progress(*position, rows.head);
    rows.close().await;
    summary.bytes = out.bytes;
    Ok(summary)
}

struct Lines<W> {
    out: W,
    bytes: u64,
}

impl<W: Write> Lines<W> {
    fn line(&mut self, line: &Line) -> anyhow::Result<()> {
        self.text(&serde_json::to_string(line)?)
    }

    fn text(&mut self, text: &str) -> anyhow::Result<()> {
        self.out.write_all(text.as_bytes()).and_then(|()| self.out.write_all(b"\n")).context("writing the export")?;
        let written = u64::try_from(text.len()).unwrap_or(u64::MAX).saturating_add(1);
        self.bytes = self.bytes.saturating_add(written);
        Ok(())
    }
}
