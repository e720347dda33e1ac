//! What an operator is promised: exec, cp, logs, terminals, drain and stop.

use std::fs;
use std::io::Write;
use std::process::{Output, Stdio};

use e2e::Host;
use rustix::process::Signal;

use crate::terminal::Tmux;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn ok(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout)
}

#[test]
fn exec_runs_beside_the_job_with_streams_and_exit_code() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    let run = job.running();
    let prefix = &run[..8];

    let output = host
        .runner(&["exec", prefix, "--", "echo out; echo err >&2; exit 9"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(9), "{output:?}");
    assert_eq!(
        (text(&output.stdout).as_str(), text(&output.stderr).as_str()),
        ("out\n", "err\n")
    );

    // Several arguments are a program and its arguments: no shell sees them.
    let argv = ok(host
        .runner(&["exec", prefix, "--", "printf", "%s|", "a b", "$(id)", ";"])
        .output()
        .unwrap());
    assert_eq!(argv, "a b|$(id)|;|");

    let mut cat = host
        .runner(&["exec", "-i", prefix, "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let sent: Vec<u8> = (0..1_000_000_u32).flat_map(|n| n.to_le_bytes()).collect();
    let mut stdin = cat.stdin.take().unwrap();
    let copy = sent.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&copy).unwrap());
    let output = cat.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(
        output.status.success() && output.stdout == sent,
        "{} bytes came back",
        output.stdout.len()
    );

    let missing = host
        .runner(&["exec", "ffffffff", "--", "true"])
        .output()
        .unwrap();
    assert_eq!(missing.status.code(), Some(1));
    assert!(text(&missing.stderr).starts_with("error: "), "{missing:?}");

    assert!(host.runner(&["kill", prefix]).status().unwrap().success());
    job.wait().expect_error(&["cancel"]);
    host.finish();
}

#[test]
fn files_are_copied_in_and_out_unchanged() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    let run = job.running();
    let here = tempfile::tempdir().unwrap();
    let sent = here.path().join("sent");
    let bytes: Vec<u8> = (0..3_000_000_u32)
        .map(|n| u8::try_from(n.wrapping_mul(2_654_435_761) >> 24).unwrap())
        .collect();
    fs::write(&sent, &bytes).unwrap();
    let to = format!("{run}:/tmp/a file; $(id)");
    ok(host
        .runner(&["cp", sent.to_str().unwrap(), &to])
        .output()
        .unwrap());
    let back = here.path().join("back");
    ok(host
        .runner(&["cp", &to, back.to_str().unwrap()])
        .output()
        .unwrap());
    assert!(fs::read(&back).unwrap() == bytes, "the copy differs");
    let missing = host
        .runner(&["cp", &format!("{run}:/no/such"), "-"])
        .output()
        .unwrap();
    assert!(!missing.status.success());
    job.signal(Signal::INT);
    job.wait();
    host.finish();
}

#[test]
fn collected_files_are_there_when_submit_ends() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let here = tempfile::tempdir().unwrap();
    let argument = format!("/tmp/report.txt={}", here.path().display());
    host.submit("echo contents > /tmp/report.txt")
        .arg("--collect")
        .arg(&argument)
        .run()
        .expect_exit(0);
    assert_eq!(
        fs::read_to_string(here.path().join("report.txt")).unwrap(),
        "contents\n"
    );
    host.finish();
}

#[test]
fn exec_it_is_a_real_terminal_that_follows_resizes() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let Some(tmux) = Tmux::new() else {
        return host.finish();
    };
    let job = host.submit("sleep 1000").spawn();
    tmux.try_out(&host, &job.running());
    job.signal(Signal::INT);
    job.wait();
    host.finish();
}

#[test]
fn a_draining_runner_finishes_what_it_has_and_takes_nothing_new_until_resumed() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let first = host
        .submit("until test -e /tmp/go; do sleep 0.2; done")
        .spawn();
    let run = first.running();
    host.daemon().signal(Signal::USR1);
    host.until_status("it drains", |status| status["mode"] == "draining");
    let mut second = host.submit("exit 0").spawn();
    second.run_id();
    ok(host
        .runner(&["exec", &run, "--", "touch /tmp/go"])
        .output()
        .unwrap());
    first.wait().expect_exit(0);
    host.until_status("nothing runs", |status| {
        status["active_runs"].as_array().is_some_and(Vec::is_empty)
    });
    assert!(second.is_running());
    host.daemon().signal(Signal::USR2);
    second.wait().expect_exit(0);
    host.finish();
}

#[test]
fn a_stopped_runner_answers_the_jobs_it_cannot_finish() {
    let Some(host) = Host::new().option("stop_timeout_secs", 1).start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    job.running();
    assert!(host.stop().success());
    let outcome = job.wait();
    assert_ne!(outcome.result()["exit_code"], 0, "{outcome:?}");
    host.finish();
}

#[test]
fn a_user_who_is_not_root_submits_into_a_home_that_only_they_may_enter() {
    const USER: u32 = 2_099_999_999;
    let Some(host) = Host::new().owned_by(USER).start() else {
        return;
    };
    let outcome = host.submit("id -u").as_user(USER).run();
    outcome.expect_exit(0);
    let log = fs::metadata(host.log_path(&outcome.run_id())).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&log), USER);
    host.finish();
}
