//! Keeps the schema `access` in step with the log: what it says about partners decides who may log in.
//!
//! A privileged act is an event first; only then it is in force here. Whoever has made one brings the clients up to it
//! before answering. What a crash has cut off in between is made up for when the service starts, and every few seconds.

use std::sync::{Arc, Weak};
use std::time::Duration;

use api_contract::{Access, AccessError, PartnerChange, Problem};
use event_store::{Log, StoreError, within};
use ledger_core::{CorruptEvent, Event};

use crate::Settings;

#[derive(Debug, thiserror::Error)]
pub(crate) enum FollowError {
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error(transparent)]
    Log(#[from] StoreError),
    #[error("position {position}: {error}")]
    Corrupt { position: i64, error: CorruptEvent },
}

/// So many events at once: a page must be followed within the bound that `Access` gives it.
const PAGE: i64 = 100;

/// A connection to the log that says nothing for so long is given up.
const LOG_TIME: Duration = Duration::from_secs(10);

const EVERY: Duration = Duration::from_secs(5);

/// Brings the clients up to the log.
pub(crate) async fn follow(log: &Log, access: &Access) -> Result<(), FollowError> {
    loop {
        let events = within(LOG_TIME, log.kind_after("partner", access.followed().await?, PAGE)).await?;
        let mut changes = Vec::with_capacity(events.len());
        for recorded in &events {
            let position = recorded.position;
            let event = recorded.read().map_err(|error| FollowError::Corrupt { position, error })?;
            if let Event::Partner(partner, event) = event {
                changes.push(PartnerChange { position, partner, event });
            }
        }
        access.follow(&changes).await?;
        if (events.len() as u64) < PAGE.unsigned_abs() {
            return Ok(());
        }
    }
}

/// Follows until nobody takes commands any more.
pub(crate) async fn keep_following(log: Log, access: Access, service: Weak<Settings>) {
    while service.upgrade().map(|_: Arc<Settings>| ()).is_some() {
        if let Err(error) = follow(&log, &access).await {
            tracing::warn!(%error, "clients could not be brought up to the log");
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// The event is in the log and will be in force; that it is already cannot be said.
impl From<FollowError> for Problem {
    fn from(error: FollowError) -> Self {
        tracing::warn!(%error, "an act on a partner is in the log and not yet in force");
        Problem::of("outcome-unknown").retry_after(2)
    }
}
