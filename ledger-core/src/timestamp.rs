//! Points in time as the log keeps them: whole microseconds since 1970, UTC, printed as RFC 3339.
//!
//! There is no `now` here: a decision has no clock.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Microseconds since 1970-01-01T00:00:00Z, between the years 1 and 9999.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

/// Not an RFC 3339 date and time in the years 1 to 9999.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an RFC 3339 time")]
pub struct InvalidTimestamp;

impl Timestamp {
    pub const EPOCH: Self = Self(0);

    pub fn from_micros(micros: i64) -> Result<Self, InvalidTimestamp> {
        let nanos = i128::from(micros).checked_mul(1_000).ok_or(InvalidTimestamp)?;
        Self::try_from(OffsetDateTime::from_unix_timestamp_nanos(nanos).map_err(|_| InvalidTimestamp)?)
    }

    pub const fn micros(self) -> i64 {
        self.0
    }

    pub fn date_time(self) -> OffsetDateTime {
        let nanos = i128::from(self.0).saturating_mul(1_000);
        OffsetDateTime::from_unix_timestamp_nanos(nanos).expect("constructors admit the years 1 to 9999 only")
    }
}

impl TryFrom<OffsetDateTime> for Timestamp {
    type Error = InvalidTimestamp;

    /// Cuts what is finer than a microsecond: the log could not keep it.
    fn try_from(at: OffsetDateTime) -> Result<Self, InvalidTimestamp> {
        let at = at.checked_to_offset(time::UtcOffset::UTC).ok_or(InvalidTimestamp)?;
        if !(1..=9999).contains(&at.year()) {
            return Err(InvalidTimestamp);
        }
        let micros = at.unix_timestamp_nanos().div_euclid(1_000);
        i64::try_from(micros).map(Self).map_err(|_| InvalidTimestamp)
    }
}

/// Like `2026-11-20T10:00:00.123456Z`.
const TEXT_LENGTH: usize = 27;

/// Written out in one piece: an event and its answer hold half a dozen times.
fn text(at: OffsetDateTime, buffer: &mut [u8; TEXT_LENGTH]) -> &str {
    *buffer = *b"0000-00-00T00:00:00.000000Z";
    write_digits(&mut buffer[..4], at.year().unsigned_abs());
    let parts = [u8::from(at.month()), at.day(), at.hour(), at.minute(), at.second()];
    for (place, part) in [5, 8, 11, 14, 17].into_iter().zip(parts) {
        write_digits(&mut buffer[place..][..2], u32::from(part));
    }
    write_digits(&mut buffer[20..26], at.microsecond());
    std::str::from_utf8(buffer).expect("digits and signs are ASCII")
}

/// The number's last digits, as many as there are places.
fn write_digits(places: &mut [u8], mut number: u32) {
    for place in places.iter_mut().rev() {
        *place = b"0123456789"[(number % 10) as usize];
        number /= 10;
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(text(self.date_time(), &mut [0; TEXT_LENGTH]))
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Timestamp {
    type Err = InvalidTimestamp;

    fn from_str(text: &str) -> Result<Self, InvalidTimestamp> {
        Self::try_from(OffsetDateTime::parse(text, &Rfc3339).map_err(|_| InvalidTimestamp)?)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(text(self.date_time(), &mut [0; TEXT_LENGTH]))
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        crate::text::from_text(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_printed_in_utc_with_six_digits_and_reads_back() {
        let at: Timestamp = "2026-11-20T12:00:00.1234567+02:00".parse().unwrap();
        assert_eq!(at.to_string(), "2026-11-20T10:00:00.123456Z");
        assert_eq!(at.to_string().parse(), Ok(at));
        assert_eq!(Timestamp::from_micros(at.micros()), Ok(at));
        assert_eq!(Timestamp::from_micros(-1).unwrap().to_string(), "1969-12-31T23:59:59.999999Z");
        for text in ["0001-01-01T00:00:00.000000Z", "9999-12-31T23:59:59.999999Z", "2026-01-02T03:04:05.000006Z"] {
            assert_eq!(text.parse::<Timestamp>().unwrap().to_string(), text);
            assert_eq!(serde_json::to_value(text.parse::<Timestamp>().unwrap()).unwrap(), text);
        }
    }

    #[test]
    fn what_is_not_a_time_is_refused() {
        for wrong in ["", "yesterday", "2026-11-20", "2026-11-20T12:00:00", "2026-13-01T00:00:00Z"] {
            assert!(wrong.parse::<Timestamp>().is_err(), "{wrong}");
        }
        assert!(Timestamp::from_micros(i64::MAX).is_err());
    }
}
