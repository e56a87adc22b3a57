//! Amounts as this crate reckons: whole minor units in 128 bits, and nothing shared with the ledger's decimals.

use serde::{Deserialize, Serialize};

/// The currencies of a run: none, two and three minor digits.
pub(crate) const CURRENCIES: [(&str, u32); 3] = [("EUR", 2), ("JPY", 0), ("KWD", 3)];

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Money {
    pub(crate) minor: i128,
    pub(crate) currency: String,
}

impl Money {
    pub(crate) fn text(&self) -> String {
        let digits = digits(&self.currency).unwrap_or_default();
        let unit = 10_i128.pow(digits);
        let sign = if self.minor < 0 { "-" } else { "" };
        let (whole, part) = ((self.minor / unit).abs(), (self.minor % unit).abs());
        match digits {
            0 => format!("{sign}{whole}"),
            _ => format!("{sign}{whole}.{part:0width$}", width = digits as usize),
        }
    }
}

/// The minor units of a decimal text, which must have exactly its currency's digits.
pub(crate) fn minor(text: &str, currency: &str) -> Option<i128> {
    let digits = digits(currency)? as usize;
    let (sign, unsigned) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text),
    };
    let (whole, part) = unsigned.split_once('.').unwrap_or((unsigned, ""));
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !is_number(whole) || !is_number(part) || part.len() != digits {
        return None;
    }
    Some(sign * format!("{whole}{part}").parse::<i128>().ok()?)
}

fn digits(currency: &str) -> Option<u32> {
    CURRENCIES.iter().find(|(code, _)| *code == currency).map(|(_, digits)| *digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_and_written_with_exactly_the_digits_of_their_currency() {
        for (text, currency, amount) in
            [("10.50", "EUR", 1_050), ("-0.07", "EUR", -7), ("12", "JPY", 12), ("0.001", "KWD", 1)]
        {
            assert_eq!(minor(text, currency), Some(amount));
            assert_eq!(Money { minor: amount, currency: currency.to_owned() }.text(), text);
        }
        for (text, currency) in [("10.5", "EUR"), ("10.500", "EUR"), ("1.0", "JPY"), ("", "JPY"), ("1", "XXX")] {
            assert_eq!(minor(text, currency), None, "{text} {currency}");
        }
    }
}
