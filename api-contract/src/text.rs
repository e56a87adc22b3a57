//! Texts from outside: what may be in them, and how long they may be.
//!
//! NUL cannot be stored, controls cannot be seen, direction overrides make a text look like another one, and
//! noncharacters are for no interchange. In a name, what cannot be seen would make two of what looks like one; in a free
//! text it may be how a language is written. Everything else is a client's own: it is data, and escaped where it is shown.

use std::fmt;
use std::ops::Deref;

use serde::de::{Deserialize, Deserializer, Visitor};
use serde::{Serialize, Serializer};
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};

use crate::reader::{FREE_TEXT, refuse};

/// One line of `MIN` to `MAX` characters: a name, a reference.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Text<const MIN: usize, const MAX: usize>(String);

/// `MIN` to `MAX` characters in which tabs and line breaks are fine: a description, a reason.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FreeText<const MIN: usize, const MAX: usize>(String);

/// A partner's name for one of its end users.
pub type UserId = Text<1, 128>;

/// Whether nothing stands in the text that must stand in none. What only names must not have passes: see [`is_name`].
pub(crate) fn is_clean(text: &str) -> bool {
    // Nearly all texts are printable ASCII; these are decided without decoding.
    text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) || text.chars().all(is_allowed)
}

/// Whether a clean text is one line in which everything can be seen: fit for a name, a reference, a key.
pub(crate) fn is_name(text: &str) -> bool {
    text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) || !text.chars().any(is_break_or_unseen)
}

/// The joiners U+200C and U+200D are not among these: Persian names and many emoji are not themselves without them.
fn is_break_or_unseen(character: char) -> bool {
    matches!(
        character,
        '\t' | '\n' | '\r' | '\u{2028}' | '\u{2029}'
            | '\u{AD}' // soft hyphen
            | '\u{61C}' | '\u{200E}' | '\u{200F}' // marks of direction
            | '\u{180E}' | '\u{200B}' | '\u{2060}'..='\u{2064}' | '\u{FEFF}' // of no width
            | '\u{206A}'..='\u{206F}' | '\u{FFF9}'..='\u{FFFB}' | '\u{E0000}'..='\u{E007F}' // deprecated, annotations, tags
    )
}

fn is_allowed(character: char) -> bool {
    let code = u32::from(character);
    match code {
        0x09 | 0x0A | 0x0D => true,
        0x00..=0x1F | 0x7F..=0x9F => false,         // C0, DEL, C1
        0x202A..=0x202E | 0x2066..=0x2069 => false, // direction overrides, embeddings and isolates
        0xFDD0..=0xFDEF => false,                   // noncharacters
        _ => code & 0xFFFE != 0xFFFE,               // the last two of each plane are noncharacters too
    }
}

macro_rules! text {
    ($name:ident, $newtype:expr, $strict:literal) => {
        impl<const MIN: usize, const MAX: usize> $name<MIN, MAX> {
            /// Checks a text that did not come in a body, such as a header's.
            pub fn parse(text: &str) -> Result<Self, crate::Problem> {
                Self::check(text).map_err(|(slug, detail)| crate::Problem::of(slug).detail(detail))?;
                Ok(Self(text.to_owned()))
            }

            fn check(text: &str) -> Result<(), (&'static str, String)> {
                if !is_clean(text) || ($strict && !is_name(text)) {
                    return Err(("invalid-character", "a character is refused here".to_owned()));
                }
                // No text has more characters than bytes, so most need no counting.
                let fits = if text.len() <= MAX { MIN <= text.len() } else { text.chars().count() <= MAX };
                if fits && (MIN <= 1 || MIN <= text.chars().count()) {
                    Ok(())
                } else {
                    Err(("invalid-field", format!("expected {MIN} to {MAX} characters")))
                }
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }

            pub fn into_string(self) -> String {
                self.0
            }
        }

        impl<const MIN: usize, const MAX: usize> Deref for $name<MIN, MAX> {
            type Target = str;

            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl<const MIN: usize, const MAX: usize> From<$name<MIN, MAX>> for String {
            fn from(text: $name<MIN, MAX>) -> Self {
                text.0
            }
        }

        impl<const MIN: usize, const MAX: usize> fmt::Debug for $name<MIN, MAX> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl<const MIN: usize, const MAX: usize> Serialize for $name<MIN, MAX> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de, const MIN: usize, const MAX: usize> Deserialize<'de> for $name<MIN, MAX> {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Read<const MIN: usize, const MAX: usize>;
                impl<'de, const MIN: usize, const MAX: usize> Visitor<'de> for Read<MIN, MAX> {
                    type Value = $name<MIN, MAX>;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        write!(f, "a string of {MIN} to {MAX} characters")
                    }

                    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<Self::Value, D::Error> {
                        inner.deserialize_str(self)
                    }

                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
                        $name::<MIN, MAX>::check(text).map_err(|(slug, detail)| refuse(slug, &detail))?;
                        Ok($name(text.to_owned()))
                    }
                }
                deserializer.deserialize_newtype_struct($newtype, Read)
            }
        }

        impl<const MIN: usize, const MAX: usize> utoipa::PartialSchema for $name<MIN, MAX> {
            fn schema() -> RefOr<Schema> {
                ObjectBuilder::new().schema_type(Type::String).min_length(Some(MIN)).max_length(Some(MAX)).into()
            }
        }

        impl<const MIN: usize, const MAX: usize> utoipa::ToSchema for $name<MIN, MAX> {
            fn name() -> std::borrow::Cow<'static, str> {
                format!("{}{MIN}To{MAX}", stringify!($name)).into()
            }
        }
    };
}

text!(Text, "Text", true);
text!(FreeText, FREE_TEXT, false);
