//! Money as the log writes it: decimal text with exactly the currency's minor digits.

use rust_decimal::Decimal;

/// No wallet holds as much: 10^18 of the major unit.
const LIMIT: Decimal = Decimal::from_parts(0xA764_0000, 0x0DE0_B6B3, 0, false, 0);

/// The minor digits of ISO 4217 that are not two.
const NO_DIGITS: [&[u8; 3]; 16] = [
    b"BIF", b"CLP", b"DJF", b"GNF", b"ISK", b"JPY", b"KMF", b"KRW", b"PYG", b"RWF", b"UGX", b"VND", b"VUV", b"XAF",
    b"XOF", b"XPF",
];
const THREE_DIGITS: [&[u8; 3]; 7] = [b"BHD", b"IQD", b"JOD", b"KWD", b"LYD", b"OMR", b"TND"];

/// A currency's three letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Currency([u8; 3]);

impl Currency {
    pub(crate) fn read(code: &str) -> Option<Self> {
        let letters: [u8; 3] = code.as_bytes().try_into().ok()?;
        letters.iter().all(u8::is_ascii_uppercase).then_some(Self(letters))
    }

    pub(crate) fn code(&self) -> &str {
        std::str::from_utf8(&self.0).expect("three letters of ASCII")
    }

    fn digits(&self) -> usize {
        match &self.0 {
            code if NO_DIGITS.contains(&code) => 0,
            code if THREE_DIGITS.contains(&code) => 3,
            _ => 2,
        }
    }

    /// Zero as this currency writes it.
    pub(crate) fn zero(&self) -> Decimal {
        Decimal::new(0, u32::try_from(self.digits()).unwrap_or_default())
    }

    /// An amount that moves: more than zero. `None`: the log would not write it so.
    pub(crate) fn amount(&self, text: &str) -> Option<Decimal> {
        self.number(text).filter(|amount| Decimal::ZERO < *amount)
    }

    /// What a wallet holds, perhaps below zero.
    pub(crate) fn balance(&self, text: &str) -> Option<Decimal> {
        match text.strip_prefix('-') {
            // There is one zero, and it has no sign.
            Some(below) => self.number(below).filter(|amount| !amount.is_zero()).map(|amount| {
                let mut amount = amount;
                amount.set_sign_negative(true);
                amount
            }),
            None => self.number(text),
        }
    }

    fn number(&self, text: &str) -> Option<Decimal> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let all_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        let written_so = !whole.is_empty()
            && all_digits(whole)
            && all_digits(fraction)
            && (whole == "0" || !whole.starts_with('0'))
            && fraction.len() == self.digits()
            && text.contains('.') == (0 < self.digits());
        if !written_so {
            return None;
        }
        Decimal::from_str_exact(text).ok().filter(|number| *number < LIMIT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn money_is_read_only_as_the_log_writes_it() {
        let read =
            |code: &str, text: &str| Currency::read(code).unwrap().balance(text).map(|number| number.to_string());
        for (code, text) in
            [("EUR", "0.00"), ("EUR", "-10.50"), ("JPY", "12"), ("KWD", "0.001"), ("USD", "999999999999999999.99")]
        {
            assert_eq!(read(code, text).as_deref(), Some(text), "{code}");
        }
        for (code, text) in [
            ("EUR", "10"),
            ("EUR", "10.5"),
            ("EUR", "10.500"),
            ("EUR", "010.50"),
            ("EUR", ".50"),
            ("EUR", "+1.00"),
            ("EUR", ""),
            ("EUR", "-0.00"),
            ("EUR", "--1.00"),
            ("EUR", "1e3"),
            ("EUR", "1.0_0"),
            ("JPY", "12."),
            ("JPY", "12.0"),
            ("KWD", "1.00"),
            ("EUR", "1000000000000000000.00"),
        ] {
            assert_eq!(read(code, text), None, "{code} {text}");
        }
        assert_eq!(Currency::read("EUR").unwrap().amount("0.00"), None);
        assert_eq!(Currency::read("EUR").unwrap().amount("-1.00"), None);
        for wrong in ["", "eur", "EU", "EURO", "E1R", "€"] {
            assert!(Currency::read(wrong).is_none(), "{wrong}");
        }
    }
}
