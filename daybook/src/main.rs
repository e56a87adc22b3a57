//! The whole system in one process, and the command line of those who run and check it.
//!
//! `daybook` alone is `daybook up`. Every command is one file; what a command does is in the crate it calls.
//! Nothing else may depend on this crate.
#![expect(
    clippy::print_stdout,
    reason = "the command line answers on standard output; its services log to standard error"
)]

mod access;
mod audit;
mod bench;
mod connection;
mod demo;
mod doctor;
mod export;
mod installation;
mod migrate;
mod progress;
mod rebuild;
mod receive;
mod tail;
mod terminal;
mod torture;
mod up;
mod verify;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

/// Most of what is allocated lives as long as one request: with libc's `malloc`, a sixth of the server's time went there.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// An event-sourced wallet ledger that can prove itself.
#[derive(Debug, Parser)]
#[command(name = "daybook", version)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Starts the whole system on a private Postgres and NATS, and prints its URL. The default.
    Up(up::Options),
    /// Makes a database ready for services that are started each by itself; `up` does it on its own.
    Migrate(migrate::Options),
    /// Re-derives everything from the log and checks it; names the first bad position.
    Audit(audit::Options),
    /// Writes the whole log to a file that anyone can check.
    Export(export::Options),
    /// Checks an export: hashes, chain and balances. Needs no database.
    Verify(verify::Options),
    /// Rebuilds views from the log, beside the running ones, and says whether they differed.
    Rebuild(rebuild::Options),
    /// Replaces signing keys, limits partners, shows who logged in.
    Access(access::Options),
    /// Plays traffic as people make it, and checks that its outcome is what was computed beforehand.
    Demo(demo::Options),
    /// Says what is wrong with this machine, these servers, these settings, and what to do about it. Changes nothing.
    Doctor(doctor::Options),
    /// Shows the log as it grows: one line for each event, in words.
    Tail(tail::Options),
    /// Receives webhooks, checks their signatures and prints them: a receiver to try things with.
    Receive(receive::Options),
    /// Kills, cuts and stalls a system of its own under load, and checks from outside that every promise was kept.
    Torture(torture::Options),
    /// Measures how fast the ledger is on this machine, beside pgbench, and what it does under too much load.
    Bench(bench::Options),
    #[command(hide = true)]
    BenchCommands(bench::CommandsOptions),
}

fn main() -> ExitCode {
    // `daybook` alone, and `daybook --listen …`, mean `daybook up`.
    let mut arguments: Vec<_> = std::env::args_os().collect();
    let wants_up = arguments.get(1).is_none_or(|first| {
        let first = first.to_string_lossy();
        first.starts_with("--") && !["--help", "--version"].contains(&&*first)
    });
    if wants_up {
        arguments.insert(1.min(arguments.len()), "up".into());
    }
    let options = Options::parse_from(arguments);
    // For HTTPS to webhook receivers; nothing else speaks TLS before this.
    rustls::crypto::ring::default_provider().install_default().expect("installed once, here");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        let done = runtime.block_on(run(options));
        // Dropped, it would wait for threads without a bound: one that asks a silent name server can take minutes.
        runtime.shutdown_timeout(THREADS_TIME);
        done
    });
    done.unwrap_or_else(|error| {
        eprintln!("daybook: {error:#}");
        ExitCode::from(2)
    })
}

/// For threads that are still busy when all is done; nothing depends on what they find.
const THREADS_TIME: Duration = Duration::from_millis(500);

async fn run(options: Options) -> anyhow::Result<ExitCode> {
    match options.command {
        Command::Up(options) => up::run(options).await,
        Command::Migrate(options) => migrate::run(options).await,
        Command::Audit(options) => audit::run(options).await,
        Command::Export(options) => export::run(options).await,
        Command::Verify(options) => verify::run(options),
        Command::Rebuild(options) => rebuild::run(options).await,
        Command::Access(options) => access::run(options).await,
        Command::Demo(options) => demo::run(options).await,
        Command::Doctor(options) => doctor::run(options).await,
        Command::Tail(options) => tail::run(options).await,
        Command::Receive(options) => receive::run(options).await,
        Command::Torture(options) => torture::run(options).await,
        Command::Bench(options) => bench::run(options).await,
        Command::BenchCommands(options) => bench::serve_commands(options).await,
    }
}
