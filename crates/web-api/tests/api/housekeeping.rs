//! What has had its time goes, and nothing else.

use std::time::Duration;

use api_types::client::{Run, RunState};
use api_types::{ProblemKind, RunnerId};
use reqwest::StatusCode;
use serde_json::json;
use web_api::service::Config;

use crate::nats::Kind;
use crate::replica::{Api, eventually};
use crate::world;

#[tokio::test(flavor = "multi_thread")]
async fn finished_runs_go_after_their_time_with_all_that_was_kept_of_them() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let config = Config {
        run_retention: Duration::from_secs(3600),
        housekeeping: Duration::from_millis(100),
        ..Config::default()
    };
    let replica = world.replica(config).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let me = RunnerId::random();
    // One small, one whose specification is a blob.
    let mut finished = Vec::new();
    for prompt in ["true".to_owned(), "x".repeat(700 << 10)] {
        let id = client.create(json!({"prompt": prompt})).await.run_id;
        let token = runner.claim(me, id).await.sandbox_token;
        let events = json!({"runId": id, "events": [{"sequenceNumber": 0, "type": "assistant"}]});
        let said = Api::new(&replica.url, &token)
            .post("/api/webhooks/agent/events", events)
            .await;
        assert_eq!(said.status, StatusCode::OK, "{said:?}");
        runner.complete(me, id, 1).await.ok::<Run>();
        finished.push(id);
    }
    let waits = client.create(json!({})).await.run_id;
    let runs = client.create(json!({})).await.run_id;
    runner.claim(me, runs).await;
    let engine = &replica.service.engine;
    let (mut entries, mut specs) = (Vec::new(), 0);
    for id in &finished {
        let (entry, _) = engine.run(*id).await.unwrap().unwrap();
        specs += usize::from(engine.spec(&entry).await.is_ok());
        entries.push(entry);
    }
    assert_eq!(specs, 2, "before their time they are whole");

    replica.clock.set_offset(3600 * 1000 + 60_000);
    for (id, entry) in finished.iter().zip(&entries) {
        eventually("the finished run is gone", || async {
            let answer = client.get(&format!("/api/runs/{id}")).await;
            answer.status == StatusCode::NOT_FOUND
        })
        .await;
        engine.spec(entry).await.unwrap_err();
        let events = client.get(&format!("/api/runs/{id}/events")).await;
        assert_eq!(events.problem(), ProblemKind::NotFound);
    }
    eventually("the list forgets them, too", || async {
        let list = client.get("/api/runs").await;
        list.body["runs"].as_array().unwrap().len() == 2
    })
    .await;
    assert_eq!(client.run(waits).await.state, RunState::Queued);
    assert_eq!(client.run(runs).await.state, RunState::Running);
}
