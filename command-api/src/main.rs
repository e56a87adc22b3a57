//! The command service as a process of its own. `daybook up` runs the same code beside all the others.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use api_contract::{Access, Seal};
use clap::Parser;
use command_api::{Commands, Settings};
use ledger_engine::Ledger;
use tokio::net::TcpListener;

/// Most of what is allocated lives as long as one request, which libc's `malloc` is slow at.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Takes commands over HTTP and writes them to the ledger.
#[derive(Parser)]
#[command(name = "command-api", version)]
struct Options {
    /// The ledger's database; its schemas must be up to date.
    #[arg(long, env = "DAYBOOK_DATABASE_URL", hide_env_values = true)]
    database_url: String,
    #[arg(long, env = "DAYBOOK_COMMANDS_LISTEN", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Where the bank's payment pages are.
    #[arg(long, env = "DAYBOOK_BANK_URL")]
    bank_url: String,
    /// A file of 32 random bytes: the key under which secrets are sealed, the same for all services. Older keys may follow
    /// it, 32 bytes each.
    #[arg(long, env = "DAYBOOK_SECRETS_KEY_FILE")]
    secrets_key_file: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    runtime::telemetry::init("command-api");
    let served = serve(options).await;
    if let Err(error) = &served {
        tracing::error!(error = %format_args!("{error:#}"), "stopped by a failure");
    }
    runtime::telemetry::flush();
    served
}

async fn serve(options: Options) -> anyhow::Result<()> {
    let seal = Seal::from_key_file(&options.secrets_key_file)?;
    let access = Access::connect(&options.database_url, seal).await.context("connecting to the schema access")?;
    let engine = ledger_engine::Settings { traces: runtime::trace::is_on(), ..ledger_engine::Settings::default() };
    let ledger = Ledger::start(&options.database_url, engine).await?;
    let state = Commands::new(ledger, access, Settings { bank_url: options.bank_url });
    let listener = TcpListener::bind(options.listen).await.context("listening")?;
    tracing::info!(address = %listener.local_addr()?, "taking commands");
    command_api::run(listener, state, runtime::shutdown::signal()).await
}
