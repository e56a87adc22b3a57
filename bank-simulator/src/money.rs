//! The bank's own arithmetic: minor units in integers.
//!
//! It is deliberately not the ledger's. Two books that share their arithmetic share its mistakes, and
//! comparing them would prove nothing.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Digits of an amount, before and after the point together.
const DIGITS_MAX: usize = 18;

/// An ISO 4217 code, as far as a bank can tell: three upper-case letters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Currency(String);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Minor(u128);

impl TryFrom<String> for Currency {
    type Error = &'static str;

    fn try_from(code: String) -> Result<Self, Self::Error> {
        let fits = code.len() == 3 && code.bytes().all(|byte| byte.is_ascii_uppercase());
        fits.then_some(Self(code)).ok_or("a currency is three upper-case letters")
    }
}

impl Currency {
    /// Digits after the point, by ISO 4217.
    fn minor_digits(&self) -> usize {
        match self.0.as_str() {
            "BIF" | "CLP" | "DJF" | "GNF" | "ISK" | "JPY" | "KMF" | "KRW" | "PYG" | "RWF" | "UGX" | "UYI" | "VND"
            | "VUV" | "XAF" | "XOF" | "XPF" => 0,
            "BHD" | "IQD" | "JOD" | "KWD" | "LYD" | "OMR" | "TND" => 3,
            "CLF" | "UYW" => 4,
            _ => 2,
        }
    }

    /// The amount in major units, with all digits of the currency.
    pub(crate) fn format(&self, amount: Minor) -> String {
        let digits = self.minor_digits();
        let text = format!("{:0>width$}", amount.0, width = digits + 1);
        match text.split_at(text.len() - digits) {
            (whole, "") => whole.to_owned(),
            (whole, part) => format!("{whole}.{part}"),
        }
    }
}

impl fmt::Display for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Minor {
    /// Reads a positive amount in major units, such as `10.50`. `None` for anything else, a digit too many included.
    pub(crate) fn parse(text: &str, currency: &Currency) -> Option<Self> {
        let (whole, part) = text.split_once('.').map_or((text, None), |(whole, part)| (whole, Some(part)));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let part_fits = part.is_none_or(|part| digits(part) && part.len() <= currency.minor_digits());
        let whole_fits = digits(whole) && (whole == "0" || !whole.starts_with('0'));
        let part = part.unwrap_or_default();
        if !whole_fits || !part_fits || DIGITS_MAX < whole.len() + part.len() {
            return None;
        }
        let minor: u128 = format!("{whole}{part:0<width$}", width = currency.minor_digits()).parse().ok()?;
        (0 < minor).then_some(Self(minor))
    }

    /// Amounts have at most 22 digits here and the bank a bounded number of them, so a sum always fits.
    pub(crate) fn plus(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn currency(code: &str) -> Currency {
        Currency::try_from(code.to_owned()).unwrap()
    }

    #[test]
    fn an_amount_is_read_in_the_currency_s_minor_units_and_written_with_all_of_them() {
        for (text, code, minor, written) in [
            ("10.50", "EUR", 1050, "10.50"),
            ("10.5", "EUR", 1050, "10.50"),
            ("0.01", "EUR", 1, "0.01"),
            ("7", "JPY", 7, "7"),
            ("1.234", "KWD", 1234, "1.234"),
            ("999999999999999999", "USD", 99_999_999_999_999_999_900, "999999999999999999.00"),
        ] {
            let amount = Minor::parse(text, &currency(code)).unwrap();
            assert_eq!((amount, currency(code).format(amount).as_str()), (Minor(minor), written), "{text} {code}");
        }
    }

    #[test]
    fn anything_but_a_plain_positive_decimal_is_refused() {
        for text in [
            "",
            "0",
            "0.00",
            "-1",
            "+1",
            "1.",
            ".5",
            "01",
            "1.234",
            "1e3",
            "1,000",
            " 1",
            "1 ",
            "１",
            "9999999999999999999",
        ] {
            assert_eq!(Minor::parse(text, &currency("EUR")), None, "{text:?}");
        }
        assert_eq!(Minor::parse("1.5", &currency("JPY")), None);
    }
}
