//! Whatever is put into the queue: it is answered where it can be, and the next job runs.

use std::fs;
use std::os::unix::fs::symlink;

use e2e::{Host, Job};
use serde_json::{Value, json};

/// The queue still works, and everything ends clean.
fn still_works(host: Host) {
    host.submit("true").run().expect_exit(0);
    host.finish();
}

fn refused(answer: &Value, words: &[&str]) {
    assert_eq!(answer["exit_code"], 1, "{answer}");
    let error = answer["error"].as_str().unwrap_or_default().to_lowercase();
    assert!(
        words.iter().any(|word| error.contains(word)),
        "no word of {words:?} in {answer}"
    );
}

fn new_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

#[test]
fn malformed_jobs_are_answered_with_the_reason() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let good = Job::new(&host, "true").0.to_string();
    let half = good[..good.len() / 2].to_owned();
    let cases: [&[u8]; 8] = [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe{\"run_id\":1}",
        b"{\"run_id\":\"x\",\"prompt\":\"true\"}",
        half.as_bytes(),
    ];
    for bytes in cases {
        let id = new_id();
        host.drop_job(&id, bytes);
        refused(&host.answer(&id), &[""]);
    }
    let unknown = Job::new(&host, "true").with("promtp", "x");
    refused(
        &host.answer(&host.queue_job(&unknown)),
        &["promtp", "unknown"],
    );
    let other = Job::new(&host, "true");
    let id = new_id();
    host.drop_job(&id, other.0.to_string());
    refused(&host.answer(&id), &["run_id", "run id", "name"]);
    still_works(host);
}

#[test]
fn a_job_of_a_gigabyte_is_refused_unread() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let id = new_id();
    let temporary = host.queue().join(".huge");
    fs::File::create(&temporary)
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    fs::rename(&temporary, host.queue().join(format!("{id}.job"))).unwrap();
    refused(&host.answer(&id), &["large", "big", "mib", "bytes"]);
    still_works(host);
}

#[test]
fn links_fifos_and_directories_are_refused_without_being_opened() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let elsewhere = tempfile::tempdir().unwrap();
    let target = elsewhere.path().join("job");
    let job = Job::new(&host, "true");
    fs::write(&target, job.0.to_string()).unwrap();

    symlink(&target, host.queue().join(format!("{}.job", job.run_id()))).unwrap();
    refused(&host.answer(&job.run_id()), &["regular", "link"]);
    assert!(target.exists(), "the link's target is untouched");

    let id = new_id();
    let fifo = host.queue().join(format!("{id}.job"));
    let made = std::process::Command::new("mkfifo")
        .arg(&fifo)
        .status()
        .unwrap();
    assert!(made.success());
    refused(&host.answer(&id), &["regular"]);

    let id = new_id();
    let held = host.queue().join(".held");
    fs::write(
        &held,
        Job::new(&host, "true")
            .with("run_id", id.clone())
            .0
            .to_string(),
    )
    .unwrap();
    fs::hard_link(&held, host.queue().join(format!("{id}.job"))).unwrap();
    refused(&host.answer(&id), &["link", "second name"]);
    fs::remove_file(held).unwrap();

    let id = new_id();
    let directory = host.queue().join(format!("{id}.job"));
    fs::create_dir(&directory).unwrap();
    refused(&host.answer(&id), &["regular"]);
    // Whether it is removed is the runner's choice; it must not stand in the way.
    let _ = fs::remove_dir_all(&directory);
    still_works(host);
}

#[test]
fn a_job_that_grows_in_place_is_answered_once() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = Job::new(&host, "true");
    let text = job.0.to_string();
    let path = host.queue().join(format!("{}.job", job.run_id()));
    fs::write(&path, &text[..text.len() / 2]).unwrap();
    let answer = host.answer(&job.run_id());
    assert!(answer["exit_code"].is_i64(), "{answer}");
    still_works(host);
}

#[test]
fn file_names_that_are_no_run_ids_do_not_stop_the_queue() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = Job::new(&host, "true").0.to_string();
    let long = "a".repeat(200);
    let mut planted = Vec::new();
    for name in [
        "evil",
        "..",
        "a b",
        "new\nline",
        "\u{1b}[31m",
        "$(id)",
        long.as_str(),
    ] {
        let path = host.queue().join(format!("{name}.job"));
        fs::write(&path, &job).unwrap();
        planted.push(path);
    }
    host.submit("true").run().expect_exit(0);
    for path in planted {
        // The runner may have removed it.
        let _ = fs::remove_file(path);
    }
    still_works(host);
}

#[test]
fn names_that_could_leave_their_directory_are_refused_at_submit() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let long = "a".repeat(10_000);
    let before = tree(&host);
    for bad in [
        "..", "../x", "vm0/../x", "vm0/a/b", "/vm0/a", "vm0/a\n", "vm0", "", &long,
    ] {
        for flag in ["--group", "--profile"] {
            let mut args = vec!["local", "submit", "--prompt", "true"];
            for (name, good) in [("--group", host.group()), ("--profile", host.profile())] {
                args.extend([name, if name == flag { bad } else { good }]);
            }
            let output = host.runner(&args).output().unwrap();
            assert!(!output.status.success(), "{flag} {bad:?}");
            assert!(output.stdout.is_empty(), "{output:?}");
        }
    }
    for bad in ["../x", "a/b", "a\nb", ".x", &long] {
        let outcome = host.submit("true").session(bad).run();
        assert!(
            !outcome.status.success() && outcome.stdout.is_empty(),
            "{outcome:?}"
        );
    }
    assert_eq!(before, tree(&host));
    still_works(host);
}

/// Paths in the group's directory.
fn tree(host: &Host) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(host.home().join("groups"))
        .unwrap()
        .chain(fs::read_dir(host.queue()).unwrap())
        .map(|entry| entry.unwrap().path().display().to_string())
        .collect();
    names.sort();
    names
}

#[test]
fn fields_that_could_leave_their_directory_are_answered() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let long = "a".repeat(10_000);
    for bad in ["../../etc", "a/b", "a\0b", "a\nb", &long] {
        let job = Job::new(&host, "true").with("session_id", bad);
        refused(&host.answer(&host.queue_job(&job)), &["session"]);
        let job = Job::new(&host, "true").with("profile", bad);
        refused(&host.answer(&host.queue_job(&job)), &["profile"]);
    }
    for environment in [
        json!({"A=B": "x"}),
        json!({"": "x"}),
        json!({"A\u{0}": "x"}),
        json!({"A": "x\u{0}y"}),
    ] {
        let job = Job::new(&host, "true").with("environment", environment);
        refused(
            &host.answer(&host.queue_job(&job)),
            &["environment", "variable"],
        );
    }
    for directory in ["relative", "/a\0b", "/home/../../etc/\u{0}"] {
        let job = Job::new(&host, "true").with("working_dir", directory);
        refused(&host.answer(&host.queue_job(&job)), &["working"]);
    }
    let job = Job::new(&host, "nul\0 in a prompt");
    refused(&host.answer(&host.queue_job(&job)), &["prompt"]);
    still_works(host);
}

#[test]
fn vm0_variables_of_a_hand_written_job_never_win() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = Job::new(&host, "echo run=$VM0_RUN_ID")
        .with("environment", json!({"VM0_RUN_ID": "planted"}));
    let id = host.queue_job(&job);
    let answer = host.answer(&id);
    if answer["exit_code"] == 0 {
        let log = host.log(&id);
        assert!(
            log.contains(&format!("run={id}")) && !log.contains("run=planted"),
            "{log}"
        );
    } else {
        refused(&answer, &["vm0_"]);
    }
    still_works(host);
}

#[test]
fn a_profile_that_nobody_serves_is_answered() {
    let Some(host) = Host::new().start() else {
        return;
    };
    host.submit("true")
        .profile("vm0/nobody")
        .run()
        .expect_error(&["vm0/nobody"]);
    still_works(host);
}

#[test]
fn claims_and_results_planted_in_advance_neither_block_nor_run_a_job_twice() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = Job::new(&host, "true");
    fs::write(
        host.queue().join(format!(".claims/{}.claim", job.run_id())),
        "not an instance",
    )
    .unwrap();
    let id = host.queue_job(&job);
    let answer = host.answer(&id);
    assert!(answer["exit_code"].is_i64(), "{answer}");

    let job = Job::new(&host, "exit 3");
    let planted = json!({"run_id": job.run_id(), "exit_code": 0, "error": null}).to_string();
    fs::write(
        host.queue()
            .join(format!(".results/{}.result", job.run_id())),
        &planted,
    )
    .unwrap();
    host.queue_job(&job);
    e2e::eventually("the job is dealt with", e2e::LONG, || {
        !host.queue().join(format!("{}.job", job.run_id())).exists()
    });
    still_works(host);
}
