//! Operators' commands over the API: from a client's WebSocket through `vm0-api` and the runner into the VM.

use e2e::{Api, Host, LONG, World, eventually};
use serde_json::json;

const WAITS: &str = "until [ -e /tmp/go ]; do sleep 0.2; done";

/// A runner with a run that waits for the file /tmp/go.
fn scene() -> Option<(World, Api, Host, String)> {
    let world = World::new()?;
    let api = Api::start(&world)?;
    let host = Host::new().world(&world).api(&api).start()?;
    let run = api.create(WAITS, json!({}));
    host.until_status("the run runs", |status| {
        status["active_runs"][0]["phase"] == "running"
    });
    Some((world, api, host, run))
}

/// Ends the run well.
fn go(host: &Host, api: &Api, run: &str) {
    host.in_vm(run, "touch /tmp/go");
    assert_eq!(api.result(run)["exitCode"], 0);
}

#[test]
fn a_command_over_the_api_has_its_input_outputs_and_exit_code() {
    let Some((_world, api, host, run)) = scene() else {
        return;
    };
    let script =
        "read first; echo \"got $first\"; echo complaint >&2; wc -c; test -t 0 || id -un; exit 7";
    let mut exec = api.exec(&run, &["sh", "-c", script], None).unwrap();
    exec.write(b"one\n");
    exec.until("got one\n");
    exec.write(b"12345");
    exec.write(b"678");
    exec.close_input();
    assert_eq!(exec.wait().code, Some(7), "{}", exec.errors());
    assert_eq!(exec.text(), "got one\n8\nuser\n");
    assert_eq!(exec.errors(), "complaint\n");

    // More than fits into any buffer on the way, and every byte of it in its place.
    let mut exec = api.exec(&run, &["seq", "1000000"], None).unwrap();
    assert_eq!(exec.wait().code, Some(0));
    let lines: String = (1..=1_000_000).map(|n| format!("{n}\n")).collect();
    assert_eq!(exec.stdout.len(), lines.len());
    assert!(exec.text() == lines, "another order");

    // What cannot be run says why.
    let mut exec = api.exec(&run, &["/no/such/program"], None).unwrap();
    let ended = exec.wait();
    assert!(
        ended.error.is_some() || matches!(ended.code, Some(126 | 127)),
        "{ended:?}"
    );

    // The host's own record of it.
    let audit = std::fs::read_to_string(host.home().join("logs/audit.jsonl")).unwrap();
    let noted = audit.lines().find(|line| line.contains("/no/such/program"));
    let key = noted.and_then(|line| line.split_once(r#""api_key":""#));
    let key = key.unwrap_or_else(|| panic!("{audit}")).1;
    assert!(
        api.client.contains(key.split('"').next().unwrap()),
        "{audit}"
    );

    // Neither a runner nor a stranger may.
    let (status, _) = api.ask(
        &api.runner,
        "GET",
        &format!("/api/runs/{run}/exec?argv=%5B%22id%22%5D"),
        None,
    );
    assert!([401, 403].contains(&status), "{status}");
    go(&host, &api, &run);
    assert_eq!(api.exec(&run, &["true"], None).err(), Some(409));
    host.finish();
}

#[test]
fn a_terminal_over_the_api_has_a_size_that_changes() {
    let Some((_world, api, host, run)) = scene() else {
        return;
    };
    let script = "trap told=yes WINCH; test -t 0 && stty size; until [ -n \"$told\" ]; do sleep 0.1; done; \
                  echo \"now $(stty size)\"; read line; echo \"read $line\"; exit 3";
    let argv = ["bash", "-c", script];
    let mut exec = api.exec(&run, &argv, Some((100, 30))).unwrap();
    exec.until("30 100\r\n");
    exec.resize(120, 40);
    exec.until("now 40 120\r\n");
    exec.write(b"a line\n");
    exec.until("read a line\r\n");
    assert_eq!(exec.wait().code, Some(3));
    // What the terminal echoed; and there is but one output.
    assert!(exec.text().contains("a line\r\n"), "{}", exec.text());
    assert_eq!(exec.errors(), "");

    // Ctrl-C is the terminal's business.
    let mut exec = api
        .exec(
            &run,
            &["sh", "-c", "echo up; exec sleep 1000"],
            Some((80, 24)),
        )
        .unwrap();
    exec.until("up\r\n");
    exec.write(b"\x03");
    assert_eq!(exec.wait().code, Some(130));
    go(&host, &api, &run);
    host.finish();
}

#[test]
fn a_command_over_the_api_ends_with_its_client_its_runners_connection_and_its_run() {
    let Some((_world, mut api, host, run)) = scene() else {
        return;
    };
    let sleeper = ["sh", "-c", "sleep 4711 & echo up; wait"];
    let sleeps = || {
        // The run itself sleeps too, but now and then.
        let found = host.in_vm(&run, "pgrep -x sleep -a || test $? = 1");
        found.contains("sleep 4711")
    };
    let mut exec = api.exec(&run, &sleeper, None).unwrap();
    exec.until("up\n");
    assert!(sleeps());
    drop(exec);
    eventually("nothing of it is left", LONG, || !sleeps());

    // The runner's connection to the API goes, and with it whoever could be told.
    let mut exec = api.exec(&run, &sleeper, None).unwrap();
    exec.until("up\n");
    assert!(sleeps());
    api.kill_replica(0);
    api.start_replica(0);
    eventually("nothing of it is left", LONG, || !sleeps());
    // A command that comes before the runner is connected again is not run, and says so after a while.
    eventually("the runner is connected again", LONG, || {
        let again = api.exec(&run, &["true"], None);
        again.is_ok_and(|mut exec| exec.wait().code == Some(0))
    });

    let mut exec = api.exec(&run, &sleeper, None).unwrap();
    exec.until("up\n");
    api.cancel(&run);
    let ended = exec.wait();
    assert_ne!(ended.code, Some(0), "{ended:?}");
    assert_eq!(api.result(&run)["exitCode"], 137);
    host.finish();
}
