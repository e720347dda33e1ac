//! Network logs, as documented.

use std::fs;
use std::path::Path;

use serde_json::Value;

/// The lines of one run.
#[derive(Debug)]
pub struct NetworkLog(Vec<Value>);

impl NetworkLog {
    /// Reads a log and checks each line for the documented fields, exactly these.
    pub(crate) fn read(path: &Path) -> Self {
        let text =
            fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(
            text.is_empty() || text.ends_with('\n'),
            "the last line is whole: {text}"
        );
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect();
        for line in &lines {
            check(line);
        }
        Self(lines)
    }

    /// Lines that have all of these fields with these values.
    pub fn with(&self, wanted: &[(&str, Value)]) -> Vec<&Value> {
        let fits = |line: &&Value| wanted.iter().all(|(key, value)| line[*key] == *value);
        self.0.iter().filter(fits).collect()
    }

    /// The first such line; panics if there is none.
    pub fn one(&self, wanted: &[(&str, Value)]) -> &Value {
        let found = self.with(wanted).into_iter().next();
        found.unwrap_or_else(|| panic!("no line with {wanted:?} in {}", self.text()))
    }

    /// All of it, to look at.
    pub fn text(&self) -> String {
        let lines: Vec<String> = self.0.iter().map(Value::to_string).collect();
        lines.join("\n")
    }
}

fn check(line: &Value) {
    let common = [
        "timestamp",
        "type",
        "action",
        "rule",
        "host",
        "port",
        "error",
    ];
    let kind = line["type"].as_str().unwrap_or_default();
    let further: &[&str] = match kind {
        "http" => &[
            "method",
            "url",
            "status",
            "latency_ms",
            "request_size",
            "response_size",
        ],
        "tcp" => &["latency_ms", "request_size", "response_size"],
        "dns" => &["query", "answers", "latency_ms"],
        "packet" => &["protocol", "count"],
        _ => panic!("a line of no known type: {line}"),
    };
    let mut wanted: Vec<&str> = common.iter().chain(further).copied().collect();
    wanted.sort_unstable();
    let mut keys: Vec<&String> = line.as_object().expect("an object").keys().collect();
    keys.sort();
    assert_eq!(keys, wanted, "{line}");
    let timestamp = line["timestamp"].as_str().unwrap_or_default();
    // 2006-01-02T15:04:05.000Z
    assert!(
        timestamp.len() == 24
            && timestamp.ends_with('Z')
            && timestamp.parse::<jiff::Timestamp>().is_ok(),
        "{line}"
    );
    assert!(
        ["ALLOW", "DENY", "AUDIT"].contains(&line["action"].as_str().unwrap_or_default()),
        "{line}"
    );
}
