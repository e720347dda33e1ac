//! The host's clock is set while jobs run: an hour forward, an hour back.
//!
//! Only the daemon sees it happen. Times of files stay the machine's, so to the daemon they are an hour in the past or in
//! the future, as they are after a real step.

use std::fs::File;
use std::io::Write;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use e2e::{DaemonClock, Host, Job, seconds_now};
use serde_json::Value;

const HOUR: i64 = 3600;
/// How long a job may take that is ended for it.
const LIMIT: Duration = Duration::from_secs(10);
/// Between two pieces of a job file that is written slowly.
const WRITER_PAUSE: Duration = Duration::from_millis(100);

/// A time of status.json, seconds since 1970.
fn seconds(time: &Value) -> i64 {
    let text = time.as_str().expect("a time");
    let time: jiff::Timestamp = text.parse().expect("ISO 8601");
    time.as_second()
}

/// Runs a job, so that the daemon has seen its new clock and has written its status anew.
fn another_job(host: &Host) {
    host.submit("true").run().expect_exit(0);
}

#[test]
fn a_job_and_what_status_says_of_it_outlast_steps_of_the_clock() {
    let Some(clock) = DaemonClock::new() else {
        return;
    };
    let Some(host) = Host::new().prepare() else {
        return;
    };
    clock.start_runner(&host);
    let began = Instant::now();
    let job = host
        .submit("until test -e /tmp/go; do sleep 0.2; done")
        .timeout_secs(600)
        .spawn();
    let run = job.running();
    for offset in [HOUR, -HOUR] {
        clock.set(offset);
        another_job(&host);
        let status = host.until_status("the clock is followed", |status| {
            (seconds(&status["updated_at"]) - seconds_now() - offset).abs() < 60
                && status["active_runs"].as_array().map(Vec::len) == Some(1)
        });
        let active = &status["active_runs"][0];
        assert_eq!(active["run_id"], run.as_str(), "{status}");
        let elapsed = i64::try_from(began.elapsed().as_secs()).unwrap();
        let age = seconds(&status["updated_at"]) - seconds(&active["phase_started_at"]);
        assert!(
            (0..=elapsed + 1).contains(&age),
            "it runs for {elapsed} s at most: {status}"
        );
        // A guest has the time its host has when its job starts.
        let outcome = host.submit("echo at=$(date +%s)=").run();
        let log = host.log(&outcome.run_id());
        let at = log
            .rsplit("at=")
            .find_map(|rest| rest.split('=').next()?.parse::<i64>().ok());
        assert!((at.unwrap() - seconds_now() - offset).abs() < 60, "{log}");
    }
    let go = host.runner(&["exec", &run, "--", "touch /tmp/go"]).status();
    assert!(go.unwrap().success());
    job.wait().expect_exit(0);
    host.finish();
}

#[test]
fn time_limits_and_idle_vms_know_no_clock() {
    let Some(clock) = DaemonClock::new() else {
        return;
    };
    let Some(host) = Host::new().sandbox("idle_timeout_secs", 900).prepare() else {
        return;
    };
    clock.start_runner(&host);
    host.submit("echo kept > ~/note")
        .session("s")
        .run()
        .expect_exit(0);
    let kept = |status: &Value| status["idle_vms"].as_array().map(Vec::len) == Some(1);
    host.until_status("the VM is kept", kept);
    for offset in [HOUR, -HOUR] {
        // Not by submit, which counts from the submission.
        let limited = Job::new(&host, "sleep 1000").with("timeout_secs", LIMIT.as_secs());
        let began = Instant::now();
        let run = host.queue_job(&limited);
        host.until_runs(&run);
        clock.set(offset);
        // An hour too late nobody would wait for it any more.
        let answer = host.answer(&run);
        assert_eq!(answer["error"], "timed out after 10 s", "{answer}");
        assert!(began.elapsed() >= LIMIT, "it was ended early: {answer}");
        host.submit("grep -q kept ~/note")
            .session("s")
            .run()
            .expect_exit(0);
        host.until_status("the VM is kept", kept);
    }
    host.finish();
}

#[test]
fn a_job_file_that_is_being_written_is_given_its_time_whatever_the_clock_says() {
    let Some(clock) = DaemonClock::new() else {
        return;
    };
    let Some(host) = Host::new().prepare() else {
        return;
    };
    clock.start_runner(&host);
    for offset in [HOUR, -HOUR] {
        clock.set(offset);
        let job = Job::new(&host, "exit 6");
        let text = job.0.to_string();
        let id = job.run_id();
        let (first, rest) = text.split_at(text.find(',').unwrap());
        let mut file = File::create(host.queue().join(format!("{id}.job"))).unwrap();
        file.write_all(first.as_bytes()).unwrap();
        let (looked_at, is_looked_at) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            // A writer that takes its time, however long the other job takes.
            let mut slow = &file;
            scope.spawn(move || {
                while is_looked_at.recv_timeout(WRITER_PAUSE) == Err(RecvTimeoutError::Timeout) {
                    slow.write_all(b" ").unwrap();
                }
            });
            // Queued after it: when this one is answered, the half one was looked at.
            another_job(&host);
            drop(looked_at);
        });
        assert_eq!(host.answer_if_kept(&id), None, "offset {offset}");
        file.write_all(rest.as_bytes()).unwrap();
        drop(file);
        assert_eq!(host.answer(&id)["exit_code"], 6, "offset {offset}");
    }
    host.finish();
}
