//! `daybook access`: what an operator sets and reads of who may call, beside what goes over HTTP.
//!
//! It works on the database alone. Running services take up within five seconds what is changed here.

use std::process::ExitCode;

use anyhow::Context;
use api_contract::{Desk, RateLimit};
use clap::{Args, Subcommand};
use ledger_core::PartnerId;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The database that holds the schema `access`.
    #[arg(long, env = "DAYBOOK_DATABASE_URL", hide_env_values = true, global = true)]
    database_url: Option<String>,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Has the key that signs access tokens replaced. The next login makes a new one, which signs a minute later; tokens of
    /// the old one stay good until they expire.
    RotateKey {
        /// The old keys are not to be trusted: no token that they have signed is good any longer.
        #[arg(long)]
        revoke: bool,
    },
    /// Limits how many requests a partner may send to each instance.
    Limit {
        /// Such as 100/s, 600/m or 5000/h; `none` lifts the limit.
        limit: String,
        /// The partner; without one, all that have no limit of their own.
        #[arg(long)]
        partner: Option<PartnerId>,
    },
    /// Shows what was done that is no event of the log: logins, wrong secrets in numbers, clients, keys, limits; the latest first.
    Audit {
        /// Only acts of this kind, such as `logins-failing`.
        act: Option<String>,
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(i64).range(1..=100_000))]
        limit: i64,
        /// One JSON object per line.
        #[arg(long)]
        json: bool,
    },
}

pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let database_url = options.database_url.context("--database-url or DAYBOOK_DATABASE_URL must name the database")?;
    let desk = Desk::connect(&database_url).await.context("connecting to the schema access")?;
    match options.what {
        What::RotateKey { revoke } => {
            desk.replace_signing_key(revoke).await?;
            println!("{}", if revoke { "every token is revoked" } else { "the next login makes a new key" });
        }
        What::Limit { limit, partner } => {
            let rate: Option<RateLimit> = if limit == "none" { None } else { Some(limit.parse()?) };
            desk.limit_rate(partner, rate).await?;
            let whose = partner.map_or_else(|| "every partner without one of its own".to_owned(), |id| id.to_string());
            println!("the limit of {whose} is {limit}");
        }
        What::Audit { act, limit, json } => {
            for act in desk.acts(act.as_deref(), limit).await? {
                let line = serde_json::to_string(&act)?;
                let of = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
                if json {
                    println!("{line}");
                } else {
                    let (client, peer, request) = (of(act.client_id), of(act.peer), of(act.request_id));
                    println!("{}  {:<20} {client}  {peer}  {request}  {}", act.at, act.act, act.detail);
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
