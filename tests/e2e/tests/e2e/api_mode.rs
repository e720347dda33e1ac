//! Runs of the Web API in real microVMs: a real `vm0-api` over a real NATS.

use e2e::{Api, Host, LONG, World, eventually};
use serde_json::{Value, json};

/// Number of runs that the runner has.
fn active(status: &Value) -> usize {
    status["active_runs"].as_array().map_or(0, Vec::len)
}

/// A world with an API in it and a runner that takes its runs.
fn scene() -> Option<(World, Api, Host)> {
    let world = World::new()?;
    let api = Api::start(&world)?;
    let host = Host::new().world(&world).api(&api).start()?;
    Some((world, api, host))
}

/// Waits until the runner's first run runs.
fn until_it_runs(host: &Host) {
    host.until_status("the run runs", |status| {
        status["active_runs"][0]["phase"] == "running"
    });
}

#[test]
fn a_run_of_the_api_runs_in_a_vm_and_is_answered_there() {
    let Some((_world, api, host)) = scene() else {
        return;
    };
    let prompt = "echo \"hello $WHO from $(uname -n)\"; test -z \"$VM0_API_TOKEN\" && echo without-token; exit 3";
    let run = api.create(prompt, json!({"environment": {"WHO": "you"}}));
    let result = api.result(&run);
    assert_eq!(result["exitCode"], 3, "{result}");
    assert_eq!(result["reason"], "completed");
    // All of the log is there before the answer.
    let output = api.output(&run);
    assert!(output.contains("hello you from "), "{output}");
    // The token is the agent's alone.
    assert!(output.contains("without-token"), "{output}");
    assert!(host.log(&run).contains("hello you from "));

    let (_, fleet) = api.ask(&api.client, "GET", "/api/runners", None);
    let heartbeat = &fleet["runners"][0]["heartbeat"];
    assert_eq!(heartbeat["runnerName"], "e2e", "{fleet}");
    assert_eq!(heartbeat["profiles"], json!(["vm0/small"]));
    let status = host.status().unwrap();
    assert_eq!(status["api"]["url"], Api::URL, "{status}");
    host.until_status("all answers are brought", |status| {
        status["api"]["undelivered"] == 0
    });
    // The agent's events came through its own webhook, numbered, and only there.
    let events = api.feed(&run, "events");
    assert!(events.contains("\"sequenceNumber\":0"), "{events}");
    let network = host.network_log(&run).text();
    assert!(network.contains("/api/webhooks/agent/events"), "{network}");
    // The token is nowhere in what the runner shows or writes.
    assert!(!host.daemon_log_text().contains(&api.runner));
    host.stop();
    let (_, fleet) = api.ask(&api.client, "GET", "/api/runners", None);
    // It said goodbye.
    assert_eq!(fleet["runners"], json!([]), "{fleet}");
    host.finish();
}

#[test]
fn what_clients_say_reaches_the_agent_while_it_works() {
    let Some((_world, api, host)) = scene() else {
        return;
    };
    let run = api.create(
        "echo prompted >/tmp/begun; until [ -e /tmp/go ]; do sleep 0.2; done; echo first",
        json!({"acceptsInput": true}),
    );
    host.until_file(&run, "/tmp/begun");
    // While the agent is at its prompt; the second needs what the first did.
    api.input(&run, "pwd >/tmp/told; echo 'it''s \"second\"'");
    api.input(&run, "cat /tmp/told; exit 3");
    eventually("the agent has both", LONG, || {
        host.log(&run).contains("▷ Input 2")
    });
    host.in_vm(&run, "touch /tmp/go");
    let result = api.result(&run);
    assert_eq!(result["exitCode"], 3, "{result}");
    let log = host.log(&run);
    let answers = log
        .lines()
        .filter(|line| !line.contains(['▶', '▷', '✓', '✗']));
    let answers: Vec<_> = answers.take(3).collect();
    assert_eq!(answers, ["first", "its \"second\"", "/home/user/workspace"]);
    // A client sees when each was read, by the prompt and two replays.
    let events = api.feed(&run, "events");
    assert_eq!(events.matches("\"isReplay\":true").count(), 3, "{events}");
    assert_eq!(api.run(&run)["inputs"], 2);

    // One that is there before any runner has the run, and scripts that read by themselves.
    let run = api.create("@active-input-smoke:1", json!({"acceptsInput": true}));
    api.input(&run, "early");
    let result = api.result(&run);
    assert_eq!(result["exitCode"], 0, "{result}");
    assert!(host.log(&run).contains("1 inputs taken"));
    host.finish();
}

#[test]
fn a_run_is_cancelled_through_the_api() {
    let Some((_world, api, host)) = scene() else {
        return;
    };
    let run = api.create("sleep 1000", json!({}));
    until_it_runs(&host);
    api.cancel(&run);
    assert_eq!(api.result(&run)["exitCode"], 137);
    host.finish();
}

#[test]
fn an_outage_of_the_api_loses_neither_a_run_nor_its_output() {
    let Some((_world, mut api, host)) = scene() else {
        return;
    };
    let first = api.create(
        "touch /tmp/begun; until [ -e /tmp/go ]; do sleep 0.2; done; echo said-in-the-dark",
        json!({}),
    );
    // The agent has reached the API by then.
    host.until_file(&first, "/tmp/begun");
    api.kill_replica(0);
    host.in_vm(&first, "touch /tmp/go");
    host.until_status("the run has ended here", |status| active(status) == 0);
    host.until_status("its answer is kept", |status| {
        status["api"]["undelivered"] == 1
    });
    // The runner dies before it could say anything; the next one brings it.
    host.kill_daemon();
    api.start_replica(0);
    host.start_runner();
    let result = api.result(&first);
    assert_eq!(result["exitCode"], 0, "{result}");
    let output = api.output(&first);
    assert_eq!(output.matches("said-in-the-dark").count(), 1, "{output}");
    let spool = host.home().join("runners/e2e/spool");
    eventually("nothing is left in the spool", LONG, || {
        std::fs::read_dir(&spool).unwrap().count() == 0
    });
    host.finish();
}

#[test]
fn a_runner_that_was_lost_is_not_heard_any_more() {
    let Some(world) = World::new() else { return };
    let Some(api) = Api::with_leases(&world, 8) else {
        return;
    };
    let Some(host) = Host::new().world(&world).api(&api).start() else {
        return;
    };
    let retry = json!({"onRunnerLost": {"do": "retry", "maxAttempts": 3}});
    let run = api.create("sleep 4; echo \"attempt over\"", retry);
    until_it_runs(&host);
    let daemon = host.daemon();
    daemon.signal(rustix::process::Signal::STOP);
    api.until(&run, "the lease is over", |run| run["state"] == "queued");
    let Some(other) = Host::new().name("other").world(&world).api(&api).start() else {
        return;
    };
    api.until(&run, "another has it", |run| {
        run["epoch"].as_u64() >= Some(2)
    });
    daemon.signal(rustix::process::Signal::CONT);
    let result = api.result(&run);
    assert_eq!(result["exitCode"], 0, "{result}");
    assert_eq!(api.run(&run)["holder"]["runnerName"], "other");
    host.until_status("the first runner has given up", |status| {
        active(status) == 0
    });
    assert_eq!(api.output(&run).matches("attempt over").count(), 1);
    other.finish();
    host.finish();
}
