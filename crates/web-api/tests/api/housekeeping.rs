//! What has had its time goes, and nothing else.

use std::time::Duration;

use api_types::client::{Run, RunState};
use api_types::runner::FirewallSecrets;
use api_types::{ProblemKind, RunnerId};
use reqwest::StatusCode;
use serde_json::json;
use web_api::service::Config;
use web_api::tokens::KeyringError;

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

#[tokio::test(flavor = "multi_thread")]
async fn keys_go_when_no_run_is_left_that_may_need_them() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let config = Config {
        run_retention: Duration::from_secs(3600),
        housekeeping: Duration::from_millis(100),
        ..Config::default()
    };
    let day = 24 * 3600 * 1000;
    let secret =
        json!({"secrets": [{"name": "KEY", "value": "hunter22", "hosts": ["api.example.com"]}]});
    let replica = world.replica(config).await;
    let runner = world.as_runner(&replica.url);
    let client = world.as_client(&replica.url);
    let keys = &replica.service.engine.keys;
    let keyring = &replica.service.keyring;
    let me = RunnerId::random();
    let gone = async |run| {
        let answer = client.get(&format!("/api/runs/{run}")).await;
        answer.status == StatusCode::NOT_FOUND
    };
    let signer = |token: &str| {
        let header = jsonwebtoken::decode_header(token).unwrap();
        format!("sign.{}", header.kid.unwrap())
    };
    let secrets = |url: String, id| {
        let runner = Api::new(&url, &world.runner).token;
        async move {
            let ask = json!({"runId": id, "runnerId": me, "epoch": 1});
            let answer = Api::new(&url, &runner)
                .post("/api/webhooks/agent/firewall/auth", ask)
                .await;
            answer.ok::<FirewallSecrets>().secrets[0].value.clone()
        }
    };

    let short = client.create(json!({})).await.run_id;
    let old_token = runner.claim(me, short).await.sandbox_token;
    runner.complete(me, short, 1).await.ok::<Run>();
    let old = client.create(secret.clone()).await.run_id;
    let sealed = keyring.seal("x", b"y").await.unwrap();
    let old_names = [format!("data.{}", sealed.kid), signer(&old_token)];

    // Three days later that run still waits, and others have new keys.
    replica.clock.set_offset(3 * day);
    let new = client.create(secret.clone()).await.run_id;
    runner.claim(me, new).await;
    eventually("the finished run is gone", || gone(short)).await;
    // It is looked for keys once a day, after the runs.
    replica.clock.set_offset(4 * day + 1);
    let passing = client.create(json!({})).await.run_id;
    let new_token = runner.claim(me, passing).await.sandbox_token;
    runner.complete(me, passing, 1).await.ok::<Run>();
    replica.clock.set_offset(4 * day + 2 * 3600 * 1000);
    eventually("the passing run is gone", || gone(passing)).await;
    for name in &old_names {
        assert!(keys.get(name).await.unwrap().is_some(), "{name}");
    }
    runner.claim(me, old).await;
    assert_eq!(secrets(replica.url.clone(), old).await, "hunter22");
    runner.complete(me, old, 1).await.ok::<Run>();

    // The run goes, and with it what only it could need.
    replica.clock.set_offset(6 * day);
    eventually("the old run is gone", || gone(old)).await;
    eventually("its keys are gone", || async {
        let mut there = 0;
        for name in &old_names {
            there += usize::from(keys.get(name).await.unwrap().is_some());
        }
        there == 0
    })
    .await;
    let closed = keyring.open_sealed("x", &sealed).await.unwrap_err();
    assert!(matches!(closed, KeyringError::Sealed), "{closed}");
    let late = Api::new(&replica.url, &old_token)
        .post("/api/webhooks/agent/heartbeat", json!({"runId": short}))
        .await;
    assert_eq!(late.problem(), ProblemKind::Unauthorized);
    // The run that is left has its own, also at a replica that has just started.
    assert!(keys.get(&signer(&new_token)).await.unwrap().is_some());
    let fresh = world.skewed_replica(config, 6 * day).await;
    assert_eq!(secrets(replica.url.clone(), new).await, "hunter22");
    assert_eq!(secrets(fresh.url.clone(), new).await, "hunter22");
}
