//! Secrets and policies that come over the API.

use std::collections::BTreeSet;

use e2e::{Api, Host, LONG, Needle, World, eventually, found_below};
use serde_json::{Value, json};

fn scene() -> Option<(World, Api, Host)> {
    let world = World::new()?;
    let api = Api::start(&world)?;
    let host = Host::new().world(&world).api(&api).start()?;
    Some((world, api, host))
}

fn rule(host: &str, action: &str) -> Value {
    json!({"name": format!("{action}-{host}"), "host": host, "action": action})
}

fn policy(rules: &[Value]) -> Value {
    json!({"version": 1, "rules": rules})
}

#[test]
fn a_secret_of_the_api_goes_to_its_host_only_and_stands_nowhere_else() {
    let Some((world, api, host)) = scene() else {
        return;
    };
    let value = "s3cr3t-Value-4711/x";
    let prompt = "
        echo \"it is $TOKEN\"
        curl -sS -H \"Authorization: Bearer $TOKEN\" https://www.example.com/with
        curl -sS -H \"Authorization: Bearer $TOKEN\" https://other.example.org/without
        sudo sh -c 'cat /proc/[0-9]*/environ' | tr '\\0' '\\n' | sort -u
        echo \"$TOKEN\" > /tmp/placeholder; until [ -e /tmp/go ]; do sleep 0.2; done";
    let run = api.create(
        prompt,
        json!({
            "policy": policy(&[rule("www.example.com", "allow"), rule("other.example.org", "allow")]),
            "secrets": [{"name": "TOKEN", "value": value, "hosts": ["www.example.com"]}],
        }),
    );
    host.until_status("the run runs", |status| {
        status["active_runs"][0]["phase"] == "running"
    });
    let placeholder = host.in_vm(
        &run,
        "until [ -s /tmp/placeholder ]; do sleep 0.2; done; cat /tmp/placeholder",
    );
    let placeholder = placeholder.trim();
    assert!(placeholder.len() > 8, "{placeholder}");
    let needles = [
        Needle::text("the value", value),
        Needle::text("the encoded value", "czNjcjN0LVZhbHVlLTQ3MTEve"),
    ];
    let control = [Needle::text("the prompt", "until [ -e /tmp/go ]")];
    for vm in host.vms() {
        assert_eq!(vm.memory_holds(&needles), BTreeSet::new());
    }
    // NATS has the prompt in the clear, and the secret not.
    assert!(!found_below(&api.store(), &[], &control).is_empty());
    let older = ["images", "proxy"];
    let mut found = found_below(&api.store(), &[], &needles);
    found.extend(found_below(host.home(), &older, &needles));
    host.in_vm(&run, "touch /tmp/go");
    assert_eq!(api.result(&run)["exitCode"], 0, "{}", host.log(&run));
    found.extend(found_below(&api.store(), &[], &needles));
    found.extend(found_below(host.home(), &older, &needles));
    assert!(found.is_empty(), "{found:?}");

    let arrived = world.arrived();
    let [with, without] = &arrived[..] else {
        panic!("two requests arrive: {arrived:?}");
    };
    assert_eq!(with["headers"]["authorization"], format!("Bearer {value}"));
    let plain = format!("Bearer {placeholder}");
    assert_eq!(without["headers"]["authorization"], plain);

    // What the agent tells the API has not even the placeholder; the host's own log has.
    assert!(host.log(&run).contains(&format!("it is {placeholder}")));
    let events = api.feed(&run, "events");
    assert!(events.contains("it is ***"), "{events}");
    assert!(!events.contains(placeholder), "{events}");
    host.finish();
    world.finish();
}

#[test]
fn a_groups_policy_stands_above_what_its_runs_ask_for_and_a_runs_own_may_change() {
    let Some((world, api, host)) = scene() else {
        return;
    };
    let path = format!("/api/policies/{}", Api::GROUP);
    let denied = policy(&[rule("other.example.org", "deny")]);
    let (status, _) = api.ask(&api.client, "PUT", &path, Some(&denied));
    assert!([401, 403].contains(&status), "a client's key: {status}");
    let operator = api.token("operator");
    eventually("the operator's key is known", LONG, || {
        api.ask(&operator, "PUT", &path, Some(&denied)).0 == 200
    });

    let asked = policy(&[
        rule("other.example.org", "allow"),
        rule("www.example.com", "allow"),
    ]);
    let prompt = "
        code() { curl -s -o /dev/null -w '%{http_code}' https://$1/; }
        echo \"group: $(code other.example.org) run: $(code www.example.com)\" > /tmp/asked
        until [ \"$(code www.example.com)\" != 200 ]; do sleep 0.2; done; echo nothing is allowed now";
    let run = api.create(prompt, json!({"policy": asked}));
    host.until_status("the run runs", |status| {
        status["active_runs"][0]["phase"] == "running"
    });
    let asked_for = host.in_vm(
        &run,
        "until [ -s /tmp/asked ]; do sleep 0.2; done; cat /tmp/asked",
    );
    assert!(asked_for.contains("run: 200"), "{asked_for}");
    assert!(!asked_for.contains("group: 200"), "{asked_for}");

    // All of it taken back while it runs; what it says goes to the API's webhooks all the same.
    let less = json!({"version": 1, "default": "deny", "rules": []});
    let (status, answer) = api.ask(
        &api.client,
        "PUT",
        &format!("/api/runs/{run}/policy"),
        Some(&less),
    );
    assert_eq!(status, 200, "{answer}");
    assert_eq!(api.result(&run)["exitCode"], 0, "{}", host.log(&run));
    let events = api.feed(&run, "events");
    assert!(events.contains("nothing is allowed now"), "{events}");
    let hooks = host.network_log(&run);
    let refused = hooks.with(&[("action", json!("DENY"))]);
    let webhook = |line: &&&Value| {
        line["rule"]
            .as_str()
            .unwrap_or_default()
            .starts_with("vm0-api")
    };
    assert_eq!(refused.iter().find(webhook), None);

    // Without the group's policy the same run may.
    let (status, _) = api.ask(&operator, "DELETE", &path, None);
    assert_eq!(status, 204);
    let prompt = "curl -sS -o /dev/null -w 'code %{http_code}' https://other.example.org/";
    let run = api.create(prompt, json!({"policy": asked}));
    assert_eq!(api.result(&run)["exitCode"], 0, "{}", host.log(&run));
    assert!(host.log(&run).contains("code 200"), "{}", host.log(&run));
    host.finish();
    world.finish();
}

#[test]
fn what_is_denied_on_the_host_stays_denied_when_the_api_changes_the_runs_policy() {
    let Some((world, api, host)) = scene() else {
        return;
    };
    let asked = policy(&[rule("www.example.com", "allow")]);
    let run = api.create(
        "until [ -e /tmp/go ]; do sleep 0.2; done",
        json!({"policy": asked}),
    );
    host.until_status("the run runs", |status| {
        status["active_runs"][0]["phase"] == "running"
    });
    // A denied name does not resolve: 000.
    let code = || {
        host.in_vm(
            &run,
            "curl -s -o /dev/null -w '%{http_code}' https://www.example.com/; true",
        )
    };
    assert_eq!(code(), "200");
    let show = |options: &[&str]| {
        let command = [&["policy", &run], options].concat();
        let shown = host.runner(&command).output().unwrap();
        assert!(shown.status.success(), "{shown:?}");
        String::from_utf8(shown.stdout).unwrap()
    };
    show(&["--deny", "www.example.com"]);
    assert_eq!(code(), "000");

    let more = policy(&[
        rule("www.example.com", "allow"),
        rule("marker.example.com", "allow"),
    ]);
    let path = format!("/api/runs/{run}/policy");
    let (status, answer) = api.ask(&api.client, "PUT", &path, Some(&more));
    assert_eq!(status, 200, "{answer}");
    eventually("the API's change holds", LONG, || {
        show(&[]).contains("marker.example.com")
    });
    assert_eq!(code(), "000");
    // And what the host takes back is as the run's own policy says.
    show(&["--allow", "www.example.com"]);
    assert_eq!(code(), "200");
    host.in_vm(&run, "touch /tmp/go");
    assert_eq!(api.result(&run)["exitCode"], 0);
    host.finish();
    world.finish();
}
