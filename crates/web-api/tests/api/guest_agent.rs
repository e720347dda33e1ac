//! The real guest agent with the mock CLI, reporting to a real replica over real NATS.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use api_types::runner::ExecutionContext;
use api_types::{RunId, RunnerId};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;
use web_api::service::Config;

use crate::nats::Kind;
use crate::replica::{Api, eventually, read_events};
use crate::world;

/// Agent and mock, built from the same tree.
fn programs() -> &'static Path {
    static PROGRAMS: OnceLock<PathBuf> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        let server = Path::new(env!("CARGO_BIN_EXE_vm0-api"));
        let directory = server.parent().unwrap();
        let mut build = std::process::Command::new(env!("CARGO"));
        build
            .args(["build", "--quiet", "--package", "guest-agent"])
            .args(["--package", "guest-mock-claude", "--target-dir"])
            .arg(directory.parent().unwrap());
        if directory.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success());
        directory.to_owned()
    })
}

/// A home of the guest's user.
struct Guest {
    home: tempfile::TempDir,
}

impl Guest {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("bin")).unwrap();
        let mock = programs().join("guest-mock-claude");
        std::os::unix::fs::symlink(mock, home.path().join("bin/claude")).unwrap();
        Self { home }
    }

    fn agent(&self, url: &str, context: &ExecutionContext) -> Command {
        let mut command = Command::new("/usr/bin/setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .arg(programs().join("guest-agent"))
            .env_clear()
            .env(
                "PATH",
                format!("{}/bin:/usr/bin:/bin", self.home.path().display()),
            )
            .env("HOME", self.home.path())
            .env("VM0_RUN_ID", context.run_id.to_string())
            .env("VM0_API_URL", url)
            .env("VM0_API_TOKEN", &context.sandbox_token)
            .env("VM0_WORKING_DIR", self.home.path().join("workspace"))
            .env("VM0_PROMPT", &context.prompt)
            .env("VM0_TELEMETRY_SECS", "0.2")
            .env("VM0_HEARTBEAT_SECS", "0.2")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }
}

async fn output(command: &mut Command) -> Output {
    let ended = tokio::time::timeout(Duration::from_secs(120), command.output());
    ended.await.expect("the agent ends").unwrap()
}

async fn claimed(api: &Api<'_>, runner: &Api<'_>, id: RunnerId, more: Value) -> ExecutionContext {
    let run = api.create(more).await;
    runner.claim(id, run.run_id).await
}

async fn feed(api: &Api<'_>, run: RunId, kind: &str) -> String {
    let response = api.stream(&format!("/api/runs/{run}/{kind}"), None).await;
    response.text().await.unwrap()
}

/// What an agent prints.
fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_reported_whole_and_its_session_goes_on_elsewhere() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let id = RunnerId::random();
    let prompt = "echo first; sleep 1; env | grep VM0_API_TOKEN; cat /proc/$PPID/comm";
    let body = json!({"prompt": prompt, "sessionId": "s-1"});
    // Before a lease runs: this may build the agent.
    let here = Guest::new();
    let context = claimed(&client, &runner, id, body).await;
    let ended = output(
        here.agent(&replica.url, &context)
            .env("VM0_SECRET_VALUES", "Zmlyc3Q="),
    )
    .await;
    let log = text(&ended);
    assert_eq!(ended.status.code(), Some(0), "{log}");
    assert!(log.contains("✓ Checkpoint complete"), "{log}");
    assert!(!log.contains("[API:"), "{log}");
    assert!(!log.contains(&context.sandbox_token), "{log}");

    let run = context.run_id;
    runner.complete(id, run, context.epoch).await;
    let events = read_events(
        client
            .stream(&format!("/api/runs/{run}/events"), None)
            .await,
        100,
    )
    .await;
    let kinds: Vec<_> = events
        .iter()
        .filter_map(|event| {
            Some((
                event.data["event"].get("type")?.as_str()?,
                event.data["event"].get("sequenceNumber")?.as_u64()?,
            ))
        })
        .collect();
    assert_eq!(
        kinds,
        [
            ("system", 0),
            ("assistant", 1),
            ("assistant", 2),
            ("user", 3),
            ("result", 4)
        ]
    );
    // What was to be hidden is hidden in all that was sent, and only there.
    let sent = feed(&client, run, "events").await;
    // Last comes the run, with the client's own words.
    let (sent, _run) = sent.split_once("event: end").unwrap();
    assert!(log.contains("first") && !sent.contains("first"), "{sent}");
    assert!(sent.contains("echo ***"), "{sent}");

    // The next run of the session, on a host that has never seen it.
    let next = claimed(
        &client,
        &runner,
        id,
        json!({"prompt": "echo second", "sessionId": "s-1"}),
    )
    .await;
    let resume = next.resume_session.clone().expect("there is a checkpoint");
    let there = Guest::new();
    // The CLI's working directory is part of where it looks.
    let file = there.home.path().join("history");
    std::fs::write(&file, &resume.session_history).unwrap();
    let mut agent = there.agent(&replica.url, &next);
    agent
        .env("VM0_RESUME_SESSION_ID", &resume.session_id)
        .env("VM0_RESUME_SESSION_FILE", &file);
    let ended = output(&mut agent).await;
    assert_eq!(ended.status.code(), Some(0), "{}", text(&ended));
    runner.complete(id, next.run_id, next.epoch).await;
    let third = claimed(&client, &runner, id, json!({"sessionId": "s-1"})).await;
    let whole = third.resume_session.unwrap();
    assert_eq!(whole.session_id, resume.session_id);
    assert!(whole.session_history.starts_with(&resume.session_history));
    assert!(whole.session_history.contains("echo second"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_opens_nothing_ends_the_agent_before_the_cli() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let id = RunnerId::random();
    let guest = Guest::new();
    let ran = guest.home.path().join("ran");
    let body = json!({"prompt": format!("touch {}", ran.display())});
    let context = claimed(&client, &runner, id, body).await;
    let mut foreign = claimed(&client, &runner, id, json!({})).await;
    // Another run's token.
    foreign.run_id = context.run_id;
    foreign.prompt.clone_from(&context.prompt);
    for context in [&foreign, &{
        runner.complete(id, context.run_id, context.epoch).await;
        context.clone()
    }] {
        let ended = output(&mut guest.agent(&replica.url, context)).await;
        assert_eq!(ended.status.code(), Some(1));
        let reason = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(reason.contains("refuses this run's token"), "{reason}");
        assert!(text(&ended).contains("network connectivity check failed"));
        assert!(!ran.exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_that_dies_under_a_run_holds_nothing_up_and_what_is_lost_is_said() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let process = world.process(&[]);
    let url = process.url.clone();
    let (client, runner) = (world.as_client(&url), world.as_runner(&url));
    let guest = Guest::new();
    let (ready, go) = (
        guest.home.path().join("ready"),
        guest.home.path().join("go"),
    );
    let prompt = format!(
        "touch {}; until test -e {}; do sleep 0.1; done; seq 200000 | tail -c 300000; echo over",
        ready.display(),
        go.display()
    );
    let context = claimed(
        &client,
        &runner,
        RunnerId::random(),
        json!({"prompt": prompt}),
    )
    .await;
    let mut agent = guest.agent(&url, &context);
    agent.env("VM0_API_DEADLINE_SECS", "2");
    let mut agent = agent.spawn().unwrap();
    eventually("the CLI runs", || async { ready.exists() }).await;
    process.kill();
    std::fs::write(&go, "").unwrap();
    let mut lines = BufReader::new(agent.stdout.take().unwrap()).lines();
    let (mut log, mut complete) = (String::new(), None);
    let read = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if line == "✓ Execution complete" {
                complete = Some(Instant::now());
            }
            log.push_str(&line);
            log.push('\n');
        }
        agent.wait().await.unwrap()
    };
    let ended = tokio::time::timeout(Duration::from_secs(120), read).await;
    let status = ended.expect("the agent ends");
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("over\n✓ Execution complete"));
    assert!(log.contains("bytes of log were not sent]"), "{log}");
    // The deadline and the last pieces' two seconds, on a busy machine; well below the 30 seconds of agents that are told
    // no deadline. The CLI's own time counts for nothing.
    let waited = complete.unwrap().elapsed();
    assert!(waited < Duration::from_secs(25), "{waited:?}");
}
