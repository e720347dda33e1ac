//! The built agent supervising the built mock CLI, through every way in which one can go wrong.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// Long enough never to matter in a test that does not wait for it, far below the test runner's patience.
const LONG: &str = "60";

/// The mock, built from the same tree into the same target directory as the agent under test.
fn mock() -> &'static Path {
    static MOCK: OnceLock<PathBuf> = OnceLock::new();
    MOCK.get_or_init(|| {
        let agent = Path::new(env!("CARGO_BIN_EXE_guest-agent"));
        let profile_dir = agent.parent().unwrap();
        let mut build = Command::new(env!("CARGO"));
        build
            .args(["build", "--quiet", "--package", "guest-mock-claude"])
            .arg("--target-dir")
            .arg(profile_dir.parent().unwrap());
        if profile_dir.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success(), "the mock does not build");
        profile_dir.join("guest-mock-claude")
    })
}

/// A home with the mock as `claude`, and an agent about to be started in it.
struct Run {
    home: tempfile::TempDir,
    command: Command,
}

struct Ended {
    status: ExitStatus,
    stdout: String,
    stderr: Vec<u8>,
    took: Duration,
}

impl Run {
    fn of(prompt: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        let bin = home.path().join("bin");
        fs::create_dir(&bin).unwrap();
        symlink(mock(), bin.join("claude")).unwrap();
        // Should the test be killed, the agent is told to end, and ends what it started.
        let mut command = Command::new("/usr/bin/setpriv");
        command
            .args(["--pdeathsig", "TERM", env!("CARGO_BIN_EXE_guest-agent")])
            .env_clear()
            .env("PATH", format!("{}:/usr/bin:/bin", bin.display()))
            .env("HOME", home.path())
            .env("VM0_RUN_ID", "11111111-2222-4333-8444-555555555555")
            .env("VM0_API_TOKEN", "")
            .env("VM0_WORKING_DIR", home.path().join("made/workspace"))
            .env("VM0_PROMPT", prompt)
            .env("VM0_STUCK_TOOL_TIMEOUT_SECS", LONG)
            .env("VM0_POST_RESULT_GRACE_SECS", LONG)
            .env("VM0_TERM_GRACE_SECS", LONG)
            .env("VM0_DRAIN_SECS", LONG)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Self { home, command }
    }

    fn with(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Another CLI instead of the mock.
    fn replace_cli(&self, script: &str) {
        let path = self.home.path().join("bin/claude");
        fs::remove_file(&path).unwrap();
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn spawn(mut self) -> (Child, tempfile::TempDir) {
        (self.command.spawn().unwrap(), self.home)
    }

    fn end(self) -> Ended {
        let started = Instant::now();
        let (child, _home) = self.spawn();
        let output = child.wait_with_output().unwrap();
        Ended {
            status: output.status,
            stdout: String::from_utf8(output.stdout).expect("the agent's log is UTF-8"),
            stderr: output.stderr,
            took: started.elapsed(),
        }
    }
}

impl Ended {
    #[track_caller]
    fn assert(self, code: i32, contains: &[&str]) -> Self {
        assert_eq!(self.status.code(), Some(code), "{}", self.stdout);
        for text in contains {
            assert!(
                self.stdout.contains(text),
                "no {text:?} in:\n{}",
                self.stdout
            );
        }
        // Every deadline that is not the one under test is LONG.
        assert!(self.took < Duration::from_secs(30), "took {:?}", self.took);
        self
    }
}

#[test]
fn the_log_of_a_good_run_reads_like_this() {
    let ended = Run::of("pwd; echo two").end();
    let log: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!(
        log,
        [
            "▶ VM0 Sandbox 11111111-2222-4333-8444-555555555555",
            "▷ Initialization",
            "✓ Initialization complete (0s)",
            "▷ Execution",
            log[4],
            "two",
            "✓ Execution complete",
            "▷ Cleanup",
            "✓ Sandbox finished successfully",
        ]
    );
    assert!(log[4].ends_with("/made/workspace"));
    assert_eq!(ended.status.code(), Some(0));
    assert!(ended.stderr.is_empty());
}

#[test]
fn without_a_token_no_connection_is_made() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    Run::of("echo hi")
        .with("VM0_API_URL", &url)
        .end()
        .assert(0, &["hi\n"]);
    let nobody = listener.accept().unwrap_err();
    assert_eq!(nobody.kind(), std::io::ErrorKind::WouldBlock);
    // Nor could this test fail to see one.
    let token = Run::of("echo hi")
        .with("VM0_API_URL", &url)
        .with("VM0_API_TOKEN", "t");
    let (mut agent, _home) = token.spawn();
    listener.set_nonblocking(false).unwrap();
    let (connection, _) = listener.accept().unwrap();
    let mut request = String::new();
    BufReader::new(connection).read_line(&mut request).unwrap();
    assert_eq!(request, "POST /api/webhooks/agent/heartbeat HTTP/1.1\r\n");
    kill_process(Pid::from_child(&agent), Signal::TERM).unwrap();
    assert_eq!(agent.wait().unwrap().signal(), Some(15));
}

#[test]
fn the_exit_code_is_the_prompts_and_the_reason_its_last_words() {
    let ended = Run::of("echo some; echo no >&2; exit 9").end().assert(
        9,
        &[
            "some\nno\n",
            "✗ Execution failed (exit code 9)",
            "✗ Sandbox failed (exit code 9)",
        ],
    );
    assert_eq!(ended.stderr, b"no\n");
    let ended = Run::of("exit 9").end().assert(9, &[]);
    assert!(ended.stderr.is_empty());
}

#[test]
fn the_real_cli_without_credentials_says_so() {
    let run = Run::of("hi");
    let fixture = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../guest-mock-claude/tests/fixtures/real-not-logged-in.jsonl"
    );
    run.replace_cli(&format!("cat {fixture}; exit 1"));
    let reason = "Not logged in · Please run /login\n";
    let ended = run
        .end()
        .assert(1, &[&format!("\n{reason}✗ Execution failed")]);
    assert_eq!(ended.stderr, reason.as_bytes());
}

#[test]
fn a_prompt_that_looks_like_a_flag_is_still_a_prompt() {
    Run::of("--resume; echo reached")
        .end()
        .assert(0, &["reached"]);
}

#[test]
fn a_long_prompt_passes_through_standard_input() {
    let mut run = Run::of("").with("VM0_PROMPT_STDIN", "1");
    run.command.stdin(Stdio::piped());
    let (mut child, _home) = run.spawn();
    let mut prompt = "echo from stdin; : ".to_owned();
    prompt.push_str(&"x".repeat(1024 * 1024));
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(prompt.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(
        String::from_utf8(output.stdout)
            .unwrap()
            .contains("\nfrom stdin\n")
    );
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_megabyte_of_result_is_all_there() {
    let ended = Run::of("head -c 5000000 /dev/zero | tr '\\0' a").end();
    let longest = ended.stdout.lines().map(str::len).max();
    assert_eq!(longest, Some(5_000_000));
    ended.assert(0, &[]);
}

#[test]
fn no_cli_is_127_and_says_which() {
    Run::of("x").with("PATH", "/nowhere").end().assert(
        127,
        &[
            "\"claude\" cannot be started",
            "✗ Sandbox failed (exit code 127)",
        ],
    );
}

#[test]
fn a_working_directory_that_cannot_be_is_named() {
    Run::of("x")
        .with("VM0_WORKING_DIR", "/dev/null/x")
        .end()
        .assert(1, &["\"/dev/null/x\" cannot be used"]);
}

#[test]
fn an_incomplete_environment_is_refused() {
    Run::of("").end().assert(1, &["VM0_PROMPT is missing"]);
    Run::of("x")
        .with("VM0_API_TOKEN", "secret-token")
        .end()
        .assert(1, &["VM0_API_URL is missing"]);
}

#[test]
fn fail_passes_standard_error_through_byte_for_byte() {
    let run = |prompt| {
        Run::of(prompt)
            .end()
            .assert(1, &["✗ Sandbox failed (exit code 1)"])
    };
    assert_eq!(run("@fail:no luck").stderr, b"no luck\n");
    assert_eq!(run("@fail-no-newline:no luck").stderr, b"no luck");
    assert_eq!(run("@fail-invalid-utf8").stderr, b"broken \xff\xfe bytes\n");
    let long = run("@fail-invalid-utf8-long").stderr;
    assert_eq!(long, b"\xf0\x9f\x98\x80\xff\xe2\x82".repeat(64 * 1024 / 7));
}

#[test]
fn a_line_beyond_the_limit_costs_only_itself() {
    Run::of("@stdout-over-limit-newline").end().assert(
        0,
        &[
            "[a line of 34603008 bytes from the agent CLI was too long",
            "\nafter the long line\n",
        ],
    );
    Run::of("@stdout-over-limit-no-newline")
        .end()
        .assert(0, &["[a line of 34603008 bytes"]);
}

#[test]
fn bytes_that_are_no_utf8_cost_only_themselves() {
    Run::of("@stdout-invalid-utf8")
        .end()
        .assert(0, &["\nbad: \u{fffd} end\n"]);
}

#[test]
fn records_need_not_arrive_in_one_piece() {
    Run::of("@stdout-record-boundaries")
        .end()
        .assert(0, &["\nboundaries \u{1f600} kept\n"]);
}

#[test]
fn a_stuck_tool_ends_the_run() {
    let why = "Tool timeout: WebFetch exceeded 0.1s without returning a result\n";
    let ended = Run::of("@stuck-tool")
        .with("VM0_STUCK_TOOL_TIMEOUT_SECS", "0.1")
        .end()
        .assert(1, &[&format!("✗ {why}")]);
    assert_eq!(ended.stderr, why.as_bytes());
}

#[test]
fn a_stuck_tool_that_ignores_sigterm_is_killed() {
    for prompt in ["@stuck-tool-deaf", "@stuck-tool-closed-stdout-deaf"] {
        Run::of(prompt)
            .with("VM0_STUCK_TOOL_TIMEOUT_SECS", "0.1")
            .with("VM0_TERM_GRACE_SECS", "0.1")
            .end()
            .assert(1, &["✗ Tool timeout: WebFetch"]);
    }
}

#[test]
fn an_orphan_that_holds_the_pipe_delays_the_end_no_longer_than_the_drain() {
    Run::of("@orphan-pipe")
        .with("VM0_DRAIN_SECS", "0.2")
        .end()
        .assert(0, &["\nan orphan holds the pipe\n", "✓ Execution complete"]);
}

#[test]
fn a_cli_that_stays_after_its_result_is_ended_and_the_result_counts() {
    for prompt in ["@hang-after-result", "@hang-after-result-then-event"] {
        Run::of(prompt)
            .with("VM0_POST_RESULT_GRACE_SECS", "0.1")
            .end()
            .assert(
                0,
                &[
                    "\ndone, but still here\n",
                    "is ended",
                    "✓ Execution complete",
                ],
            );
    }
    Run::of("@hang-after-error-result")
        .with("VM0_POST_RESULT_GRACE_SECS", "0.1")
        .end()
        .assert(1, &["\ndone, but still here\n"]);
}

#[test]
fn staying_after_the_result_is_not_helped_by_being_deaf() {
    Run::of("@hang-after-result-deaf")
        .with("VM0_POST_RESULT_GRACE_SECS", "0.1")
        .with("VM0_TERM_GRACE_SECS", "0.1")
        .end()
        .assert(0, &["✓ Execution complete"]);
}

#[test]
fn events_after_the_result_do_not_prolong_it_for_ever() {
    // An event every 50 ms renews the grace each time; ten graces are the end all the same.
    Run::of("@hang-after-result-periodic-events")
        .with("VM0_POST_RESULT_GRACE_SECS", "0.2")
        .end()
        .assert(0, &["is ended", "✓ Execution complete"]);
}

#[test]
fn a_cli_that_exits_after_its_result_is_left_to_do_so() {
    let ended = Run::of("@exit-after-result")
        .end()
        .assert(0, &["\nexits soon\n"]);
    assert!(!ended.stdout.contains("is ended"), "{}", ended.stdout);
}

#[test]
fn the_cli_gets_its_environment_and_not_the_agents_secrets() {
    let file = tempfile::NamedTempFile::new().unwrap();
    Run::of(&format!("@write-env-json:{}", file.path().display()))
        .with("JOB_VARIABLE", "kept")
        .end()
        .assert(0, &[]);
    let environment: serde_json::Value =
        serde_json::from_slice(&fs::read(file.path()).unwrap()).unwrap();
    assert_eq!(environment["JOB_VARIABLE"], "kept");
    assert_eq!(environment["DISABLE_TELEMETRY"], "1");
    assert_eq!(environment["CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"], "1");
    assert_eq!(
        environment["VM0_RUN_ID"],
        "11111111-2222-4333-8444-555555555555"
    );
    for hidden in ["VM0_API_TOKEN", "VM0_PROMPT", "VM0_DRAIN_SECS"] {
        assert_eq!(environment.get(hidden), None, "{hidden}");
    }
}

#[test]
fn lines_that_are_no_events_are_passed_on() {
    let result = r#"{"type":"result","is_error":false,"result":"said"}"#;
    Run::of(&format!(
        "@ECHO@plain words\n{{\"type\":\"new\"}}\n{result}"
    ))
    .end()
    .assert(0, &["\nplain words\nsaid\n✓"]);
}

#[test]
fn a_result_ends_an_echo_that_hangs() {
    let result = r#"{"type":"result","is_error":true,"result":"said"}"#;
    Run::of(&format!("@ECHO-HANG@{result}"))
        .with("VM0_POST_RESULT_GRACE_SECS", "0.1")
        .end()
        .assert(1, &["\nsaid\n"]);
}

#[test]
fn a_job_has_no_input_while_it_runs() {
    Run::of("@active-input-smoke:2")
        .end()
        .assert(1, &["input ended before line 1 of 2"]);
    Run::of("@active-input-smoke:0")
        .end()
        .assert(0, &["0 inputs taken"]);
}

/// A run that takes input, with these messages on its standard input already; more can follow.
fn conversation(run: Run, messages: &[&str]) -> (Child, tempfile::TempDir) {
    let mut run = run.with("VM0_INPUT", "1");
    run.command.stdin(Stdio::piped());
    let (mut child, home) = run.spawn();
    for message in messages {
        say(&mut child, message);
    }
    (child, home)
}

fn say(child: &mut Child, message: &str) {
    let stdin = child.stdin.as_mut().unwrap();
    let message =
        serde_json::json!({"type": "user", "message": {"role": "user", "content": message}});
    writeln!(stdin, "{message}").unwrap();
}

/// How it ended, with its standard input open to the last.
fn ended(mut child: Child) -> (i32, String) {
    let _stdin = child.stdin.take().unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    (output.status.code().unwrap(), said)
}

#[test]
fn a_job_that_takes_input_gets_each_message_while_it_works() {
    let (mut child, _home) = conversation(Run::of(""), &["@active-input-smoke:2", "one"]);
    say(&mut child, "two");
    let (code, said) = ended(child);
    assert_eq!(code, 0, "{said}");
    for wanted in ["▷ Input 1", "▷ Input 2", "2 inputs taken"] {
        assert!(said.contains(wanted), "{wanted} in {said}");
    }
}

#[test]
fn a_message_that_waits_is_answered_after_the_prompt_and_then_it_is_over() {
    // It is at the first, which is more than pipes hold, until all are there.
    let filling = "x".repeat(1 << 20);
    let first = format!(": {filling}; until [ -e ~/go ]; do sleep 0.05; done; echo one");
    let (child, home) = conversation(Run::of(""), &[&first, "echo two", "echo three"]);
    fs::write(home.path().join("go"), "").unwrap();
    let (code, said) = ended(child);
    assert_eq!(code, 0, "{said}");
    let answers = said.lines().filter(|line| !line.contains(' '));
    assert_eq!(answers.collect::<Vec<_>>(), ["one", "two", "three"]);
}

#[test]
fn a_job_that_takes_input_and_gets_none_ends_with_its_answer() {
    let (child, _home) = conversation(Run::of(""), &["echo one; exit 3"]);
    let (code, said) = ended(child);
    assert_eq!(code, 3, "{said}");
}

#[test]
fn what_comes_behind_the_last_answer_is_given_to_nobody() {
    // It answers the first message, and says what it finds afterwards.
    let cli = r#"read -r line; printf '{"type":"user","isReplay":true}\n{"type":"result","result":"done"}\n'
        rest=$(cat); echo "rest=[$rest]""#;
    let run = Run::of("");
    run.replace_cli(cli);
    let (mut child, _home) = conversation(run, &["one"]);
    let mut log = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while line.trim_end() != "rest=[]" {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "it ended");
    }
    // Nobody reads it, and nobody waits for it.
    let _broken = child.stdin.as_mut().unwrap().write_all(b"late");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_cli_that_has_a_message_to_read_is_given_time_after_its_result() {
    // Each turn takes longer than the grace; a result between them is not the end.
    let cli = r#"read -r line; echo '{"type":"user","isReplay":true}'
        read -r line; echo '{"type":"result","result":"one"}'; sleep 1
        echo '{"type":"user","isReplay":true}'; sleep 1
        echo '{"type":"result","result":"two"}'"#;
    let run = Run::of("").with("VM0_POST_RESULT_GRACE_SECS", "0.4");
    run.replace_cli(cli);
    let (child, _home) = conversation(run, &["prompt", "more"]);
    let (code, said) = ended(child);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("one\ntwo\n"), "{said}");
}

#[test]
fn a_turn_that_began_is_told_more_whatever_the_cli_says_of_what_it_read() {
    let cli = r#"read -r line; read -r line; echo '{"type":"result","result":"one"}'
        echo '{"type":"system","subtype":"init","session_id":"s","cwd":"/"}'; echo begun
        read -r line && echo '{"type":"result","result":"two"}'"#;
    let run = Run::of("").with("VM0_POST_RESULT_GRACE_SECS", "1");
    run.replace_cli(cli);
    let (mut child, _home) = conversation(run, &["prompt", "more"]);
    let mut log = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while line.trim_end() != "begun" {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "it ended");
    }
    // Longer than the grace: only the turn that began keeps its input open. No event could tell that.
    std::thread::sleep(Duration::from_millis(2500));
    say(&mut child, "and more");
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\ntwo\n"), "{rest}");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_cli_that_closes_its_input_or_leaves_it_unread_is_watched_all_the_same() {
    let answer = r#"printf '{"type":"result","result":"done"}\n'"#;
    for cli in [format!("exec <&-; {answer}; sleep 0.1"), answer.to_owned()] {
        let large = "x".repeat(1 << 20);
        let run = Run::of("");
        run.replace_cli(&cli);
        let (mut child, _home) = conversation(run, &[]);
        let mut stdin = child.stdin.take().unwrap();
        let writer = std::thread::spawn(move || drop(stdin.write_all(large.as_bytes())));
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        writer.join().unwrap();
    }
}

#[test]
fn a_cli_ended_by_a_signal_is_128_and_its_number() {
    Run::of("kill -9 $PPID")
        .end()
        .assert(137, &["exit code 137"]);
}

/// The pid that the prompt's bash wrote into `file`, once it is there.
fn pid_in(file: &Path) -> Pid {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let text = fs::read_to_string(file).unwrap_or_default();
        if let Some(pid) = text.strip_suffix('\n') {
            return Pid::from_raw(pid.parse().unwrap()).unwrap();
        }
        assert!(Instant::now() < deadline, "the prompt did not start");
        std::thread::yield_now();
    }
}

/// Waits until nothing but a zombie is left of a process that is not ours to wait for.
fn assert_ends(pid: Pid) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
        if test_kill_process(pid).is_err() || stat.is_ok_and(|stat| stat.contains(") Z ")) {
            return;
        }
        assert!(Instant::now() < deadline, "process {pid:?} is still there");
        std::thread::yield_now();
    }
}

#[test]
fn whatever_the_cli_left_behind_is_killed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    Run::of(&format!("sleep 600 & echo $! > {}", file.path().display()))
        .end()
        .assert(0, &[]);
    assert_ends(pid_in(file.path()));
}

#[test]
fn a_signal_is_forwarded_and_is_the_exit_code() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (child, _home) = Run::of(&format!(
            "echo $$ > {}; exec sleep 600",
            file.path().display()
        ))
        .spawn();
        let prompt = pid_in(file.path());
        kill_process(Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code));
        assert_eq!(output.status.signal(), None);
        assert_ends(prompt);
    }
}

#[test]
fn a_reader_that_stalls_stops_nothing() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let line = r#"{"type":"result","is_error":false,"result":"RESULT"}"#;
    let many = format!("{}\n", line.replace("RESULT", &"r".repeat(20_000))).repeat(100);
    let prompt = format!("@ECHO@{many}");
    // Two megabytes of results, far more than a pipe holds, and nobody reads until the CLI has exited.
    let mut run = Run::of("")
        .with("VM0_PROMPT_STDIN", "1")
        .with("VM0_POST_RESULT_GRACE_SECS", LONG);
    run.replace_cli(&format!(
        "{} \"$@\"; echo $$ > {}",
        mock().display(),
        file.path().display()
    ));
    run.command.stdin(Stdio::piped());
    let (mut child, _home) = run.spawn();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(prompt.as_bytes())
        .unwrap();
    pid_in(file.path());
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let results = stdout
        .lines()
        .filter(|line| line.as_ref().unwrap().starts_with("rrr"));
    assert_eq!(results.count(), 100);
    assert!(child.wait().unwrap().success());
}
