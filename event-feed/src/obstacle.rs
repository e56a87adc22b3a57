//! What keeps a consumer from going on and will not pass by waiting: a log that cannot be read, or is another one.
//!
//! Outages are not told here: they pass, and a consumer that waits for one does its work. Shared by the task that
//! follows and by the readiness of its service.

use std::sync::{Arc, Mutex, PoisonError};

/// Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Obstacle(Arc<Mutex<Option<String>>>);

impl Obstacle {
    /// There is one. Answers whether it is news, so that it is logged once.
    pub fn met(&self, what: &str) -> bool {
        let mut met = self.0.lock().unwrap_or_else(PoisonError::into_inner); // a text cannot be half-written
        let is_news = met.as_deref() != Some(what);
        *met = Some(what.to_owned());
        is_news
    }

    /// The consumer went on.
    pub fn passed(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// For readiness: `Err` with what it is.
    pub fn check(&self) -> Result<(), String> {
        let met = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        met.clone().map_or(Ok(()), Err)
    }
}
