//! What `runner doctor` finds of what goes wrong, each made to happen, and what `runner kill` does without a runner.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

use e2e::{Host, LONG, Proc, World, eventually, eventually_some};
use rustix::process::Signal;
use serde_json::Value;

/// Inside a mount and a network namespace of its own: `script`, then `doctor` with the rest of the arguments.
pub(crate) fn doctor_in(host: &Host, script: &str, args: &[&str]) -> Value {
    let inner = host.runner(&[&["doctor", "--json"], args].concat());
    let mut command = Command::new("unshare");
    let script = format!("{script}\nexec \"$@\"");
    command.args(["--mount", "--net", "--", "sh", "-ec", &script, "sh"]);
    report(command.arg(inner.get_program()), &inner)
}

/// In the machine's own network namespace, where other tests may have killed runners: their tables are left out.
pub(crate) fn doctor(host: &Host, args: &[&str]) -> Value {
    let inner = host.runner(&[&["doctor", "--json"], args].concat());
    let mut report = report(&mut Command::new(inner.get_program()), &inner);
    let anomalies = report["anomalies"].as_array_mut().unwrap();
    anomalies.retain(|one| one["name"] != "orphaned table");
    report
}

fn report(command: &mut Command, inner: &Command) -> Value {
    command.args(inner.get_args());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let output = command.output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {output:?}"));
    // FAIL of anything is 1.
    assert_eq!(output.status.success(), report["ok"] == true, "{output:?}");
    report
}

pub(crate) fn names(report: &Value) -> Vec<&str> {
    let anomalies = report["anomalies"].as_array().unwrap().iter();
    anomalies.map(|one| one["name"].as_str().unwrap()).collect()
}

/// The one anomaly of a report, which has this name and says this, with a fix that says that.
pub(crate) fn only(report: &Value, name: &str, found: &str, fix: &str) {
    assert_eq!(names(report), [name], "{report:#}");
    let one = &report["anomalies"][0];
    assert!(one["found"].as_str().unwrap().contains(found), "{one:#}");
    assert!(one["fix"].as_str().unwrap().contains(fix), "{one:#}");
}

#[test]
fn a_healthy_runner_has_no_anomaly_and_its_vms_are_shown_with_redirect_and_port() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    let run = job.running();
    let report = doctor(&host, &[]);
    assert!(names(&report).is_empty(), "{report:#}");
    let vm = &report["runners"][0]["vms"][0];
    assert_eq!(vm["run_id"], *run);
    assert!(vm["proxy_port"].as_u64().is_some(), "{report:#}");
    assert_eq!(vm["proxy_port"], vm["redirect"]);
    let text = host.runner(&["doctor"]).output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(
        text.contains("→ proxy port") && text.contains("(redirected to"),
        "{text}"
    );
    job.signal(Signal::INT);
    job.wait();
    host.finish();
}

#[test]
fn jobs_that_wait_for_a_runner_that_does_not_run_or_is_not_local_are_named() {
    let Some(host) = Host::new().prepare() else {
        return;
    };
    let mut job = host.submit("true").spawn();
    job.run_id();
    only(
        &doctor(&host, &[]),
        "not running",
        "1 job waits",
        "runner start",
    );
    let unit = |command: &str| {
        format!(
            "mount -t tmpfs none /run/systemd/system 2>/dev/null || {{ mkdir -p /run/systemd/system; \
             mount -t tmpfs none /run/systemd/system; }}\n\
             printf '[Service]\\nExecStart={command}\\n' > /run/systemd/system/vm0-runner-e2e.service"
        )
    };
    let report = doctor_in(&host, &unit("/x/runner start --config y"), &[]);
    only(
        &report,
        "not local",
        "without --local",
        "--local --env USE_MOCK_CLAUDE=true",
    );
    let report = doctor_in(&host, &unit("/x/runner start --local"), &[]);
    only(
        &report,
        "not running",
        "does not run",
        "systemctl status vm0-runner-e2e",
    );
    assert!(job.is_running());
    // A runner that takes it is the cure.
    host.start_runner();
    job.wait().expect_exit(0);
    assert!(names(&doctor(&host, &[])).is_empty());
    host.finish();
}

#[test]
fn what_cuts_a_vm_from_the_proxy_is_named() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    let run = job.running();
    let log = host.home().join(format!("logs/network-{run}.jsonl"));
    eventually("there is a network log", LONG, || log.exists());
    let aside = log.with_extension("aside");
    fs::rename(&log, &aside).unwrap();
    only(&doctor(&host, &[]), "no network log", &run, "logs");
    fs::rename(&aside, &log).unwrap();

    let registry = host.config().with_file_name("proxy-registry.json");
    let text = fs::read(&registry).unwrap();
    fs::write(&registry, r#"{"vms":{},"updatedAt":""}"#).unwrap();
    only(&doctor(&host, &[]), "not registered", &run, "runner kill");
    fs::write(&registry, text).unwrap();

    let report = doctor(&host, &[]);
    let address = report["runners"][0]["vms"][0]["address"].as_str().unwrap();
    let net = format!("--net=/proc/{}/ns/net", host.proxies()[0].pid);
    let nft = |args: &[&str]| {
        let output = Command::new("nsenter")
            .args([&net, "nft"])
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let rules = nft(&["-j", "list", "maps"]);
    let rules: Value = serde_json::from_str(&rules).unwrap();
    let map = rules["nftables"].as_array().unwrap().iter();
    let mut map = map.filter_map(|one| one.get("map"));
    let map = map.find(|map| map["name"] == "worker_of").unwrap();
    let part = |key: &str| map[key].as_str().unwrap().to_owned();
    let element = format!("{{ {address} }}");
    nft(&[
        "delete",
        "element",
        &part("family"),
        &part("table"),
        "worker_of",
        &element,
    ]);
    only(
        &doctor(&host, &[]),
        "no redirect",
        "no port",
        "restart the runner",
    );
    job.signal(Signal::INT);
    job.wait();
    host.finish();
}

#[test]
fn a_proxy_that_cannot_come_up_again_is_named() {
    let Some(host) = Host::new().start() else {
        return;
    };
    // The links of this home only: the files themselves are shared with other tests.
    for version in fs::read_dir(host.home().join("proxy")).unwrap().flatten() {
        let program = version.path().join("venv/bin/mitmdump");
        let _ = fs::remove_file(program);
    }
    for proxy in host.proxies() {
        proxy.kill();
    }
    host.until_status("the proxy is down", |status| {
        status["proxy"][0]["state"] == "down"
    });
    only(
        &doctor(&host, &[]),
        "proxy down",
        "runner e2e's proxy",
        "sudo runner setup",
    );
    host.finish();
}

#[test]
fn an_upstream_certificate_that_nobody_vouches_for_is_named() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new().world(&world).start() else {
        return;
    };
    let outcome = host
        .submit("curl -sS -o /dev/null -w '%{http_code}\\n' https://www.example.com/")
        .run();
    outcome.expect_exit(0);
    // The same with a runner that believes nobody whom the server has.
    host.stop();
    let config = fs::read_to_string(host.config()).unwrap();
    let line = config
        .lines()
        .find(|line| line.contains("ssl_verify"))
        .unwrap();
    let empty = host.home().join("nobody.pem");
    let own = fs::read(host.home().join("ca/ca.pem")).unwrap();
    fs::write(&empty, own).unwrap();
    let other = format!("  ssl_verify_upstream_trusted_ca: {}", empty.display());
    fs::write(host.config(), config.replace(line, &other)).unwrap();
    host.start_runner();
    let prompt = "curl -sS -w '%{http_code}\\n' https://www.example.com/";
    let outcome = host.submit(prompt).run();
    outcome.expect_exit(0);
    assert!(host.log(&outcome.run_id()).contains("502"));
    let report = doctor(&host, &[]);
    only(
        &report,
        "upstream certificate",
        &outcome.run_id(),
        "ssl_verify_upstream_trusted_ca",
    );
    assert_eq!(report["anomalies"][0]["status"], "WARN");
    host.finish();
    world.finish();
}

#[test]
fn an_agent_that_is_not_logged_in_is_named() {
    let Some(host) = Host::new().start() else {
        return;
    };
    // The words of the real agent CLI.
    let outcome = host
        .submit("echo 'Not logged in · Please run /login'; exit 1")
        .run();
    outcome.expect_exit(1);
    let report = doctor(&host, &[]);
    only(
        &report,
        "not logged in",
        &outcome.run_id(),
        "USE_MOCK_CLAUDE=true",
    );
    host.finish();
}

#[test]
fn a_full_disk_is_named() {
    let Some(host) = Host::new().prepare() else {
        return;
    };
    let script = format!(
        "mount -t tmpfs -o size=64m,mode=700 none '{}'",
        host.home().display()
    );
    only(
        &doctor_in(&host, &script, &[]),
        "disk full",
        "MiB are free",
        "runner gc",
    );
    host.finish();
}

#[test]
fn what_dead_runners_left_is_named_and_fixed() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    job.running();
    let launcher = host.launcher();
    launcher.signal(Signal::STOP);
    launcher.kill();
    host.kill_daemon();
    drop(job);
    let script = "nft add table ip vm0_hub1021";
    let report = doctor_in(&host, script, &[]);
    let mut found = names(&report);
    found.sort_unstable();
    assert_eq!(found, ["orphaned slot", "orphaned table"], "{report:#}");
    // The kernel may let go of the slot's control group late.
    let report = eventually_some("both are fixed", LONG, || {
        let report = doctor_in(&host, script, &["--fix"]);
        names(&report).is_empty().then_some(report)
    });
    assert_eq!(report["fixed"].as_array().unwrap().len(), 2, "{report:#}");

    // A process of a slot that nobody holds.
    let uid = host.first_uid() + 77;
    let mut nobodys = Command::new("sleep")
        .arg("1000")
        .uid(uid)
        .gid(uid)
        .spawn()
        .unwrap();
    let report = doctor(&host, &[]);
    only(
        &report,
        "VM without an owner",
        &nobodys.id().to_string(),
        "--fix",
    );
    let reaped = std::thread::spawn(move || nobodys.wait().unwrap());
    let report = doctor(&host, &["--fix"]);
    assert!(names(&report).is_empty(), "{report:#}");
    assert!(!reaped.join().unwrap().success());
    host.start_runner();
    host.finish();
}

#[test]
fn a_run_whose_runner_hangs_is_named_without_its_vm_and_can_be_killed() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    let run = job.running();
    let daemon = host.daemon();
    daemon.signal(Signal::STOP);
    let kill = host.runner(&["kill", &run[..8]]).output().unwrap();
    assert!(!kill.status.success(), "{kill:?}");
    assert!(!host.vms().is_empty());
    let kill = host
        .runner(&["kill", &run[..8], "--force"])
        .output()
        .unwrap();
    assert!(kill.status.success(), "{kill:?}");
    eventually("its VM is gone", LONG, || host.vms().is_empty());
    only(&doctor(&host, &[]), "run without VM", &run, "--force");
    daemon.signal(Signal::CONT);
    assert_ne!(job.wait().result()["exit_code"], 0);
    host.finish();
}

#[test]
fn a_run_whose_runner_is_dead_with_its_launcher_is_killed_and_answered_by_the_next() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    let run = job.running();
    let launcher: Proc = host.launcher();
    launcher.signal(Signal::STOP);
    launcher.kill();
    host.kill_daemon();
    let kill = host.runner(&["kill", &run[..8]]).output().unwrap();
    assert!(kill.status.success(), "{kill:?}");
    assert_eq!(String::from_utf8_lossy(&kill.stdout).trim(), run);
    let again = host.runner(&["kill", &run[..8]]).output().unwrap();
    assert!(!again.status.success(), "{again:?}");
    host.start_runner();
    job.wait().expect_error(&["runner stopped"]);
    host.finish();
}

#[test]
fn a_forced_kill_of_a_runner_that_answers_is_a_cancellation() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    let run = job.running();
    let kill = host.runner(&["kill", &run, "--force"]).output().unwrap();
    assert!(kill.status.success(), "{kill:?}");
    job.wait().expect_error(&["cancel"]);
    host.finish();
}
