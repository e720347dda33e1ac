//! What a run says arrives once, in order, at everybody who follows.

use std::time::Duration;

use api_types::client::{InputAccepted, Run};
use api_types::guest::{Accepted, TelemetryAccepted};
use api_types::runner::Inputs;
use api_types::{ProblemKind, RunId, RunnerId};
use reqwest::StatusCode;
use serde_json::{Value, json};
use web_api::service::Config;

use crate::nats::Kind;
use crate::replica::{Api, Replica, World, eventually, read_events};
use crate::world;

const EVENTS: &str = "/api/webhooks/agent/events";

fn events(run: RunId, numbers: std::ops::Range<u64>) -> Value {
    let events: Vec<Value> = numbers
        .map(|n| json!({"sequenceNumber": n, "type": "assistant"}))
        .collect();
    json!({"runId": run, "events": events})
}

struct Claimed {
    run: RunId,
    me: RunnerId,
    token: String,
}

async fn claimed(world: &World, replica: &Replica) -> Claimed {
    let run = world.as_client(&replica.url).create(json!({})).await.run_id;
    let me = RunnerId::random();
    let token = world
        .as_runner(&replica.url)
        .claim(me, run)
        .await
        .sandbox_token;
    Claimed { run, me, token }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_arrive_once_and_in_order_whatever_is_sent_twice_and_wherever() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let (a, b) = (
        world.replica(Config::default()).await,
        world.replica(Config::default()).await,
    );
    let job = claimed(&world, &a).await;
    let (to_a, to_b) = (Api::new(&a.url, &job.token), Api::new(&b.url, &job.token));
    // Followers at both replicas, from before the first event.
    let path = format!("/api/runs/{}/events", job.run);
    let follow = |url: String| {
        let (client, path) = (world.client.clone(), path.clone());
        tokio::spawn(async move {
            let api = Api::new(&url, &client);
            read_events(api.stream(&path, None).await, usize::MAX).await
        })
    };
    let followers = [follow(a.url.clone()), follow(b.url.clone())];

    let next = |answer: crate::replica::Answer| answer.ok::<Accepted>().next;
    assert_eq!(next(to_a.post(EVENTS, events(job.run, 0..3)).await), 3);
    assert_eq!(
        next(to_b.post(EVENTS, events(job.run, 0..3)).await),
        3,
        "a replay"
    );
    assert_eq!(
        next(to_b.post(EVENTS, events(job.run, 1..5)).await),
        5,
        "an overlap"
    );
    let gap = to_a.post(EVENTS, events(job.run, 7..8)).await;
    assert_eq!(
        (gap.problem(), gap.body["next"].clone()),
        (ProblemKind::Gap, json!(5))
    );
    // The same batches at once, at both; fewer than a guest may have under way at one.
    let race = (0..12).map(|n| {
        let (api, body) = (
            if n % 2 == 0 { &to_a } else { &to_b },
            events(job.run, 5..25),
        );
        api.post(EVENTS, body)
    });
    for answer in futures_util::future::join_all(race).await {
        assert_eq!(next(answer), 25);
    }
    for bad in [
        json!([{"type": "x"}]),
        json!([{"sequenceNumber": 25}, {"sequenceNumber": 27}]),
        json!([{"sequenceNumber": -1}]),
        json!([1]),
    ] {
        let refused = to_a
            .post(EVENTS, json!({"runId": job.run, "events": bad}))
            .await;
        assert_eq!(refused.problem(), ProblemKind::Invalid);
    }
    world
        .as_runner(&b.url)
        .complete(job.me, job.run, 1)
        .await
        .ok::<Run>();
    for follower in followers {
        let seen = follower.await.unwrap();
        let numbers: Vec<u64> = seen
            .iter()
            .filter_map(|event| event.data["event"]["sequenceNumber"].as_u64())
            .collect();
        assert_eq!(numbers, (0..25).collect::<Vec<_>>());
        assert_eq!(seen.last().unwrap().name, "end");
        assert_eq!(seen.last().unwrap().data["result"]["exitCode"], 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_back_goes_on_where_it_was_at_any_replica() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let (a, b) = (
        world.replica(Config::default()).await,
        world.replica(Config::default()).await,
    );
    let job = claimed(&world, &a).await;
    let guest = Api::new(&a.url, &job.token);
    guest
        .post(EVENTS, events(job.run, 0..10))
        .await
        .ok::<Accepted>();
    guest
        .post(EVENTS, events(job.run, 10..20))
        .await
        .ok::<Accepted>();
    world
        .as_runner(&a.url)
        .complete(job.me, job.run, 1)
        .await
        .ok::<Run>();
    let path = format!("/api/runs/{}/events", job.run);
    let (mut last, mut numbers) = (None::<String>, Vec::new());
    // Three at a time, in turn at each replica.
    for turn in 0.. {
        let url = if turn % 2 == 0 { &a.url } else { &b.url };
        let client = world.as_client(url);
        let seen = read_events(client.stream(&path, last.as_deref()).await, 3).await;
        numbers.extend(
            seen.iter()
                .filter_map(|e| e.data["event"]["sequenceNumber"].as_u64()),
        );
        if seen.last().unwrap().name == "end" {
            break;
        }
        last.clone_from(&seen.last().unwrap().id);
    }
    assert_eq!(numbers, (0..20).collect::<Vec<_>>());
    let client = world.as_client(&a.url);
    for bad in ["x", "-1", "1-", "1-x", "99999999999999999999999"] {
        let answer = client.stream(&path, Some(bad)).await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{bad}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_come_whole_and_those_of_a_lost_claim_are_told_from_the_next_ones() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    // Nobody renews it while either claim says what it has to say.
    let config = Config {
        lease: Duration::from_secs(8),
        ..Config::default()
    };
    let replica = world.replica(config).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let retry = json!({"onRunnerLost": {"do": "retry", "maxAttempts": 3}});
    let run = client.create(retry).await.run_id;
    let me = RunnerId::random();
    let first = runner.claim(me, run).await.sandbox_token;
    let upload = |epoch: u64, start: usize, text: &str| {
        let body =
            json!({"runnerId": me, "epoch": epoch, "kind": "output", "start": start, "text": text});
        let (runner, path) = (runner.clone(), format!("/api/runners/jobs/{run}/logs"));
        async move { runner.post(&path, body).await }
    };
    assert_eq!(upload(1, 0, "first é").await.body["next"], 8);
    assert_eq!(
        upload(1, 6, "é, more\n").await.body["next"],
        15,
        "overlaps, and is cut"
    );
    assert_eq!(upload(1, 7, "x").await.body["next"], 15, "is there already");
    assert_eq!(upload(1, 99, "x").await.problem(), ProblemKind::Gap);
    eventually("the lease is lost", || async {
        client.run(run).await.holder.is_some() && runner.poll(me, 0).await.is_some()
    })
    .await;
    assert_eq!(
        upload(1, 15, "late").await.problem(),
        ProblemKind::LeaseLost
    );
    let late = Api::new(&replica.url, &first)
        .post(EVENTS, events(run, 0..1))
        .await;
    assert_eq!(late.problem(), ProblemKind::Unauthorized);

    let token = runner.claim(me, run).await.sandbox_token;
    assert_eq!(upload(2, 0, "second\n").await.body["next"], 7);
    let network = json!({"runnerId": me, "epoch": 2, "kind": "network", "start": 0, "text": "{\"host\":\"example.com\"}\n"});
    runner.job(run, "logs", network).await.ok::<Value>();
    let telemetry = json!({"runId": run, "systemLog": "agent\n", "metrics": [{"cpu": 1}]});
    let guest = Api::new(&replica.url, &token);
    for _ in 0..2 {
        let taken: TelemetryAccepted = guest
            .post("/api/webhooks/agent/telemetry", telemetry.clone())
            .await
            .ok();
        assert_eq!((taken.system_log_next, taken.metrics_next), (6, 1));
    }
    runner.complete(me, run, 2).await.ok::<Run>();
    // What is left comes shortly after the end.
    assert_eq!(upload(2, 7, "tail\n").await.body["next"], 12);
    let text = |path: &str| {
        let (client, path) = (client.clone(), format!("/api/runs/{run}/{path}"));
        async move { client.stream(&path, None).await.text().await.unwrap() }
    };
    assert_eq!(text("logs").await, "first é, more\nsecond\ntail\n");
    assert_eq!(text("logs?kind=system").await, "agent\n");
    assert_eq!(text("network-log").await, "{\"host\":\"example.com\"}\n");
    let output = read_events(
        client
            .stream(&format!("/api/runs/{run}/output"), None)
            .await,
        usize::MAX,
    )
    .await;
    let epochs: Vec<u64> = output
        .iter()
        .filter_map(|e| e.data["start"].as_u64().and(e.data["epoch"].as_u64()))
        .collect();
    assert_eq!(epochs, [1, 1, 2, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_keeps_its_number_whatever_is_sent_twice_and_whatever_is_forgotten() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let run = client.create(json!({"acceptsInput": true})).await.run_id;
    let me = RunnerId::random();
    runner.claim(me, run).await;
    let path = format!("/api/runs/{run}/input");
    let send = |body: Value| client.post_owned(path.clone(), body);
    let number = async |body: Value| send(body).await.ok::<InputAccepted>().sequence;
    let fetch = async |after: u64, cursor: u64| {
        let query = format!("runnerId={me}&epoch=1&after={after}&cursor={cursor}");
        let path = format!("/api/runners/jobs/{run}/inputs?{query}");
        let found: Inputs = runner.get(&path).await.ok();
        let inputs = found.inputs.into_iter();
        let inputs: Vec<_> = inputs.map(|input| (input.sequence, input.text)).collect();
        (inputs, found.cursor)
    };
    let input = |number: u64, text: &str| (number, text.to_owned());

    // Its sender does not know whether the first one arrived.
    for _ in 0..2 {
        assert_eq!(number(json!({"text": "a", "sequence": 1})).await, 1);
    }
    let gap = send(json!({"text": "c", "sequence": 3})).await;
    assert_eq!(gap.problem(), ProblemKind::Gap);
    assert_eq!(gap.body["next"], 2);
    assert_eq!(number(json!({"text": "b"})).await, 2);
    for sequence in [0, 1001] {
        let wrong = send(json!({"text": "x", "sequence": sequence})).await;
        assert_eq!(wrong.problem(), ProblemKind::Invalid);
    }
    let (all, cursor) = fetch(0, 0).await;
    assert_eq!(all, [input(1, "a"), input(2, "b")]);
    assert_eq!(fetch(1, 0).await, (vec![input(2, "b")], cursor));
    assert_eq!(fetch(2, cursor).await, (Vec::new(), cursor));

    // As the stream does with what is old, seen by a replica that remembers nothing.
    replica.service.engine.remove_feeds(run).await.unwrap();
    let other = world.replica(Config::default()).await;
    let there = world.as_client(&other.url);
    let again = there.post_owned(path.clone(), json!({"text": "b", "sequence": 2}));
    assert_eq!(again.await.ok::<InputAccepted>().sequence, 2);
    let next = there.post_owned(path.clone(), json!({"text": "c"}));
    assert_eq!(next.await.ok::<InputAccepted>().sequence, 3);
    assert_eq!(fetch(2, cursor).await.0, [input(3, "c")]);
}
