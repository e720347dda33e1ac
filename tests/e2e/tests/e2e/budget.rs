//! How many jobs run at once.

use std::collections::BTreeSet;
use std::fs;

use e2e::{Host, Job, LONG, eventually};

#[test]
fn max_concurrent_caps_the_jobs_and_the_rest_wait() {
    let Some(host) = Host::new().sandbox("max_concurrent", 1).start() else {
        return;
    };
    let first = host.submit("echo first; sleep 1000").spawn();
    let run = first.running();
    let mut second = host.submit("exit 0").spawn();
    second.run_id();
    assert!(second.is_running());
    assert_eq!(host.vms().len(), 1);
    let cancel = host.runner(&["kill", &run]).output().unwrap();
    assert!(cancel.status.success(), "{cancel:?}");
    first.wait().expect_error(&["cancel"]);
    second.wait().expect_exit(0);
    host.finish();
}

#[test]
fn the_first_job_is_admitted_even_above_the_budget_and_the_second_waits_for_it() {
    let Some(host) = Host::new().sandbox("concurrency_factor", 0.01).start() else {
        return;
    };
    let first = host.submit("echo first; sleep 1000").spawn();
    let run = first.running();
    let second = host.submit("exit 0").spawn();
    second.run_id();
    let status = host.until_status("one run is active", |status| {
        status["active_runs"]
            .as_array()
            .is_some_and(|runs| runs.len() == 1)
    });
    assert_eq!(status["active_runs"][0]["run_id"], run.as_str());
    // The VM's own memory, and what its engine may take beside it.
    let leased = status["budget"]["host"]["firm"]["memory_mb"].as_u64();
    assert!(
        leased.is_some_and(|mb| (256 + 96..=256 + 160).contains(&mb)),
        "{status}"
    );
    assert!(host.runner(&["kill", &run]).status().unwrap().success());
    first.wait();
    second.wait().expect_exit(0);
    host.finish();
}

#[test]
fn two_runners_of_one_host_share_its_budget() {
    let small = |name: &str, group: &str| {
        Host::new()
            .name(name)
            .group(group)
            .sandbox("concurrency_factor", 0.01)
    };
    let Some(one) = small("one", "vm0/one").start() else {
        return;
    };
    let Some(two) = small("two", "vm0/two").beside(&one).start() else {
        return;
    };
    let first = one.submit("echo first; sleep 1000").spawn();
    let run = first.running();
    let second = two.submit("exit 0").spawn();
    second.run_id();
    let status = two.until_status("the other runner's job counts", |status| {
        status["budget"]["host"]["firm_count"] == 1
    });
    assert_eq!(
        status["active_runs"].as_array().map(Vec::len),
        Some(0),
        "{status}"
    );
    assert!(one.runner(&["kill", &run]).status().unwrap().success());
    first.wait();
    second.wait().expect_exit(0);
    two.finish();
    one.finish();
}

#[test]
fn two_hundred_jobs_at_once_are_each_answered_once_and_the_budget_holds() {
    // Small VMs, so that the machine's memory and not its two CPUs is what the budget is about.
    let Some(host) = Host::new().sandbox("concurrency_factor", 4).start() else {
        return;
    };
    let total = host.status().unwrap()["budget"]["total"]["vcpu"]
        .as_u64()
        .unwrap();
    let jobs: Vec<Job> = (0..200)
        .map(|number| Job::new(&host, &format!("exit $(({number} % 2))")))
        .collect();
    for job in &jobs {
        host.queue_job(job);
    }
    let mut most = 0;
    let mut answered = BTreeSet::new();
    eventually("all are answered", 5 * LONG, || {
        let vms = u64::try_from(host.vms().len()).unwrap();
        most = most.max(vms);
        assert!(vms <= total, "{vms} VMs, and the budget is {total}");
        if let Some(status) = host.status() {
            let used = status["budget"]["host"]["firm"]["vcpu"].as_u64().unwrap();
            assert!(used <= total, "status.json says {used} of {total}");
        }
        answered.extend(
            jobs.iter()
                .enumerate()
                .filter_map(|(number, job)| host.answer_if_kept(&job.run_id()).map(|_| number)),
        );
        answered.len() == jobs.len()
    });
    assert!(most > 1, "they never ran side by side");
    for (number, job) in jobs.iter().enumerate() {
        let answer = host.answer(&job.run_id());
        assert_eq!(answer["exit_code"], number % 2, "{answer}");
        let log = host.log(&job.run_id());
        assert_eq!(
            log.matches("▷ Execution").count(),
            1,
            "run {} ran twice: {log}",
            job.run_id()
        );
    }
    let logs = fs::read_dir(host.home().join("logs"))
        .unwrap()
        .filter(|entry| {
            entry
                .as_ref()
                .unwrap()
                .file_name()
                .to_string_lossy()
                .starts_with("system-")
        })
        .count();
    assert_eq!(logs, jobs.len());
    host.finish();
}
