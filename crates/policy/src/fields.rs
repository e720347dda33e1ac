//! What a rule sets on requests: `headers` and `query`.

use std::collections::{BTreeMap, BTreeSet};

use crate::policy::shown;
use crate::template::Template;

/// Most headers, and most query parameters, that a rule may set.
const MAX_FIELDS: usize = 32;

/// A complaint about one key of a rule.
pub(crate) struct Bad(pub(crate) String, pub(crate) String);

impl Bad {
    pub(crate) fn new(key: &str, reason: impl ToString) -> Self {
        Self(key.to_owned(), reason.to_string())
    }
}

/// The headers that a rule sets.
pub(crate) fn headers(
    written: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, Template>, Bad> {
    // Names have no case: of two spellings one would be lost.
    let mut folded = BTreeSet::new();
    if let Some(name) = written
        .keys()
        .find(|name| !folded.insert(name.to_ascii_lowercase()))
    {
        return Err(Bad::new(
            "headers",
            format!("the header {name} is there twice"),
        ));
    }
    fields("headers", written, header_name)
}

/// The query parameters that a rule sets.
pub(crate) fn query(written: &BTreeMap<String, String>) -> Result<BTreeMap<String, Template>, Bad> {
    fields("query", written, query_name)
}

/// Names that frame a message or belong to the connection: to set one is to smuggle.
const FRAMING: [&str; 12] = [
    "connection",
    "content-encoding",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

fn header_name(name: &str) -> Result<(), String> {
    let token = (1..=128).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b));
    if !token {
        return Err(format!("{} is not a header's name", shown(name)));
    }
    if FRAMING.contains(&name.to_ascii_lowercase().as_str()) {
        return Err(format!(
            "the header {name} frames the message; the proxy sets it"
        ));
    }
    Ok(())
}

fn query_name(name: &str) -> Result<(), String> {
    if (1..=128).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic()) {
        Ok(())
    } else {
        Err(format!(
            "{} is not a parameter's name of 1 to 128 printable ASCII characters",
            shown(name)
        ))
    }
}

fn fields(
    key: &str,
    written: &BTreeMap<String, String>,
    check: fn(&str) -> Result<(), String>,
) -> Result<BTreeMap<String, Template>, Bad> {
    if written.len() > MAX_FIELDS {
        return Err(Bad::new(
            key,
            format!("it sets {} of them; at most {MAX_FIELDS} go", written.len()),
        ));
    }
    let mut fields = BTreeMap::new();
    for (name, value) in written {
        check(name).map_err(|reason| Bad::new(key, reason))?;
        let value = value
            .parse()
            .map_err(|error| Bad::new(&format!("{key}.{name}"), error))?;
        fields.insert(name.clone(), value);
    }
    Ok(fields)
}
