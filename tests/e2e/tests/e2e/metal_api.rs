//! A remote host whose runner takes runs from a Web API, and goes back to its local queue, and back.

use e2e::{Api, LONG, METAL_NAME, Metal, eventually, eventually_some};
use serde_json::{Value, json};

/// What the API tells of its only runner; it must answer.
fn registered(api: &Api) -> Option<Value> {
    let (status, fleet) = api.ask(&api.client, "GET", "/api/runners", None);
    assert_eq!(status, 200, "{fleet}");
    let runners = fleet["runners"].as_array().expect("a list");
    runners.first().map(|runner| runner["heartbeat"].clone())
}

/// `pnpm SCRIPT` in `turbo`, or what that script says where there is no pnpm; it must succeed.
fn pnpm(metal: &Metal, script: &str, action: &str) {
    let mut command = if metal.has_pnpm() {
        let mut command = metal.laptop("pnpm");
        let turbo = command
            .get_current_dir()
            .expect("the checkout")
            .join("turbo");
        command.args(["--silent", script]).current_dir(turbo);
        command
    } else {
        metal.dev_runner(&[action])
    };
    let output = command.output().expect("it starts");
    assert!(output.status.success(), "{script}: {output:?}");
}

#[test]
fn a_deployed_runner_registers_with_the_api_takes_its_runs_and_goes_back_to_local_mode() {
    let Some(metal) = Metal::new("vm0/small") else {
        return;
    };
    let Some(api) = Api::serving(metal.world(), &format!("vm0/{METAL_NAME}")) else {
        return;
    };
    metal.settings(&format!(
        "VM0_API_URL={}\nVM0_RUNNER_TOKEN={}",
        Api::URL,
        api.runner
    ));
    pnpm(&metal, "runner", "deploy");
    let heartbeat = eventually_some("the runner has registered", LONG, || registered(&api));
    assert_eq!(heartbeat["runnerName"], METAL_NAME, "{heartbeat}");
    assert_eq!(heartbeat["profiles"], json!(["vm0/small"]), "{heartbeat}");
    let unit = metal.on_host(&format!(
        "systemctl cat vm0-runner-{METAL_NAME}; systemctl status --no-pager vm0-runner-{METAL_NAME}"
    ));
    assert!(!unit.contains("--local"), "{unit}");
    assert!(!unit.contains("USE_MOCK_CLAUDE"), "{unit}");
    // Whoever may look at the unit does not see the token.
    assert!(!unit.contains(&api.runner), "{unit}");

    // The agent's own CLI is asked for, which this image does not hold: the run is answered all the same.
    let run = api.create("echo hello", json!({}));
    let result = api.result(&run);
    assert_eq!(result["reason"], "completed", "{result}");
    assert_ne!(result["exitCode"], 0, "{result}");
    let error = result["error"].as_str().unwrap_or_default();
    assert!(error.contains("claude"), "{result}");

    // An operator who wants the mock says so.
    let place = format!("/etc/systemd/system/vm0-runner-{METAL_NAME}.service.d");
    metal.on_host(&format!(
        "sudo -n mkdir {place} && printf '[Service]\\nEnvironment=USE_MOCK_CLAUDE=true\\n' | sudo -n tee {place}/mock.conf && \
         sudo -n systemctl daemon-reload && sudo -n systemctl restart vm0-runner-{METAL_NAME}"
    ));
    let run = api.create("echo from the API; uname -s", json!({}));
    let result = api.result(&run);
    assert_eq!(result["exitCode"], 0, "{result}");
    assert!(api.output(&run).contains("from the API"));
    let log = metal.on_host(&format!("cat ~/.vm0-runner/logs/system-{run}.log"));
    assert!(log.contains("from the API\nLinux\n"), "{log}");

    pnpm(&metal, "runner:local", "deploy-local");
    assert!(
        metal.property("ExecStart").contains(" --local"),
        "it is in local mode"
    );
    metal.submit("echo local").expect_exit(0);
    eventually("the API knows no runner", LONG, || {
        registered(&api).is_none()
    });
    // What waits meanwhile is not lost.
    let waiting = api.create("echo waited", json!({}));

    pnpm(&metal, "runner", "deploy");
    assert_eq!(api.result(&waiting)["exitCode"], 0);
    assert!(api.output(&waiting).contains("waited"));
    metal.finish();
}
