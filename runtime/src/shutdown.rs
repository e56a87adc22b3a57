//! Stopping: one token that everything which runs long listens to.
//!
//! It only says *that* a stop is wanted. Whoever runs decides how to end: the HTTP server drains,
//! a relay finishes its batch, a stream of events says goodbye. Nobody is dropped half-way by it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{SignalKind, signal as unix_signal};
use tokio_util::sync::CancellationToken;

/// A request to stop, shared by all clones. Once triggered it stays so.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    token: CancellationToken,
    /// The same, to be looked at often: the token has a lock.
    requested: Arc<AtomicBool>,
}

/// A shutdown that SIGTERM or Ctrl-C triggers. Call it inside the tokio runtime; from its return on no signal is missed.
///
/// # Panics
/// When the process may not listen to signals, since it could then not be stopped cleanly.
pub fn signal() -> Shutdown {
    let shutdown = Shutdown::new();
    let triggered = shutdown.clone();
    let mut terminate = unix_signal(SignalKind::terminate()).expect("a process may listen to SIGTERM");
    let mut interrupt = unix_signal(SignalKind::interrupt()).expect("a process may listen to SIGINT");
    tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
            () = triggered.requested() => return,
        };
        tracing::info!(signal = name, "stopping");
        triggered.trigger();
    });
    shutdown
}

impl Shutdown {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn trigger(&self) {
        self.requested.store(true, Ordering::Release); // before whoever is woken looks
        self.token.cancel();
    }

    /// Returns once a stop is wanted, at once when it already is.
    pub async fn requested(&self) {
        self.token.cancelled().await;
    }

    pub fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Acquire)
    }
}
