//! `daybook rebuild [VIEW]`: views made anew from the log, beside the running ones, compared and then switched.

use std::process::ExitCode;

use clap::Args;

use crate::progress::Progress;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The database that holds the log and the views. Its user must own the views.
    #[arg(long, env = "DAYBOOK_DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// One view; all of them if none is named.
    view: Option<String>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let progress = Progress::new("rebuilding");
    let reports =
        projector::rebuild(&options.database_url, options.view.as_deref(), |done, total| progress.at(done, total))
            .await?;
    drop(progress);
    if options.json {
        println!("{}", serde_json::to_string_pretty(&reports)?);
    } else {
        for report in &reports {
            let verdict = if report.differed == 0 {
                "equal to what it replaces".to_owned()
            } else {
                format!("{} rows DIFFERED and are replaced", report.differed)
            };
            println!("{}: {} rows at position {}, {verdict}", report.view, report.rows, report.position);
        }
    }
    Ok(ExitCode::SUCCESS)
}
