//! The way of a run's token: from the API to the runner, the agent and the wire; and what it opens.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as B64;
use e2e::{Api, Capture, Host, World};
use serde_json::{Value, json};

const WEBHOOKS: [&str; 5] = [
    "/api/webhooks/agent/heartbeat",
    "/api/webhooks/agent/events",
    "/api/webhooks/agent/telemetry",
    "/api/webhooks/agent/checkpoints",
    "/api/webhooks/agent/complete",
];

/// What a replica tells everybody.
const OPEN: [&str; 3] = ["/healthz", "/readyz", "/openapi.json"];

/// Runs a bash line in a run's VM as root, and gives what it prints.
fn inside(host: &Host, run: &str, variables: &[(&str, &str)], line: &str) -> String {
    let mut command = host.runner(&["exec", &run[..8], "--user", "root"]);
    for (name, value) in variables {
        command.args(["--env", &format!("{name}={value}")]);
    }
    let output = command.arg(line).output().expect("it starts");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Everything that the API describes, about this run.
fn routes(api: &Api, run: &str) -> Vec<(String, String)> {
    let (status, description) = api.ask("", "GET", "/openapi.json", None);
    assert_eq!(status, 200);
    let mut routes = Vec::new();
    for (path, methods) in description["paths"].as_object().expect("paths") {
        for method in methods.as_object().expect("methods").keys() {
            let path = path.replace("{run}", run);
            let path = path.replace("{org}", "vm0").replace("{name}", "e2e");
            routes.push((method.to_uppercase(), path));
        }
    }
    assert!(routes.len() > 25, "{routes:?}");
    routes
}

/// The same claims, or changed ones, under a signature that they do not have.
fn forgeries(token: &str) -> Vec<(&'static str, String)> {
    let parts: Vec<&str> = token.split('.').collect();
    let [header, claims, signature] = parts[..] else {
        panic!("no JWT: {token}");
    };
    let read = |part: &str| -> Value {
        serde_json::from_slice(&B64.decode(part).expect("base64")).expect("JSON")
    };
    let written = |value: &Value| B64.encode(value.to_string());
    let with = |name: &str, value: Value| {
        let mut claims = read(claims);
        claims[name] = value;
        format!("{header}.{}.{signature}", written(&claims))
    };
    let headed = |name: &str, value: &str, signature: &str| {
        let mut header = read(header);
        header[name] = json!(value);
        format!("{}.{claims}.{signature}", written(&header))
    };
    let mut other = B64.decode(signature).expect("base64");
    other[0] ^= 1;
    vec![
        (
            "changed signature",
            format!("{header}.{claims}.{}", B64.encode(other)),
        ),
        ("no signature", format!("{header}.{claims}.")),
        ("no algorithm", headed("alg", "none", "")),
        ("another algorithm", headed("alg", "HS256", signature)),
        ("an unknown key", headed("kid", "unknown", signature)),
        (
            "another run",
            with("sub", json!("6f1c2f0e-3a7b-4c1d-9e55-0a1b2c3d4e5f")),
        ),
        ("another claim", with("epoch", json!(2))),
        ("another audience", with("aud", json!("somebody"))),
        ("a longer life", with("exp", json!(4_000_000_000_u64))),
        ("nonsense", "x".to_owned()),
    ]
}

#[test]
fn a_token_goes_from_the_api_to_the_wire_and_opens_its_runs_webhooks_alone() {
    let Some(world) = World::new() else { return };
    let Some(api) = Api::start(&world) else {
        return;
    };
    let Some(host) = Host::new().world(&world).api(&api).start() else {
        return;
    };
    let capture = Capture::around(&host.proxies()[0]);
    let wait =
        "touch /tmp/up; until [ -e /tmp/go ]; do sleep 0.2; done; test -z \"$VM0_API_TOKEN\"";
    let run = api.create(wait, json!({}));
    host.until_file(&run, "/tmp/up");

    // From the API, which signed it for this claim, to the agent's environment …
    let environment =
        "tr '\\0' '\\n' < /proc/$(pgrep -o guest-agent)/environ | sed -n 's/^VM0_API_TOKEN=//p'";
    let token = inside(&host, &run, &[], environment);
    let claims = token.split('.').nth(1).expect("a JWT");
    let claims: Value = serde_json::from_slice(&B64.decode(claims).expect("base64")).expect("JSON");
    assert_eq!(
        (&claims["sub"], &claims["epoch"]),
        (&json!(run), &json!(1)),
        "{claims}"
    );
    // … and from there to the wire, in the header of its webhooks.
    let sent = capture.until("the heartbeat on the wire", |data| {
        data.starts_with("POST /api/webhooks/agent/heartbeat HTTP/1.1\r\n")
    });
    let sent = sent["data"].as_str().expect("text");
    let bearer = format!("bearer {token}");
    let header = sent.lines().find_map(|line| {
        line.split_once(": ")
            .filter(|(name, _)| name.eq_ignore_ascii_case("authorization"))
    });
    let value = header.map(|(_, value)| value.replacen("Bearer", "bearer", 1));
    assert_eq!(value.as_deref(), Some(bearer.as_str()), "{sent}");
    assert!(
        capture.connections().contains("198.18.0.5:8090"),
        "{:?}",
        capture.connections()
    );

    // From inside the VM, with its own token.
    let ask = |token: &str, method: &str, path: &str, body: &Value| {
        let line = format!(
            "curl -sS -o /dev/null -w '%{{http_code}}' -X {method} -H \"Authorization: Bearer $TOKEN\" \
             -H 'Content-Type: application/json' -d \"$BODY\" '{}{path}'",
            Api::URL
        );
        let variables = [("TOKEN", token), ("BODY", &body.to_string())];
        inside(&host, &run, &variables, &line)
    };
    let own = json!({"runId": run, "events": []});
    assert_eq!(ask(&token, "POST", WEBHOOKS[0], &own), "200");
    let foreign = json!({"runId": "6f1c2f0e-3a7b-4c1d-9e55-0a1b2c3d4e5f", "events": [], "exitCode": 0,
        "cliAgentSessionId": "s", "cliAgentSessionHistory": ""});
    for hook in WEBHOOKS {
        assert_eq!(ask(&token, "POST", hook, &foreign), "403", "{hook}");
    }
    for (what, forged) in forgeries(&token) {
        assert_eq!(ask(&forged, "POST", WEBHOOKS[0], &own), "401", "{what}");
    }
    let query = "?runnerId=6f1c2f0e-3a7b-4c1d-9e55-0a1b2c3d4e5f&group=vm0/e2e&epoch=1&argv=%5B%5D";
    for (method, path) in routes(&api, &run) {
        if WEBHOOKS.contains(&path.as_str()) {
            continue;
        }
        let full = if method == "GET" {
            format!("{path}{query}")
        } else {
            path.clone()
        };
        // The runner's proxy is in the way …
        let status = ask(&token, &method, &full, &own);
        assert!(
            ["401", "403"].contains(&status.as_str()),
            "{method} {path}: {status}"
        );
        // … and where it is not, the API is.
        if !OPEN.contains(&path.as_str()) {
            let (status, answer) = api.ask(&token, &method, &full, Some(&own));
            assert!(
                [401, 403].contains(&status),
                "{method} {path}: {status} {answer}"
            );
        }
    }

    inside(&host, &run, &[], "touch /tmp/go");
    assert_eq!(api.result(&run)["exitCode"], 0, "the CLI has no token");
    let (status, _) = api.ask(&token, "POST", WEBHOOKS[0], Some(&own));
    assert_eq!(status, 401, "a finished run's token");
    assert!(!host.log(&run).contains(&token));
    host.finish();
}

#[test]
fn over_tls_no_token_is_in_the_clear_and_an_unknown_certificate_is_not_talked_to() {
    let Some(world) = World::new() else { return };
    let Some(api) = Api::start(&world) else {
        return;
    };
    let Some(host) = Host::new().world(&world).api_over_tls(&api, &world).start() else {
        return;
    };
    let capture = Capture::around(&host.proxies()[0]);
    let environment =
        "tr '\\0' '\\n' < /proc/$(pgrep -o guest-agent)/environ | sed -n 's/^VM0_API_TOKEN=//p'";
    let run = api.create("until [ -e /tmp/go ]; do sleep 0.2; done", json!({}));
    host.until_status("the run runs", |status| {
        status["active_runs"][0]["phase"] == "running"
    });
    let token = inside(&host, &run, &[], environment);
    assert_eq!(token.split('.').count(), 3, "{token}");
    // Over the runner's WebSocket, too.
    let mut exec = api.exec(&run, &["touch", "/tmp/go"], None).unwrap();
    assert_eq!(exec.wait().code, Some(0));
    assert_eq!(api.result(&run)["exitCode"], 0, "{}", host.log(&run));
    // The webhooks came, and went to the balancer …
    let events = api.feed(&run, "events");
    assert!(events.contains("\"sequenceNumber\":0"), "{events}");
    let begun = capture.connections();
    assert!(begun.contains("198.18.0.5:8443"), "{begun:?}");
    assert!(!begun.contains("198.18.0.5:8090"), "{begun:?}");
    // … of which nobody on the way can read the token.
    let readable = |packet: &Value| {
        packet["data"]
            .as_str()
            .is_some_and(|data| data.contains(&token))
    };
    assert!(!capture.packets().iter().any(readable));
    host.finish();

    // Who does not trust the certificate hands nobody a token.
    let Some(stranger) = Host::new()
        .name("stranger")
        .world(&world)
        .api_over_tls(&api, &world)
        .env("SSL_CERT_FILE", "/dev/null")
        .start()
    else {
        return;
    };
    stranger.until_status("the API is not believed", |status| {
        status["api"]["error"].is_string()
    });
    let status = stranger.status().unwrap();
    assert!(status["api"]["last_contact"].is_null(), "{status}");
    stranger.finish();
    world.finish();
}

#[test]
fn a_local_job_makes_no_connection_for_webhooks() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new().world(&world).start() else {
        return;
    };
    let capture = Capture::around(&host.proxies()[0]);
    let outcome = host.submit("curl -sS http://www.example.com/hello").run();
    outcome.expect_exit(0);
    capture.until("the job's own request", |data| {
        data.starts_with("GET /hello")
    });
    let begun = capture.connections();
    // The job's own request, and what the proxy made of it.
    assert!(begun.contains("198.18.0.2:80"), "{begun:?}");
    let others: Vec<_> = begun.iter().filter(|to| *to != "198.18.0.2:80").collect();
    assert!(others.is_empty(), "{others:?}");
    let named = |packet: &Value| {
        packet["data"]
            .as_str()
            .is_some_and(|data| data.contains("/api/webhooks"))
    };
    assert!(!capture.packets().iter().any(named));
    host.finish();
}
