//! What Prometheus gets of a runner, asked of a real Prometheus. Each test has a world of its own, and every port in it.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use e2e::{Host, LONG, World, eventually, skip};
use serde_json::Value;

/// Where runners serve their metrics.
const RUNNER: &str = "127.0.0.1:9464";
/// Where Prometheus listens.
const PROMETHEUS: &str = "127.0.0.1:9090";

fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .unwrap()
}

/// A Prometheus of the test's own; it ends with it.
struct Prometheus<'w> {
    world: &'w World,
    child: Child,
    directory: tempfile::TempDir,
}

impl<'w> Prometheus<'w> {
    fn start(world: &'w World) -> Option<Self> {
        let version = Command::new("prometheus").arg("--version").output();
        if !version.is_ok_and(|output| output.status.success()) {
            skip("prometheus is not installed (apt-get install prometheus)");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let rules = top().join("deploy/prometheus/runners.rules.yml");
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{}']\nscrape_configs:\n  \
             - job_name: vm0-runner\n    static_configs: [{{targets: ['{RUNNER}']}}]\n",
            rules.display()
        );
        let file = directory.path().join("prometheus.yml");
        fs::write(&file, config).unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let child = world
            .on_host("setpriv")
            .args(["--pdeathsig", "KILL", "--", "prometheus"])
            .arg(format!("--config.file={}", file.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                directory.path().join("data").display()
            ))
            .arg(format!("--web.listen-address={PROMETHEUS}"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Some(Self {
            world,
            child,
            directory,
        })
    }

    /// What a query answers now; nothing while Prometheus does not.
    fn query(&self, expression: &str) -> Vec<Value> {
        let url = format!("http://{PROMETHEUS}/api/v1/query");
        let query = format!("query={expression}");
        let mut curl = self.world.on_host("curl");
        let output = curl
            .args(["-fsS", "--get", &url, "--data-urlencode", &query])
            .output()
            .unwrap();
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        answer["data"]["result"]
            .as_array()
            .cloned()
            .unwrap_or_default()
    }

    fn rules(&self) -> Vec<Value> {
        let url = format!("http://{PROMETHEUS}/api/v1/rules");
        let mut curl = self.world.on_host("curl");
        let output = curl.args(["-fsS", &url]).output().unwrap();
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let rules = answer["data"]["groups"][0]["rules"].as_array();
        rules.cloned().unwrap_or_default()
    }
}

impl Drop for Prometheus<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.directory.path().join("log"));
            eprintln!("prometheus: {}", log.unwrap_or_default());
        }
        // It has no state that anybody wants.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_real_prometheus_finds_data_for_every_panel_and_accepts_the_alerts() {
    let Some(world) = World::new() else { return };
    let Some(prometheus) = Prometheus::start(&world) else {
        return;
    };
    let Some(host) = Host::new()
        .world(&world)
        .option("metrics", format!("{{listen: '{RUNNER}'}}"))
        .start()
    else {
        return;
    };
    host.submit("exit 0").run().expect_exit(0);
    host.submit("exit 3").run().expect_exit(3);
    // An address that is closed to VMs, and a name that the policy denies.
    host.submit("curl -m 5 -s http://10.0.0.1:22/; curl -s https://other.example.org/; true")
        .allow("www.example.com")
        .run()
        .expect_exit(0);
    let count = |expression: &str| {
        let result = prometheus.query(expression);
        result
            .first()
            .and_then(|one| one["value"][1].as_str()?.parse::<f64>().ok())
    };
    for (expression, value) in [
        ("vm0_runner_jobs_total{result=\"ok\"}", 2.0),
        ("vm0_runner_jobs_total{result=\"failed\"}", 1.0),
        ("vm0_runner_vm_starts_total{source=\"restored\"}", 3.0),
        ("vm0_runner_job_phase_seconds_count{phase=\"running\"}", 3.0),
        (
            "vm0_runner_job_phase_seconds_count{phase=\"finishing\"}",
            3.0,
        ),
        ("vm0_runner_proxy_up", 1.0),
        ("vm0_runner_mode{mode=\"running\"}", 1.0),
        ("vm0_runner_jobs_waiting", 0.0),
    ] {
        eventually(&format!("{expression} is {value}"), LONG, || {
            count(expression) == Some(value)
        });
    }
    let denied = "sum(vm0_runner_network_events_total{action=\"deny\"})";
    eventually("refusals are counted", LONG, || {
        count(denied).is_some_and(|n| n >= 2.0)
    });

    // What stands above was seen by Prometheus, so this is an increase to it: a rate needs one.
    host.submit("exit 0").run().expect_exit(0);
    let dashboard = fs::read(top().join("deploy/grafana/runners.json")).unwrap();
    let dashboard: Value = serde_json::from_slice(&dashboard).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels
        .iter()
        .flat_map(|panel| panel["targets"].as_array().unwrap());
    let expressions: Vec<&str> = targets
        .map(|target| target["expr"].as_str().unwrap())
        .collect();
    assert!(expressions.len() >= 10);
    for expression in expressions {
        eventually(&format!("{expression} has data"), LONG, || {
            let result = prometheus.query(expression);
            // A quantile of nothing is NaN, which no panel draws.
            result.iter().any(|one| one["value"][1] != "NaN")
        });
    }
    let rules = prometheus.rules();
    assert!(rules.len() >= 6, "{rules:#?}");
    eventually("every rule has been evaluated", LONG, || {
        prometheus.rules().iter().all(|rule| rule["health"] == "ok")
    });
    host.finish();
}

#[test]
fn metrics_are_served_where_the_configuration_says_and_logs_are_json_when_asked() {
    let Some(world) = World::new() else { return };
    let Some(host) = Host::new()
        .world(&world)
        .option("metrics", format!("{{listen: '{RUNNER}'}}"))
        .prepare()
    else {
        return;
    };
    let mut command = host.start_command();
    command.args(["--log-format", "json"]);
    host.start_runner_with(command);
    let get = |path: &str, more: &[&str]| {
        let url = format!("http://{RUNNER}{path}");
        let mut curl = world.on_host("curl");
        let output = curl.args(["-sSi", &url]).args(more).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let answer = get("/metrics", &[]);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(
        answer.contains("application/openmetrics-text; version=1.0.0"),
        "{answer}"
    );
    assert!(answer.ends_with("# EOF\n"), "{answer}");
    assert!(get("/", &[]).starts_with("HTTP/1.1 404"));
    assert!(get("/metrics", &["-X", "POST"]).starts_with("HTTP/1.1 405"));
    let log = host.daemon_log_text();
    let lines: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    assert!(lines.iter().any(|line| line["message"] == "ready"), "{log}");
    // A second runner cannot have the address.
    let other = Host::new()
        .name("other")
        .beside(&host)
        .world(&world)
        .option("metrics", format!("{{listen: '{RUNNER}'}}"))
        .prepare()
        .unwrap();
    assert!(!other.try_start_runner());
    assert!(other.daemon_log_text().contains("metrics.listen"));
    other.finish();
    host.finish();
}
