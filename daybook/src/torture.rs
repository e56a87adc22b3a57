//! `daybook torture`: the promises under crashes, on a system of its own. Exit code 0 means that all were kept.

use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// What the faults follow from. The same seed has the same faults in the same order.
    #[arg(long)]
    seed: Option<u64>,
    /// How long it takes, about; from five minutes on the process is killed at least twenty times. 0 is a few faults.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=1440))]
    minutes: u64,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let seed = match options.seed {
        Some(seed) => seed,
        None => u64::from(std::process::id()) ^ (uuid::Uuid::now_v7().as_u64_pair().1 & 0xffff_ffff),
    };
    let length = match options.minutes {
        0 => torture::Length::Short,
        minutes => torture::Length::Minutes(minutes),
    };
    let program = std::env::current_exe().context("finding this program")?;
    let shutdown = runtime::shutdown::signal();
    // The report alone is on standard output.
    let run = torture::run(torture::Options { program, seed, length }, |line| eprintln!("{line}"));
    let report = tokio::select! {
        report = run => report?,
        () = shutdown.requested() => bail!("stopped before its end; its processes end with it"),
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{report}");
    }
    Ok(if report.is_sound() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}
