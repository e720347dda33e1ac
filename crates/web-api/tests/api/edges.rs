//! What is sent may be anything.

use std::io::{Read as _, Write as _};
use std::sync::{Arc, Mutex};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use web_api::http::limits::Ceilings;
use web_api::service::Config;

use api_types::{ProblemKind, RunnerId};

use crate::nats::Kind;
use crate::replica::{Api, GROUP, run};
use crate::world;

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_are_none_are_refused_with_a_problem() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let client = world.as_client(&replica.url);
    let raw = |body: Vec<u8>, kind: &'static str| {
        let request = client
            .request(Method::POST, "/api/runs")
            .header("Content-Type", kind)
            .body(body);
        let client = client.clone();
        async move { client.try_send(request).await.unwrap().problem() }
    };
    let json_type = "application/json";
    for bad in [&b""[..], b"{", b"\xff\xfe", b"{\"group\":"] {
        assert_eq!(raw(bad.to_vec(), json_type).await, ProblemKind::Malformed);
    }
    let deep = "[".repeat(100_000);
    for bad in ["null", &deep, "1", "[]", "{}", "\"x\""] {
        assert_eq!(raw(bad.into(), json_type).await, ProblemKind::Invalid);
    }
    assert_eq!(
        raw(b"{}".to_vec(), "text/plain").await,
        ProblemKind::UnsupportedMediaType
    );
    assert_eq!(
        raw(vec![b' '; 13 << 20], json_type).await,
        ProblemKind::TooLarge
    );
    let guestly = vec![b' '; 3 << 20];
    let request = client
        .request(Method::POST, "/api/runners/poll")
        .header("Content-Type", json_type)
        .body(guestly);
    let runner = world.as_runner(&replica.url);
    let answer = runner
        .try_send(request.bearer_auth(&world.runner))
        .await
        .unwrap();
    // Two Authorization headers are one too many.
    assert_eq!(answer.problem(), ProblemKind::Unauthorized);
    let request = runner
        .request(Method::POST, "/api/runners/poll")
        .header("Content-Type", json_type)
        .body(vec![b' '; 3 << 20]);
    assert_eq!(
        runner.try_send(request).await.unwrap().problem(),
        ProblemKind::TooLarge
    );
}

/// More than all buffers between the two hold: who writes it is done only when the server has read it.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_reaches_a_sender_that_is_still_sending() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let address = replica.url.strip_prefix("http://").unwrap().to_owned();
    let answer = tokio::task::spawn_blocking(move || {
        let body = vec![b' '; 40 << 20];
        let head = format!(
            "POST /api/webhooks/agent/checkpoints HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let mut stream = std::net::TcpStream::connect(&address).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&body).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    })
    .await
    .unwrap();
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn senseless_values_are_refused_naming_the_field_and_no_secret() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let client = world.as_client(&replica.url);
    let cases = [
        ("prompt", json!({"prompt": ""})),
        ("prompt", json!({"prompt": "a\u{0}b"})),
        ("workingDir", json!({"workingDir": "/a/../b"})),
        ("timeoutSecs", json!({"timeoutSecs": 0})),
        ("environment", json!({"environment": {"VM0_RUN_ID": "x"}})),
        ("environment", json!({"environment": {"A=B": "x"}})),
        (
            "secrets",
            json!({"secrets": [{"name": "A", "value": "hunter22\n"}]}),
        ),
        (
            "secrets",
            json!({"secrets": [{"name": "A", "value": "hunter22"}, {"name": "A", "value": "hunter22"}]}),
        ),
        (
            "secrets",
            json!({"secrets": [{"name": "A", "value": "hunter22", "hosts": ["a b"]}]}),
        ),
        (
            "maxAttempts",
            json!({"onRunnerLost": {"do": "retry", "maxAttempts": 1}}),
        ),
        ("group", json!({"group": "a/../b"})),
        ("surprise", json!({"surprise": 1})),
        ("policy", json!({"policy": {"rules": [{"hostt": "x"}]}})),
    ];
    for (field, body) in cases {
        let answer = client.post("/api/runs", run(body.clone())).await;
        assert_eq!(answer.problem(), ProblemKind::Invalid, "{body}");
        let text = answer.body.to_string();
        assert!(text.contains(field), "{field}: {text}");
        assert!(!text.contains("hunter22"), "{text}");
    }
    let foreign = client
        .post("/api/runs", run(json!({"group": "vm0/other"})))
        .await;
    assert_eq!(foreign.problem(), ProblemKind::Forbidden);
    for path in [
        "/api/runs?limit=0",
        "/api/runs?limit=x",
        "/api/runs?surprise=1",
        "/api/runs?cursor=x",
        "/api/runs?state=X",
    ] {
        assert_eq!(
            client.get(path).await.problem(),
            ProblemKind::Malformed,
            "{path}"
        );
    }
    assert_eq!(
        client.get("/api/runs/..%2f..").await.problem(),
        ProblemKind::NotFound
    );
    assert_eq!(
        client.get("/api/nothing").await.problem(),
        ProblemKind::NotFound
    );
    let wrong = client
        .try_send(client.request(Method::DELETE, "/api/runs"))
        .await
        .unwrap();
    assert_eq!(wrong.problem(), ProblemKind::MethodNotAllowed);
}

#[tokio::test(flavor = "multi_thread")]
async fn under_pressure_the_answer_is_429_with_retry_after() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let config = Config {
        max_queued: 2,
        limits: Ceilings {
            waiters: 1,
            followers: 1,
            ..Ceilings::default()
        },
        ..Config::default()
    };
    let replica = world.replica(config).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let first = client.create(json!({})).await.run_id;
    client.create(json!({})).await;
    let refused = client
        .request(Method::POST, "/api/runs")
        .json(&run(json!({})))
        .send()
        .await
        .unwrap();
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(refused.headers().contains_key("retry-after"));
    // One follower, one waiter.
    let path = format!("/api/runs/{first}/events");
    let _follower = client.stream(&path, None).await;
    assert_eq!(
        client.stream(&path, None).await.status(),
        StatusCode::TOO_MANY_REQUESTS
    );
    let waiting =
        json!({"runnerId": RunnerId::random(), "group": GROUP, "profiles": [], "waitSecs": 30});
    let waiter = {
        let (url, token, body) = (replica.url.clone(), world.runner.clone(), waiting.clone());
        tokio::spawn(async move { Api::new(&url, &token).post("/api/runners/poll", body).await })
    };
    let places = &replica.service.limits.waiters;
    crate::replica::eventually("the first one waits", || async {
        places.available_permits() == 0
    })
    .await;
    let second = runner.post("/api/runners/poll", waiting).await;
    assert_eq!(second.problem(), ProblemKind::TooManyRequests);
    waiter.abort();
}

/// Bodies that never arrive cost nobody a place but who sends them.
#[tokio::test(flavor = "multi_thread")]
async fn one_api_key_keeps_neither_other_groups_nor_runners_out() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let config = Config {
        limits: Ceilings {
            requests: 4,
            per_token: 6,
            ..Ceilings::default()
        },
        ..Config::default()
    };
    let replica = world.replica(config).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let other = Api::new(&replica.url, &world.other_client);
    let me = RunnerId::random();
    let id = client.create(json!({})).await.run_id;
    let guest = Api::new(&replica.url, &runner.claim(me, id).await.sandbox_token);

    let slow = Mutex::new(Vec::new());
    crate::replica::eventually("all of its places are taken", || async {
        // One more each time: what asks takes a place, too, and one that comes meanwhile may find none.
        let announced = announce(&replica.url, "/api/runs", &world.other_client, 1_000_000);
        slow.lock().unwrap().push(announced);
        other.get("/api/runs").await.status == StatusCode::TOO_MANY_REQUESTS
    })
    .await;
    let lease = json!({"runnerId": me, "epoch": 1});
    let renewed = runner.job(id, "renew", lease.clone()).await;
    assert_eq!(renewed.status, StatusCode::OK, "{renewed:?}");
    client.create(json!({})).await;
    drop(slow);
    crate::replica::eventually("its places come back", || async {
        other.get("/api/runs").await.status == StatusCode::OK
    })
    .await;

    let places = Arc::clone(&replica.service.limits.clients.requests);
    let _all = places.acquire_many_owned(4).await.unwrap();
    let refused = client.get("/api/runs").await;
    assert_eq!(refused.problem(), ProblemKind::TooManyRequests);
    let renewed = runner.job(id, "renew", lease).await;
    assert_eq!(renewed.status, StatusCode::OK, "{renewed:?}");
    let alive = guest
        .post("/api/webhooks/agent/heartbeat", json!({"runId": id}))
        .await;
    assert_eq!(alive.status, StatusCode::OK, "{alive:?}");
}

/// The beginning of a request whose body is announced and does not come.
fn announce(url: &str, path: &str, token: &str, bytes: usize) -> std::net::TcpStream {
    let address = url.strip_prefix("http://").unwrap();
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\n\
         Content-Type: application/json\r\nContent-Length: {bytes}\r\n\r\n{{"
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_come_one_by_one_within_the_room_that_there_is() {
    const CHECKPOINTS: &str = "/api/webhooks/agent/checkpoints";
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let config = Config {
        limits: Ceilings {
            body_kib: 10 << 10,
            ..Ceilings::default()
        },
        ..Config::default()
    };
    let replica = world.replica(config).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let me = RunnerId::random();
    let mut runs = Vec::new();
    for _ in 0..2 {
        let id = client.create(json!({"sessionId": "s-1"})).await.run_id;
        runs.push((id, runner.claim(me, id).await.sandbox_token));
    }
    let checkpoint = |n: usize, bytes: usize| {
        let (id, token) = &runs[n];
        let body = json!({"runId": id, "cliAgentType": "claude-code", "cliAgentSessionId": "s",
            "cliAgentSessionHistory": "x".repeat(bytes)});
        let guest = Api::new(&replica.url, token);
        async move { guest.post(CHECKPOINTS, body).await }
    };
    let room = &replica.service.limits.guests.bodies;
    let slow = announce(&replica.url, CHECKPOINTS, &runs[0].1, 9 << 20);
    crate::replica::eventually("the body has its room", || async {
        room.available_permits() == 1 << 10
    })
    .await;
    let second = checkpoint(0, 1).await;
    assert_eq!(second.problem(), ProblemKind::TooManyRequests);
    let large = checkpoint(1, 3 << 20).await;
    assert_eq!(large.problem(), ProblemKind::TooManyRequests);
    assert_eq!(checkpoint(1, 1 << 20).await.status, StatusCode::OK);
    drop(slow);
    crate::replica::eventually("the room comes back", || async {
        room.available_permits() == 10 << 10
    })
    .await;
    assert_eq!(checkpoint(0, 3 << 20).await.status, StatusCode::OK);

    // Of an ended run nothing is read.
    runner.complete(me, runs[0].0, 1).await.ok::<Value>();
    let mut late = announce(&replica.url, CHECKPOINTS, &runs[0].1, 9 << 20);
    let status = tokio::task::spawn_blocking(move || {
        let mut status = [0; 12];
        late.shutdown(std::net::Shutdown::Write).unwrap();
        late.read_exact(&mut status).unwrap();
        String::from_utf8_lossy(&status).into_owned()
    });
    assert_eq!(status.await.unwrap(), "HTTP/1.1 401");
}

#[tokio::test(flavor = "multi_thread")]
async fn group_policies_are_canonical_and_travel_with_claims() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let path = "/api/policies/vm0/demo";
    assert_eq!(client.get(path).await.problem(), ProblemKind::NotFound);
    let operator = Api::new(&replica.url, &world.operator);
    let rules = json!({"rules": [{"host": "Example.COM", "action": "deny"}]});
    let lifted = client.put(path, rules.clone()).await;
    assert_eq!(lifted.problem(), ProblemKind::Forbidden);
    operator.put(path, rules).await.ok::<Value>();
    let id = client.create(json!({})).await.run_id;
    let policy = runner
        .claim(RunnerId::random(), id)
        .await
        .group_policy
        .unwrap();
    assert_eq!(policy["rules"][0]["host"], "example.com");
    let senseless = operator.put(path, json!({"rules": 1})).await;
    assert_eq!(senseless.problem(), ProblemKind::Invalid);
    let gone = client
        .try_send(operator.request(Method::DELETE, path))
        .await
        .unwrap();
    assert_eq!(gone.status, StatusCode::NO_CONTENT);
    assert_eq!(client.get(path).await.problem(), ProblemKind::NotFound);
    let foreign = Api::new(&replica.url, &world.other_client).get(path).await;
    assert_eq!(foreign.problem(), ProblemKind::Forbidden);
}
