//! The operator's desk: what is set and read in the schema `access` by hand, from the command line.
//!
//! It needs the database and no sealing key: it opens and seals nothing. Running services learn of what is changed
//! here by themselves, within five seconds.

use std::str::FromStr;

use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use ledger_core::PartnerId;

use crate::audit::{self, RecordedAct};
use crate::{AccessError, RateLimit, rate, signing};

pub struct Desk(PgPool);

impl Desk {
    /// Connects as the role `daybook_access`.
    pub async fn connect(database_url: &str) -> Result<Self, AccessError> {
        let options = PgConnectOptions::from_str(database_url)?.application_name("daybook_access");
        let options = options.options([("role", "daybook_access"), ("statement_timeout", "30s")]);
        Ok(Self(PgPoolOptions::new().max_connections(1).connect_with(options).await?))
    }

    /// Has the signing key replaced: the next login makes a new one, which signs once it is known everywhere. `at_once`:
    /// no token that was signed before is good any longer, and who wants to go on must log in again.
    pub async fn replace_signing_key(&self, at_once: bool) -> Result<(), AccessError> {
        let mut tx = self.0.begin().await?;
        signing::replace(&mut tx, at_once).await?;
        Ok(tx.commit().await?)
    }

    /// Limits the requests of a partner, or of all that have no limit of their own. `None`: no limit.
    pub async fn limit_rate(&self, partner: Option<PartnerId>, limit: Option<RateLimit>) -> Result<(), AccessError> {
        Ok(rate::set(&self.0, partner, limit).await?)
    }

    /// What was written down last, of one kind or of all, the latest first.
    pub async fn acts(&self, act: Option<&str>, limit: i64) -> Result<Vec<RecordedAct>, AccessError> {
        Ok(audit::latest(&self.0, act, limit).await?)
    }
}
