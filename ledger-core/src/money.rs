//! Money: amounts, balances and what may be said about them.
//!
//! Parsed once at the edge; inside, the type is the proof. An amount always has exactly its currency's minor
//! digits, so printing it needs no currency and never rounds.

use std::fmt;
use std::str::FromStr;

use rust_decimal::Decimal;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Currency;

/// The most digits that an amount may be written with.
const DIGITS_MAX: usize = 18;

/// A positive decimal number in major units. Zero, a sign, an exponent or a float cannot be built.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Amount(Decimal);

/// An amount in a currency, with exactly the currency's minor digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Money {
    amount: Amount,
    currency: Currency,
}

/// What a wallet holds: a decimal number in major units; below zero only in system wallets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Balance(Decimal);

/// Why a text is not an amount. One reason each, as API.md's problem types have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AmountError {
    #[error("an amount is a decimal string such as \"10.50\"")]
    Format,
    #[error("an amount has at most {DIGITS_MAX} digits")]
    OutOfRange,
    #[error("{currency} has {digits} minor digits; amounts are never rounded")]
    Precision { currency: Currency, digits: u32 },
    #[error("an amount is greater than zero")]
    NotPositive,
}

impl Money {
    /// Reads an amount as a client writes it: `"10.50"`, `"10.5"` or `"10"` for ten and a half or ten euros.
    pub fn parse(text: &str, currency: Currency) -> Result<Self, AmountError> {
        let unsigned = text.strip_prefix('-');
        let (whole, fraction) = split(unsigned.unwrap_or(text)).ok_or(AmountError::Format)?;
        // Zeros at the end do not count: an amount is printed with all its minor digits, and what is printed must read back.
        if DIGITS_MAX < whole.len().saturating_add(fraction.trim_end_matches('0').len()) {
            return Err(AmountError::OutOfRange);
        }
        let digits = currency.minor_digits();
        if usize::try_from(digits).is_ok_and(|digits| digits < fraction.len()) {
            return Err(AmountError::Precision { currency, digits });
        }
        let mut value = Decimal::from_str_exact(unsigned.unwrap_or(text)).map_err(|_| AmountError::Format)?;
        if unsigned.is_some() || value.is_zero() {
            return Err(AmountError::NotPositive);
        }
        value.rescale(digits);
        Ok(Self { amount: Amount(value), currency })
    }

    /// From parts that history keeps side by side; the amount has the minor digits already.
    pub(crate) const fn from_parts(amount: Amount, currency: Currency) -> Self {
        Self { amount, currency }
    }

    pub const fn amount(self) -> Amount {
        self.amount
    }

    pub const fn currency(self) -> Currency {
        self.currency
    }
}

impl Amount {
    pub const fn decimal(self) -> Decimal {
        self.0
    }
}

impl Balance {
    /// The most that a wallet may hold, in major units: one more digit could not be written as an amount.
    const LIMIT: Decimal = Decimal::from_parts(0xA764_0000, 0x0DE0_B6B3, 0, false, 0); // 10^18

    /// Nothing, with the currency's minor digits.
    pub fn zero(currency: Currency) -> Self {
        Self(Decimal::new(0, currency.minor_digits()))
    }

    /// `None` when the limit would be passed.
    pub fn plus(self, amount: Amount) -> Option<Self> {
        self.0.checked_add(amount.0).filter(|sum| *sum < Self::LIMIT).map(Self)
    }

    /// `None` when the limit would be passed; below zero is a matter of floors, not of arithmetic.
    pub fn minus(self, amount: Amount) -> Option<Self> {
        self.0.checked_sub(amount.0).filter(|left| -Self::LIMIT < *left).map(Self)
    }

    /// What is left without `other`. Within the limits there always is an answer.
    pub fn less(self, other: Balance) -> Option<Self> {
        self.0.checked_sub(other.0).map(Self)
    }

    pub fn covers(self, amount: Amount) -> bool {
        amount.0 <= self.0
    }

    pub fn is_zero(self) -> bool {
        self.0.is_zero()
    }

    pub fn is_negative(self) -> bool {
        self.0.is_sign_negative() && !self.0.is_zero()
    }

    pub const fn decimal(self) -> Decimal {
        self.0
    }
}

impl From<Decimal> for Balance {
    fn from(value: Decimal) -> Self {
        Self(value)
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_zero() {
            // A difference can come out as "-0.00"; there is one zero.
            return fmt::Display::fmt(&self.0.abs(), f);
        }
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A sign, the digits of a `u64`, a point, and zeros before it.
const DIGITS_ROOM: usize = 32;

/// What `Display` prints, in one piece: a transfer's event and answer hold a dozen amounts. `None` for what is too large
/// for that.
fn digits(value: Decimal, buffer: &mut [u8; DIGITS_ROOM]) -> Option<&str> {
    let scale = usize::try_from(value.scale()).ok().filter(|scale| *scale <= DIGITS_MAX)?;
    let mantissa = value.mantissa();
    let mut rest = u64::try_from(mantissa.unsigned_abs()).ok()?;
    let mut at = DIGITS_ROOM;
    let mut put = |byte| {
        at = at.checked_sub(1)?;
        buffer[at] = byte;
        Some(at)
    };
    let mut written = 0..;
    let mut begin = DIGITS_ROOM;
    while let Some(place) = written.next().filter(|place| rest != 0 || *place <= scale) {
        if place == scale && place != 0 {
            put(b'.')?;
        }
        begin = put(b"0123456789"[(rest % 10) as usize])?;
        rest /= 10;
    }
    if mantissa < 0 {
        begin = put(b'-')?;
    }
    std::str::from_utf8(&buffer[begin..]).ok()
}

/// Reads an amount back from history, where its currency stands beside it.
impl FromStr for Amount {
    type Err = AmountError;

    fn from_str(text: &str) -> Result<Self, AmountError> {
        split(text).ok_or(AmountError::Format)?;
        let value = Decimal::from_str_exact(text).map_err(|_| AmountError::OutOfRange)?;
        if value.is_zero() { Err(AmountError::NotPositive) } else { Ok(Self(value)) }
    }
}

impl FromStr for Balance {
    type Err = AmountError;

    fn from_str(text: &str) -> Result<Self, AmountError> {
        split(text.strip_prefix('-').unwrap_or(text)).ok_or(AmountError::Format)?;
        Decimal::from_str_exact(text).map(Self).map_err(|_| AmountError::OutOfRange)
    }
}

macro_rules! as_string {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match digits(self.0, &mut [0; DIGITS_ROOM]) {
                    Some(text) => serializer.serialize_str(text),
                    None => serializer.collect_str(self),
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                crate::text::from_text(deserializer)
            }
        }
    };
}

as_string!(Amount);
as_string!(Balance);

/// The digits before and after the point of `10`, `10.5` or `0.50`; nothing else is a number here.
fn split(text: &str) -> Option<(&str, &str)> {
    let (whole, fraction) = match text.split_once('.') {
        Some((_, "")) => return None,
        Some(parts) => parts,
        None => (text, ""),
    };
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let leading_zero = 1 < whole.len() && whole.starts_with('0');
    (!whole.is_empty() && !leading_zero && digits(whole) && digits(fraction)).then_some((whole, fraction))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(text: &str, currency: &str, expected: Result<&str, AmountError>) {
        let parsed = Money::parse(text, currency.parse().unwrap());
        assert_eq!(parsed.map(|money| money.amount().to_string()), expected.map(str::to_owned), "{text} {currency}");
    }

    #[test]
    fn an_amount_is_given_all_its_minor_digits_and_never_rounded() {
        check("10.5", "EUR", Ok("10.50"));
        check("10", "EUR", Ok("10.00"));
        check("0.01", "EUR", Ok("0.01"));
        check("7", "JPY", Ok("7"));
        check("1.5", "KWD", Ok("1.500"));
        check("9999999999999999.99", "EUR", Ok("9999999999999999.99"));
        let precision = |code: &str, digits| AmountError::Precision { currency: code.parse().unwrap(), digits };
        check("10.001", "EUR", Err(precision("EUR", 2)));
        check("1.5", "JPY", Err(precision("JPY", 0)));
        check("1.2345", "KWD", Err(precision("KWD", 3)));
    }

    #[test]
    fn what_is_not_an_amount_is_refused_for_its_own_reason() {
        for wrong in [
            "", " 10", "10 ", "+10", "1,000.00", "010", "00", ".5", "5.", "1e3", "0x10", "NaN", "Infinity", "１０",
            "--1", "1.2.3", "-",
        ] {
            check(wrong, "EUR", Err(AmountError::Format));
        }
        for wrong in ["0", "0.00", "-0", "-1.00", "-0.01"] {
            check(wrong, "EUR", Err(AmountError::NotPositive));
        }
        check("1234567890123456789", "EUR", Err(AmountError::OutOfRange));
        check(&"9".repeat(1_000), "EUR", Err(AmountError::OutOfRange));
    }

    #[test]
    fn a_balance_stops_at_its_limit() {
        let eur: Currency = "EUR".parse().unwrap();
        let most = Money::parse("999999999999999999", eur).unwrap().amount();
        let one = Money::parse("1.00", eur).unwrap().amount();
        let full = Balance::zero(eur).plus(most).unwrap();
        assert_eq!(full.plus(one), None);
        assert_eq!(full.minus(most).unwrap().to_string(), "0.00");
        assert_eq!(Balance::zero(eur).minus(most).unwrap().minus(one), None);
    }

    proptest! {
        #[test]
        fn a_printed_amount_reads_back_equal(minor in 1u64..1_000_000_000_000_000_000) {
            let eur: Currency = "EUR".parse().unwrap();
            let text = Decimal::from_i128_with_scale(i128::from(minor), 2).to_string();
            let money = Money::parse(&text, eur).unwrap();
            prop_assert_eq!(money.amount().to_string(), text.clone());
            prop_assert_eq!(text.parse::<Amount>().unwrap(), money.amount());
        }

        #[test]
        fn money_is_written_as_it_is_printed(mantissa in any::<i64>(), small in -1_000i128..1_000, scale in 0u32..=20) {
            for mantissa in [i128::from(mantissa), i128::from(mantissa).saturating_mul(1_000_000), small] {
                let balance = Balance(Decimal::from_i128_with_scale(mantissa, scale));
                prop_assert_eq!(serde_json::to_value(balance).unwrap(), balance.to_string());
            }
        }

        #[test]
        fn any_text_is_an_amount_or_refused_without_a_panic(text in ".{0,40}") {
            if let Ok(money) = Money::parse(&text, "KWD".parse().unwrap()) {
                prop_assert!(Decimal::ZERO < money.amount().decimal());
                prop_assert_eq!(money.amount().decimal().scale(), 3);
            }
        }
    }
}
