//! kill -9 of anything: every submitter is answered and nothing is left.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use e2e::{Host, Job, LONG, eventually};
use rustix::process::Signal;

#[test]
fn a_killed_vm_is_answered_and_the_runner_goes_on() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    job.running();
    for vm in host.vms() {
        vm.kill();
    }
    job.wait().expect_error(&["vm", "died", "killed", "ended"]);
    host.submit("true").run().expect_exit(0);
    host.finish();
}

#[test]
fn a_killed_launcher_takes_its_vms_along_and_every_submitter_is_answered() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    job.running();
    host.launcher().kill();
    eventually("every VM is gone", LONG, || host.vms().is_empty());
    let outcome = job.wait();
    assert_ne!(outcome.result()["exit_code"], 0, "{outcome:?}");
    // A runner without a launcher can start nothing: it ends, and its status says so.
    assert!(!host.daemon_ends().success());
    host.start_runner();
    host.submit("true").run().expect_exit(0);
    host.finish();
}

#[test]
fn a_killed_runner_s_job_is_answered_by_the_next_start() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    job.running();
    host.kill_daemon();
    host.start_runner();
    job.wait().expect_error(&["stopped while"]);
    host.submit("true").run().expect_exit(0);
    host.finish();
}

/// Kills the runner as soon as `phase` has come for a job, and starts it again: the job has exactly one answer.
fn killed_in(phase: &str, reached: impl Fn(&Host, &str) -> bool) {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = Job::new(&host, "echo once >> /tmp/count; sleep 1");
    let id = host.queue_job(&job);
    eventually(phase, LONG, || {
        reached(&host, &id) || host.answer_if_kept(&id).is_some()
    });
    host.kill_daemon();
    host.start_runner();
    let answer = host.answer(&id);
    let code = answer["exit_code"].as_i64().unwrap();
    let error = answer["error"].as_str().unwrap_or_default();
    assert!(
        code == 0 || error.contains("stopped while"),
        "killed in {phase}: {answer}"
    );
    eventually("the job is gone from the queue", LONG, || {
        host.jobs().is_empty()
    });
    host.submit("true").run().expect_exit(0);
    host.finish();
}

#[test]
fn a_runner_killed_when_the_job_appears_loses_nothing() {
    killed_in("queued", |_, _| true);
}

#[test]
fn a_runner_killed_when_it_has_claimed_loses_nothing() {
    killed_in("claimed", |host, id| {
        host.queue().join(format!(".claims/{id}.claim")).exists()
    });
}

#[test]
fn a_runner_killed_when_the_vm_starts_loses_nothing() {
    killed_in("VM started", |host, _| !host.vms().is_empty());
}

#[test]
fn a_runner_killed_when_the_agent_writes_loses_nothing() {
    killed_in("agent runs", |host, id| {
        std::fs::metadata(host.log_path(id)).is_ok_and(|log| log.len() > 0)
    });
}

#[test]
fn a_runner_killed_when_the_job_ends_loses_nothing() {
    killed_in("job ends", |host, id| {
        std::fs::read_to_string(host.log_path(id))
            .is_ok_and(|log| log.contains("Execution complete"))
    });
}

#[test]
fn a_job_submitted_while_no_runner_lives_is_run_by_the_next() {
    let Some(host) = Host::new().start() else {
        return;
    };
    host.submit("true").run().expect_exit(0);
    host.kill_daemon();
    let job = host.submit("exit 4").spawn();
    job.run_id();
    host.start_runner();
    job.wait().expect_exit(4);
    host.finish();
}

#[test]
fn a_killed_submit_leaves_nothing() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 3").spawn();
    job.running();
    job.signal(Signal::KILL);
    drop(job);
    eventually("the job is gone from the queue", LONG, || {
        host.jobs().is_empty()
    });
    host.submit("true").run().expect_exit(0);
    host.finish();
}

#[test]
fn a_second_runner_of_one_name_is_refused_and_the_first_is_named() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let output = host.start_command().output().unwrap();
    assert!(!output.status.success());
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains(&host.daemon().pid.to_string()), "{error}");
    host.submit("true").run().expect_exit(0);
    host.finish();
}

/// A host whose `place` in the home is a link to a directory elsewhere: the runner refuses or replaces it, but
/// nothing is ever written through it.
fn linked(place: &str) {
    let Some(host) = Host::new().prepare() else {
        return;
    };
    let elsewhere = tempfile::tempdir().unwrap();
    fs::write(elsewhere.path().join("precious"), "data").unwrap();
    let path = host.home().join(place);
    // The harness may have made it as a directory already.
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    symlink(elsewhere.path(), &path).unwrap();
    let started = host.try_start_runner();
    if started {
        let job = Job::new(&host, "true");
        if host.queue().is_dir() && !host.queue().is_symlink() {
            host.queue_job(&job);
            eventually("the job is dealt with", LONG, || {
                !host.jobs().contains(&job.run_id())
            });
        }
    }
    let names: Vec<_> = fs::read_dir(elsewhere.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["precious"], "{place} was followed");
    if host.queue().is_symlink() {
        fs::remove_file(host.queue()).unwrap();
    }
    host.finish();
}

#[test]
fn planted_links_in_the_home_are_never_followed() {
    for place in [
        "logs",
        "locks",
        "groups/vm0/e2e",
        "groups/vm0/e2e/.results",
        "groups/vm0/e2e/.claims",
        "groups/vm0/e2e/.runners",
        "runners/e2e/instances",
    ] {
        linked(place);
    }
}

#[test]
fn a_home_that_others_may_write_is_refused() {
    let Some(host) = Host::new().prepare() else {
        return;
    };
    fs::set_permissions(host.home(), fs::Permissions::from_mode(0o777)).unwrap();
    let output = host.start_command().output().unwrap();
    assert!(!output.status.success());
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("writ"), "{error}");
    fs::set_permissions(host.home(), fs::Permissions::from_mode(0o700)).unwrap();
    host.finish();
}
