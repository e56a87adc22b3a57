//! `daybook audit`: the second opinion on a database. Exit code 0 means sound, 1 means not.

use std::process::ExitCode;

use clap::Args;

use crate::progress::Progress;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The database that holds the log and the views.
    #[arg(long, env = "DAYBOOK_DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let progress = Progress::new("auditing");
    let report = auditor::audit(&options.database_url, |done, total| progress.at(done, total)).await?;
    drop(progress);
    print(&report, options.json)
}

/// The same for a database and for an export.
pub(crate) fn print(report: &auditor::Report, json: bool) -> anyhow::Result<ExitCode> {
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        println!("{report}");
    }
    Ok(if report.is_sound() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}
