//! `daybook verify FILE`: the second opinion on an export, without any database.

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use crate::progress::Progress;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// What `daybook export` wrote.
    file: PathBuf,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: Options) -> anyhow::Result<ExitCode> {
    let file = File::open(&options.file).with_context(|| format!("opening {}", options.file.display()))?;
    let bytes = file.metadata().context("looking at the file's size")?.len();
    let progress = Progress::new("verifying");
    let at = |read: u64| progress.at(i64::try_from(read).unwrap_or(i64::MAX), i64::try_from(bytes).unwrap_or(i64::MAX));
    let report = auditor::verify(BufReader::new(file), at)?;
    drop(progress);
    crate::audit::print(&report, options.json)
}
