//! `daybook export`: the log as a file that anyone can keep and check. The format is API.md's.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use crate::progress::Progress;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The database that holds the log.
    #[arg(long, env = "DAYBOOK_DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// The file to write; it appears under this name only when it is whole.
    #[arg(long)]
    out: PathBuf,
    /// Print what was written as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let mut unfinished = options.out.clone().into_os_string();
    unfinished.push(".unfinished");
    let file = File::create(&unfinished).with_context(|| format!("creating {}", unfinished.display()))?;
    let mut out = BufWriter::new(file);
    let progress = Progress::new("exporting");
    let summary = auditor::export(&options.database_url, &mut out, |done, total| progress.at(done, total)).await?;
    out.flush().context("writing the export")?;
    out.get_ref().sync_all().context("writing the export")?;
    std::fs::rename(&unfinished, &options.out).with_context(|| format!("naming {}", options.out.display()))?;
    drop(progress);
    if options.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        let auditor::ExportSummary { position, commit, chain, events, .. } = &summary;
        println!("{}: {events} events up to position {position}, commit {commit}", options.out.display());
        println!("chain {chain}");
    }
    Ok(ExitCode::SUCCESS)
}
