//! What jobs reach, what they do not, and what is told about it.

use std::collections::BTreeSet;
use std::fs;

use e2e::{Host, Needle, World, found_below};
use serde_json::{Value, json};

/// Requests that reached the world's web servers, as `host path`.
fn requests(world: &World) -> Vec<String> {
    let arrived = world.arrived();
    let request = |one: &Value| {
        let host = one["headers"]["host"].as_str()?;
        Some(format!("{host}{}", one["path"].as_str()?))
    };
    arrived.iter().filter_map(request).collect()
}

#[test]
fn an_allowed_request_passes_and_stands_in_the_log_before_the_result() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new().world(&world).start() else {
        return;
    };
    let prompt = "
        curl -sS -w 'code=%{http_code}\\n' -d 12345 'https://www.example.com/hello?x=1'
        curl -sS https://other.example.org/; echo other=$?
        curl -sS --resolve other.example.org:443:198.18.0.2 https://other.example.org/private";
    let outcome = host.submit(prompt).allow("www.example.com").run();
    outcome.expect_exit(0);
    let network = host.network_log(&outcome.run_id());
    let log = host.log(&outcome.run_id());
    assert!(log.contains("hello from the world\ncode=200\n"), "{log}");
    let line = network.one(&[
        ("type", json!("dns")),
        ("host", json!("www.example.com")),
        ("query", json!("A")),
    ]);
    assert_eq!(line["action"], "ALLOW");
    assert_eq!(line["answers"], json!(["198.18.0.2"]));
    let line = network.one(&[("type", json!("http")), ("host", json!("www.example.com"))]);
    assert_eq!(line["action"], "ALLOW");
    assert_eq!(line["url"], "https://www.example.com/hello?x=1");
    assert_eq!(line["method"], "POST");
    assert_eq!((&line["port"], &line["status"]), (&json!(443), &json!(200)));
    assert_eq!(line["request_size"], 5);
    assert_eq!(line["response_size"], "hello from the world\n".len());
    assert_eq!(line["rule"], "www.example.com");
    assert!(line["latency_ms"].is_u64() && line["error"].is_null());

    // What no rule names has no address, and whoever knows the address is told why he may not use it.
    assert!(log.contains("other=6\n"), "{log}");
    network.one(&[
        ("type", json!("dns")),
        ("host", json!("other.example.org")),
        ("action", json!("DENY")),
    ]);
    let line = network.one(&[
        ("type", json!("http")),
        ("host", json!("other.example.org")),
        ("action", json!("DENY")),
    ]);
    assert_eq!(line["status"], 403);
    assert_eq!(line["rule"], "default");
    let refusal = log.lines().find(|line| line.starts_with('{'));
    let refusal: Value = serde_json::from_str(refusal.expect("a refusal")).expect("it is JSON");
    assert_eq!(refusal["error"], "network_policy_denied");
    assert_eq!(refusal["denied_by"], "runner network policy");
    assert_eq!(refusal["host"], "other.example.org");
    assert_eq!(refusal["path"], "/private");
    assert_eq!(requests(&world), ["www.example.com/hello?x=1"]);
    host.finish();
    world.finish();
}

#[test]
fn without_a_policy_the_public_web_is_allowed_and_logged() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new().world(&world).start() else {
        return;
    };
    let prompt = "curl -sS https://other.example.org/a; curl -sS http://api.example.com/b";
    let outcome = host.submit(prompt).run();
    outcome.expect_exit(0);
    let network = host.network_log(&outcome.run_id());
    for (name, url) in [
        ("other.example.org", "https://other.example.org/a"),
        ("api.example.com", "http://api.example.com/b"),
    ] {
        let allowed = [("host", json!(name)), ("action", json!("ALLOW"))];
        let line = network.one(&[&allowed[..], &[("type", json!("http"))]].concat());
        assert_eq!(
            (&line["url"], &line["rule"]),
            (&json!(url), &json!("default"))
        );
        network.one(&[&allowed[..], &[("type", json!("dns"))]].concat());
    }
    assert_eq!(
        requests(&world),
        ["other.example.org/a", "api.example.com/b"]
    );

    // A server that is not who it says gets nothing, and why is told to the job and in the log.
    let prompt = "
        for name in unknown expired wrong; do curl -sS -w ' code=%{http_code}\\n' https://$name.example.net/; done";
    let outcome = host.submit(prompt).run();
    outcome.expect_exit(0);
    let network = host.network_log(&outcome.run_id());
    let log = host.log(&outcome.run_id());
    assert_eq!(log.matches("upstream_failed").count(), 3, "{log}");
    assert_eq!(log.matches("code=502").count(), 3, "{log}");
    for (name, why) in [
        ("unknown", "unable to get local issuer certificate"),
        ("expired", "certificate has expired"),
        ("wrong", "mismatch"),
    ] {
        let name = format!("{name}.example.net");
        let line = network.one(&[("type", json!("http")), ("host", json!(name))]);
        let error = line["error"].as_str().unwrap_or_default();
        assert!(error.to_lowercase().contains(why), "{line}");
        let told = log.lines().find(|line| line.contains(&name));
        let told = told.unwrap_or_else(|| panic!("nothing about {name} in {log}"));
        assert!(told.to_lowercase().contains(why), "{told}");
    }
    assert_eq!(requests(&world).len(), 2, "{:?}", requests(&world));
    host.finish();
    world.finish();
}

#[test]
fn a_port_that_a_rule_opens_is_open_and_told_with_its_sizes_and_no_other_is() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new().world(&world).start() else {
        return;
    };
    let prompt = r#"python3 - <<'END'
import socket
def talk(port):
    try:
        with socket.create_connection(("198.18.0.2", port), timeout=10) as s:
            s.sendall(b"x" * 5000)
            s.shutdown(socket.SHUT_WR)
            got = 0
            while data := s.recv(65536):
                got += len(data)
            return got
    except OSError as error:
        return type(error).__name__
try:
    print("name", socket.gethostbyname("tcp.example.com"))
except OSError as error:
    print("name", type(error).__name__)
print("open", talk(9000))
print("other", talk(9001))
END"#;
    let outcome = host.submit(prompt).allow("tcp.example.com:9000").run();
    outcome.expect_exit(0);
    let network = host.network_log(&outcome.run_id());
    let log = host.log(&outcome.run_id());
    assert!(
        log.contains("name 198.18.0.2\nopen 5000\nother ConnectionRefusedError\n"),
        "{log}"
    );
    let line = network.one(&[("type", json!("tcp")), ("port", json!(9000))]);
    assert_eq!(line["action"], "ALLOW", "{line}");
    assert_eq!(line["host"], "tcp.example.com", "{line}");
    for field in ["request_size", "response_size"] {
        // With or without headers, depending on who counts.
        let size = line[field].as_u64().unwrap_or_default();
        assert!((5000..7000).contains(&size), "{line}");
    }
    network.one(&[
        ("type", json!("packet")),
        ("action", json!("DENY")),
        ("protocol", json!("tcp")),
        ("port", json!(9001)),
    ]);

    // No default opens it.
    let outcome = host.submit(prompt).run();
    outcome.expect_exit(0);
    let log = host.log(&outcome.run_id());
    assert!(log.contains("open ConnectionRefusedError\n"), "{log}");
    host.network_log(&outcome.run_id()).one(&[
        ("type", json!("packet")),
        ("action", json!("DENY")),
        ("port", json!(9000)),
    ]);
    let talks = world
        .arrived()
        .iter()
        .filter(|one| one["at"] == "echo")
        .count();
    assert_eq!(talks, 1);
    assert_eq!(world.trespasses(), Vec::<Value>::new());
    host.finish();
    world.finish();
}

#[test]
fn a_secret_goes_to_its_host_only_and_stands_nowhere_else() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new().world(&world).start() else {
        return;
    };
    let value = "s3cr3t-Value-4711/x";
    let encoded = "czNjcjN0LVZhbHVlLTQ3MTEve";
    let prompt = "
        echo \"$TOKEN\" > /tmp/placeholder
        curl -sS -H \"Authorization: Bearer $TOKEN\" \"https://www.example.com/q?key=$TOKEN\"
        curl -sS -H \"Authorization: Bearer $TOKEN\" https://other.example.org/
        curl -sS -H \"Authorization: Bearer $TOKEN\" http://www.example.com/plain
        sudo sh -c 'cat /proc/[0-9]*/environ' | tr '\\0' '\\n' | sort -u
        touch /tmp/done; until [ -e /tmp/go ]; do sleep 0.2; done";
    let job = host
        .submit(prompt)
        .allow("www.example.com")
        .allow("other.example.org")
        .secret("TOKEN", value, "www.example.com")
        .spawn();
    let run = job.running();
    let placeholder = host.in_vm(
        &run,
        "until [ -e /tmp/done ]; do sleep 0.2; done; cat /tmp/placeholder",
    );
    let placeholder = placeholder.trim();
    assert!(
        placeholder.len() > 8 && !placeholder.contains("s3cr3t"),
        "{placeholder}"
    );

    // The VM's whole memory, seen from outside; that the placeholder is found shows that the search can find.
    let vms = host.vms();
    assert!(!vms.is_empty());
    let needles = [
        Needle::text("the value", value),
        Needle::text("the encoded value", encoded),
    ];
    let control = [Needle::text("the placeholder", placeholder)];
    assert!(vms.iter().any(|vm| !vm.memory_holds(&control).is_empty()));
    for vm in &vms {
        assert_eq!(vm.memory_holds(&needles), BTreeSet::new());
        assert_eq!(vm.open_files_hold(&needles), BTreeSet::new());
    }
    for process in vms
        .iter()
        .chain([&host.daemon(), &host.launcher()])
        .chain(&host.proxies())
    {
        for file in ["environ", "cmdline"] {
            let path = format!("/proc/{}/{file}", process.pid);
            let bytes = fs::read(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            assert!(
                !text.contains(value),
                "{value} in {path} ({})",
                process.name
            );
        }
    }
    let handed_over: Vec<_> = fs::read_dir("/dev/shm")
        .expect("/dev/shm is there")
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().contains(&run))
        .collect();
    assert!(handed_over.is_empty(), "{handed_over:?}");
    // Images and the proxy's program are older than the job.
    let older = ["images", "proxy"];
    let mut found = found_below(host.home(), &older, &needles);
    host.in_vm(&run, "touch /tmp/go");
    job.wait().expect_exit(0);
    let log = host.log(&run);
    assert!(log.contains(&format!("TOKEN={placeholder}")), "{log}");
    found.extend(found_below(host.home(), &older, &needles));
    assert!(found.is_empty(), "{found:?}");

    let arrived = world.arrived();
    let [secret, other, plain] = &arrived[..] else {
        panic!("three requests arrive: {arrived:?}");
    };
    assert_eq!(
        secret["headers"]["authorization"],
        format!("Bearer {value}")
    );
    let path = secret["path"].as_str().unwrap_or_default();
    let in_query = [value.to_owned(), value.replace('/', "%2F")];
    assert!(
        in_query.iter().any(|one| *path == format!("/q?key={one}")),
        "{path}"
    );
    for one in [other, plain] {
        assert_eq!(
            one["headers"]["authorization"],
            format!("Bearer {placeholder}")
        );
    }
    host.network_log(&run)
        .one(&[("type", json!("http")), ("host", json!("www.example.com"))]);
    host.finish();
    world.finish();
}
