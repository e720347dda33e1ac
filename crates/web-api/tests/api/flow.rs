//! A run from its creation to its answer.

use api_types::client::{Run, RunPage, RunState};
use api_types::guest::Alive;
use api_types::runner::{Fleet, HeartbeatAnswer, Inputs, LeaseAnswer, LeaseVerdict, RunPolicy};
use api_types::{ProblemKind, RunnerId};
use reqwest::StatusCode;
use serde_json::json;
use web_api::service::Config;

use crate::nats::Kind;
use crate::replica::{Api, GROUP, eventually, run};
use crate::world;

#[tokio::test(flavor = "multi_thread")]
async fn a_run_goes_from_its_creation_to_its_answer() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let me = RunnerId::random();

    let policy = json!({"rules": [{"host": "api.example.com"}]});
    let made = client
        .create(json!({"prompt": "\n echo hi", "environment": {"A": "b"}, "policy": policy, "timeoutSecs": 5}))
        .await;
    assert_eq!(
        (made.state, made.title.as_str()),
        (RunState::Queued, "echo hi")
    );
    let offer = runner.poll(me, 10).await.unwrap();
    assert_eq!(offer.run_id, made.run_id);
    let context = runner.claim(me, made.run_id).await;
    assert_eq!(context.epoch, 1);
    assert_eq!(context.environment["A"], "b");
    assert_eq!(
        context.policy.unwrap()["rules"][0]["host"],
        "api.example.com"
    );
    assert_eq!(client.run(made.run_id).await.state, RunState::Running);

    let guest = Api::new(&replica.url, &context.sandbox_token);
    let alive: Alive = guest
        .post(
            "/api/webhooks/agent/heartbeat",
            json!({"runId": made.run_id}),
        )
        .await
        .ok();
    assert!(!alive.cancel_requested);
    let lease = json!({"runnerId": me, "epoch": 1});
    let renewed: LeaseAnswer = runner.job(made.run_id, "renew", lease).await.ok();
    assert_eq!(renewed.verdict, LeaseVerdict::Renewed);

    // The guest's word is noted and decides nothing.
    let word = json!({"runId": made.run_id, "exitCode": 3});
    let noted = guest.post("/api/webhooks/agent/complete", word).await;
    assert_eq!(noted.status, StatusCode::NO_CONTENT);
    assert_eq!(client.run(made.run_id).await.state, RunState::Running);

    let done: Run = runner.complete(me, made.run_id, 1).await.ok();
    assert_eq!(done.result.unwrap().exit_code, 0);
    // An answer that got lost on its way is asked for again.
    runner.complete(me, made.run_id, 1).await.ok::<Run>();
    let late = runner
        .job(made.run_id, "renew", json!({"runnerId": me, "epoch": 1}))
        .await;
    assert_eq!(late.problem(), ProblemKind::LeaseLost);
    client.hears_of_the_end(made.run_id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_sent_twice_makes_one_run() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let (a, b) = (
        world.replica(Config::default()).await,
        world.replica(Config::default()).await,
    );
    let secret = json!({"name": "KEY", "value": "hunter22"});
    let body = run(json!({"secrets": [secret]}));
    let send = |url: String, body: serde_json::Value| {
        let client = Api::new(&url, &world.client);
        let request = client
            .request(reqwest::Method::POST, "/api/runs")
            .header("Idempotency-Key", "deploy 7")
            .json(&body);
        let http = request.send();
        async move { http.await.unwrap() }
    };
    // At once, at two replicas.
    let sent: Vec<_> = (0..20)
        .map(|n| {
            send(
                if n % 2 == 0 {
                    a.url.clone()
                } else {
                    b.url.clone()
                },
                body.clone(),
            )
        })
        .collect();
    let mut ids = std::collections::BTreeSet::new();
    let mut created = 0;
    for response in futures_util::future::join_all(sent).await {
        created += u32::from(response.status() == StatusCode::CREATED);
        ids.insert(response.json::<Run>().await.unwrap().run_id);
    }
    assert_eq!((ids.len(), created), (1, 1));
    let other = send(a.url.clone(), run(json!({"prompt": "other"}))).await;
    assert_eq!(other.status(), StatusCode::UNPROCESSABLE_ENTITY);
    // The key is the API key's own.
    let stranger = Api::new(&a.url, &world.other_client);
    let request = stranger
        .request(reqwest::Method::POST, "/api/runs")
        .header("Idempotency-Key", "deploy 7")
        .json(&run(json!({"group": "vm0/other"})));
    assert_eq!(
        stranger.try_send(request).await.unwrap().status,
        StatusCode::CREATED
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_input_and_policy_reach_the_runner_by_its_next_renewal() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let me = RunnerId::random();

    let waiting = client.create(json!({})).await;
    let ended: Run = client
        .post(&format!("/api/runs/{}/cancel", waiting.run_id), json!({}))
        .await
        .ok();
    assert_eq!(ended.result.unwrap().exit_code, 137);
    assert!(runner.poll(me, 0).await.is_none());

    let run = client.create(json!({"acceptsInput": true})).await;
    assert!(run.accepts_input);
    let id = run.run_id;
    let input =
        |text: &str| client.post_owned(format!("/api/runs/{id}/input"), json!({"text": text}));
    input("early").await;
    let context = runner.claim(me, id).await;
    assert!(context.accepts_input);
    assert_eq!(context.inputs, 1);
    input("late").await;
    let deaf = client.create(json!({})).await;
    assert!(!deaf.accepts_input);
    let refused = client
        .post_owned(
            format!("/api/runs/{}/input", deaf.run_id),
            json!({"text": "x"}),
        )
        .await;
    assert_eq!(refused.problem(), ProblemKind::NoInput);
    let policy = json!({"default": "deny", "rules": []});
    let set: RunPolicy = client
        .put(&format!("/api/runs/{id}/policy"), policy)
        .await
        .ok();
    client
        .post(&format!("/api/runs/{id}/cancel"), json!({}))
        .await
        .ok::<Run>();
    let beat = json!({
        "runnerId": me, "runnerName": "metal-1", "group": GROUP, "profiles": ["vm0/small"], "mode": "running",
        "heldSessions": ["s-1"], "leases": [{"runId": id, "epoch": 1}, {"runId": waiting.run_id, "epoch": 1}]
    });
    let answer: HeartbeatAnswer = runner.post("/api/runners/heartbeat", beat).await.ok();
    let (mine, lost) = (answer.leases[0], answer.leases[1]);
    assert!(mine.cancel_requested);
    assert_eq!(
        (mine.inputs, mine.policy_revision),
        (2, set.policy_revision)
    );
    assert_eq!(lost.verdict, LeaseVerdict::Lost);
    let query = format!("runnerId={me}&epoch=1&after=1");
    let inputs: Inputs = runner
        .get(&format!("/api/runners/jobs/{id}/inputs?{query}"))
        .await
        .ok();
    assert_eq!(
        (inputs.inputs.len(), inputs.inputs[0].text.as_str()),
        (1, "late")
    );
    let policy: RunPolicy = runner
        .get(&format!("/api/runners/jobs/{id}/policy?{query}"))
        .await
        .ok();
    assert_eq!(policy.policy.unwrap()["default"], "deny");
    let fleet: Fleet = client.get("/api/runners").await.ok();
    assert_eq!(fleet.runners[0].heartbeat.runner_id, me);
    let others: Fleet = Api::new(&replica.url, &world.other_client)
        .get("/api/runners")
        .await
        .ok();
    assert!(others.runners.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_for_a_message_travels_all_the_same() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let me = RunnerId::random();
    // Every byte of it has to be escaped.
    let prompt = "\u{1}".repeat(1 << 20) + &"x".repeat(3 << 20);
    let id = client
        .create(json!({"prompt": prompt, "sessionId": "s-1"}))
        .await
        .run_id;
    let context = runner.claim(me, id).await;
    assert!(context.prompt == prompt);
    // A checkpoint, for the session's next run.
    let guest = Api::new(&replica.url, &context.sandbox_token);
    let history = "{\"type\":\"user\"}\n".repeat(200_000);
    let checkpoint =
        json!({"runId": id, "cliAgentSessionId": "c-1", "cliAgentSessionHistory": history});
    let kept = guest
        .post("/api/webhooks/agent/checkpoints", checkpoint)
        .await;
    assert_eq!(kept.status, StatusCode::OK, "{kept:?}");
    runner.complete(me, id, 1).await.ok::<Run>();
    let next = client.create(json!({"sessionId": "s-1"})).await.run_id;
    let resumed = runner.claim(me, next).await.resume_session.unwrap();
    assert_eq!(resumed.session_id, "c-1");
    assert!(resumed.session_history == history);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_filtered_paged_and_made_anew_by_any_replica() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let first = world.replica(Config::default()).await;
    let client = world.as_client(&first.url);
    for n in 0..12 {
        client
            .create(json!({"prompt": format!("number {n}"), "sessionId": format!("s-{}", n % 2)}))
            .await;
    }
    let second = world.replica(Config::default()).await;
    let client = world.as_client(&second.url);
    eventually("the second replica knows them", || async {
        client
            .get("/api/runs?limit=200")
            .await
            .ok::<RunPage>()
            .runs
            .len()
            == 12
    })
    .await;
    let mut seen = Vec::new();
    let mut path = "/api/runs?limit=5&sessionId=s-1".to_owned();
    loop {
        let page: RunPage = client.get(&path).await.ok();
        seen.extend(page.runs.into_iter().map(|run| run.run_id));
        match page.next {
            Some(next) => path = format!("/api/runs?limit=5&sessionId=s-1&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen.len(), 6);
    let found: RunPage = client.get("/api/runs?q=NUMBER%2011").await.ok();
    assert_eq!(found.runs.len(), 1);
    let stranger = Api::new(&second.url, &world.other_client);
    assert!(
        stranger
            .get("/api/runs")
            .await
            .ok::<RunPage>()
            .runs
            .is_empty()
    );
    assert_eq!(
        stranger
            .get(&format!("/api/runs?group={GROUP}"))
            .await
            .problem(),
        ProblemKind::Forbidden
    );
    assert_eq!(
        stranger
            .get(&format!("/api/runs/{}", seen[0]))
            .await
            .problem(),
        ProblemKind::NotFound
    );
}
