//! What is noted of what operators do.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use e2e::{Host, LONG, eventually, eventually_some};
use serde_json::Value;

fn lines(host: &Host) -> Vec<Value> {
    let output = host.runner(&["audit", "--json"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The one line of the end of an action.
fn end(lines: &[Value], action: &str) -> Value {
    let mut found = lines
        .iter()
        .filter(|line| line["action"] == action && line["event"] == "end");
    let one = found
        .next()
        .unwrap_or_else(|| panic!("{action}: {lines:#?}"));
    assert!(found.next().is_none(), "{action} twice: {lines:#?}");
    one.clone()
}

#[test]
fn who_did_what_to_a_job_is_noted_and_no_secret_is() {
    const VALUE: &str = "hunter2-hunter2";
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host
        .submit("sleep 1000")
        .secret("KEY", VALUE, "api.example.com")
        .spawn();
    let run = job.running();
    let here = tempfile::tempdir().unwrap();
    let file = here.path().join("f");
    fs::write(&file, "x").unwrap();
    let file = file.to_str().unwrap();
    let script = format!("echo {VALUE} $(id); exit 7");
    let inside = format!("{run}:/tmp/f");
    for (args, code) in [
        (vec!["exec", &run, "--user", "root", "--", &script], 7),
        (vec!["cp", file, &inside], 0),
        (vec!["cp", &inside, file], 0),
        (vec!["policy", &run, "--allow", "example.org:22"], 0),
        (vec!["kill", &run], 0),
    ] {
        let output = host.runner(&args).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {output:?}");
    }
    job.wait().expect_error(&["cancel"]);
    // An end is noted when the client may have left already.
    let lines = eventually_some("every end is noted", LONG, || {
        let lines = lines(&host);
        let ends = lines.iter().filter(|line| line["event"] == "end").count();
        (ends == 5).then_some(lines)
    });
    let exec = end(&lines, "exec");
    assert_eq!(exec["exit_code"], 7);
    assert_eq!(exec["as_user"], "root");
    assert_eq!(exec["run_id"], *run);
    assert_eq!(
        (&exec["by"]["uid"], &exec["by"]["user"]),
        (&0.into(), &"root".into())
    );
    assert!(exec["by"]["pid"].as_u64().is_some_and(|pid| pid > 1));
    assert!(exec["command"].to_string().contains("$(id)"), "{exec}");
    assert_eq!(end(&lines, "cp_in")["path"], "/tmp/f");
    assert_eq!(end(&lines, "cp_out")["ok"], true);
    assert_eq!(end(&lines, "policy")["allow"][0], "example.org:22");
    assert_eq!(end(&lines, "kill")["ok"], true);
    let begun = lines.iter().filter(|line| line["event"] == "begin").count();
    assert_eq!(begun, 5, "{lines:#?}");

    let path = host.home().join("logs/audit.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    assert!(!text.contains(VALUE) && text.contains("[secret]"), "{text}");
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let table = host.runner(&["audit", &run[..8]]).output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    assert_eq!(table.lines().count(), 5, "{table}");
    assert!(table.contains("exit 7"), "{table}");
    host.finish();
}

#[test]
fn a_cancel_in_the_queue_and_an_exec_that_lost_its_client_are_noted() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    let run = job.running();
    let mut exec = host.runner(&["exec", &run, "--", "echo on; sleep 1000"]);
    let mut exec = exec.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut byte = [0];
    std::io::Read::read_exact(exec.stdout.as_mut().unwrap(), &mut byte).unwrap();
    exec.kill().unwrap();
    exec.wait().unwrap();
    // Meanwhile the directory of logs goes.
    eventually("the end of the exec is noted", LONG, || {
        lines(&host).iter().any(|line| line["event"] == "end")
    });
    assert_eq!(end(&lines(&host), "exec")["ok"], false);
    fs::remove_dir_all(host.home().join("logs")).unwrap();
    let cancel = ["local", "cancel", "--group", host.group(), &run];
    assert!(host.runner(&cancel).status().unwrap().success());
    job.wait().expect_error(&["cancel"]);
    let lines = lines(&host);
    assert_eq!(end(&lines, "cancel")["by"]["uid"], 0);
    assert_eq!(lines.len(), 1, "{lines:#?}");
    host.finish();
}

#[test]
fn root_is_noted_with_whom_it_works_for() {
    const USER: u32 = 2_099_999_998;
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    let run = job.running();
    // As under sudo: a root process whose parent is a user's. The parent waits as that user while root's child works.
    let script = format!(
        "import os, subprocess, sys\n\
         r, w = os.pipe()\n\
         pid = os.fork()\n\
         if pid == 0:\n    os.read(r, 1)\n    os.execvp(sys.argv[1], sys.argv[1:])\n\
         os.setresuid({USER}, {USER}, {USER})\n\
         os.write(w, b'.')\n\
         sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    );
    let inner = host.runner(&["exec", &run, "--", "true"]);
    let mut command = Command::new("python3");
    command.args(["-c", &script]).arg(inner.get_program());
    command.args(inner.get_args());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    eventually("the end of the exec is noted", LONG, || {
        lines(&host).iter().any(|line| line["event"] == "end")
    });
    let exec = end(&lines(&host), "exec");
    assert_eq!(
        (&exec["by"]["uid"], &exec["by"]["for_uid"]),
        (&0.into(), &USER.into())
    );
    job.signal(rustix::process::Signal::INT);
    job.wait();
    host.finish();
}
