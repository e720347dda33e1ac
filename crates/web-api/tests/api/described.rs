//! The API against its own description, by property: schemathesis makes requests out of the description, valid ones and
//! others, and holds every answer against it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use api_types::RunId;
use api_types::runner::ExecutionContext;
use serde_json::json;

use crate::nats::Kind;
use crate::replica::World;
use crate::world;

/// What is made up is made from this number; `VM0_TEST_SEED` has another.
const SEED: &str = "1";
/// Requests made up for an operation in each phase.
const EXAMPLES: &str = "25";
/// Who has claimed the runs.
const RUNNER: &str = "6f1c2f0e-3a7b-4c1d-9e55-0a1b2c3d4e5f";

/// The program, or why there is none.
fn program() -> Result<PathBuf, String> {
    match std::env::var_os("VM0_TEST_SCHEMATHESIS").map(PathBuf::from) {
        Some(path) if path.is_file() => Ok(path),
        Some(path) => Err(format!(
            "VM0_TEST_SCHEMATHESIS names {}, which is no file",
            path.display()
        )),
        None => {
            Err("VM0_TEST_SCHEMATHESIS names no schemathesis (scripts/test.sh does)".to_owned())
        }
    }
}

/// What a valid request may be answered with.
const USUAL: &str = r#""2xx", "401", "403", "404", "409", "429""#;
/// Where requests are made meaningful.
const HOOKS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/schemathesis/hooks.py");

/// Runs that requests can be about.
struct Runs {
    /// Claimed, for as long as the test takes.
    running: ExecutionContext,
    /// Claimed, to be completed and released by whoever comes.
    complete: ExecutionContext,
    release: ExecutionContext,
    /// Answered.
    done: ExecutionContext,
    /// Waits to be claimed.
    queued: RunId,
}

/// Who asks for what, about which run, and what a valid request may be answered with beside what it usually may.
fn config(world: &World, runs: &Runs) -> String {
    let mut text = String::new();
    for (scheme, token) in [
        ("apiKey", &world.client),
        ("operatorKey", &world.operator),
        ("runnerToken", &world.runner),
        ("sandboxToken", &runs.running.sandbox_token),
    ] {
        let _ = writeln!(text, "[auth.openapi.{scheme}]\nbearer = \"{token}\"");
    }
    for (path, run) in [
        // Feeds of a run that is done have an end.
        ("/api/runs/{run}/events", &runs.done),
        ("/api/runs/{run}/output", &runs.done),
        ("/api/runs/{run}/logs", &runs.done),
        ("/api/runs/{run}/network-log", &runs.done),
        ("/api/runs/{run}", &runs.done),
        ("/api/runs/{run}/input", &runs.running),
    ] {
        let run = run.run_id;
        let _ = writeln!(
            text,
            "[[operations]]\ninclude-path = \"{path}\"\nparameters = {{ run = \"{run}\" }}"
        );
    }
    let running = runs.running.run_id;
    for (path, run, status) in [
        // Schemathesis asks for no WebSocket.
        ("/api/runners/connect", None, 426),
        ("/api/runs/{run}/exec", Some(running), 426),
        // What members have to do with each other no schema can say.
        ("/api/runs", None, 422),
        ("/api/runs/{run}/policy", Some(running), 422),
        ("/api/webhooks/agent/events", None, 422),
    ] {
        let run = run.map_or(String::new(), |run| {
            format!("parameters = {{ run = \"{run}\" }}\n")
        });
        let _ = writeln!(
            text,
            "[[operations]]\ninclude-path = \"{path}\"\n{run}checks.positive_data_acceptance.expected-statuses = [{USUAL}, \"{status}\"]"
        );
    }
    let _ = writeln!(
        text,
        "[[operations]]\ninclude-path = \"/api/policies/{{org}}/{{name}}\"\n\
         parameters = {{ org = \"vm0\", name = \"demo\" }}\n\
         checks.positive_data_acceptance.expected-statuses = [{USUAL}, \"422\"]"
    );
    text
}

fn schemathesis(program: &Path, directory: &Path, url: &str, runs: &Runs) -> Output {
    let seed = std::env::var("VM0_TEST_SEED").unwrap_or_else(|_| SEED.to_owned());
    Command::new(program)
        .current_dir(directory)
        .args(["--config-file", "schemathesis.toml", "run"])
        .args(["--checks", "all", "--mode", "all"])
        .args(["--max-examples", EXAMPLES, "--seed", &seed])
        .args(["--request-timeout", "20", "--continue-on-failure"])
        .args(["--suppress-health-check", "all", "--no-color"])
        .arg(format!("{url}/openapi.json"))
        .env("SCHEMATHESIS_HOOKS", HOOKS)
        .env("VM0_RUNNER_ID", RUNNER)
        .env("VM0_RUN_RUNNING", runs.running.run_id.to_string())
        .env("VM0_RUN_QUEUED", runs.queued.to_string())
        .env("VM0_RUN_COMPLETE", runs.complete.run_id.to_string())
        .env("VM0_RUN_RELEASE", runs.release.run_id.to_string())
        .output()
        .expect("it starts")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_is_as_the_description_says() {
    let program = match program() {
        Ok(program) => program,
        Err(reason) => return crate::skip(&reason),
    };
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.process(&["--lease-secs", "3600", "--max-wait-secs", "1"]);
    let (client, operator) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let runner = RUNNER.parse().unwrap();
    let mut claims = Vec::new();
    for _ in 0..4 {
        let run = client.create(json!({"acceptsInput": true})).await.run_id;
        claims.push(operator.claim(runner, run).await);
    }
    let [running, complete, release, done] = claims.try_into().unwrap();
    assert!(running.epoch == 1 && release.epoch == 1, "as the hooks say");
    let ended = operator.complete(runner, done.run_id, done.epoch).await;
    assert!(ended.status.is_success(), "{ended:?}");
    let runs = Runs {
        running,
        complete,
        release,
        done,
        queued: client.create(json!({})).await.run_id,
    };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("schemathesis.toml");
    std::fs::write(file, config(&world, &runs)).unwrap();
    let output = schemathesis(&program, directory.path(), &replica.url, &runs);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    // Every operation was reached: no credential was refused everywhere.
    assert!(!said.contains("Authentication failed"), "{said}");
    println!("{said}");
    replica.kill();
}
