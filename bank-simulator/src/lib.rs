//! The outside world: a bank that collects money from payers and tells its merchants so.
//!
//! Merchants register payments and ask about them, payers approve or decline on a page (or through
//! its scripted twin, which can also make the bank misbehave), and signed callbacks carry the outcome.
//! The bank keeps its own book in its own arithmetic. Nothing of the ledger is used here, since what
//! shares its mistakes could not show them; of ours it knows only `runtime`.

mod bank;
mod book;
mod callback;
mod journal;
mod money;
mod page;
mod routes;

use std::future::pending;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use runtime::http::Limits;
use runtime::shutdown::Shutdown;
use tokio::net::TcpListener;
use tokio::time::timeout;

use crate::bank::Bank;
use crate::callback::Callbacks;
use crate::journal::Journal;

/// What a bank needs to know. There are no default secrets.
#[derive(Clone)]
pub struct Config {
    /// The key of the callbacks' signatures, shared with the merchant.
    pub callback_secret: String,
    /// The merchant's bearer key for registering payments and asking about them.
    pub api_key: String,
    /// Where the bank remembers; without it, a stop forgets everything.
    pub journal: Option<PathBuf>,
}

/// Runs the bank until the shutdown. An error means that it cannot keep its book any more.
pub async fn run(listener: TcpListener, config: Config, shutdown: Shutdown) -> anyhow::Result<()> {
    ensure!(!config.callback_secret.is_empty(), "the callback secret is empty");
    ensure!(!config.api_key.is_empty(), "the API key is empty");
    let _ = rustls::crypto::ring::default_provider().install_default(); // an error says that there is one already
    let (journal, entries, failure) = match &config.journal {
        Some(path) => {
            let opened = Journal::open(path).with_context(|| format!("the journal {}", path.display()))?;
            (opened.0, opened.1, Some(opened.2))
        }
        None => (Journal::in_memory(), Vec::new(), None),
    };
    let callbacks = Callbacks::new(&config.callback_secret, shutdown.clone())?;
    let bank = Bank::open(journal, &entries, callbacks);
    let router = routes::router(bank.clone(), &config.api_key);
    let limits = Limits { body_bytes: BODY_BYTES, ..Limits::default() };
    let lost = async {
        match failure {
            Some(failure) => failure.await.ok(),
            None => pending().await,
        }
    };
    tokio::select! {
        served = runtime::http::serve(listener, router, limits, shutdown) => served?,
        Some(error) = lost => return Err(error).context("the journal can no longer be written"),
    }
    timeout(CLOSE_TIME, bank.close()).await.context("the bank did not close in time")
}

const BODY_BYTES: usize = 64 * 1024;
const CLOSE_TIME: Duration = Duration::from_secs(5);
