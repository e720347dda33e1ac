//! Takes secrets out of everything that is sent.
//!
//! The values of a run's secrets never enter the VM; what is masked is what the agent was given: its own token, and the texts that
//! `VM0_SECRET_VALUES` lists (placeholders). Each is looked for as it is, in base64 and percent-encoded.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Map, Value};

/// Shorter texts would be found everywhere.
const SHORTEST: usize = 5;
const MASK: &str = "***";
/// What JavaScript's `encodeURIComponent` encodes.
const COMPONENT: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'!')
    .remove(b'~')
    .remove(b'*')
    .remove(b'\'')
    .remove(b'(')
    .remove(b')');

/// What must not be sent.
#[derive(Debug, Default)]
pub(crate) struct Masker {
    /// Longest first, so that no part of one stays when a shorter one is in it.
    forms: Vec<String>,
}

impl Masker {
    /// Hides these, in every form.
    pub(crate) fn new(values: impl IntoIterator<Item = String>) -> Self {
        let mut forms = Vec::new();
        for value in values {
            if value.len() < SHORTEST {
                continue;
            }
            forms.push(STANDARD.encode(&value));
            forms.push(STANDARD_NO_PAD.encode(&value));
            forms.push(URL_SAFE_NO_PAD.encode(&value));
            forms.push(utf8_percent_encode(&value, COMPONENT).to_string());
            forms.push(value);
        }
        forms.sort_unstable_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        forms.dedup();
        Self { forms }
    }

    /// What `VM0_SECRET_VALUES` lists: texts in base64, separated by commas.
    pub(crate) fn parse_list(list: &str) -> Result<Vec<String>, String> {
        list.split(',')
            .filter(|item| !item.is_empty())
            .map(|item| {
                let bytes = STANDARD.decode(item).ok();
                bytes
                    .and_then(|bytes| String::from_utf8(bytes).ok())
                    .ok_or_else(|| "VM0_SECRET_VALUES is not a list of texts in base64".to_owned())
            })
            .collect()
    }

    /// The text without them.
    pub(crate) fn text(&self, text: &str) -> String {
        let mut masked = text.to_owned();
        for form in &self.forms {
            if masked.contains(form.as_str()) {
                masked = masked.replace(form.as_str(), MASK);
            }
        }
        masked
    }

    /// Every string in it, but for the names of members.
    pub(crate) fn object(&self, object: &mut Map<String, Value>) {
        object.values_mut().for_each(|value| self.value(value));
    }

    fn value(&self, value: &mut Value) {
        match value {
            Value::String(text) => {
                if self.forms.iter().any(|form| text.contains(form.as_str())) {
                    *text = self.text(text);
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.value(item)),
            Value::Object(object) => self.object(object),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn every_form_of_a_secret_is_hidden_everywhere() {
        let masker = Masker::new(["p@ss word".to_owned(), "abc".to_owned()]);
        let base64 = STANDARD.encode("p@ss word");
        let text = format!("p@ss word|{base64}|p%40ss%20word|abc");
        assert_eq!(masker.text(&text), "***|***|***|abc");
        let mut event = json!({"a": [{"b": "x p@ss word y"}], "p@ss word": 1});
        masker.object(event.as_object_mut().unwrap());
        assert_eq!(event, json!({"a": [{"b": "x *** y"}], "p@ss word": 1}));
    }

    #[test]
    fn the_list_is_base64() {
        let list = format!(
            "{},{}",
            STANDARD.encode("one"),
            STANDARD.encode("two,three")
        );
        assert_eq!(Masker::parse_list(&list).unwrap(), ["one", "two,three"]);
        assert_eq!(Masker::parse_list("").unwrap(), Vec::<String>::new());
        assert!(Masker::parse_list("&").is_err());
    }

    proptest! {
        #[test]
        fn nothing_of_a_secret_is_left(secret in "[a-zA-Z0-9_-]{5,20}", before in ".{0,20}", after in ".{0,20}") {
            let masked = Masker::new([secret.clone()]).text(&format!("{before}{secret}{after}"));
            prop_assert!(!masked.contains(&secret));
        }
    }
}
