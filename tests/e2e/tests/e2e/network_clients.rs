//! Programs that fetch things, from inside VMs, through the proxy.

use std::fs;

use e2e::{Host, NetworkLog, World, has_wheels};
use serde_json::json;

/// The line of a successful request.
fn fetched(network: &NetworkLog, url: &str) {
    network.one(&[
        ("type", json!("http")),
        ("action", json!("ALLOW")),
        ("url", json!(url)),
        ("status", json!(200)),
        ("error", json!(null)),
    ]);
}

/// Both images have these.
const COMMON: &str = "
curl -sS --http1.1 -w 'curl %{http_version} %{http_code}\\n' https://www.example.com/curl-1
curl -sS --http2 -w 'curl %{http_version} %{http_code}\\n' https://www.example.com/curl-2
git clone --quiet https://git.example.com/repository.git /tmp/clone && echo git $(cat /tmp/clone/README)
python3 -c 'import urllib.request as u; print(\"urllib\", u.urlopen(\"https://www.example.com/urllib\").read().decode())'
";
const COMMON_SAYS: &[&str] = &[
    "curl 1.1 200\n",
    "curl 2 200\n",
    "git cloned over https\n",
    "urllib hello from the world\n",
];
const COMMON_URLS: &[&str] = &[
    "https://www.example.com/curl-1",
    "https://www.example.com/curl-2",
    "https://git.example.com/repository.git/info/refs?service=git-upload-pack",
    "https://git.example.com/repository.git/git-upload-pack",
    "https://www.example.com/urllib",
];

#[test]
fn curl_git_and_python_work_through_the_proxy() {
    let Some(mut world) = World::new() else {
        return;
    };
    world.serve_services();
    let Some(host) = Host::new().world(&world).start() else {
        return;
    };
    let outcome = host.submit(COMMON).run();
    outcome.expect_exit(0);
    let log = host.log(&outcome.run_id());
    let network = host.network_log(&outcome.run_id());
    for wanted in COMMON_SAYS {
        assert!(log.contains(wanted), "{wanted} in {log}");
    }
    for url in COMMON_URLS {
        fetched(&network, url);
    }
    host.finish();
    world.finish();
}

/// What only the full image has. Packages come from registries of the world, and are used. `cargo vendor` is the one
/// command of cargo's that fetches without a compiler, which the image lacks as it lacks cargo: the job fetches it.
const PACKAGES: &str = r#"
set -x
pip install --quiet --disable-pip-version-check --index-url https://wheels.example.com/simple --target /tmp/python requests
PYTHONPATH=/tmp/python python3 -c 'import requests as r; print("requests", r.__version__, r.get("https://www.example.com/requests").text)'
mkdir /tmp/node && cd /tmp/node
npm install --no-audit --no-fund --registry https://npm.example.com e2e-greeting && node -p '"npm " + require("e2e-greeting")'
node -e 'fetch("https://www.example.com/node").then(r => r.text()).then(t => console.log("fetch", t))'
mkdir -p /tmp/rust/src && cd /tmp/rust && touch src/lib.rs
curl -sS -o /tmp/cargo https://crates.example.com/cargo && chmod +x /tmp/cargo
cat > Cargo.toml <<END
[package]
name = "job"
version = "0.1.0"
edition = "2021"
[dependencies]
e2e-greeting = { version = "1", registry = "world" }
END
CARGO_REGISTRIES_WORLD_INDEX=sparse+https://crates.example.com/index/ /tmp/cargo vendor > /dev/null && echo cargo $(cat vendor/e2e-greeting/src/lib.rs)
wget -q -O - https://www.example.com/wget | sed 's/^/wget /'
"#;

#[test]
fn every_package_manager_of_the_full_image_works_through_the_proxy() {
    if !has_wheels() {
        return;
    }
    let Some(mut world) = World::new() else {
        return;
    };
    world.serve_services();
    let Some(host) = Host::new().profile("vm0/default").world(&world).start() else {
        return;
    };
    let outcome = host
        .submit(&format!("{COMMON}{PACKAGES}"))
        .spawn()
        .wait_within(2 * e2e::LONG);
    outcome.expect_exit(0);
    let log = host.log(&outcome.run_id());
    let network = host.network_log(&outcome.run_id());
    let packages = [
        "requests 2.34.2 hello from the world\n",
        "npm a package of the registry\n",
        "fetch hello from the world\n",
        "cargo //! A crate of the registry.\n",
        "wget hello from the world\n",
    ];
    for wanted in COMMON_SAYS.iter().chain(&packages) {
        assert!(
            log.contains(wanted),
            "{wanted} in {log}\n{}",
            network.text()
        );
    }
    let urls = [
        "https://wheels.example.com/simple/requests/",
        "https://www.example.com/requests",
        "https://npm.example.com/e2e-greeting",
        "https://npm.example.com/e2e-greeting/-/e2e-greeting-1.0.0.tgz",
        "https://www.example.com/node",
        "https://crates.example.com/index/config.json",
        "https://crates.example.com/index/e2/e-/e2e-greeting",
        "https://crates.example.com/dl/e2e-greeting/1.0.0/download",
        "https://crates.example.com/cargo",
        "https://www.example.com/wget",
    ];
    for url in COMMON_URLS.iter().chain(&urls) {
        fetched(&network, url);
    }
    host.finish();
    world.finish();
}

/// What a client of the guest says about a server whose authority the proxy does not know.
const STRANGER: &str = "
for version in http1.1 http2; do
    curl -sS --$version -w \"\\n$version: spoke %{http_version}, code %{http_code}, exit %{exitcode}\\n\" https://unknown.example.net/$version
done";

#[test]
fn an_emptied_trust_is_answered_502_over_both_versions_and_doctor_names_it() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new().world(&world).prepare() else {
        return;
    };
    // Even the authority that the host's own list would hold is a stranger then.
    let stranger = |name: &str| STRANGER.replace("unknown.example.net", name);
    let yaml = fs::read_to_string(host.config()).unwrap();
    let line = yaml
        .lines()
        .find(|line| line.contains("ssl_verify_upstream_trusted_ca"))
        .unwrap();
    let emptied = yaml.replace(line, "  ssl_verify_upstream_trusted_ca: \"\"");
    fs::write(host.config(), emptied).unwrap();
    host.start_runner();
    let outcome = host.submit(&stranger("www.example.com")).run();
    outcome.expect_exit(0);
    let log = host.log(&outcome.run_id());
    let network = host.network_log(&outcome.run_id());
    for (version, spoken) in [("http1.1", "1.1"), ("http2", "2")] {
        // An answer that explains itself: curl has no reason to fail.
        let wanted = format!("{version}: spoke {spoken}, code 502, exit 0\n");
        assert!(log.contains(&wanted), "{log}");
        let url = format!("https://www.example.com/{version}");
        let line = network.one(&[("url", json!(url)), ("status", json!(null))]);
        let error = line["error"].as_str().unwrap_or_default();
        assert!(
            error.contains("unable to get local issuer certificate"),
            "{line}"
        );
    }
    assert_eq!(
        log.matches("unable to get local issuer certificate")
            .count(),
        2,
        "{log}"
    );
    let doctor = host.runner(&["doctor", "--json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let found = report["checks"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|one| one["name"] == "upstream trust");
    let found = found.unwrap_or_else(|| panic!("no such check in {report}"));
    assert_eq!(found["status"], "WARN", "{found}");
    for words in ["ssl_verify_upstream_trusted_ca is empty", "502"] {
        assert!(found.to_string().contains(words), "{found}");
    }
    host.stop();

    // With that authority in the list it passes, over both.
    fs::write(host.config(), yaml).unwrap();
    host.start_runner();
    let outcome = host.submit(&stranger("www.example.com")).run();
    outcome.expect_exit(0);
    let log = host.log(&outcome.run_id());
    for (version, spoken) in [("http1.1", "1.1"), ("http2", "2")] {
        let wanted = format!("{version}: spoke {spoken}, code 200, exit 0\n");
        assert!(log.contains(&wanted), "{log}");
    }
    host.finish();
    world.finish();
}
