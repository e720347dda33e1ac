//! NATS's disk is full for real: what was accepted is there when there is space again.

use api_types::client::{Run, RunState};
use api_types::{ProblemKind, RunnerId};
use reqwest::header::RETRY_AFTER;
use reqwest::{Method, StatusCode};
use serde_json::json;
use web_api::service::Config;

use crate::nats::Kind;
use crate::replica::{Api, eventually, run};
use crate::world;

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_new_runs_and_loses_none() {
    let kind = Kind {
        disk: Some("48M"),
        feed_bytes: 4 << 20,
        ..Kind::default()
    };
    let Some(mut world) = world(kind).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let client = Api::new(&replica.url, &world.client);
    let runner = Api::new(&replica.url, &world.runner);
    let prompt = "x".repeat(400 << 10);
    let body = run(json!({"prompt": prompt}));
    let mut accepted = Vec::new();
    let refused = loop {
        let request = client.request(Method::POST, "/api/runs").json(&body);
        let answer = request.send().await.unwrap();
        if answer.status() != StatusCode::CREATED {
            break answer;
        }
        accepted.push(answer.json::<Run>().await.unwrap().run_id);
        assert!(accepted.len() < 1000, "the disk does not fill up");
    };
    assert!(accepted.len() > 20, "{}", accepted.len());
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    let wait: u64 = refused.headers()[RETRY_AFTER]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!(wait >= 1);
    let problem: api_types::Problem = refused.json().await.unwrap();
    assert_eq!(problem.code, ProblemKind::Unavailable);

    // After a write that found no space, NATS 2.15 reads only, space or not, until it is started anew.
    world.nats.resize(0, "512M");
    world.nats.kill(0);
    world.nats.restart(0);
    eventually("the replica is ready again", || async {
        client.get("/readyz").await.status == StatusCode::OK
    })
    .await;
    let me = RunnerId::random();
    for id in accepted {
        assert_eq!(client.run(id).await.state, RunState::Queued);
        assert_eq!(runner.claim(me, id).await.prompt, prompt);
        let done: Run = runner.complete(me, id, 1).await.ok();
        assert_eq!(done.state, RunState::Done);
    }
    client.create(json!({"prompt": prompt})).await;
}
