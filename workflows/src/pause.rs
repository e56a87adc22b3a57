//! Pauses between attempts: each twice as long as the one before, up to a bound.

use std::time::Duration;

use runtime::shutdown::Shutdown;

/// The pause after so many failures: `first`, twice that, four times that, …, at most `longest`.
pub(crate) fn after(failures: i32, first: Duration, longest: Duration) -> Duration {
    let doublings = u32::try_from(failures).unwrap_or(0).min(20);
    first.saturating_mul(1 << doublings).min(longest)
}

/// The pauses of a loop that must not end.
pub(crate) struct Pause {
    first: Duration,
    longest: Duration,
    failures: i32,
}

impl Pause {
    pub(crate) const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, failures: 0 }
    }

    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// Returns early when a stop is requested.
    pub(crate) async fn wait(&mut self, shutdown: &Shutdown) {
        let pause = after(self.failures, self.first, self.longest);
        self.failures = self.failures.saturating_add(1);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.requested() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_their_bound() {
        let (first, longest) = (Duration::from_secs(60), Duration::from_secs(3600));
        let minutes = [0, 1, 2, 5, 6, 1_000, i32::MAX].map(|failures| after(failures, first, longest).as_secs() / 60);
        assert_eq!(minutes, [1, 2, 4, 32, 60, 60, 60]);
    }
}
