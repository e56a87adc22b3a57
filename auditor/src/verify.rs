//! Verifying an export: the same checks as an audit, without a database.
//!
//! The file is somebody else's: a line may be anything. One that cannot be read is a finding that names it.

use std::io::{BufRead, Read};

use anyhow::Context;

use crate::check::Check;
use crate::hash::from_hex;
use crate::record::{CheckpointLine, LedgerLine, Line, StoredCommit, StoredEvent, id};
use crate::report::{Report, ViewsChecked};

/// Far above any event: a request has at most 1 MiB.
const LINE_MAX: u64 = 16 * 1024 * 1024;

/// Checks an export from its first line to its last. `Err` means that it could not be read; what is wrong with
/// what was read is in the report. `progress` gets the bytes read so far.
pub fn verify(mut input: impl BufRead, mut progress: impl FnMut(u64)) -> anyhow::Result<Report> {
    let mut read = 0_u64;
    let mut number = 0_u64;
    let mut check = Check::begin(None);
    let mut ended = false;
    let mut line = Vec::new();
    loop {
        line.clear();
        let length = input.by_ref().take(LINE_MAX).read_until(b'\n', &mut line).context("reading the export")?;
        if length == 0 {
            break;
        }
        number = number.saturating_add(1);
        read = read.saturating_add(u64::try_from(length).unwrap_or(u64::MAX));
        if number.is_multiple_of(1_000) {
            progress(read);
        }
        let finding = match std::str::from_utf8(&line) {
            _ if ended => Err("nothing may follow the checkpoint".to_owned()),
            Ok(text) => {
                let text = text.strip_suffix('\n').unwrap_or(text);
                if number == 1 {
                    first(text).map(|begun| check = begun)
                } else {
                    following(text, &mut check, &mut ended)?
                }
            }
            Err(_) => Err("not UTF-8".to_owned()),
        };
        if let Err(why) = finding {
            let at = check.position.saturating_add(1);
            check.findings.add(at, None, "line", format!("line {number}: {why}"));
        }
    }
    progress(read);
    if number == 0 {
        check.findings.add(0, None, "line", "the export is empty");
    } else if !ended {
        let at = check.position.saturating_add(1);
        check.findings.add(at, None, "checkpoint", "the export ends without its checkpoint: its end is missing");
    }
    Ok(check.end(ViewsChecked::NotChecked { why: "an export has no views" })?)
}

/// The first line says whose log follows.
fn first(text: &str) -> Result<Check, String> {
    match serde_json::from_str(text) {
        Ok(Line::Ledger(LedgerLine { id: ledger, format: 1 })) => match id("", &ledger) {
            Some(ledger) => Ok(Check::begin(Some(ledger))),
            None => Err("the ledger's id is not a UUID".to_owned()),
        },
        Ok(Line::Ledger(LedgerLine { format, .. })) => Err(format!("format {format} is not known here")),
        Ok(_) => Err("an export begins with its ledger".to_owned()),
        Err(error) => Err(format!("an export begins with its ledger: {error}")),
    }
}

/// Every other line is an event, a commit or, last of all, the checkpoint.
fn following(text: &str, check: &mut Check, ended: &mut bool) -> std::io::Result<Result<(), String>> {
    let no_event = match StoredEvent::from_line(text) {
        Ok(event) => return check.event(&event).map(Ok),
        Err(why) => why,
    };
    Ok(match serde_json::from_str(text) {
        Ok(Line::Commit(commit)) => StoredCommit::from_line(commit).map(|commit| check.commit(&commit)),
        Ok(Line::Checkpoint(CheckpointLine { position, commit, chain })) => {
            *ended = true;
            match from_hex(&chain) {
                Some(chain) => {
                    check.checkpoint(position, commit, &chain);
                    Ok(())
                }
                None => Err("chain is not lower-case hex".to_owned()),
            }
        }
        Ok(Line::Ledger(_)) => Err("the ledger stands in the first line only".to_owned()),
        Err(_) if text.contains("\"eventId\"") => Err(no_event),
        Err(error) => Err(error.to_string()),
    })
}
