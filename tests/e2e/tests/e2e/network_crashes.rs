//! The network when something dies, and between two jobs.

use e2e::{Host, LONG, Proc, World, eventually};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Whether something arrived at a path.
fn arrived(world: &World, path: &str) -> bool {
    world.arrived().iter().any(|one| one["path"] == path)
}

/// Whether the world noticed the end of a download.
fn ended(world: &World, path: &str) -> bool {
    let lines = world.arrived();
    lines
        .iter()
        .any(|one| one["path"] == path && one["ended"] == true)
}

fn proxy(host: &Host) -> Proc {
    let mut found = host.proxies();
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

#[test]
fn a_killed_proxy_is_started_again_and_the_job_goes_on() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new().world(&world).start() else {
        return;
    };
    // An attempt while the proxy is down is refused, and tried again.
    let prompt = "
        web() { until curl -sSf https://www.example.com/$1; do sleep 0.2; done; }
        web one; touch /tmp/one; until [ -e /tmp/idle ]; do sleep 0.1; done
        web two
        curl -sS https://www.example.com/slow > /dev/null; echo slow=$?
        web three";
    let job = host.submit(prompt).allow("www.example.com").spawn();
    let run = job.running();
    host.in_vm(&run, "until [ -e /tmp/one ]; do sleep 0.1; done");
    let first = proxy(&host);
    first.kill();
    assert!(first.ends_within(LONG));
    host.in_vm(&run, "touch /tmp/idle");
    eventually("the download runs", LONG, || arrived(&world, "/slow"));
    let second = proxy(&host);
    assert_ne!(first.pid, second.pid);
    second.kill();
    job.wait().expect_exit(0);
    let log = host.log(&run);
    assert!(log.contains("slow=") && !log.contains("slow=0"), "{log}");
    assert_eq!(log.matches("hello from the world").count(), 3, "{log}");
    for path in ["/one", "/two", "/three"] {
        assert!(arrived(&world, path), "{path}");
        // What the dead proxy had not yet told is lost; what came before and after is not.
        let url = format!("https://www.example.com{path}");
        host.network_log(&run)
            .one(&[("url", json!(url)), ("action", json!("ALLOW"))]);
    }
    let told = host.daemon_log_text();
    let listens: Vec<&str> = told
        .lines()
        .filter_map(|line| line.split_once("the proxy listens").map(|(_, rest)| rest))
        .collect();
    assert_eq!(listens.len(), 3, "{told}");
    assert!(
        listens.iter().all(|rest| *rest == listens[0]),
        "{listens:?}"
    );
    let last = proxy(&host);
    host.finish();
    assert!(last.ends_within(LONG), "the proxy ends with its runner");
    world.finish();
}

#[test]
fn a_proxy_that_hangs_is_ended_and_started_again() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new().world(&world).start() else {
        return;
    };
    let prompt = "
        until [ -e /tmp/go ]; do sleep 0.2; done
        until curl -sSf --max-time 5 https://www.example.com/after; do sleep 0.5; done";
    let job = host.submit(prompt).allow("www.example.com").spawn();
    let run = job.running();
    let first = proxy(&host);
    first.signal(Signal::STOP);
    host.in_vm(&run, "touch /tmp/go");
    // Nobody but the runner ends it: it is asked every few seconds, and has half a minute to answer.
    assert!(first.ends_within(LONG));
    job.wait().expect_exit(0);
    assert!(arrived(&world, "/after"));
    let told = host.daemon_log_text();
    assert!(told.contains("it did not answer within 30 s"), "{told}");
    host.finish();
    world.finish();
}

#[test]
fn a_session_s_next_job_has_nothing_of_the_job_before() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new().world(&world).start() else {
        return;
    };
    // What stays behind: a download, a connection past the proxy, and a script that tries again and again.
    let first = r#"
        touch /tmp/first
        cat > /tmp/hold.py <<'END'
import socket, time
s = socket.create_connection(("tcp.example.com", 9000))
open("/tmp/held", "w").close()
while True:
    s.sendall(b"x" * 10)
    s.recv(10)
    time.sleep(0.05)
END
        setsid python3 /tmp/hold.py > /dev/null 2>&1 < /dev/null &
        setsid sh -c 'while :; do curl -s https://www.example.com/slow; sleep 0.3; done' > /dev/null 2>&1 < /dev/null &
        until [ -e /tmp/held ]; do sleep 0.1; done
        until [ -e /tmp/go ]; do sleep 0.1; done"#;
    let job = host
        .submit(first)
        .session("s1")
        .allow("www.example.com")
        .allow("tcp.example.com:9000")
        .spawn();
    let run = job.running();
    eventually("the download runs", LONG, || arrived(&world, "/slow"));
    host.in_vm(
        &run,
        "until [ -e /tmp/held ]; do sleep 0.1; done; touch /tmp/go",
    );
    job.wait().expect_exit(0);
    eventually("the download has ended", LONG, || ended(&world, "/slow"));
    let before = world.arrived();

    let prompt = "
        [ -e /tmp/first ] && echo same VM
        curl -sS https://api.example.com/second; curl -sS https://www.example.com/; echo www=$?
        sleep 1";
    let outcome = host
        .submit(prompt)
        .session("s1")
        .allow("api.example.com")
        .run();
    outcome.expect_exit(0);
    let second = outcome.run_id();
    let log = host.log(&second);
    assert!(log.contains("same VM\n"), "{log}");
    assert!(log.contains("www=6"), "{log}");
    let network = host.network_log(&second);
    network.one(&[
        ("url", json!("https://api.example.com/second")),
        ("action", json!("ALLOW")),
    ]);
    for name in ["www.example.com", "tcp.example.com"] {
        let passed = network.with(&[("host", json!(name)), ("action", json!("ALLOW"))]);
        assert!(passed.is_empty(), "{passed:?}");
    }
    let since: Vec<Value> = world.arrived().split_off(before.len());
    // Neither another request nor another byte past the proxy, though whoever sends them lives on in the VM.
    let paths: Vec<&Value> = since.iter().map(|one| &one["path"]).collect();
    assert_eq!(paths, ["/second"], "{since:?}");
    // The first job's log is its own, and was complete.
    let network = host.network_log(&run);
    network.one(&[
        ("type", json!("tcp")),
        ("port", json!(9000)),
        ("action", json!("ALLOW")),
    ]);
    network.one(&[
        ("url", json!("https://www.example.com/slow")),
        ("action", json!("ALLOW")),
    ]);
    assert!(!network.text().contains("api.example.com"));
    host.finish();
    world.finish();
}

#[test]
fn a_killed_runner_leaves_no_link_and_no_process_and_the_next_clears_its_table() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new().world(&world).start() else {
        return;
    };
    let job = host.submit("curl -sS https://www.example.com/slow").spawn();
    job.running();
    eventually("the download runs", LONG, || arrived(&world, "/slow"));
    assert_eq!((world.hub_links().len(), world.hub_tables().len()), (1, 1));
    let proxy = proxy(&host);
    host.kill_daemon();
    assert!(proxy.ends_within(LONG), "the proxy outlives its runner");
    eventually("the hub's link is gone", LONG, || {
        world.hub_links().is_empty()
    });
    host.start_runner();
    job.wait().expect_error(&["stopped while"]);
    assert_eq!((world.hub_links().len(), world.hub_tables().len()), (1, 1));
    let outcome = host.submit("curl -sSf https://www.example.com/again").run();
    outcome.expect_exit(0);
    host.finish();
    world.finish();
}

/// Two runners in one namespace; `beside`: in one run directory too, as on a real host.
fn two_runners(beside: bool) {
    let Some(world) = World::new() else { return };
    let Some(one) = Host::new().world(&world).start() else {
        return;
    };
    let builder = Host::new().name("other").world(&world);
    let builder = if beside {
        builder.beside(&one)
    } else {
        builder
    };
    let Some(other) = builder.start() else { return };
    assert_eq!((world.hub_links().len(), world.hub_tables().len()), (2, 2));
    let first = one.submit("curl -sSf https://www.example.com/one").spawn();
    let second = other
        .submit("curl -sSf https://www.example.com/other")
        .allow("www.example.com")
        .run();
    second.expect_exit(0);
    let first = first.wait();
    first.expect_exit(0);
    for (host, outcome, path) in [(&one, &first, "/one"), (&other, &second, "/other")] {
        assert!(arrived(&world, path));
        let network = host.network_log(&outcome.run_id());
        let requests = network.with(&[("type", json!("http"))]);
        assert_eq!(requests.len(), 1, "{}", network.text());
    }
    one.finish();
    let outcome = other
        .submit("curl -sSf https://www.example.com/still")
        .run();
    outcome.expect_exit(0);
    // Neither in its life nor at its end has the one ended the other's proxy.
    let told = other.daemon_log_text();
    assert_eq!(told.matches("the proxy listens").count(), 1, "{told}");
    other.finish();
    world.finish();
}

#[test]
fn two_runners_of_one_host_have_a_hub_each_and_do_not_disturb_each_other() {
    two_runners(true);
}

#[test]
fn two_run_directories_of_one_host_do_not_disturb_each_other() {
    two_runners(false);
}
