//! A host whose disk is full: every submitter is answered, and room makes everything work again.

use e2e::{Host, Job, LONG, eventually};
use std::fs;

/// The home on a small file system of this test's own, in a mount namespace of its own.
fn small_disk() -> Option<Host> {
    e2e::in_own_mounts("full_disk")?;
    Host::new().own_file_system(200).start()
}

#[test]
fn a_result_that_finds_no_room_is_written_when_there_is_some() {
    let Some(host) = small_disk() else { return };
    let job = host
        .submit("until test -e /tmp/go; do sleep 0.2; done")
        .spawn();
    let run = job.running();
    let filler = host.fill_disk(0);
    let go = host
        .runner(&["exec", &run, "--", "touch /tmp/go"])
        .output()
        .unwrap();
    assert!(go.status.success(), "{go:?}");
    // A few bytes may be left, and enough for an answer.
    eventually(
        "it is answered, or there is no room for the answer",
        LONG,
        || host.vms().is_empty() || host.daemon_log_text().contains("cannot write an answer"),
    );
    fs::remove_file(filler).unwrap();
    job.wait().expect_exit(0);
    host.submit("true").run().expect_exit(0);
    host.finish();
}

#[test]
fn submit_says_that_the_disk_is_full_and_leaves_nothing() {
    let Some(host) = small_disk() else { return };
    let filler = host.fill_disk(0);
    let mut job = host.submit("true").spawn();
    // A few bytes may be left for a job, and then none for its answer: that one comes when there is room.
    eventually("it was refused or is queued", LONG, || {
        !job.is_running() || !host.jobs().is_empty()
    });
    fs::remove_file(filler).unwrap();
    let outcome = job.wait();
    if outcome.stdout.is_empty() {
        assert!(!outcome.status.success());
        assert!(outcome.stderr.contains("No space left"), "{outcome:?}");
    } else {
        outcome.result();
    }
    eventually("the queue is empty", LONG, || host.jobs().is_empty());
    host.submit("true").run().expect_exit(0);
    host.finish();
}

#[test]
fn a_vm_whose_disk_finds_no_room_on_the_host_is_answered() {
    let Some(host) = small_disk() else { return };
    let filler = host.fill_disk(8);
    let prompt = "dd if=/dev/urandom of=$HOME/big bs=1M count=60 && sync $HOME/big && \
                  echo 3 | sudo tee /proc/sys/vm/drop_caches && md5sum $HOME/big";
    let run = host.queue_job(&Job::new(&host, prompt));
    eventually(
        "it is answered, or there is no room for the answer",
        LONG,
        || {
            host.answer_if_kept(&run).is_some()
                || host.daemon_log_text().contains("cannot write an answer")
        },
    );
    fs::remove_file(filler).unwrap();
    let answer = host.answer(&run);
    // Its programs hear of it, and nothing waited for a limit of time.
    assert_ne!(answer["exit_code"], 0, "{answer}");
    assert_ne!(answer["exit_code"], 124, "{answer}");
    let log = host.log(&run);
    assert!(log.contains("Input/output error"), "{answer}\n{log}");
    host.submit("true").run().expect_exit(0);
    host.finish();
}
