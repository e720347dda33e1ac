//! What `runner doctor` finds where something waits for something else: a runner that drains, a run that never gets its
//! VM, a Web API that is away; and a server that breaks off.

use e2e::{Api, DaemonClock, Host, Job, LONG, Proc, World, eventually, eventually_some};
use rustix::process::Signal;
use serde_json::json;

use crate::anomalies::{doctor, doctor_in, names, only};

#[test]
fn a_runner_that_drains_while_jobs_wait_is_named() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let daemon = host.daemon();
    daemon.signal(Signal::USR1);
    host.until_status("it drains", |status| status["mode"] == "draining");
    // Nothing waits: this is what somebody wanted.
    let report = doctor(&host, &[]);
    assert!(names(&report).is_empty(), "{report:#}");
    assert_eq!(report["runners"][0]["mode"], "draining", "{report:#}");

    let job = host.submit("true").spawn();
    job.run_id();
    host.until_status("it sees the job", |status| status["waiting"] == 1);
    let report = doctor(&host, &[]);
    only(
        &report,
        "draining",
        "1 job waits",
        "runner service resume --name e2e",
    );
    assert_eq!(report["anomalies"][0]["status"], "WARN", "{report:#}");
    // The other half of the fix, for a runner without a unit.
    let usr2 = format!("kill -USR2 {}", daemon.pid);
    only(&report, "draining", "draining", &usr2);
    daemon.signal(Signal::USR2);
    job.wait().expect_exit(0);
    let report = doctor(&host, &[]);
    assert!(names(&report).is_empty(), "{report:#}");
    host.finish();
}

/// Processes that were stopped go on.
fn go_on(stopped: &[Proc]) {
    for process in stopped {
        process.signal(Signal::CONT);
    }
}

#[test]
fn a_run_that_never_gets_its_vm_is_named_once_that_is_no_patience_any_more() {
    let Some(clock) = DaemonClock::new() else {
        return;
    };
    let Some(host) = Host::new().start() else {
        return;
    };
    // A VM stands still as soon as there is any of it, before its guest answers. One that was quicker than we are may go on
    // to its end, and another is tried.
    let (run, stopped) = eventually_some("a VM stops before its guest answers", LONG, || {
        let run = host.queue_job(&Job::new(&host, "echo got there"));
        let stopped = eventually_some("its VM begins, or is over", LONG, || {
            let found = host.vms();
            found
                .iter()
                .for_each(|process| process.signal(Signal::STOP));
            let over = host.answer_if_kept(&run).is_some();
            (over || !found.is_empty()).then_some(found)
        });
        let prepares = || {
            let first = host.status()?["active_runs"][0].clone();
            let over = host.answer_if_kept(&run).is_some();
            (over || first["run_id"] == *run).then(|| !over && first["phase"] == "preparing")
        };
        eventually_some("the run is in status.json, or over", LONG, prepares);
        let report = doctor_in(&host, &clock.script(), &[]);
        // What the guest had said by then is in status.json by now.
        if prepares() == Some(true) {
            // A run that prepares for seconds is nothing to tell.
            assert!(names(&report).is_empty(), "{report:#}");
            return Some((run, stopped));
        }
        go_on(&stopped);
        assert_eq!(host.answer(&run)["exit_code"], 0);
        eventually("its VM is gone", LONG, || host.vms().is_empty());
        None
    });
    // The same, seen two minutes later, is something.
    clock.set(125);
    let report = doctor_in(&host, &clock.script(), &[]);
    only(
        &report,
        "stuck",
        &run,
        &format!("runner kill {run} --force"),
    );
    assert_eq!(report["anomalies"][0]["status"], "FAIL", "{report:#}");
    go_on(&stopped);
    assert_eq!(host.answer(&run)["exit_code"], 0);
    let report = doctor_in(&host, &clock.script(), &[]);
    assert!(names(&report).is_empty(), "{report:#}");
    host.finish();
}

#[test]
fn an_api_that_is_away_is_named_and_counted_until_it_is_back() {
    let Some(world) = World::new() else { return };
    let Some(mut api) = Api::start(&world) else {
        return;
    };
    // The world is the test's own, so is every port in it.
    let Some(host) = Host::new()
        .world(&world)
        .api(&api)
        .option("metrics", "{listen: '127.0.0.1:9464'}")
        .start()
    else {
        return;
    };
    let metric = |name: &str| {
        let mut curl = world.on_host("curl");
        curl.args(["-fsS", "http://127.0.0.1:9464/metrics"]);
        let text = String::from_utf8(curl.output().unwrap().stdout).unwrap();
        let mut lines = text.lines();
        // Without labels, which may be written as none or as an empty set.
        let value = lines.find_map(|line| line.strip_prefix(&format!("vm0_runner_{name}")))?;
        value.trim_start_matches("{}").trim().parse::<i64>().ok()
    };
    let until = |name: &str, value: i64| {
        eventually(&format!("{name} is {value}"), LONG, || {
            metric(name) == Some(value)
        });
    };
    until("api_up", 1);
    until("api_undelivered", 0);
    let report = doctor(&host, &[]);
    assert!(names(&report).is_empty(), "{report:#}");

    let run = api.create(
        "touch /tmp/begun; until test -e /tmp/go; do sleep 0.2; done",
        json!({}),
    );
    let there = |file: &str| {
        let exec = host
            .runner(&["exec", &run[..8], "--", &format!("test -e {file}")])
            .output();
        exec.unwrap().status.success()
    };
    eventually("the run runs", LONG, || there("/tmp/begun"));
    api.kill_replica(0);
    host.in_vm(&run, "touch /tmp/go");
    until("api_up", 0);
    until("api_undelivered", 1);
    // The run has ended meanwhile, and its answer waits: told with the address, and what to ask there.
    let report = eventually_some("doctor tells of it", LONG, || {
        let report = doctor(&host, &[]);
        (!names(&report).is_empty()).then_some(report)
    });
    only(&report, "API away", Api::URL, "/readyz");
    only(&report, "API away", "1 answer waits", Api::URL);
    assert_eq!(report["anomalies"][0]["status"], "WARN", "{report:#}");

    api.start_replica(0);
    until("api_up", 1);
    until("api_undelivered", 0);
    assert_eq!(api.result(&run)["exitCode"], 0);
    let report = doctor(&host, &[]);
    assert!(names(&report).is_empty(), "{report:#}");
    host.finish();
    world.finish();
}

#[test]
fn a_stream_that_a_server_breaks_off_ends_curl_with_92_and_is_named() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new().world(&world).start() else {
        return;
    };
    let prompt = "curl -sS --http2 -o /dev/null https://www.example.com/broken; code=$?; echo \"exit $code\"; exit $code";
    let outcome = host.submit(prompt).run();
    outcome.expect_exit(92);
    let run = outcome.run_id();
    let log = host.log(&run);
    assert!(log.contains("curl: (92) HTTP/2 stream"), "{log}");
    // What the fix says: the log of the network knows why.
    let network = host.network_log(&run);
    let line = network.one(&[("url", json!("https://www.example.com/broken"))]);
    assert!(line["error"].is_string(), "{line}");
    let report = doctor(&host, &[]);
    only(&report, "HTTP/2 stream", &run, "runner logs RUN --network");
    assert_eq!(report["anomalies"][0]["status"], "WARN", "{report:#}");
    host.finish();
    world.finish();
}
