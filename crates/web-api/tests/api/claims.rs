//! Every run is claimed once, whatever happens to runners and clocks.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use api_types::client::{EndReason, Run, RunState};
use api_types::{ProblemKind, RunId, RunnerId};
use reqwest::StatusCode;
use serde_json::json;
use web_api::service::Config;

use crate::nats::Kind;
use crate::replica::{Api, eventually, open};
use crate::world;

/// Soon over, and long enough for the few requests of a claim that nobody renews.
const LEASE: Duration = Duration::from_secs(5);

fn short_lease() -> Config {
    Config {
        lease: LEASE,
        ..Config::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_run_is_claimed_once_by_runners_that_race_at_two_replicas() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replicas = [
        world.replica(Config::default()).await,
        world.replica(Config::default()).await,
    ];
    let client = world.as_client(&replicas[0].url);
    let mut expected = HashSet::new();
    for _ in 0..200 {
        expected.insert(client.create(json!({})).await.run_id);
    }
    let claim_all = |n: usize| {
        let runner = world.as_runner(&replicas[n % 2].url);
        async move {
            let me = RunnerId::random();
            let mut mine = Vec::new();
            while let Some(offer) = runner.poll(me, 3).await {
                match runner.try_claim(me, offer.run_id).await {
                    answer if answer.status == StatusCode::OK => {
                        mine.push(offer.run_id);
                        runner.complete(me, offer.run_id, 1).await.ok::<Run>();
                    }
                    answer => assert_eq!(answer.problem(), ProblemKind::ClaimLost),
                }
            }
            mine
        }
    };
    let claimed: Vec<RunId> = futures_util::future::join_all((0..16).map(claim_all))
        .await
        .concat();
    assert_eq!(claimed.len(), 200, "none twice");
    assert_eq!(
        claimed.into_iter().collect::<HashSet<_>>(),
        expected,
        "none lost"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_claim_one_run_one_gets_it_and_only_that_one_completes_it() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replicas = [
        world.replica(Config::default()).await,
        world.replica(Config::default()).await,
    ];
    for _ in 0..10 {
        let id = world
            .as_client(&replicas[0].url)
            .create(json!({}))
            .await
            .run_id;
        let race = (0..20).map(|n| {
            let runner = world.as_runner(&replicas[n % 2].url);
            async move {
                let me = RunnerId::random();
                (me, runner.try_claim(me, id).await.status)
            }
        });
        let outcomes = futures_util::future::join_all(race).await;
        let winners: Vec<_> = outcomes
            .iter()
            .filter(|(_, s)| *s == StatusCode::OK)
            .collect();
        assert_eq!(winners.len(), 1);
        assert!(
            outcomes
                .iter()
                .all(|(_, s)| [StatusCode::OK, StatusCode::CONFLICT].contains(s))
        );
        let completions = outcomes.iter().map(|(me, _)| {
            let runner = world.as_runner(&replicas[1].url);
            async move { runner.complete(*me, id, 1).await.status }
        });
        let done = futures_util::future::join_all(completions).await;
        assert_eq!(done.iter().filter(|s| **s == StatusCode::OK).count(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_is_delivered_twice_is_one_claim() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let id = world.as_client(&replica.url).create(json!({})).await.run_id;
    let runner = world.as_runner(&replica.url);
    let body = json!({"runnerId": RunnerId::random(), "claimId": RunnerId::random()});
    for _ in 0..3 {
        let answer = runner.job(id, "claim", body.clone()).await;
        assert_eq!(answer.body["epoch"], 1, "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_runner_is_answered_or_its_run_retried_and_what_it_says_later_is_refused() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replicas = [
        world.replica(short_lease()).await,
        world.replica(short_lease()).await,
    ];
    let client = world.as_client(&replicas[0].url);
    let runner = world.as_runner(&replicas[1].url);
    let (lost, other) = (RunnerId::random(), RunnerId::random());
    let answered = client.create(json!({})).await.run_id;
    let retried = client
        .create(json!({"onRunnerLost": {"do": "retry", "maxAttempts": 2}}))
        .await
        .run_id;
    runner.claim(lost, answered).await;
    let token = runner.claim(lost, retried).await.sandbox_token;

    eventually("the run is answered", || async {
        client.run(answered).await.state == RunState::Done
    })
    .await;
    let result = client.run(answered).await.result.unwrap();
    assert_eq!(
        (result.reason, result.exit_code),
        (EndReason::RunnerLost, 1)
    );
    assert!(result.error.unwrap().starts_with("runner lost: metal-1"));

    // Another one takes the other run; the lost one comes back and is nobody.
    eventually("the other run is offered again", || async {
        let offer = runner.poll(other, 1).await;
        offer.is_some_and(|offer| offer.run_id == retried)
    })
    .await;
    let second = runner.claim(other, retried).await;
    assert_eq!(second.epoch, 2);
    for (who, epoch) in [(lost, 1), (lost, 2), (other, 1)] {
        let late = runner.complete(who, retried, epoch).await;
        assert_eq!(late.problem(), ProblemKind::LeaseLost);
    }
    let guest = Api::new(&replicas[0].url, &token);
    let late = guest
        .post("/api/webhooks/agent/heartbeat", json!({"runId": retried}))
        .await;
    assert_eq!(late.problem(), ProblemKind::Unauthorized);
    let secrets = json!({"runId": retried, "runnerId": lost, "epoch": 1});
    let late = runner
        .post("/api/webhooks/agent/firewall/auth", secrets)
        .await;
    assert_eq!(late.problem(), ProblemKind::LeaseLost);
    runner.complete(other, retried, 2).await.ok::<Run>();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_is_renewed_lasts_however_wrong_the_clocks_go() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let minutes = |n: i64| n * 60 * 1000;
    let behind = world.skewed_replica(short_lease(), minutes(-5)).await;
    let ahead = world.skewed_replica(short_lease(), minutes(5)).await;
    let client = world.as_client(&behind.url);
    let id = client.create(json!({})).await.run_id;
    let me = RunnerId::random();
    // Granted by one, used at the other, renewed at either for more than two leases' time.
    let token = world
        .as_runner(&behind.url)
        .claim(me, id)
        .await
        .sandbox_token;
    let granted = Instant::now();
    for n in 0.. {
        if granted.elapsed() > LEASE * 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        let url = if n % 2 == 0 { &ahead.url } else { &behind.url };
        let renewed = world
            .as_runner(url)
            .job(id, "renew", json!({"runnerId": me, "epoch": 1}))
            .await;
        assert_eq!(renewed.status, StatusCode::OK, "{renewed:?}");
        let alive = Api::new(url, &token)
            .post("/api/webhooks/agent/heartbeat", json!({"runId": id}))
            .await;
        assert_eq!(alive.status, StatusCode::OK, "{alive:?}");
        ahead
            .clock
            .set_offset(if n % 2 == 0 { minutes(-5) } else { minutes(5) });
    }
    world
        .as_runner(&ahead.url)
        .complete(me, id, 1)
        .await
        .ok::<Run>();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_given_back_keeps_its_place() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let first = client.create(json!({})).await.run_id;
    client.create(json!({})).await;
    let me = RunnerId::random();
    runner.claim(me, first).await;
    let back = runner
        .job(first, "release", json!({"runnerId": me, "epoch": 1}))
        .await;
    assert_eq!(back.status, StatusCode::NO_CONTENT);
    assert_eq!(runner.poll(me, 5).await.unwrap().run_id, first);
    assert_eq!(runner.claim(me, first).await.epoch, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn news_that_come_late_are_not_believed_for_good() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(short_lease()).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let (engine, index) = (&replica.service.engine, &replica.service.index);
    let me = RunnerId::random();
    let id = client.create(json!({})).await.run_id;
    let (queued, first) = engine.run(id).await.unwrap().unwrap();
    runner.claim(me, id).await;
    let (running, second) = engine.run(id).await.unwrap().unwrap();
    runner.complete(me, id, 1).await.ok::<Run>();
    client.hears_of_the_end(id).await;
    assert!(index.hint(id).is_none());

    // As by a handler that slept between writing and noting.
    index.note(&queued, first, Instant::now());
    assert_eq!(runner.poll(me, 5).await.unwrap().run_id, id);
    let refused = runner.try_claim(me, id).await;
    assert_eq!(refused.problem(), ProblemKind::ClaimLost);
    assert!(index.hint(id).is_none());
    // Such a lease is silent.
    index.note(&running, second, Instant::now());
    eventually("it is known to be done again", || async {
        index.hint(id).is_none()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_are_counted_by_the_bucket_that_renewals_go_to() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let engine = open(&world.nats).await;
    let bucket = engine.runs_bucket();
    assert_eq!(bucket.messages().await.unwrap(), 0);
    for _ in 0..3 {
        engine.probe().await.unwrap();
    }
    assert_eq!(bucket.messages().await.unwrap(), 1);
    // It is no run to anybody.
    assert_eq!(engine.oldest_run().await.unwrap(), None);
    let replica = world.replica(Config::default()).await;
    let list = world.as_client(&replica.url).get("/api/runs").await;
    assert_eq!(list.body["runs"], json!([]));
}
