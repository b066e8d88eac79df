//! The document, and how it is read.

use std::fmt::Write;
use std::sync::Arc;

use serde_json::{Map, Value};

/// How an answer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// JSON.
    Json,
    /// As EC2's service does: the text of a string, the names of what is in an object, a line each.
    Text,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unanswered {
    /// There is nothing at that path.
    NotFound,
    /// What there is has no form as text.
    NoText,
}

/// A document that was put. It does not change.
#[derive(Debug)]
pub(super) struct Document {
    value: Value,
    text: Arc<str>,
}

impl Document {
    pub(super) fn new(value: Value) -> Self {
        let text = value.to_string().into();
        Self { value, text }
    }

    /// What [`Self::text`] gave.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let value: Map<String, Value> = serde_json::from_str(text).ok()?;
        Some(Self { value: Value::Object(value), text: text.into() })
    }

    pub(super) fn value(&self) -> &Value {
        &self.value
    }

    /// It in JSON.
    pub(super) fn text(&self) -> &Arc<str> {
        &self.text
    }

    pub(super) fn patched(&self, patch: Map<String, Value>) -> Self {
        let mut value = self.value.clone();
        merge(&mut value, Value::Object(patch));
        Self::new(value)
    }

    /// What is at `path`, whose parts are the names of fields or the numbers of an array's elements; empty parts are
    /// passed over.
    pub(super) fn read(&self, path: &str, form: Form) -> Result<String, Unanswered> {
        let mut at = &self.value;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            let next = match at {
                Value::Object(fields) => fields.get(part),
                Value::Array(elements) => part.parse().ok().and_then(|index: usize| elements.get(index)),
                _ => None,
            };
            at = next.ok_or(Unanswered::NotFound)?;
        }
        match (form, at) {
            (Form::Json, value) => Ok(value.to_string()),
            (Form::Text, Value::String(text)) => Ok(text.clone()),
            (Form::Text, Value::Object(fields)) => Ok(list(fields)),
            (Form::Text, _) => Err(Unanswered::NoText),
        }
    }
}

/// The names of fields, a line each; a slash follows where there are more below.
fn list(fields: &Map<String, Value>) -> String {
    let mut text = String::new();
    for (name, value) in fields {
        let separator = if text.is_empty() { "" } else { "\n" };
        let below = if value.is_object() { "/" } else { "" };
        // Text takes whatever is written.
        let _ = write!(text, "{separator}{name}{below}");
    }
    text
}

/// RFC 7386. How deep it goes is bounded by what the JSON parser takes.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(fields) = target else { return };
    for (name, value) in patch {
        if value.is_null() {
            fields.remove(&name);
        } else {
            merge(fields.entry(name).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn patches_merge_as_the_rfc_has_it() {
        // RFC 7386, appendix A, where both are objects.
        for (target, patch, result) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "c"}), json!({"a": ["b"]}), json!({"a": ["b"]})),
            (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
            (json!({"a": [{"b": "c"}]}), json!({"a": [1]}), json!({"a": [1]})),
            (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
            (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        ] {
            let Value::Object(patch) = patch else { panic!() };
            assert_eq!(Document::new(target).patched(patch).value, result);
        }
    }

    #[test]
    fn what_is_at_a_path_is_told_as_json_or_as_text() {
        let document = Document::new(json!({"a": {"b": "c", "d": {"e": 1}, "f": [7, "x"]}, "g": true}));
        let read = |path, form| document.read(path, form);
        assert_eq!(read("/a/b", Form::Json).unwrap(), "\"c\"");
        assert_eq!(read("/a/b", Form::Text).unwrap(), "c");
        assert_eq!(read("/", Form::Text).unwrap(), "a/\ng");
        assert_eq!(read("//a//", Form::Text).unwrap(), "b\nd/\nf");
        assert_eq!(read("/a/f/1", Form::Text).unwrap(), "x");
        assert_eq!(read("/a/d", Form::Json).unwrap(), "{\"e\":1}");
        assert_eq!(read("/a/d/e", Form::Text), Err(Unanswered::NoText));
        assert_eq!(read("/a/f", Form::Text), Err(Unanswered::NoText));
        for nowhere in ["/x", "/a/b/c", "/a/f/2", "/a/f/-1", "/g/"] {
            let found = read(nowhere, Form::Json);
            assert_eq!(found.is_ok(), nowhere == "/g/", "{nowhere}: {found:?}");
        }
    }

    #[test]
    fn only_objects_are_documents() {
        assert!(Document::parse("{\"a\":1}").is_some());
        assert!(Document::parse("[]").is_none());
        assert!(Document::parse("{").is_none());
    }
}
