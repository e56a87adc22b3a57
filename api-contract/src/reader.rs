//! From a tree of JSON, or a query, to a request's type; every no has a reason and a place.
//!
//! This is a serde `Deserializer` of our own for two things that serde_json's cannot do: it refuses every
//! field that nobody asked for, and its errors carry a problem's slug and a JSON pointer.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{self, Deserializer, Expected, IntoDeserializer, Unexpected, Visitor};
use serde::forward_to_deserialize_any;

use crate::json::Value;
use crate::problem::{self, ECHO_MAX, Problem};
use crate::text;

/// Names a newtype whose texts may have line breaks and tabs.
pub(crate) const FREE_TEXT: &str = "daybook::FreeText";

/// For a `Deserialize` of one's own: the value is refused as this problem. `slug` must be in the table of problems.
pub fn refuse<E: de::Error>(slug: &'static str, detail: &str) -> E {
    // serde lets a type say a text to its reader and nothing else. No text of a client has a NUL in it here.
    E::custom(format_args!("\0{slug}\0{detail}"))
}

/// Why a value was refused, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReadError(Box<Inner>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Inner {
    slug: &'static str,
    detail: String,
    /// From the innermost outwards.
    segments: Vec<String>,
}

impl ReadError {
    pub(crate) fn new(slug: &'static str, detail: impl Into<String>) -> Self {
        Self(Box::new(Inner { slug, detail: detail.into(), segments: Vec::new() }))
    }

    /// The error is one level further in than it knew.
    pub(crate) fn inside(&mut self, segment: &str) {
        self.0.segments.push(segment.to_owned());
    }

    fn within(mut self, segment: &str) -> Self {
        self.inside(segment);
        self
    }
}

impl From<ReadError> for Problem {
    fn from(error: ReadError) -> Self {
        let Inner { slug, detail, segments } = *error.0;
        // As deep as can be repeated: a pointer to the parent is still a pointer, half a name is none.
        let mut pointer = String::new();
        for segment in segments.iter().rev() {
            let escaped = segment.replace('~', "~0").replace('/', "~1");
            if ECHO_MAX < pointer.chars().count() + 1 + escaped.chars().count() || !text::is_clean(segment) {
                break;
            }
            pointer.push('/');
            pointer.push_str(&escaped);
        }
        Problem::of(slug).at(pointer, detail)
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.slug, self.0.detail)
    }
}

impl std::error::Error for ReadError {}

impl de::Error for ReadError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        let message = message.to_string();
        if let Some((slug, detail)) = message.strip_prefix('\0').and_then(|rest| rest.split_once('\0')) {
            return Self::new(problem::known_slug(slug).unwrap_or("invalid-field"), detail);
        }
        match slug_of_ledger_type(&message) {
            Some(slug) => Self::new(slug, message),
            // Somebody else's words: they may repeat what was written.
            None => Self::new("invalid-field", message.chars().take(ECHO_MAX).collect::<String>()),
        }
    }

    fn invalid_type(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::new("invalid-field", format!("expected {expected}"))
    }

    fn invalid_value(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::new("invalid-field", format!("expected {expected}"))
    }

    fn invalid_length(_: usize, expected: &dyn Expected) -> Self {
        Self::new("invalid-field", format!("expected {expected}"))
    }

    fn unknown_variant(_: &str, expected: &'static [&'static str]) -> Self {
        Self::new("invalid-field", format!("expected one of {}", expected.join(", ")))
    }

    fn unknown_field(field: &str, _: &'static [&'static str]) -> Self {
        Self::new("unknown-field", "no such field is known here").within(field)
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new("invalid-field", "this field is required").within(field)
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self::new("duplicate-field", "this key stands here twice").within(field)
    }
}

/// The ledger's own types say only their error's text; they are known by it.
fn slug_of_ledger_type(message: &str) -> Option<&'static str> {
    if message.starts_with("not an id of the form") {
        Some("invalid-id")
    } else if message == "not an ISO 4217 currency" {
        Some("currency-unknown")
    } else if message == "not an RFC 3339 time" {
        Some("time-format")
    } else {
        None
    }
}

/// A value and how its texts are to be read.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'v> {
    value: &'v Value<'v>,
    /// Line breaks and tabs are fine.
    free: bool,
    /// Everything is text: numbers and booleans are read from it.
    query: bool,
}

impl<'v> Reader<'v> {
    pub(crate) fn of_body(value: &'v Value<'v>) -> Self {
        Self { value, free: false, query: false }
    }

    pub(crate) fn of_query(value: &'v Value<'v>) -> Self {
        Self { value, free: false, query: true }
    }

    fn text(&self) -> Result<Option<&'v str>, ReadError> {
        match self.value {
            Value::String(text) if !self.free && !text::is_name(text) => Err(ReadError::new(
                "invalid-character",
                "line breaks, tabs and characters that cannot be seen are refused here",
            )),
            Value::String(text) => Ok(Some(text)),
            _ => Ok(None),
        }
    }

    /// A number or boolean that a query wrote as text.
    fn parsed<T: std::str::FromStr>(&self) -> Result<Option<T>, ReadError> {
        if self.query { Ok(self.text()?.and_then(|text| text.parse().ok())) } else { Ok(None) }
    }
}

macro_rules! read_scalars {
    ($($method:ident $visit:ident $type:ty,)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
            match self.parsed::<$type>()? {
                Some(value) => visitor.$visit(value),
                None => self.deserialize_any(visitor),
            }
        }
    )*};
}

impl<'de, 'v> Deserializer<'de> for Reader<'v> {
    type Error = ReadError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
                (Some(value), _, _) => visitor.visit_u64(value),
                (_, Some(value), _) => visitor.visit_i64(value),
                (_, _, value) => visitor.visit_f64(value.unwrap_or(f64::NAN)),
            },
            Value::String(_) => visitor.visit_str(self.text()?.unwrap_or_default()),
            Value::Array(items) => visitor.visit_seq(Items { reader: self, items: items.iter(), place: 0 }),
            Value::Object(entries) => {
                visitor.visit_map(Entries { reader: self, entries: entries.iter(), current: None })
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        visitor.visit_newtype_struct(Self { free: self.free || name == FREE_TEXT, ..self })
    }

    /// serde would also take an array for a struct, its fields in the order in which we happen to declare them.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        match self.value {
            Value::Object(_) => self.deserialize_any(visitor),
            _ => Err(ReadError::new("invalid-field", "expected an object")),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        let Some(text) = self.text()? else {
            return Err(de::Error::unknown_variant("", variants));
        };
        let variant: StrDeserializer<'_, ReadError> = text.into_deserializer();
        visitor.visit_enum(variant)
    }

    /// serde comes here with a field that the type does not have.
    fn deserialize_ignored_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, ReadError> {
        Err(ReadError::new("unknown-field", "no such field is known here"))
    }

    read_scalars! {
        deserialize_bool visit_bool bool,
        deserialize_i8 visit_i8 i8,
        deserialize_i16 visit_i16 i16,
        deserialize_i32 visit_i32 i32,
        deserialize_i64 visit_i64 i64,
        deserialize_u8 visit_u8 u8,
        deserialize_u16 visit_u16 u16,
        deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64,
    }

    forward_to_deserialize_any! {
        i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map identifier
    }
}

struct Items<'v> {
    reader: Reader<'v>,
    items: std::slice::Iter<'v, Value<'v>>,
    place: usize,
}

impl<'de> de::SeqAccess<'de> for Items<'_> {
    type Error = ReadError;

    fn next_element_seed<T: de::DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, ReadError> {
        let Some(value) = self.items.next() else { return Ok(None) };
        let place = self.place;
        self.place += 1;
        seed.deserialize(Reader { value, ..self.reader }).map(Some).map_err(|error| error.within(&place.to_string()))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len())
    }
}

struct Entries<'v> {
    reader: Reader<'v>,
    entries: std::slice::Iter<'v, (std::borrow::Cow<'v, str>, Value<'v>)>,
    current: Option<&'v (std::borrow::Cow<'v, str>, Value<'v>)>,
}

impl<'de> de::MapAccess<'de> for Entries<'_> {
    type Error = ReadError;

    fn next_key_seed<K: de::DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, ReadError> {
        self.current = self.entries.next();
        let Some((key, _)) = self.current else { return Ok(None) };
        let key: StrDeserializer<'_, ReadError> = key.as_ref().into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: de::DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, ReadError> {
        let (key, value) = self.current.take().expect("serde asks for a key first");
        seed.deserialize(Reader { value, ..self.reader }).map_err(|error| error.within(key))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.entries.len())
    }
}
