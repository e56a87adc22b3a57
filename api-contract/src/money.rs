//! Money and business time as clients write them.
//!
//! Amount and currency are read as texts first, for each has its own reason to be refused and its own place
//! in the body; [`money`] makes one value of the two.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Visitor};
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};

use ledger_core::{AmountError, Currency, Money, Timestamp};

use crate::Problem;
use crate::reader::refuse;

/// What a client wrote as an amount; a JSON string, or it is refused as `amount-format`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AmountText(String);

/// What a client wrote as a currency.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CurrencyText(String);

/// The money that was written, or the first reason against it: the currency's, then the amount's.
pub fn money(amount: &AmountText, currency: &CurrencyText) -> Result<Money, Problem> {
    let currency = currency.currency()?;
    Money::parse(&amount.0, currency).map_err(|error| {
        let slug = match error {
            AmountError::Format => "amount-format",
            AmountError::OutOfRange => "amount-out-of-range",
            AmountError::Precision { .. } => "amount-precision",
            AmountError::NotPositive => "amount-not-positive",
        };
        Problem::of(slug).at("/amount", error.to_string())
    })
}

/// When it counts in business: any time that has passed.
pub fn effective_at(at: Option<Timestamp>, now: Timestamp) -> Result<Option<Timestamp>, Problem> {
    match at {
        Some(at) if now < at => Err(Problem::of("time-range-invalid").at("/effectiveAt", "this time has not come yet")),
        at => Ok(at),
    }
}

impl CurrencyText {
    pub fn currency(&self) -> Result<Currency, Problem> {
        self.0
            .parse()
            .map_err(|_| Problem::of("currency-unknown").at("/currency", "expected an ISO 4217 code such as EUR"))
    }
}

impl<'de> Deserialize<'de> for AmountText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = AmountText;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a decimal string such as \"10.50\"")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<AmountText, E> {
                Ok(AmountText(text.to_owned()))
            }

            fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<AmountText, E> {
                Err(number())
            }

            fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<AmountText, E> {
                Err(number())
            }

            fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<AmountText, E> {
                Err(number())
            }
        }
        fn number<E: serde::de::Error>() -> E {
            refuse("amount-format", "an amount is a string such as \"10.50\", never a JSON number")
        }
        deserializer.deserialize_any(Read)
    }
}

impl<'de> Deserialize<'de> for CurrencyText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

impl utoipa::PartialSchema for AmountText {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some("Decimal, in major units, at most the currency's minor digits and 18 digits in all, zeros at the end aside."))
            .pattern(Some("^(0|[1-9][0-9]*)(\\.[0-9]+)?$"))
            .examples(["10.50"])
            .into()
    }
}

impl utoipa::ToSchema for AmountText {
    fn name() -> std::borrow::Cow<'static, str> {
        "Amount".into()
    }
}

impl utoipa::PartialSchema for CurrencyText {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some("ISO 4217."))
            .pattern(Some("^[A-Z]{3}$"))
            .examples(["EUR"])
            .into()
    }
}

impl utoipa::ToSchema for CurrencyText {
    fn name() -> std::borrow::Cow<'static, str> {
        "Currency".into()
    }
}
