//! The trace that an event belongs to, as its metadata says: what whoever works on the event later makes child spans of.
//!
//! Metadata is written by us, a flat object of texts without a space in it, and looked at for every event while traces
//! are on: so the text is searched and not parsed. In what was written elsewhere the name may go unfound, which costs a
//! span and nothing else.

use crate::RecordedEvent;

/// The `traceparent` in an event's or a command's metadata.
pub fn traceparent(metadata: &str) -> Option<&str> {
    // Inside a text each quotation mark stands behind a backslash, so this is a name and never part of a value.
    const NAME: &str = r#""traceparent":""#;
    let value = &metadata[metadata.find(NAME)? + NAME.len()..];
    value.find('"').map(|end| &value[..end])
}

impl RecordedEvent {
    pub fn traceparent(&self) -> Option<&str> {
        traceparent(&self.metadata)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_found_by_its_name_and_not_in_what_others_wrote() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let metadata = serde_json::json!({"requestId": "r", "traceparent": good, "userId": "u"}).to_string();
        assert_eq!(traceparent(&metadata), Some(good));
        let forged = serde_json::json!({"userId": format!(r#","traceparent":"{good}""#)}).to_string();
        assert_eq!(traceparent(&forged), None, "{forged}");
        for none in ["{}", "", r#"{"traceparent":null}"#, r#"{"traceparent":"00-"#, r#"{"x-traceparent":"a"}"#] {
            assert_eq!(traceparent(none), None, "{none}");
        }
    }
}
