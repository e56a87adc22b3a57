//! What stands in the URI: ids in the path, parameters in the query.

use std::borrow::Cow;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use crate::Problem;
use crate::json::Value;
use crate::reader::{ReadError, Reader};
use crate::text;

/// The path's parameters. What `T` cannot be read from is refused as `invalid-id`.
#[derive(Clone, Debug)]
pub struct Path<T>(pub T);

/// The query's parameters, each at most once; names that `T` does not have are refused.
///
/// `T` must not use `#[serde(flatten)]`: through it unknown names slip by.
#[derive(Clone, Debug)]
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        match axum::extract::Path::<T>::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(value)) => Ok(Self(value)),
            Err(_) => Err(Problem::of("invalid-id").detail("the path names no id of this kind")),
        }
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        Ok(Self(read(parts.uri.query().unwrap_or_default())?))
    }
}

pub(crate) fn read<T: DeserializeOwned>(query: &str) -> Result<T, Problem> {
    let mut entries = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (Some(name), Some(value)) = (decode(name), decode(value)) else {
            return Err(Problem::of("invalid-field").detail("the query is not percent-encoded UTF-8"));
        };
        if [&name, &value].into_iter().any(|text| !text::is_clean(text) || !text::is_name(text)) {
            return Err(at(
                ReadError::new("invalid-character", "a control character, or one that cannot be seen, is refused here"),
                &name,
            ));
        }
        entries.push((name, Value::String(value)));
    }
    entries.sort_by(|(left, _), (right, _)| left.cmp(right));
    if let Some(pair) = entries.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(at(ReadError::new("invalid-field", "this parameter stands here twice"), &pair[0].0));
    }
    let tree = Value::Object(entries);
    Ok(T::deserialize(Reader::of_query(&tree))?)
}

fn at(mut error: ReadError, name: &str) -> Problem {
    error.inside(name);
    error.into()
}

/// Form decoding: `+` is a space, `%` and two hex digits a byte. `None` where that gives no UTF-8.
fn decode(text: &str) -> Option<Cow<'_, str>> {
    if !text.bytes().any(|byte| matches!(byte, b'%' | b'+')) {
        return Some(Cow::Borrowed(text));
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => hex(rest.next()?)? << 4 | hex(rest.next()?)?,
            other => other,
        });
    }
    String::from_utf8(bytes).ok().map(Cow::Owned)
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}
