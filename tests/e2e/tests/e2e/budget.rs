//! How many jobs run at once.

use std::collections::BTreeSet;
use std::fs;

use e2e::{Host, Job, LONG, eventually};
use serde_json::Value;

/// Waits until a job waits at `host` while `run` runs, and then for as long as a command in that one's VM takes: by then
/// a job that need not wait would run. Gives the status of that time.
fn until_one_waits(host: &Host, first: &Host, run: &str) -> Value {
    host.until_status("it sees the job", |status| status["waiting"] == 1);
    first.in_vm(run, "true");
    let status = host.status().unwrap();
    assert_eq!(status["waiting"], 1, "{status}");
    status
}

/// The ids of the active runs.
fn active(status: &Value) -> Vec<&str> {
    let runs = status["active_runs"].as_array().unwrap();
    runs.iter()
        .map(|run| run["run_id"].as_str().unwrap())
        .collect()
}

#[test]
fn max_concurrent_caps_the_jobs_and_the_rest_wait() {
    let Some(host) = Host::new().sandbox("max_concurrent", 1).start() else {
        return;
    };
    let first = host.submit("echo first; sleep 1000").spawn();
    let run = first.running();
    let mut second = host.submit("exit 0").spawn();
    let status = until_one_waits(&host, &host, &run);
    assert_eq!(active(&status), [run.as_str()], "{status}");
    assert_eq!(host.vms().len(), 1);
    assert!(second.is_running());
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
    let mut second = host.submit("exit 0").spawn();
    let status = until_one_waits(&host, &host, &run);
    assert_eq!(active(&status), [run.as_str()], "{status}");
    assert!(second.is_running());
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
    two.until_status("the other runner's job counts", |status| {
        status["budget"]["host"]["firm_count"] == 1
    });
    let mut second = two.submit("exit 0").spawn();
    let status = until_one_waits(&two, &one, &run);
    assert!(active(&status).is_empty(), "{status}");
    assert!(second.is_running());
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
