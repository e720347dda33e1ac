//! The mock's lines against what the real CLI printed (`fixtures/README.md`).

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::Value;

const REAL: &str = include_str!("fixtures/real-tool-run.jsonl");
const REAL_INPUT: &str = include_str!("fixtures/real-input.jsonl");

fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// What a line is, as far as somebody who reads the stream tells lines apart.
fn kind(line: &Value) -> (String, String) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let block = &line["message"]["content"][0]["type"];
    (text(&line["type"]), text(block))
}

/// Every field of `mock` is in `real` too, with a value of the same type.
fn assert_fields_of(mock: &Value, real: &Value, path: &str) {
    match (mock, real) {
        (Value::Object(mock), Value::Object(real)) => {
            for (name, value) in mock {
                let path = format!("{path}.{name}");
                let counterpart = real.get(name);
                assert!(counterpart.is_some(), "the real line has no {path}");
                assert_fields_of(value, counterpart.unwrap(), &path);
            }
        }
        (Value::Array(mock), Value::Array(real)) => {
            if let (Some(mock), Some(real)) = (mock.first(), real.first()) {
                assert_fields_of(mock, real, &format!("{path}[0]"));
            }
        }
        (Value::String(_), Value::String(_))
        | (Value::Number(_), Value::Number(_))
        | (Value::Bool(_), Value::Bool(_)) => {}
        _ => panic!("{path} is {mock} here and {real} in the real line"),
    }
}

#[test]
fn every_field_of_the_mocks_lines_is_the_real_ones() {
    let home = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_guest-mock-claude"))
        .args(["--output-format", "stream-json", "echo hi"])
        .current_dir(home.path())
        .env("HOME", home.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let mock = lines(std::str::from_utf8(&output.stdout).unwrap());
    let real = lines(REAL);
    let mock_kinds: Vec<_> = mock.iter().map(kind).collect();
    let mut real_kinds: Vec<_> = real.iter().map(kind).collect();
    // The real assistant has the last word before the result; the mock says nothing more.
    real_kinds.remove(4);
    assert_eq!(mock_kinds, real_kinds);
    for line in &mock {
        let counterpart = real.iter().find(|real| kind(real) == kind(line)).unwrap();
        assert_fields_of(line, counterpart, &kind(line).0);
    }
    assert_eq!(mock[4]["subtype"], real[5]["subtype"]);
}

#[test]
fn a_message_that_is_read_is_repeated_like_the_real_one_does() {
    let home = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_guest-mock-claude"))
        .args(["--output-format", "stream-json", "--input-format"])
        .args(["stream-json", "--replay-user-messages"])
        .current_dir(home.path())
        .env("HOME", home.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let message = r#"{"type":"user","message":{"role":"user","content":"echo hi"}}"#;
    let mut stdin = child.stdin.take().unwrap();
    writeln!(stdin, "{message}").unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let mock = lines(std::str::from_utf8(&output.stdout).unwrap());
    let read = |line: &&Value| line["isReplay"] == true;
    let real = lines(REAL_INPUT);
    let (mock, real) = (
        mock.iter().find(read).unwrap(),
        real.iter().find(read).unwrap(),
    );
    assert_fields_of(mock, real, "user");
    assert_eq!(mock["message"]["content"], "echo hi");
}
