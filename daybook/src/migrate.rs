//! `daybook migrate`: makes a database ready for services that are started each by itself.
//!
//! `daybook up` does all of this on its own. Here it is a step of its own, for a deployment: schemas, roles and the
//! opening of the ledger, and the clients that nobody could be given over HTTP, since an administrator comes first.
//! Secrets come from the environment only, where `ps` does not show them. Repeating it changes nothing.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use api_contract::{Access, NewClient, Scopes, Seal, Secret};
use clap::Args;
use ledger_core::ClientId;

#[derive(Debug, Args)]
#[command(
    after_help = "DAYBOOK_ADMIN_CLIENT_SECRET and DAYBOOK_WORKFLOWS_CLIENT_SECRET hold the secrets of the clients named."
)]
pub(crate) struct Options {
    /// The database; its user must own it, and be allowed to make roles.
    #[arg(long, env = "DAYBOOK_DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// A file of 32 random bytes: the key under which secrets are sealed, the same for all services. Older keys may follow
    /// it, 32 bytes each.
    #[arg(long, env = "DAYBOOK_SECRETS_KEY_FILE")]
    secrets_key_file: Option<PathBuf>,
    /// The administrator's client, with every right: `cli_` and a UUID.
    #[arg(long, env = "DAYBOOK_ADMIN_CLIENT_ID", requires = "secrets_key_file")]
    admin_client_id: Option<ClientId>,
    /// The client as which the workflows issue commands.
    #[arg(long, env = "DAYBOOK_WORKFLOWS_CLIENT_ID", requires = "secrets_key_file")]
    workflows_client_id: Option<ClientId>,
}

/// Secrets are stored as a plain hash, which is enough for what nobody can guess, and for nothing else.
const SECRET_LENGTH_MIN: usize = 32;

pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    migrations::run(&options.database_url).await?;
    println!("the database is up to date");
    let Some(key_file) = &options.secrets_key_file else { return Ok(ExitCode::SUCCESS) };
    let access =
        Access::connect(&options.database_url, Seal::from_key_file(key_file)?).await.context("the schema access")?;
    let clients = [
        (options.admin_client_id, Scopes::ADMIN, "DAYBOOK_ADMIN_CLIENT_SECRET"),
        (options.workflows_client_id, Scopes::WORKFLOW, "DAYBOOK_WORKFLOWS_CLIENT_SECRET"),
    ];
    for (id, scopes, variable) in clients {
        let Some(id) = id else { continue };
        let secret = Secret::new(secret(variable)?);
        access.ensure_client(NewClient { id, partner: None, secret, scopes }).await?;
        println!("{id} may get tokens for: {scopes}");
    }
    Ok(ExitCode::SUCCESS)
}

fn secret(variable: &str) -> anyhow::Result<String> {
    let secret = std::env::var(variable).unwrap_or_default();
    ensure!(
        SECRET_LENGTH_MIN <= secret.len(),
        "{variable} must hold at least {SECRET_LENGTH_MIN} random characters, such as `openssl rand -hex 32` prints"
    );
    Ok(secret)
}
