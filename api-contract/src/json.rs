//! Bodies in: JSON read strictly, so that nothing can be understood in two ways.
//!
//! The bytes are read once, into a tree that borrows from them. On the way every string is looked at and
//! every key must be alone in its object. The tree then becomes the request (`reader.rs`) and its canonical
//! text, by which repetitions of the request are known.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;

use axum::body::HttpBody;
use axum::extract::{FromRequest, OptionalFromRequest, Request};
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Number;

use crate::Problem;
use crate::reader::{ReadError, Reader};
use crate::text;

/// The most bytes of a body, unless a route says otherwise with [`JsonMax`].
pub const BODY_BYTES_MAX: usize = 64 * 1024;

/// A JSON body of at most 64 KiB. Fields that `T` does not have are refused, whatever serde attributes it has.
///
/// `T` must not use `#[serde(flatten)]` or tagged enums: through them unknown fields slip by.
#[derive(Clone, Debug)]
pub struct Json<T>(pub T, pub CanonicalBody);

/// A JSON body of at most `BYTES_MAX` bytes.
#[derive(Clone, Debug)]
pub struct JsonMax<T, const BYTES_MAX: usize>(pub T, pub CanonicalBody);

/// The body as JSON with sorted keys and without white space: equal for equal requests, however they were typed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CanonicalBody(Vec<u8>);

impl CanonicalBody {
    /// Of a request without a body.
    pub const EMPTY: CanonicalBody = CanonicalBody(Vec::new());

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let (value, canonical) = read(&body(request, BODY_BYTES_MAX).await?)?;
        Ok(Self(value, canonical))
    }
}

/// `Option<Json<T>>`: where a body may be left out, and has to be right where it is not.
impl<S: Send + Sync, T: DeserializeOwned> OptionalFromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Option<Self>, Problem> {
        if request.body().is_end_stream() {
            return Ok(None);
        }
        <Self as FromRequest<S>>::from_request(request, state).await.map(Some)
    }
}

impl<S: Send + Sync, T: DeserializeOwned, const BYTES_MAX: usize> FromRequest<S> for JsonMax<T, BYTES_MAX> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let (value, canonical) = read(&body(request, BYTES_MAX).await?)?;
        Ok(Self(value, canonical))
    }
}

/// The raw bytes, after what the headers say has been checked.
async fn body(request: Request, bytes_max: usize) -> Result<Bytes, Problem> {
    check_content_type(request.headers())?;
    let too_large = || Problem::of("payload-too-large").detail(format!("a body has at most {bytes_max} bytes here"));
    // The announced length, or what is known of the rest: refused before a byte of it is read.
    if u64::try_from(bytes_max).is_ok_and(|max| max < request.body().size_hint().lower()) {
        return Err(too_large());
    }
    match Limited::new(request.into_body(), bytes_max).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
        Err(_) => Err(Problem::of("malformed-json").detail("the body broke off")),
    }
}

fn check_content_type(headers: &HeaderMap) -> Result<(), Problem> {
    let mut values = headers.get_all(header::CONTENT_TYPE).iter();
    let single = values.next().filter(|_| values.next().is_none()).and_then(|value| value.to_str().ok());
    if single.is_some_and(is_json) { Ok(()) } else { Err(Problem::of("unsupported-media-type")) }
}

/// `application/json`, with no parameter but a charset, which can only be UTF-8.
fn is_json(content_type: &str) -> bool {
    let mut parts = content_type.split(';').map(str::trim);
    let json = parts.next().is_some_and(|kind| kind.eq_ignore_ascii_case("application/json"));
    json && parts.all(|parameter| {
        parameter.split_once('=').is_some_and(|(name, value)| {
            name.eq_ignore_ascii_case("charset") && value.trim_matches('"').eq_ignore_ascii_case("utf-8")
        })
    })
}

/// Reads bytes as a request. The pure half of the extractors.
pub(crate) fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, CanonicalBody), Problem> {
    let tree = Value::parse(bytes)?;
    let value = T::deserialize(Reader::of_body(&tree))?;
    let mut canonical = Vec::with_capacity(bytes.len());
    tree.write(&mut canonical);
    Ok((value, CanonicalBody(canonical)))
}

/// A JSON text, taken apart. Keys are sorted, and no two of an object are equal.
#[derive(Debug)]
pub(crate) enum Value<'a> {
    Null,
    Bool(bool),
    Number(Number),
    String(Cow<'a, str>),
    Array(Vec<Value<'a>>),
    Object(Vec<(Cow<'a, str>, Value<'a>)>),
}

impl<'a> Value<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, Problem> {
        let malformed = |detail: &str| Problem::of("malformed-json").detail(detail);
        let text = std::str::from_utf8(bytes).map_err(|_| malformed("the body is not UTF-8"))?;
        if text.trim_ascii().is_empty() {
            return Err(malformed("the body is empty"));
        }
        let refusal = RefCell::new(None);
        let mut deserializer = serde_json::Deserializer::from_str(text);
        let seed = Seed { refusal: &refusal };
        let read = seed.deserialize(&mut deserializer).and_then(|value| deserializer.end().map(|()| value));
        read.map_err(|error| match refusal.take() {
            Some(refusal) => refusal.into(),
            None if error.to_string().starts_with(OUT_OF_RANGE) => number_out_of_range().into(),
            None => malformed(&format!("not JSON at line {}, column {}", error.line(), error.column())),
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Null => out.extend_from_slice(b"null"),
            Self::Bool(value) => out.extend_from_slice(if *value { b"true" } else { b"false" }),
            Self::Number(number) => write_scalar(out, number),
            Self::String(text) => write_scalar(out, text),
            Self::Array(items) => {
                out.push(b'[');
                for (place, item) in items.iter().enumerate() {
                    if place != 0 {
                        out.push(b',');
                    }
                    item.write(out);
                }
                out.push(b']');
            }
            Self::Object(entries) => {
                out.push(b'{');
                for (place, (key, value)) in entries.iter().enumerate() {
                    if place != 0 {
                        out.push(b',');
                    }
                    write_scalar(out, key);
                    out.push(b':');
                    value.write(out);
                }
                out.push(b'}');
            }
        }
    }
}

fn write_scalar(out: &mut Vec<u8>, value: &impl serde::Serialize) {
    serde_json::to_writer(out, value).expect("a number or a text goes into memory");
}

/// How serde_json's error begins for `1E400`. That is JSON all the same, so it is no malformed one: JSON has no largest number,
/// and only what we could keep of it has.
const OUT_OF_RANGE: &str = "number out of range";

fn number_out_of_range() -> ReadError {
    ReadError::new("invalid-field", "a number this large cannot be kept: write it as a string")
}

/// Builds the tree. serde_json's error cannot carry our reason, so the reason waits beside it; each level on
/// the way out puts its own name in front of the pointer.
#[derive(Clone, Copy)]
struct Seed<'r> {
    refusal: &'r RefCell<Option<ReadError>>,
}

impl Seed<'_> {
    fn refuse<E: serde::de::Error>(&self, slug: &'static str, detail: &str) -> E {
        *self.refusal.borrow_mut() = Some(ReadError::new(slug, detail));
        E::custom(slug)
    }

    fn inside<E: fmt::Display>(&self, segment: &str, error: E) -> E {
        let mut refusal = self.refusal.borrow_mut();
        if refusal.is_none() && error.to_string().starts_with(OUT_OF_RANGE) {
            *refusal = Some(number_out_of_range());
        }
        if let Some(refusal) = refusal.as_mut() {
            refusal.inside(segment);
        }
        error
    }

    fn string<'a, E: serde::de::Error>(&self, text: Cow<'a, str>) -> Result<Cow<'a, str>, E> {
        if text::is_clean(&text) {
            Ok(text)
        } else {
            Err(self
                .refuse("invalid-character", "control characters, direction overrides and non-characters are refused"))
        }
    }
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value<'de>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value<'de>, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value<'de>, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value<'de>, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value<'de>, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value<'de>, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number beyond all bounds"))
    }

    fn visit_borrowed_str<E: serde::de::Error>(self, text: &'de str) -> Result<Value<'de>, E> {
        self.string(Cow::Borrowed(text)).map(Value::String)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Value<'de>, E> {
        self.string(Cow::Owned(text.to_owned())).map(Value::String)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value<'de>, A::Error> {
        let mut items = Vec::new();
        loop {
            match sequence.next_element_seed(self) {
                Ok(Some(item)) => items.push(item),
                Ok(None) => return Ok(Value::Array(items)),
                Err(error) => return Err(self.inside(&items.len().to_string(), error)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value<'de>, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key_seed(Key(self))? {
            match map.next_value_seed(self) {
                Ok(value) => entries.push((key, value)),
                Err(error) => return Err(self.inside(&key, error)),
            }
        }
        entries.sort_by(|(left, _), (right, _)| left.cmp(right));
        if let Some(pair) = entries.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let error = self.refuse("duplicate-field", "this key stands here twice");
            return Err(self.inside(&pair[0].0, error));
        }
        Ok(Value::Object(entries))
    }
}

/// Reads an object's key. Keys are names: not even a line break may be in them.
struct Key<'r>(Seed<'r>);

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = Cow<'de, str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Cow<'de, str>, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Key<'_> {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_borrowed_str<E: serde::de::Error>(self, key: &'de str) -> Result<Cow<'de, str>, E> {
        self.key(Cow::Borrowed(key))
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<Cow<'de, str>, E> {
        self.key(Cow::Owned(key.to_owned()))
    }
}

impl Key<'_> {
    fn key<'de, E: serde::de::Error>(self, key: Cow<'de, str>) -> Result<Cow<'de, str>, E> {
        if !text::is_name(&key) {
            let detail = "a key of this object has a control character, or one that cannot be seen";
            return Err(self.0.refuse("invalid-character", detail));
        }
        self.0.string(key)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    /// Takes whatever is JSON; it is not a request of ours, but shows what is left of one.
    #[derive(Debug, Deserialize)]
    #[serde(transparent)]
    struct Anything(serde_json::Value);

    fn canonical(text: &str) -> String {
        let (_, canonical) = read::<Anything>(text.as_bytes()).unwrap();
        String::from_utf8(canonical.0).unwrap()
    }

    #[test]
    fn order_and_white_space_do_not_change_the_canonical_body_and_everything_else_does() {
        let text = canonical(r#"{"b": [1, 2.50, {"d": null, "c": "\u00e9\/"}], "a": true}"#);
        assert_eq!(text, r#"{"a":true,"b":[1,2.5,{"c":"é/","d":null}]}"#);
        assert_eq!(canonical(&text), text);
        for other in [r#"{"a":true}"#, r#"{"a":"true"}"#, r#"{"a":null}"#, r#"{"A":true}"#, r#"{"a":[true]}"#] {
            assert_ne!(canonical(other), text);
        }
        assert_ne!(canonical(r#"["a","b"]"#), canonical(r#"["b","a"]"#));
    }

    #[test]
    fn pointers_are_escaped_and_never_repeat_more_than_a_little() {
        #[derive(Debug, Deserialize)]
        struct Nested {
            #[serde(rename = "a/b~")]
            _inner: BTreeMap<String, u8>,
        }
        let pointer =
            |text: &str| read::<Nested>(text.as_bytes()).unwrap_err().document()["errors"][0]["pointer"].clone();
        assert_eq!(pointer(r#"{"a/b~": {"x": 1000}}"#), "/a~1b~0/x");
        assert_eq!(pointer(&format!(r#"{{"a/b~": {{"{}": 1000}}}}"#, "x".repeat(100))), "/a~1b~0");
        assert_eq!(pointer(&format!(r#"{{"{}": 1}}"#, "x".repeat(100))), "");
    }

    fn any_json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<u64>().prop_map(Into::into),
            "[a-zA-Zé€ ]{0,12}".prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Into::into),
                prop::collection::btree_map("[a-zA-Z/~]{0,6}", inner, 0..6)
                    .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_json_says_is_what_is_read_and_what_the_canonical_body_says(value in any_json()) {
            let (read, canonical) = read::<Anything>(value.to_string().as_bytes()).unwrap();
            prop_assert_eq!(&read.0, &value);
            prop_assert_eq!(serde_json::from_slice::<serde_json::Value>(canonical.bytes()).unwrap(), value);
        }

        #[test]
        fn any_bytes_are_read_or_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read::<Anything>(&bytes);
        }

        #[test]
        fn any_damaged_json_is_read_or_refused_without_a_panic(value in any_json(), place in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = value.to_string().into_bytes();
            let place = place.index(bytes.len());
            bytes[place] = byte;
            if let Err(problem) = read::<Anything>(&bytes) {
                prop_assert!(["malformed-json", "duplicate-field", "invalid-character", "invalid-field"].contains(&problem.slug()), "{}", problem);
            }
        }
    }
}
