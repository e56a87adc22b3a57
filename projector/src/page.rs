//! A page of the log as views fold it: read once, written into every view.

use std::sync::Arc;

use event_feed::{Commit, RecordedEvent, StoreError};
use ledger_core::{CorruptEvent, Event, Timestamp};
use runtime::trace::Stage;
use sqlx::Row;
use sqlx::postgres::PgRow;
use time::OffsetDateTime;

/// Whole commits, contiguous.
pub(crate) struct Page {
    pub(crate) events: Vec<Happened>,
    /// Of its last event.
    pub(crate) position: i64,
    pub(crate) commit: i64,
    /// Of the traces in it, if any is followed.
    pub(crate) stage: Option<Stage>,
}

pub(crate) struct Happened {
    pub(crate) position: i64,
    pub(crate) recorded_at: Timestamp,
    pub(crate) event: Event,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum PageError {
    #[error("position {position} cannot be read: {source}")]
    Corrupt { position: i64, source: CorruptEvent },
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Page {
    /// Reads the commits' events.
    pub(crate) fn read(commits: &[Arc<Commit>]) -> Result<Self, PageError> {
        let last = commits.last().expect("a page has commits");
        let mut events = Vec::with_capacity(commits.iter().map(|commit| commit.events.len()).sum());
        for recorded in commits.iter().flat_map(|commit| &commit.events) {
            events.push(Happened::of(recorded)?);
        }
        Ok(Self { events, position: last.last, commit: last.number, stage: None })
    }

    /// The page after this one becomes a part of it.
    pub(crate) fn add(&mut self, next: Self) {
        self.events.extend(next.events);
        (self.position, self.commit) = (next.position, next.commit);
        self.stage = self.stage.take().or(next.stage);
    }
}

/// Columns of an event `e` of the log, for [`Happened::from_row`].
pub(crate) const EVENT: &str = "e.position as event_position, e.aggregate_type, e.aggregate_id, e.event_type, e.event_version, \
    e.payload::text as payload, e.recorded_at";

impl Happened {
    pub(crate) fn of(recorded: &RecordedEvent) -> Result<Self, PageError> {
        let position = recorded.position;
        let event = recorded.read().map_err(|source| PageError::Corrupt { position, source })?;
        Ok(Self { position, recorded_at: recorded.recorded_at, event })
    }

    /// `None` from a row that has no event.
    pub(crate) fn from_row(row: &PgRow) -> Result<Option<Self>, PageError> {
        let columns = || -> sqlx::Result<_> {
            let Some(position) = row.try_get::<Option<i64>, _>("event_position")? else { return Ok(None) };
            let recorded_at: OffsetDateTime = row.try_get("recorded_at")?;
            let event = Event::read(
                row.try_get("aggregate_type")?,
                row.try_get("aggregate_id")?,
                row.try_get("event_type")?,
                row.try_get("event_version")?,
                row.try_get("payload")?,
            );
            Ok(Some((position, recorded_at, event)))
        };
        let Some((position, recorded_at, event)) = columns().map_err(StoreError::from)? else { return Ok(None) };
        let recorded_at = Timestamp::try_from(recorded_at).map_err(|error| StoreError::Corrupt(error.to_string()))?;
        let event = event.map_err(|source| PageError::Corrupt { position, source })?;
        Ok(Some(Self { position, recorded_at, event }))
    }
}
