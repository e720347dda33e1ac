//! What has had its time goes, and nothing else.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::time::Duration;

use api_types::client::{Run, RunState};
use api_types::runner::FirewallSecrets;
use api_types::{ProblemKind, RunId, RunnerId};
use reqwest::StatusCode;
use serde_json::json;
use web_api::service::Config;
use web_api::tokens::{self, KeyringError, SandboxRefusal};

use crate::nats::Kind;
use crate::replica::{Api, World, eventually, open};
use crate::world;

/// Runs are kept for an hour, and it is looked for older ones all the time.
fn hourly() -> Config {
    Config {
        run_retention: Duration::from_secs(3600),
        housekeeping: Duration::from_millis(100),
        ..Config::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn finished_runs_go_after_their_time_with_all_that_was_kept_of_them() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(hourly()).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let me = RunnerId::random();
    let engine = &replica.service.engine;
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
        let checkpoint = json!({"runId": id, "cliAgentType": "claude-code", "cliAgentSessionId": "s",
            "cliAgentSessionHistory": "x".repeat(300 << 10)});
        let said = Api::new(&replica.url, &token)
            .post("/api/webhooks/agent/checkpoints", checkpoint)
            .await;
        assert_eq!(said.status, StatusCode::OK, "{said:?}");
        let policy = json!({"rules": [{"host": "example.com", "action": "deny"}]});
        let set = client.put(&format!("/api/runs/{id}/policy"), policy).await;
        assert_eq!(set.status, StatusCode::OK, "{set:?}");
        runner.complete(me, id, 1).await.ok::<Run>();
        finished.push(id);
    }
    let waits = client.create(json!({})).await.run_id;
    let runs = client.create(json!({})).await.run_id;
    runner.claim(me, runs).await;
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
        let policy = engine.policies.get(&format!("run.{id}")).await.unwrap();
        assert!(policy.is_none());
    }
    assert_eq!(chunks(&world).await, 0, "blobs of runs are gone");
    eventually("the list forgets them, too", || async {
        let list = client.get("/api/runs").await;
        list.body["runs"].as_array().unwrap().len() == 2
    })
    .await;
    assert_eq!(client.run(waits).await.state, RunState::Queued);
    assert_eq!(client.run(runs).await.state, RunState::Running);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_cannot_be_removed_now_is_removed_later_and_keeps_no_other() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(hourly()).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let me = RunnerId::random();
    let mut finished = Vec::new();
    for _ in 0..3 {
        let id = client.create(json!({})).await.run_id;
        runner.claim(me, id).await;
        runner.complete(me, id, 1).await.ok::<Run>();
        finished.push(id);
    }
    let listed = || async {
        let list = client.get("/api/runs?state=done").await;
        let ids = list.body["runs"].as_array().unwrap().iter();
        ids.map(|run| run["runId"].as_str().unwrap().parse().unwrap())
            .collect::<Vec<RunId>>()
    };
    eventually("all are listed as finished", || async {
        listed().await.len() == 3
    })
    .await;
    // The one that is looked at first cannot be read.
    let damaged = finished[0];
    let bucket = replica.service.engine.runs_bucket();
    let whole = bucket.get(&damaged.to_string()).await.unwrap().unwrap();
    let key = damaged.to_string();
    bucket.put(&key, "{".into()).await.unwrap();

    replica.clock.set_offset(3600 * 1000 + 60_000);
    eventually("the others are gone", || async { listed().await.len() < 2 }).await;
    assert_eq!(listed().await, [damaged]);
    bucket.put(&key, whole.value).await.unwrap();
    eventually("it is gone, too", || async {
        bucket.get(&key).await.unwrap().is_none()
    })
    .await;
}

/// Messages of blobs, without their names.
async fn chunks(world: &World) -> usize {
    use futures_util::TryStreamExt as _;
    let stream = blobs(world)
        .await
        .get_stream("OBJ_vm0_blobs")
        .await
        .unwrap();
    let all = stream.info_with_subjects("$O.vm0_blobs.C.>").await.unwrap();
    all.try_fold(0, |sum, (_, count)| async move { Ok(sum + count) })
        .await
        .unwrap()
}

async fn blobs(world: &World) -> async_nats::jetstream::Context {
    async_nats::jetstream::new(world.nats.client().await)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_upload_left_that_broke_off_goes_and_nothing_that_has_a_name() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let engine = open(&world.nats).await;
    let whole = vec![7; 300 << 10];
    engine.put_blob("whole", &whole).await.unwrap();
    engine.put_blob("removed", &whole).await.unwrap();
    engine.remove_blob("removed").await.unwrap();
    engine.remove_blob("never").await.unwrap();
    let there = chunks(&world).await;
    let broken = "$O.vm0_blobs.C.broken";
    let context = blobs(&world).await;
    context
        .publish(broken, "x".into())
        .await
        .unwrap()
        .await
        .unwrap();
    // It may still be on its way.
    let strays = engine.remove_strays(&BTreeSet::new()).await.unwrap();
    assert_eq!(strays, BTreeSet::from([broken.to_owned()]));
    assert_eq!(chunks(&world).await, there + 1);
    let strays = engine.remove_strays(&strays).await.unwrap();
    assert_eq!(strays, BTreeSet::new());
    assert_eq!(chunks(&world).await, there);
    assert_eq!(engine.blob("whole").await.unwrap(), Some(whole));
    assert_eq!(engine.blob("removed").await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_kept_when_its_sender_has_gone_and_goes_after_its_time() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let me = RunnerId::random();
    let session = json!({"sessionId": "s-1"});
    let id = client.create(session.clone()).await.run_id;
    let token = runner.claim(me, id).await.sandbox_token;
    let history = "x".repeat(8 << 20);
    let body = json!({"runId": id, "cliAgentType": "claude-code", "cliAgentSessionId": "s",
        "cliAgentSessionHistory": history})
    .to_string();
    let address = replica.url.strip_prefix("http://").unwrap().to_owned();
    let sender = tokio::task::spawn_blocking(move || {
        let mut stream = std::net::TcpStream::connect(&address).unwrap();
        let head = format!(
            "POST /api/webhooks/agent/checkpoints HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        stream
    });
    let sender = sender.await.unwrap();
    eventually("it is being written", || async { chunks(&world).await > 0 }).await;
    drop(sender);
    let sessions = &replica.service.engine.sessions;
    eventually("the session is kept", || async {
        sessions.messages().await.unwrap() > 0
    })
    .await;
    runner.complete(me, id, 1).await.ok::<Run>();
    let next = client.create(session.clone()).await.run_id;
    let resumed = runner.claim(me, next).await.resume_session.unwrap();
    assert!(resumed.session_history == history);

    // Nobody goes on with it for a month.
    let month = 31 * 24 * 3600 * 1000;
    let config = Config {
        housekeeping: Duration::from_millis(100),
        ..Config::default()
    };
    let _later = world.skewed_replica(config, month).await;
    eventually("the session is gone", || async {
        let context = runner.claim(me, client.create(session.clone()).await.run_id);
        context.await.resume_session.is_none()
    })
    .await;
    eventually("so is its history", || async { chunks(&world).await == 0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_go_when_no_run_is_left_that_may_need_them() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let day = 24 * 3600 * 1000;
    let secret =
        json!({"secrets": [{"name": "KEY", "value": "hunter22", "hosts": ["api.example.com"]}]});
    let replica = world.replica(hourly()).await;
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
    // At a time when no token is good what is said of one tells whether its key is known.
    let refusal = async || tokens::read(keyring, &old_token, 0).await.unwrap_err();
    let known = refusal().await;
    assert!(matches!(known, SandboxRefusal::Expired), "{known}");
    runner.claim(me, old).await;
    assert_eq!(secrets(replica.url.clone(), old).await, "hunter22");
    runner.complete(me, old, 1).await.ok::<Run>();
    // Or that day's look for keys would find it there still.
    client.hears_of_the_end(old).await;

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
    // The replica forgets them when NATS has done so with the last one.
    eventually("the replica does not know them", || async {
        keyring.open_sealed("x", &sealed).await.is_err()
    })
    .await;
    let closed = keyring.open_sealed("x", &sealed).await.unwrap_err();
    assert!(matches!(closed, KeyringError::Sealed), "{closed}");
    let unknown = refusal().await;
    assert!(matches!(unknown, SandboxRefusal::Invalid), "{unknown}");
    // The run that is left has its own, also at a replica that has just started.
    assert!(keys.get(&signer(&new_token)).await.unwrap().is_some());
    let fresh = world.skewed_replica(hourly(), 6 * day).await;
    assert_eq!(secrets(replica.url.clone(), new).await, "hunter22");
    assert_eq!(secrets(fresh.url.clone(), new).await, "hunter22");
}
