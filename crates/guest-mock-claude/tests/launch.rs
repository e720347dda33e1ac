//! The built mock, started as the agent starts it.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn mock(home: &tempfile::TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_guest-mock-claude"));
    command
        .current_dir(home.path())
        .env("HOME", home.path())
        .stdin(Stdio::null());
    command
}

fn stream_json(home: &tempfile::TempDir, prompt: &str) -> Output {
    mock(home)
        .args(["--print", "--output-format", "stream-json", "--", prompt])
        .output()
        .unwrap()
}

fn lines(output: &Output) -> Vec<Value> {
    let text = std::str::from_utf8(&output.stdout).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn a_prompt_gives_five_lines_its_exit_code_and_a_history() {
    let home = tempfile::tempdir().unwrap();
    let output = stream_json(&home, "pwd; echo ünï; echo bad >&2; exit 3");
    assert_eq!(output.status.code(), Some(3));
    let lines = lines(&output);
    let cwd = home.path().canonicalize().unwrap();
    let cwd = cwd.to_str().unwrap();
    assert_eq!(lines.len(), 5);
    assert_eq!(lines[0]["cwd"], cwd);
    assert_eq!(lines[4]["result"], format!("{cwd}\nünï\nbad\n"));

    let sid = lines[0]["session_id"].as_str().unwrap();
    let history = home
        .path()
        .join(".claude/projects")
        .join(cwd.replace(|c: char| !c.is_ascii_alphanumeric(), "-"))
        .join(format!("{sid}.jsonl"));
    assert_eq!(fs::read(history).unwrap(), output.stdout);
}

#[test]
fn a_long_prompt_comes_by_standard_input() {
    let home = tempfile::tempdir().unwrap();
    let mut child = mock(&home)
        .args(["--print", "--output-format", "stream-json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut prompt = b"echo long; : ".to_vec();
    prompt.resize(1024 * 1024, b'y');
    child.stdin.take().unwrap().write_all(&prompt).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(lines(&output)[4]["result"], "long\n");
}

#[test]
fn text_format_is_the_command_and_nothing_else() {
    let home = tempfile::tempdir().unwrap();
    let output = mock(&home)
        .arg("echo out; echo err >&2; exit 4")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(4));
    assert_eq!(output.stdout, b"out\n");
    assert_eq!(output.stderr, b"err\n");
}

#[test]
fn no_prompt_at_all_is_an_error() {
    let home = tempfile::tempdir().unwrap();
    let output = mock(&home).arg("--print").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("Input must be provided"));
}

#[test]
fn failures_print_only_their_message() {
    let home = tempfile::tempdir().unwrap();
    let output = stream_json(&home, "@fail:no luck");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(output.stderr, b"no luck\n");
    assert!(output.stdout.is_empty());
}

#[test]
fn each_message_is_a_turn_of_one_session() {
    let home = tempfile::tempdir().unwrap();
    let mut child = mock(&home)
        .args(["--output-format", "stream-json", "--input-format"])
        .args(["stream-json", "--replay-user-messages"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for prompt in ["echo one", "echo two; exit 3"] {
        let message =
            serde_json::json!({"type": "user", "message": {"role": "user", "content": prompt}});
        writeln!(stdin, "{message}").unwrap();
    }
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    let lines = lines(&output);
    let of = |name: &str| -> Vec<_> {
        let has = lines.iter().filter(|line| !line[name].is_null());
        has.map(|line| line[name].to_string()).collect()
    };
    assert_eq!(of("isReplay"), ["true", "true"]);
    assert_eq!(of("result"), [r#""one\n""#, r#""two\n""#]);
    let mut sessions = of("session_id");
    sessions.dedup();
    assert_eq!(sessions.len(), 1);
}

#[test]
fn inputs_are_taken_while_it_runs() {
    let home = tempfile::tempdir().unwrap();
    let start = |input: &'static [u8]| {
        let mut child = mock(&home)
            .args(["--output-format", "stream-json", "@active-input-smoke:2"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    };
    let both = start(b"one\ntwo\n");
    assert_eq!(both.status.code(), Some(0));
    assert_eq!(
        lines(&both)[4]["message"]["content"][0]["text"],
        "input 2: two"
    );
    let one = start(b"one\n");
    assert_eq!(one.status.code(), Some(1));
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let home = tempfile::tempdir().unwrap();
    let mut child = mock(&home)
        .args([
            "--output-format",
            "stream-json",
            "head -c 1000000 /dev/zero",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.signal(), None);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.is_empty());
}
