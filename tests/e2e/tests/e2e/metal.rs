//! A remote host, from a laptop: scripts, service, and what breaks in between.

use std::collections::BTreeMap;
use std::fs;
use std::process::Output;

use e2e::{LONG, METAL_NAME, Metal, Text, eventually, eventually_some};
use serde_json::Value;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn refused(output: &Output, word: &str) {
    let told = text(&output.stderr);
    assert!(!output.status.success(), "{output:?}");
    assert!(told.contains(word), "no {word:?} in: {told}");
}

/// Waits until one run is active on the host; gives its id.
fn running(metal: &Metal) -> String {
    eventually_some("a job runs", LONG, || metal.active().pop())
}

/// How often each run was started, by the daemon's own log.
fn starts(metal: &Metal) -> BTreeMap<String, u32> {
    let log = metal.on_host(&format!("cat ~/.vm0-runner/logs/runner-{METAL_NAME}.log"));
    let mut starts = BTreeMap::new();
    for line in log.lines().filter(|line| line.contains("job starts ")) {
        let run = line
            .split("run=")
            .nth(1)
            .and_then(|rest| rest.split(' ').next());
        *starts.entry(run.expect("a run").to_owned()).or_default() += 1;
    }
    starts
}

#[test]
fn whatever_is_in_a_prompt_or_command_arrives_in_the_guest_as_it_was_typed() {
    let Some(metal) = Metal::new("vm0/small") else {
        return;
    };
    metal.deploy_local();
    let prompt = "printf '[%s]\\n' \"it's $(echo one)\" '$(not this)' `echo two` \"a\nb\" 'back\\slash' \"*\" ''";
    let run = metal.submit(prompt).expect_exit(0);
    let log = metal.on_host(&format!("cat ~/.vm0-runner/logs/system-{run}.log"));
    let wanted = "[it's one]\n[$(not this)]\n[two]\n[a\nb]\n[back\\slash]\n[*]\n[]\n";
    assert!(log.contains(wanted), "{log}");
    // A job that fails is told by its result and by the exit status.
    let failing = metal
        .dev_runner(&["submit", "vm0/small", "exit 7"])
        .output()
        .unwrap();
    assert_eq!(failing.status.code(), Some(1), "{failing:?}");
    let result: Value = serde_json::from_slice(&failing.stdout).unwrap();
    assert_eq!(result["exit_code"], 7);

    let job = metal.submit("sleep 1000");
    let run = running(&metal);
    let exec = |args: &[&str]| {
        let output = metal
            .dev_runner(&[&["exec", &run[..8]], args].concat())
            .output()
            .unwrap();
        (output.status.code(), text(&output.stdout))
    };
    // One argument is a bash command line, several are a program and its arguments.
    assert_eq!(
        exec(&["printf '[%s]' \"it's $(echo one)\" 'a\nb'; exit 3"]),
        (Some(3), "[it's one][a\nb]".to_owned())
    );
    assert_eq!(
        exec(&["printf", "[%s]", "it's $(echo one)", "a\nb", ""]),
        (Some(0), "[it's $(echo one)][a\nb][]".to_owned())
    );
    assert_eq!(
        exec(&["--", "printf", "[%s]", "--", "-x"]),
        (Some(0), "[--][-x]".to_owned())
    );
    let force = metal.dev_runner(&["remove"]).output().unwrap();
    refused(&force, "active job");
    // Another runner's images stay, and everything else of this one goes all the same.
    metal.on_host("mkdir ~/.vm0-runner/runners/other");
    let removed = metal
        .dev_runner(&["remove", "--force", "--all"])
        .output()
        .unwrap();
    assert!(removed.status.success(), "{removed:?}");
    let told = text(&removed.stderr);
    assert!(told.contains("also of other"), "{told}");
    assert_ne!(job.result()["exit_code"], 0);
    assert_eq!(metal.property("LoadState"), "not-found");
    let left = metal.on_host("cd ~/.vm0-runner && ls -d images runners/*");
    assert_eq!(left, "images\nrunners/other\n");
    metal.finish();
}

#[test]
fn a_submit_that_is_interrupted_or_cut_off_cancels_its_job() {
    let Some(metal) = Metal::new("vm0/small") else {
        return;
    };
    metal.deploy_local();
    let job = metal.submit("sleep 1000");
    running(&metal);
    job.interrupt();
    let result = job.result();
    assert_ne!(result["exit_code"], 0);
    assert!(
        result["error"].as_str().unwrap().contains("cancel"),
        "{result}"
    );
    // Killed, the laptop says nothing more.
    let mut job = metal.submit("sleep 1000");
    running(&metal);
    job.kill();
    eventually("its job is cancelled", LONG, || metal.active().is_empty());
    metal.submit("true").expect_exit(0);
    metal.finish();
}

#[test]
fn cloudflare_access_is_asked_with_the_credentials_in_its_environment_only() {
    let Some(metal) = Metal::new("vm0/small") else {
        return;
    };
    let laptop = metal.laptop_directory();
    // It records how it was called and carries the bytes, as cloudflared does.
    metal.laptop_program(
        "cloudflared",
        &format!(
            "#!/bin/bash\nprintf '%s\\n' \"$*\" \"$TUNNEL_SERVICE_TOKEN_ID\" \"$TUNNEL_SERVICE_TOKEN_SECRET\" >'{0}/called'\n\
             tr '\\0' ' ' </proc/$PPID/cmdline >'{0}/ssh-called'\n\
             exec python3 -c '{1}'\n",
            laptop.display(),
            "import os, socket, threading\n\
             s = socket.create_connection((\"198.18.0.1\", 22))\n\
             def up():\n while d := os.read(0, 65536): s.sendall(d)\n s.shutdown(1)\n\
             threading.Thread(target=up, daemon=True).start()\n\
             while d := s.recv(65536): os.write(1, d)\n"
        ),
    );
    let host = "metal-1.eu.example.com";
    let cf_ssh = || {
        let mut command = metal.laptop("scripts/cf-ssh.sh");
        command.args([
            host,
            "-o",
            "LogLevel=ERROR",
            "--",
            "echo \"$(id -un)\" '$x'; exit 5",
        ]);
        command.output().unwrap()
    };
    metal.settings("CF_ACCESS_CLIENT_ID=the-id.access\nCF_ACCESS_CLIENT_SECRET='the secret'");
    let output = cf_ssh();
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    assert_eq!(text(&output.stdout), "dev $x\n");
    let called = fs::read_to_string(laptop.join("called")).unwrap();
    assert_eq!(
        called,
        "access ssh --hostname metal-1-eu-ssh.example.com\nthe-id.access\nthe secret\n"
    );
    let ssh = fs::read_to_string(laptop.join("ssh-called")).unwrap();
    assert!(ssh.contains("ssh ") && !ssh.contains("the secret"), "{ssh}");

    // A hostname of one's own, and other credentials for production.
    metal.settings(
        "CF_ACCESS_CLIENT_ID=a\nCF_ACCESS_CLIENT_SECRET=b\nCF_ACCESS_CLIENT_ID_PROD=c\nCF_ACCESS_CLIENT_SECRET_PROD=d\n\
         CF_ACCESS_HOSTNAME=ssh.example.org",
    );
    assert_eq!(cf_ssh().status.code(), Some(5));
    let called = fs::read_to_string(laptop.join("called")).unwrap();
    assert_eq!(called, "access ssh --hostname ssh.example.org\na\nb\n");
    let prod = metal
        .laptop("scripts/cf-ssh.sh")
        .args(["prod-1.example.com", "--", "true"])
        .output()
        .unwrap();
    // Nobody has told the laptop this host's key: it is not believed.
    refused(&prod, "Host key verification failed");
    let called = fs::read_to_string(laptop.join("called")).unwrap();
    assert_eq!(called, "access ssh --hostname ssh.example.org\nc\nd\n");

    metal.settings("CF_ACCESS_CLIENT_ID=a");
    refused(&cf_ssh(), "needs both");
    // Without credentials, ssh goes straight to the host, and cloudflared is not asked.
    fs::remove_file(laptop.join("called")).unwrap();
    metal.settings("");
    assert_eq!(metal.on_host("id -un"), "dev\n");
    assert!(!laptop.join("called").exists());
    metal.finish();
}

/// Stands in for ssh: the call whose number is in the file `break` fails as the file `how` says.
const BREAKING_SSH: &str = r#"#!/bin/bash
cd "$(dirname "$0")/.."
call=$(($(cat calls 2>/dev/null || echo 0) + 1))
echo $call >calls
[ "$call" = "$(cat break 2>/dev/null)" ] || exec /usr/bin/ssh "$@"
case $(cat how) in
    before) ;;
    half) head -c 3000000 | /usr/bin/ssh "$@" ;;
    after) /usr/bin/ssh "$@" >/dev/null 2>&1 ;;
esac
exit 255
"#;

#[test]
fn a_connection_that_breaks_at_any_step_of_a_deploy_leaves_a_runner_that_works() {
    let Some(metal) = Metal::new("vm0/small") else {
        return;
    };
    let laptop = metal.laptop_directory();
    metal.laptop_program("ssh", BREAKING_SSH);
    let set = |name: &str, value: &str| fs::write(laptop.join(name), value).unwrap();
    metal.deploy_local();
    // Another build of the runner: the same with a word at its end.
    let again = |number: usize| {
        let binary = laptop.join("runner");
        fs::copy(metal.binary(), &binary).unwrap();
        let mut bytes = fs::read(&binary).unwrap();
        bytes.extend(format!("build {number}").bytes());
        fs::write(&binary, bytes).unwrap();
        metal.settings(&format!("RUNNER_BINARY='{}'", binary.display()));
    };
    again(0);
    set("calls", "0");
    metal.deploy_local();
    let steps: usize = fs::read_to_string(laptop.join("calls"))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!((6..=9).contains(&steps), "{steps} connections");
    let mut number = 0;
    for how in ["before", "after", "half"] {
        for step in 1..=steps {
            // Only the upload is longer than that. And a step that was done, but nobody heard of it, is like one before
            // the next that was not, but for the upload and the last.
            let chosen = match how {
                "before" => true,
                "after" => step == 3 || step == steps,
                _ => step == 3,
            };
            if !chosen {
                continue;
            }
            number += 1;
            again(number);
            let main = metal.property("MainPID");
            set("how", how);
            set("break", &step.to_string());
            set("calls", "0");
            let output = metal.dev_runner(&["deploy-local"]).output().unwrap();
            refused(&output, "error: ");
            fs::remove_file(laptop.join("break")).unwrap();
            let deployed = step == steps && how == "after";
            assert_eq!(metal.property("ActiveState"), "active", "{how} {step}");
            assert_eq!(metal.property("MainPID") != main, deployed, "{how} {step}");
        }
        metal.submit("true").expect_exit(0);
    }
    // What was left behind hinders nobody.
    metal.deploy_local();
    metal.submit("true").expect_exit(0);
    let left = metal.on_host(&format!(
        "ls -A ~/.vm0-runner/bin/{METAL_NAME} | grep upload || true"
    ));
    assert_eq!(left, "");
    metal.finish();
}

#[test]
fn two_deploys_at_once_both_end_well_and_one_runner_is_left() {
    let Some(metal) = Metal::new("vm0/small") else {
        return;
    };
    metal.deploy_local();
    let mut deploys: Vec<_> = (0..2)
        .map(|_| {
            let mut command = metal.dev_runner(&["deploy-local"]);
            command
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::piped());
            let mut child = command.spawn().unwrap();
            let said = Text::collect(child.stderr.take().unwrap());
            (child, said)
        })
        .collect();
    for (child, said) in &mut deploys {
        let said = said.all(LONG);
        assert!(child.wait().unwrap().success(), "{said}");
    }
    metal.submit("true").expect_exit(0);
    let instances = "cd ~/.vm0-runner/runners/*/instances && grep -l running */status.json | wc -l";
    eventually("one instance is left", LONG, || {
        metal.on_host(instances).trim() == "1"
    });
    metal.finish();
}

#[test]
fn an_upgrade_under_running_jobs_loses_none_and_runs_none_twice() {
    let Some(metal) = Metal::new("vm0/small") else {
        return;
    };
    metal.deploy_local();
    let long = metal.submit("until test -e /tmp/go; do sleep 0.2; done; echo went");
    let run = running(&metal);
    let jobs: Vec<_> = (0..20).map(|_| metal.submit("sleep 1")).collect();
    let first = metal.property("MainPID");
    for _ in 0..2 {
        metal.deploy_local();
    }
    assert_ne!(metal.property("MainPID"), first);
    // The unit has kept its name, the process that finishes the old job is still in it, and operators reach that job.
    assert_eq!(
        metal.on_host(&format!("test -d /proc/{first} && echo there")),
        "there\n"
    );
    let processes = metal.on_host(&format!(
        "systemctl status --no-pager -n 0 vm0-runner-{METAL_NAME}"
    ));
    assert!(processes.contains(&format!("─{first} ")), "{processes}");
    let mut ids: Vec<String> = jobs.into_iter().map(|job| job.expect_exit(0)).collect();
    // The new main process is the one systemd hears: what it tells changes with it.
    assert!(metal.property("StatusText").starts_with("running:"));
    let refusal = metal.root_runner(&format!("service stop --name {METAL_NAME}"));
    refused(&refusal, &run);
    let go = metal
        .dev_runner(&["exec", &run[..8], "touch /tmp/go"])
        .output()
        .unwrap();
    assert!(go.status.success(), "{go:?}");
    ids.push(long.expect_exit(0));
    let starts = starts(&metal);
    for id in &ids {
        assert_eq!(starts.get(id), Some(&1), "{id}: {starts:?}");
    }
    assert_eq!(starts.len(), ids.len());
    eventually("the old instance leaves", LONG, || {
        metal.on_host(&format!("test -d /proc/{first} || echo gone")) == "gone\n"
    });
    // A stop is orderly also when the main process took over.
    let stopped = metal.root_runner(&format!("service stop --name {METAL_NAME}"));
    assert!(stopped.status.success(), "{stopped:?}");
    let journal = metal.on_host(&format!(
        "journalctl --no-pager -o cat -u vm0-runner-{METAL_NAME}"
    ));
    assert!(!journal.contains("SIGKILL"), "{journal}");
    metal.finish();
}

#[test]
fn a_service_killed_while_jobs_run_answers_them_and_comes_back() {
    let Some(metal) = Metal::new("vm0/small") else {
        return;
    };
    metal.deploy_local();
    let job = metal.submit("sleep 1000");
    running(&metal);
    let main = metal.property("MainPID");
    metal.on_host(&format!("sudo -n kill -KILL {main}"));
    let result = job.result();
    assert_ne!(result["exit_code"], 0);
    assert!(
        result["error"].as_str().unwrap().contains("runner stopped"),
        "{result}"
    );
    metal.submit("true").expect_exit(0);
    assert_ne!(metal.property("MainPID"), main);
    // A daemon that hangs is noticed, too: the watchdog is armed.
    assert_ne!(metal.property("WatchdogUSec"), "0");
    assert_ne!(metal.property("WatchdogTimestampMonotonic"), "0");
    metal.finish();
}

#[test]
fn a_drain_with_a_job_that_never_ends_is_told_and_can_be_taken_back_or_forced() {
    let Some(metal) = Metal::new("vm0/small") else {
        return;
    };
    metal.settings("RUNNER_CONFIG_OPTIONS='--stop-timeout-secs 1'");
    metal.deploy_local();
    let job = metal.submit("sleep 100000");
    let run = running(&metal);
    let service =
        |command: &str| metal.root_runner(&format!("service {command} --name {METAL_NAME}"));
    refused(&service("drain --wait 1s"), &run);
    let waits = metal.submit("true");
    refused(&service("stop"), &run);
    // A refused stop has not made it take jobs again: it drains as before.
    let status = || {
        metal.on_host(&format!(
            "cat ~/.vm0-runner/runners/{METAL_NAME}/status.json"
        ))
    };
    assert!(status().contains("\"mode\": \"draining\""), "{}", status());
    // Somebody with another home has no such runner, whatever its jobs: not even by force.
    for command in ["stop --force", "uninstall --force", "drain --wait 1s"] {
        let stranger = format!("--home /root/other service {command} --name {METAL_NAME}");
        refused(&metal.root_runner(&stranger), "another home");
    }
    assert_eq!(metal.property("ActiveState"), "active");
    assert!(service("resume").status.success());
    waits.expect_exit(0);
    let forced = service("stop --force");
    assert!(forced.status.success(), "{forced:?}");
    assert_ne!(job.result()["exit_code"], 0);
    assert_eq!(metal.property("LoadState"), "not-found");
    metal.finish();
}

#[test]
fn an_installed_service_comes_back_after_a_power_cut_and_answers_what_was_running() {
    let Some(mut metal) = Metal::new("vm0/small") else {
        return;
    };
    metal.deploy_local();
    let yaml = format!("~/.vm0-runner/runners/{METAL_NAME}/runner.yaml");
    let install = format!("service install --config {yaml} --local --env USE_MOCK_CLAUDE=true");
    // What runs until the reboot is replaced by what is there after it.
    let installed = metal.root_runner(&install);
    assert!(installed.status.success(), "{installed:?}");
    assert_eq!(metal.property("UnitFileState"), "enabled");
    // The other kind of start does not touch it.
    let start = metal.root_runner(&format!("service start --config {yaml} --local"));
    refused(&start, "installed");
    metal.on_host(&format!(
        "nohup ~/.vm0-runner/bin/{METAL_NAME}/runner local submit --group vm0/{METAL_NAME} --profile vm0/small \
         --prompt 'sleep 1000' >/dev/null 2>&1 &"
    ));
    let run = running(&metal);
    metal.power_cut();
    metal.boot();
    let result = format!("cat ~/.vm0-runner/groups/vm0/{METAL_NAME}/.results/{run}.result");
    let result = eventually_some("the job is answered", LONG, || {
        let output = metal.ssh(&result);
        output.status.success().then(|| text(&output.stdout))
    });
    assert!(
        result.contains("runner stopped while the job was running"),
        "{result}"
    );
    metal.submit("true").expect_exit(0);
    let removed = metal.root_runner(&format!("service uninstall --name {METAL_NAME}"));
    assert!(removed.status.success(), "{removed:?}");
    assert_eq!(metal.property("LoadState"), "not-found");
    metal.finish();
}

#[test]
fn a_start_that_fails_leaves_the_service_that_runs_and_says_why() {
    let Some(metal) = Metal::new("vm0/small") else {
        return;
    };
    metal.deploy_local();
    let main = metal.property("MainPID");
    let before = metal.on_host(&format!(
        "cat /run/systemd/system/vm0-runner-{METAL_NAME}.service"
    ));
    // Without --local it would need the API.
    let config = format!("~/.vm0-runner/runners/{METAL_NAME}/runner.yaml");
    refused(
        &metal.root_runner(&format!("service start --config {config}")),
        "the instance that ran goes on",
    );
    assert_eq!(metal.property("MainPID"), main);
    let after = metal.on_host(&format!(
        "cat /run/systemd/system/vm0-runner-{METAL_NAME}.service"
    ));
    assert_eq!(before, after);
    metal.submit("true").expect_exit(0);
    // A value that systemd, a shell and a line-oriented file would each take apart arrives whole.
    let value = "a \"b\" 100% $HOME \\n 'c'";
    let quoted = value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('$', "\\$");
    let start = metal.root_runner(&format!(
        "service start --config {config} --local --env USE_MOCK_CLAUDE=true --env \"A={quoted}\""
    ));
    assert!(start.status.success(), "{start:?}");
    let main = metal.property("MainPID");
    let environment = metal.on_host(&format!(
        "sudo -n cat /proc/{main}/environ | tr '\\0' '\\n'"
    ));
    assert!(
        environment.lines().any(|line| line == format!("A={value}")),
        "{environment}"
    );
    // Nobody without root may do any of this, and the error says so.
    let user = metal.ssh(&format!(
        "~/.vm0-runner/bin/{METAL_NAME}/runner service stop --name {METAL_NAME}"
    ));
    refused(&user, "needs root");
    metal.finish();
}
