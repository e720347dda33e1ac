//! Replicas and NATS nodes die, hang and fill up; no run that was accepted is lost or answered twice.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use api_types::client::{Run, RunState};
use api_types::{ProblemKind, RunId, RunnerId};
use reqwest::{Method, StatusCode};
use serde_json::json;
use web_api::engine::{Engine, OpenError, ServerFault};
use web_api::service::Config;

use crate::nats::{Kind, Nats};
use crate::replica::{Api, GROUP, World, eventually, run};
use crate::world;

/// Tries every replica in turn until one answers with something that is final.
async fn insist(
    urls: &[String],
    token: &str,
    method: &Method,
    path: &str,
    body: &serde_json::Value,
    key: Option<&str>,
) -> crate::replica::Answer {
    for turn in 0_usize.. {
        let url = &urls[turn % urls.len()];
        let api = Api::new(url, token);
        let mut request = api
            .request(method.clone(), path)
            .timeout(Duration::from_secs(15));
        if let Some(key) = key {
            request = request.header("Idempotency-Key", key);
        }
        let request = if method == Method::GET {
            request
        } else {
            request.json(body)
        };
        if let Ok(answer) = api.try_send(request).await
            && !answer.status.is_server_error()
        {
            return answer;
        }
        assert!(turn < 400, "{path}: nobody answers");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    unreachable!()
}

pub(crate) struct Tokens {
    client: String,
    runner: String,
}

impl Tokens {
    pub(crate) fn of(world: &World) -> Self {
        Self {
            client: world.client.clone(),
            runner: world.runner.clone(),
        }
    }
}

/// A client makes runs and runners take and answer them, through whatever replicas live, for as long as `disturb` does
/// its worst and a little longer. Afterwards every accepted run is answered, each exactly once.
pub(crate) async fn survives<F: Future<Output = ()>>(
    tokens: &Tokens,
    urls: Vec<String>,
    disturb: impl FnOnce() -> F,
) {
    let urls = Arc::new(urls);
    let calm = Arc::new(AtomicBool::new(false));
    let over = Arc::new(AtomicBool::new(false));
    let accepted = Arc::new(std::sync::Mutex::new(Vec::<RunId>::new()));
    let completions = Arc::new(std::sync::Mutex::new(BTreeMap::<RunId, usize>::new()));
    let finished = Arc::new(AtomicUsize::new(0));

    let maker = {
        let (urls, token, accepted) = (
            Arc::clone(&urls),
            tokens.client.clone(),
            Arc::clone(&accepted),
        );
        let calm = Arc::clone(&calm);
        tokio::spawn(async move {
            let (mut n, mut left) = (0, 20);
            while left > 0 {
                n += 1;
                left -= i32::from(calm.load(Ordering::Relaxed));
                let key = format!("run {n}");
                let answer = insist(
                    &urls,
                    &token,
                    &Method::POST,
                    "/api/runs",
                    &run(json!({})),
                    Some(&key),
                )
                .await;
                accepted.lock().unwrap().push(answer.ok::<Run>().run_id);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
    };
    let runners: Vec<_> = (0..4)
        .map(|_| {
            let (urls, token, over) = (Arc::clone(&urls), tokens.runner.clone(), Arc::clone(&over));
            let (completions, finished) = (Arc::clone(&completions), Arc::clone(&finished));
            tokio::spawn(async move {
                let me = RunnerId::random();
                while !over.load(Ordering::Relaxed) {
                    let poll = json!({"runnerId": me, "group": GROUP, "profiles": ["vm0/small"], "waitSecs": 1});
                    let polled = insist(&urls, &token, &Method::POST, "/api/runners/poll", &poll, None).await;
                    let Some(id) = polled.body["job"]["runId"].as_str() else { continue };
                    let claim = json!({"runnerId": me, "claimId": RunnerId::random()});
                    let path = format!("/api/runners/jobs/{id}");
                    let claimed = insist(&urls, &token, &Method::POST, &format!("{path}/claim"), &claim, None).await;
                    if claimed.status == StatusCode::CONFLICT {
                        continue;
                    }
                    assert_eq!(claimed.status, StatusCode::OK, "{claimed:?}");
                    let done = json!({"runnerId": me, "epoch": claimed.body["epoch"], "exitCode": 0});
                    let answer = insist(&urls, &token, &Method::POST, &format!("{path}/complete"), &done, None).await;
                    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
                    *completions.lock().unwrap().entry(id.parse().unwrap()).or_default() += 1;
                    finished.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    disturb().await;
    calm.store(true, Ordering::Relaxed);
    maker.await.unwrap();
    let runs = accepted.lock().unwrap().len();
    assert!(runs > 20, "nothing went on meanwhile");
    eventually("every run is answered", || async {
        finished.load(Ordering::Relaxed) >= runs
    })
    .await;
    over.store(true, Ordering::Relaxed);
    for runner in runners {
        runner.await.unwrap();
    }
    let accepted = accepted.lock().unwrap().clone();
    let completions = completions.lock().unwrap().clone();
    assert_eq!(completions.len(), runs);
    assert!(
        completions.values().all(|count| *count == 1),
        "answered twice: {completions:?}"
    );
    for id in accepted {
        let answer = insist(
            &urls,
            &tokens.client,
            &Method::GET,
            &format!("/api/runs/{id}"),
            &json!({}),
            None,
        )
        .await;
        let found: Run = answer.ok();
        assert_eq!((found.state, found.epoch), (RunState::Done, 1), "{found:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_replica_costs_no_run() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let (a, b, c) = (world.process(&[]), world.process(&[]), world.process(&[]));
    let urls = vec![a.url.clone(), b.url.clone(), c.url.clone()];
    survives(&Tokens::of(&world), urls, || async {
        tokio::time::sleep(Duration::from_millis(400)).await;
        a.kill();
        tokio::time::sleep(Duration::from_millis(400)).await;
        c.kill();
    })
    .await;
    drop(b);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_nats_nodes_cost_no_run() {
    let kind = Kind {
        nodes: 3,
        ..Kind::default()
    };
    let Some(mut world) = world(kind).await else {
        return;
    };
    let (a, b) = (
        world.replica(Config::default()).await,
        world.replica(Config::default()).await,
    );
    let urls = vec![a.url.clone(), b.url.clone()];
    let tokens = Tokens::of(&world);
    let nodes = &mut world.nats;
    survives(&tokens, urls, || async move {
        for node in 0..3 {
            tokio::time::sleep(Duration::from_millis(700)).await;
            nodes.kill(node);
            tokio::time::sleep(Duration::from_millis(700)).await;
            nodes.restart(node);
            // The others may lose a node only when this one is back.
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
    })
    .await;
    drop((a, b));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_nats_is_told_and_costs_no_lease() {
    let Some(mut world) = world(Kind::default()).await else {
        return;
    };
    let config = Config {
        lease: Duration::from_secs(10),
        ..Config::default()
    };
    let replica = world.replica(config).await;
    let client = Api::new(&replica.url, &world.client);
    let runner = Api::new(&replica.url, &world.runner);
    let me = RunnerId::random();
    let id = client.create(json!({})).await.run_id;
    runner.claim(me, id).await;
    world.nats.kill(0);
    // It learns of the end when the kernel tells it, which on a busy host is not at once.
    eventually("the replica says that it is not ready", || async {
        client.get("/readyz").await.status == StatusCode::SERVICE_UNAVAILABLE
    })
    .await;
    let down = client.get("/readyz");
    assert_eq!(down.await.problem(), ProblemKind::Unavailable);
    let refused = client.post("/api/runs", run(json!({}))).await;
    assert_eq!(refused.problem(), ProblemKind::Unavailable);
    // Longer than a lease.
    tokio::time::sleep(Duration::from_secs(13)).await;
    world.nats.restart(0);
    eventually("the replica is back", || async {
        client.get("/readyz").await.status == StatusCode::OK
    })
    .await;
    // The runner is slow to notice: who ends silent leases has looked several times by then, but not for a whole lease.
    tokio::time::sleep(Duration::from_secs(3)).await;
    eventually("the lease is renewed", || async {
        let body = json!({"runnerId": me, "epoch": 1});
        match runner.job(id, "renew", body).await {
            answer if answer.status == StatusCode::OK => true,
            answer => {
                assert_eq!(answer.problem(), ProblemKind::Unavailable);
                false
            }
        }
    })
    .await;
    runner.complete(me, id, 1).await.ok::<Run>();
    // The fleet is there again, too, and a runner that is lost now is found out.
    let lost = client.create(json!({})).await.run_id;
    runner.claim(me, lost).await;
    let beat = json!({
        "runnerId": me, "runnerName": "metal-1", "group": GROUP, "profiles": [], "mode": "running"
    });
    let heard = runner.post("/api/runners/heartbeat", beat).await;
    assert_eq!(heard.status, StatusCode::OK, "{heard:?}");
    eventually("the lost runner is found out", || async {
        client.run(lost).await.state == RunState::Done
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_that_hangs_for_a_while_costs_time_only() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let urls = vec![replica.url.clone()];
    survives(&Tokens::of(&world), urls, || async {
        for _ in 0..2 {
            tokio::time::sleep(Duration::from_millis(300)).await;
            world.nats.freeze(0, true);
            tokio::time::sleep(Duration::from_secs(2)).await;
            world.nats.freeze(0, false);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_storage_refuses_new_runs_and_keeps_what_was_accepted() {
    let kind = Kind {
        max_file: "64M",
        feed_bytes: 8 << 20,
        ..Kind::default()
    };
    let Some(world) = world(kind).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let client = Api::new(&replica.url, &world.client);
    let mut accepted = Vec::new();
    let prompt = "x".repeat(400 << 10);
    let refused = loop {
        let answer = client
            .post("/api/runs", run(json!({"prompt": prompt})))
            .await;
        if answer.status == StatusCode::CREATED {
            accepted.push(answer.ok::<Run>().run_id);
            assert!(accepted.len() < 1000);
        } else {
            break answer;
        }
    };
    assert_eq!(refused.problem(), ProblemKind::Unavailable);
    assert!(accepted.len() > 20);
    for id in accepted {
        assert_eq!(client.run(id).await.state, RunState::Queued);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_may_lose_what_it_acknowledged_is_refused() {
    let lazy = Kind {
        sync_always: false,
        ..Kind::default()
    };
    let nats = match Nats::start(lazy) {
        Ok(nats) => nats,
        Err(_) => {
            world(lazy).await;
            return;
        }
    };
    let mut settings = nats.settings();
    let error = Engine::open(&settings).await.unwrap_err();
    assert!(
        matches!(error, OpenError::Server(ServerFault::Lazy(_))),
        "{error}"
    );
    assert!(error.to_string().contains("sync_interval: always"));
    settings.system_url = None;
    let error = Engine::open(&settings).await.unwrap_err();
    assert!(
        matches!(error, OpenError::Server(ServerFault::Unknown)),
        "{error}"
    );
    // A user who is none of the system account learns nothing.
    settings.system_url = Some(nats.url());
    let error = Engine::open(&settings).await.unwrap_err();
    assert!(
        matches!(error, OpenError::Server(ServerFault::Silent { .. })),
        "{error}"
    );
    settings.allow_data_loss = true;
    Engine::open(&settings).await.unwrap();
}
