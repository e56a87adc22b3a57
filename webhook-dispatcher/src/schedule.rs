//! When a failed delivery is tried again, and when it is given up.
//!
//! The waits are applied by Postgres to its own `now()`: the host's clock decides nothing here.

use std::str::FromStr;
use std::time::Duration;

use ring::rand::{SecureRandom, SystemRandom};

/// The waits between the attempts of one delivery; after the last, it is a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    waits: Vec<Duration>,
    /// Whether a little is added to each wait, so that what failed together does not come back together.
    jitter: bool,
}

/// Not a list such as `1m,5m,15m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a schedule is a list of 1 to 20 waits such as 1s,5s,1m,6h, each at most seven days")]
pub struct InvalidSchedule;

const WAITS_MAX: usize = 20;
const WAIT_MAX: Duration = Duration::from_secs(7 * 24 * 60 * 60);

impl Schedule {
    /// How long to wait after failure number `failed` (from 1); `None` when that was the last attempt.
    pub(crate) fn wait_after(&self, failed: i32) -> Option<Duration> {
        let place = usize::try_from(failed.max(1) - 1).ok()?;
        let wait = *self.waits.get(place)?;
        Some(if self.jitter { wait + jitter(wait) } else { wait })
    }

    /// How many times a delivery is sent before it is given up.
    pub(crate) fn attempts_max(&self) -> i32 {
        i32::try_from(self.waits.len()).expect("a schedule is short") + 1
    }
}

/// Up to a tenth of the wait.
fn jitter(wait: Duration) -> Duration {
    let mut random = [0; 2];
    SystemRandom::new().fill(&mut random).expect("the system has randomness");
    wait / 10 * u32::from(u16::from_be_bytes(random)) / u32::from(u16::MAX)
}

impl Default for Schedule {
    /// 1 m, 5 m, 15 m, 1 h, 6 h.
    fn default() -> Self {
        let waits = [1, 5, 15, 60, 360].map(|minutes| Duration::from_secs(60 * minutes));
        Self { waits: waits.into(), jitter: true }
    }
}

/// A schedule of one's own, kept exactly: nothing is added to its waits.
impl FromStr for Schedule {
    type Err = InvalidSchedule;

    fn from_str(text: &str) -> Result<Self, InvalidSchedule> {
        let waits: Vec<_> =
            text.split(',').map(|wait| parse(wait.trim())).collect::<Option<_>>().ok_or(InvalidSchedule)?;
        if (1..=WAITS_MAX).contains(&waits.len()) { Ok(Self { waits, jitter: false }) } else { Err(InvalidSchedule) }
    }
}

/// `500ms`, `1s`, `5m`, `6h`.
fn parse(wait: &str) -> Option<Duration> {
    let unit = wait.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = wait.split_at(unit);
    let number: u64 = number.parse().ok()?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.checked_mul(millis).map(Duration::from_millis).filter(|wait| *wait <= WAIT_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_schedule_is_1m_5m_15m_1h_6h_with_at_most_a_tenth_added() {
        let usual = Schedule::default();
        for (failed, minutes) in [(1, 1), (2, 5), (3, 15), (4, 60), (5, 360)] {
            let exact = Duration::from_secs(60 * minutes);
            for _ in 0..100 {
                let wait = usual.wait_after(failed).unwrap();
                assert!(exact <= wait && wait <= exact + exact / 10, "{wait:?} after failure {failed}");
            }
        }
        assert_eq!(usual.wait_after(6), None);
        assert_eq!(usual.attempts_max(), 6);
    }

    #[test]
    fn a_schedule_of_ones_own_is_kept_exactly() {
        let own: Schedule = "500ms, 1s,5m,6h".parse().unwrap();
        let waits: Vec<_> = (1..).map_while(|failed| own.wait_after(failed)).collect();
        assert_eq!(waits, [500, 1_000, 300_000, 21_600_000].map(Duration::from_millis));
        for wrong in ["", "1", "s", "1d", "1s,", "-1s", "1.5s", "169h", "99999999999999999999s"] {
            assert_eq!(wrong.parse::<Schedule>(), Err(InvalidSchedule), "{wrong}");
        }
    }
}
