//! A runner in a network of its own, whose link to the API is cut.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use api_types::client::{EndReason, Run, RunState};
use api_types::runner::ExecutionContext;
use api_types::{ProblemKind, RunId, RunnerId};
use reqwest::StatusCode;
use serde_json::{Value, json};
use web_api::service::Config;

use crate::nats::{Held, Kind};
use crate::replica::{Answer, eventually};
use crate::{skip, world};

/// A network namespace with a link to this one. It lasts as long as a shell whose standard input is a pipe of ours, and
/// the link lasts as long as it.
struct Island {
    shell: Held,
    link: String,
    ours: String,
}

fn succeed(command: &mut Command) -> Result<(), String> {
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        other => Err(format!("{command:?}: {other:?}")),
    }
}

fn ip(args: &[&str]) -> Result<(), String> {
    succeed(Command::new("ip").args(args))
}

impl Island {
    fn new() -> Result<Self, String> {
        let mut shell = Command::new("unshare");
        shell.args(["--net", "sh", "-c", "echo here && read -r _"]);
        let shell = Held::saying(&mut shell, "here")?
            .ok_or("a network namespace cannot be made: that needs root")?;
        // By the process's id, so that copies of this test do not meet.
        let pid = shell.pid();
        let [_, _, high, low] = (pid << 2).to_be_bytes();
        let address = |last: u8| format!("198.19.{high}.{}", low | last);
        let island = Self {
            shell,
            link: format!("vt{pid}"),
            ours: address(1),
        };
        let pid = pid.to_string();
        let (ours, theirs) = (format!("{}/30", island.ours), format!("{}/30", address(2)));
        let peer = ["type", "veth", "peer", "name", "up0", "netns", &pid];
        ip(&[&["link", "add", &island.link], &peer[..]].concat())?;
        ip(&["address", "add", &ours, "dev", &island.link])?;
        island.joined(true);
        for args in [
            ["address", "add", &theirs, "dev", "up0"].as_slice(),
            ["link", "set", "up0", "up"].as_slice(),
        ] {
            succeed(island.within("ip").args(args))?;
        }
        Ok(island)
    }

    /// Makes or cuts the link.
    fn joined(&self, up: bool) {
        ip(&["link", "set", &self.link, if up { "up" } else { "down" }]).unwrap();
    }

    fn within(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.shell.pid().to_string(), "--net", program])
            .stdin(Stdio::null());
        command
    }

    /// Posts from the island; nothing when there is no answer. Three seconds are for the connection, which the kernel of
    /// the other side takes: where there is one, the answer may take longer.
    async fn post(&self, url: &str, token: &str, body: &Value) -> Option<Answer> {
        let mut command = self.within("curl");
        command
            .args(["--silent", "--noproxy", "*"])
            .args(["--connect-timeout", "3", "--max-time", "20"])
            .args(["--header", &format!("Authorization: Bearer {token}")])
            .args(["--header", "Content-Type: application/json"])
            .args(["--data", &body.to_string()])
            .args(["--write-out", "\n%{http_code}", url]);
        let output = tokio::task::spawn_blocking(move || command.output())
            .await
            .unwrap()
            .expect("curl is there");
        if !output.status.success() {
            return None;
        }
        let text = String::from_utf8(output.stdout).unwrap();
        let (body, status) = text.rsplit_once('\n').unwrap();
        Some(Answer {
            status: StatusCode::from_u16(status.parse().unwrap()).unwrap(),
            body: serde_json::from_str(body).unwrap_or(Value::Null),
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_is_cut_off_keeps_its_runs_for_a_lease_and_is_fenced_after_it() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let island = match Island::new() {
        Ok(island) => island,
        Err(reason) => return skip(&reason),
    };
    let lease = Duration::from_secs(20);
    let replica = world
        .replica(Config {
            lease,
            ..Config::default()
        })
        .await;
    // The same replica, where the island sees it.
    let listener = tokio::net::TcpListener::bind((island.ours.as_str(), 0))
        .await
        .unwrap();
    let there = format!("http://{}", listener.local_addr().unwrap());
    let app = web_api::http::router(Arc::clone(&replica.service));
    let server = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });

    let (client, near) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let (far, other) = (RunnerId::random(), RunnerId::random());
    let job = async |run: RunId, verb: &str, body: Value| {
        let url = format!("{there}/api/runners/jobs/{run}/{verb}");
        island.post(&url, &world.runner, &body).await
    };
    let claim = json!({"runnerId": far, "runnerName": "metal-1", "claimId": RunnerId::random()});
    let mine = json!({"runnerId": far, "epoch": 1});
    let done = json!({"runnerId": far, "epoch": 1, "exitCode": 0});

    // Shorter than a lease: what could not be brought is brought, once, and a claim said again is the same claim.
    let short = client.create(json!({})).await.run_id;
    let first: ExecutionContext = job(short, "claim", claim.clone()).await.unwrap().ok();
    island.joined(false);
    assert!(job(short, "complete", done.clone()).await.is_none());
    assert_eq!(client.run(short).await.state, RunState::Running);
    island.joined(true);
    let again = tokio::time::timeout(lease, async {
        loop {
            if let Some(answer) = job(short, "claim", claim.clone()).await {
                break answer.ok::<ExecutionContext>();
            }
        }
    });
    let again = again.await.expect("the link is back within a lease");
    assert_eq!((first.epoch, again.epoch), (1, 1));
    for _ in 0..2 {
        let ended: Run = job(short, "complete", done.clone()).await.unwrap().ok();
        assert_eq!((ended.state, ended.epoch), (RunState::Done, 1));
    }

    // Longer: its runs are answered or another's, and it is nobody when it comes back.
    let answered = client.create(json!({})).await.run_id;
    let retry = json!({"onRunnerLost": {"do": "retry", "maxAttempts": 2}});
    let retried = client.create(retry).await.run_id;
    for id in [answered, retried] {
        let claimed = job(id, "claim", claim.clone()).await.unwrap();
        assert_eq!(claimed.ok::<ExecutionContext>().epoch, 1);
    }
    island.joined(false);
    assert!(job(retried, "renew", mine.clone()).await.is_none());
    eventually("the run is answered", || async {
        client.run(answered).await.state == RunState::Done
    })
    .await;
    eventually("the other run is offered again", || async {
        let offer = near.poll(other, 1).await;
        offer.is_some_and(|offer| offer.run_id == retried)
    })
    .await;
    assert_eq!(near.claim(other, retried).await.epoch, 2);
    island.joined(true);
    eventually("the runner is back", || async {
        job(retried, "renew", mine.clone()).await.is_some()
    })
    .await;
    for verb in ["renew", "complete"] {
        let late = job(retried, verb, done.clone()).await.unwrap();
        assert!(late.status.is_client_error(), "{verb}: {late:?}");
    }
    let late = job(retried, "complete", done.clone()).await.unwrap();
    assert_eq!(late.problem(), ProblemKind::LeaseLost);
    let late = job(answered, "complete", done).await.unwrap();
    assert!(late.status.is_client_error(), "{late:?}");
    let result = client.run(answered).await.result.unwrap();
    assert_eq!(result.reason, EndReason::RunnerLost);
    let ended: Run = near.complete(other, retried, 2).await.ok();
    assert_eq!((ended.state, ended.epoch), (RunState::Done, 2));
    server.abort();
}
