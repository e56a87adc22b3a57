//! The bank as a process of its own. Secrets come from the environment only, where `ps` does not show them.

use std::net::SocketAddr;
use std::path::PathBuf;

use bank_simulator::Config;
use clap::Parser;
use tokio::net::TcpListener;

/// A simulated bank: collects payments, tells its merchant with signed callbacks, and misbehaves on request.
///
/// DAYBOOK_BANK_CALLBACK_SECRET and DAYBOOK_BANK_API_KEY must be set; they are shared with the merchant.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Where to listen; port 0 picks a free one.
    #[arg(long, env = "DAYBOOK_BANK_LISTEN", default_value = "127.0.0.1:8090")]
    listen: SocketAddr,
    /// The file in which the bank remembers across restarts; without it, it forgets.
    #[arg(long, env = "DAYBOOK_BANK_JOURNAL")]
    journal: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    runtime::telemetry::init("bank-simulator");
    let config = Config {
        callback_secret: secret("DAYBOOK_BANK_CALLBACK_SECRET")?,
        api_key: secret("DAYBOOK_BANK_API_KEY")?,
        journal: options.journal,
    };
    let listener = TcpListener::bind(options.listen).await?;
    tracing::info!(address = %listener.local_addr()?, "open for business");
    let ended = bank_simulator::run(listener, config, runtime::shutdown::signal()).await;
    runtime::telemetry::flush();
    ended
}

fn secret(name: &str) -> anyhow::Result<String> {
    let value = std::env::var(name).unwrap_or_default();
    anyhow::ensure!(!value.is_empty(), "{name} is not set");
    Ok(value)
}
