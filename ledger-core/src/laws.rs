//! Laws of what is read here, for any bytes at all. Each is stated once: the tests below run it for a moment, the targets in
//! `fuzz/` for as long as one likes. A law panics where it does not hold.
//!
//! Compiled for tests and for fuzzing alone.
#![expect(clippy::expect_used, clippy::missing_panics_doc, reason = "a law that is broken says so by panicking")]

use crate::{AmountError, Currency, Event, Money};

/// An amount is read as exactly what was written, digit by digit, or refused for the first reason there is; and what was
/// read prints as it was written, with all minor digits, and reads back.
///
/// The first byte picks the currency; the rest is what the client wrote.
pub fn amount(bytes: &[u8]) {
    let Some((pick, text)) = bytes.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let code = ["JPY", "EUR", "KWD"][usize::from(pick % 3)];
    let currency: Currency = code.parse().expect("a currency");
    let read = Money::parse(text, currency);
    assert_eq!(read.map(|money| money.amount().to_string()), written(text, currency), "{text:?} in {code}");
    if let Ok(money) = read {
        let printed = money.amount().to_string();
        assert_eq!(Money::parse(&printed, currency), Ok(money), "{text:?} is printed as {printed}");
        assert_eq!(printed.parse(), Ok(money.amount()), "{printed} in history");
    }
}

/// What an amount must print as, from its letters alone: no number is made of them.
fn written(text: &str, currency: Currency) -> Result<String, AmountError> {
    let digits = currency.minor_digits();
    let unsigned = text.strip_prefix('-').unwrap_or(text);
    let (whole, fraction) = unsigned.split_once('.').unwrap_or((unsigned, ""));
    let all_digits = unsigned.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') && !fraction.contains('.');
    let whole_is_one = whole == "0" || !whole.is_empty() && !whole.starts_with('0');
    if !all_digits || !whole_is_one || unsigned.ends_with('.') {
        return Err(AmountError::Format);
    }
    if 18 < whole.len().saturating_add(fraction.trim_end_matches('0').len()) {
        return Err(AmountError::OutOfRange);
    }
    let width = usize::try_from(digits).expect("few digits");
    if width < fraction.len() {
        return Err(AmountError::Precision { currency, digits });
    }
    if text.starts_with('-') || unsigned.bytes().all(|byte| matches!(byte, b'0' | b'.')) {
        return Err(AmountError::NotPositive);
    }
    Ok(if width == 0 { whole.to_owned() } else { format!("{whole}.{fraction:0<width$}") })
}

/// Whatever is read as an event is written as an event that reads as the same; whatever is none is refused.
///
/// Four lines of an event's columns (type and id of its aggregate, its own type and version), then the payload.
pub fn event(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let mut parts = text.splitn(5, '\n');
    let mut next = || parts.next().unwrap_or_default();
    let (aggregate_type, aggregate_id, event_type, version, payload) = (next(), next(), next(), next(), next());
    let Ok(event) = Event::read(aggregate_type, aggregate_id, event_type, version, payload) else { return };
    assert_eq!((event.aggregate_type(), &*event.aggregate_id()), (aggregate_type, aggregate_id));
    let written = event.payload();
    let read = Event::read(aggregate_type, aggregate_id, event.event_type(), event.event_version(), &written);
    let read = read.unwrap_or_else(|error| panic!("written and not read again: {error}: {written}"));
    assert_eq!(read, event, "{payload} was written as {written}");
    assert_eq!(read.payload(), written);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    /// The samples of history, as [`event`] takes them.
    fn samples() -> Vec<Vec<u8>> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/history");
        let files = std::fs::read_dir(folder).unwrap();
        let samples: Vec<_> = files.map(|file| sample(&std::fs::read(file.unwrap().path()).unwrap())).collect();
        assert!(10 < samples.len());
        samples
    }

    fn sample(file: &[u8]) -> Vec<u8> {
        let sample: serde_json::Value = serde_json::from_slice(file).unwrap();
        let text = |name: &str| sample[name].as_str().unwrap().to_owned();
        let columns = ["aggregateType", "aggregateId", "eventType", "eventVersion"].map(text).join("\n");
        format!("{columns}\n{}", sample["payload"]).into_bytes()
    }

    #[test]
    fn every_sample_of_history_keeps_the_law_of_events() {
        samples().iter().for_each(|sample| event(sample));
    }

    proptest! {
        #[test]
        fn amounts_keep_their_law(pick in any::<u8>(), text in "-?[0-9]{0,12}\\.?[0-9]{0,8}|[-+0-9.eE_, ]{0,24}|.{0,12}") {
            amount(&[&[pick], text.as_bytes()].concat());
        }

        #[test]
        fn damaged_events_keep_their_law(
            sample in any::<Index>(),
            damage in prop::collection::vec((any::<Index>(), prop::option::of(any::<u8>())), 0..3),
        ) {
            let samples = samples();
            let mut bytes = sample.get(&samples).clone();
            for (place, byte) in damage {
                let place = place.index(bytes.len());
                match byte {
                    Some(byte) => bytes[place] = byte,
                    None => { bytes.remove(place); }
                }
            }
            event(&bytes);
        }

        #[test]
        fn any_numbers_in_metadata_are_kept(number in any::<f64>(), digits in "-?(0|[1-9][0-9]{0,25})(\\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?") {
            for number in [number.to_string(), digits] {
                let payload = format!(r#"{{"WalletOpened":{{"kind":"CUSTOMER","partnerId":"par_0192f0c1-2d3e-7abc-8def-0123456789ad","userId":"u","currency":"EUR","metadata":{{"n":{number}}},"walletVersion":1,"balanceAfter":"0.00"}}}}"#);
                event(format!("wallet\nwal_0192f0c1-2d3e-7abc-8def-0123456789ab\nWalletOpened\n1.0.0\n{payload}").as_bytes());
            }
        }
    }
}
