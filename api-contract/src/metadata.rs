//! Metadata: what a client attaches to a wallet or a transaction. Carried, never read, so only its size matters.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Visitor};
use serde_json::Value;
use utoipa::openapi::schema::AdditionalProperties;
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};

use crate::reader::{FREE_TEXT, refuse};

/// A JSON object within the limits below. Texts in it may have line breaks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata(ledger_core::Metadata);

const DEPTH_MAX: usize = 5;
const KEYS_MAX: usize = 50;
const KEY_BYTES_MAX: usize = 64;
const VALUE_BYTES_MAX: usize = 512;

/// 2^53. From here on a float does not tell neighbouring integers apart, and what is read as one (an integer beyond 64
/// bits is) would come back as another number.
const INEXACT: f64 = 9_007_199_254_740_992.0;

/// A problem's slug, and why.
type Refused = (&'static str, String);

impl Metadata {
    pub fn into_inner(self) -> ledger_core::Metadata {
        self.0
    }
}

impl From<Metadata> for ledger_core::Metadata {
    fn from(metadata: Metadata) -> Self {
        metadata.0
    }
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<Metadata, D::Error> {
                let fields = ledger_core::Metadata::deserialize(inner)?;
                let mut keys = 0;
                check_object(&fields, 1, &mut keys).map_err(|(slug, reason)| refuse(slug, &reason))?;
                Ok(Metadata(fields))
            }
        }
        deserializer.deserialize_newtype_struct(FREE_TEXT, Read)
    }
}

fn too_large(reason: String) -> Refused {
    ("metadata-too-large", reason)
}

fn check_object(fields: &ledger_core::Metadata, depth: usize, keys: &mut usize) -> Result<(), Refused> {
    *keys += fields.len();
    if KEYS_MAX < *keys {
        return Err(too_large(format!("at most {KEYS_MAX} keys in all")));
    }
    if fields.keys().any(|key| KEY_BYTES_MAX < key.len()) {
        return Err(too_large(format!("a key has at most {KEY_BYTES_MAX} bytes")));
    }
    fields.values().try_for_each(|value| check(value, depth, keys))
}

/// `depth` is that of the object or array which the value stands in; the metadata itself is the first.
fn check(value: &Value, depth: usize, keys: &mut usize) -> Result<(), Refused> {
    match value {
        Value::Object(_) | Value::Array(_) if DEPTH_MAX <= depth => {
            Err(too_large(format!("nested at most {DEPTH_MAX} deep")))
        }
        Value::Object(fields) => check_object(fields, depth + 1, keys),
        Value::Array(items) => {
            // Items count like keys: otherwise an array would be a way around the limit.
            *keys += items.len();
            if KEYS_MAX < *keys {
                return Err(too_large(format!("at most {KEYS_MAX} keys and items in all")));
            }
            items.iter().try_for_each(|item| check(item, depth + 1, keys))
        }
        Value::String(text) if VALUE_BYTES_MAX < text.len() => {
            Err(too_large(format!("a text has at most {VALUE_BYTES_MAX} bytes")))
        }
        Value::Number(number) if number.is_f64() && number.as_f64().is_none_or(|value| INEXACT <= value.abs()) => {
            Err(("invalid-field", "a number this large is not kept exactly: write it as a string".to_owned()))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Ok(()),
    }
}

impl utoipa::PartialSchema for Metadata {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::Object)
            .additional_properties(Some(AdditionalProperties::FreeForm(true)))
            .description(Some("Yours: at most 50 keys in all, nested 5 deep, keys of 64 bytes, texts of 512 bytes."))
            .into()
    }
}

impl utoipa::ToSchema for Metadata {}
