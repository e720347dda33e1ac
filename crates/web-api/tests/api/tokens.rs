//! Each token opens its own paths, for its own time, and no others.

use std::collections::BTreeSet;
use std::time::Duration;

use api_types::client::Run;
use api_types::runner::FirewallSecrets;
use api_types::{ProblemKind, RunnerId};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as B64;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use web_api::service::{Config, Service, StartError};
use web_api::tokens::{BearerKind, KeyringError, MasterKey, new_bearer};

use crate::nats::Kind;
use crate::replica::{Api, GROUP, eventually, open};
use crate::world;

const HEARTBEAT: &str = "/api/webhooks/agent/heartbeat";

/// Every path of the description, with every method that it has.
fn all_paths(run: &str) -> Vec<(Method, String)> {
    let openapi = web_api::http::openapi().unwrap();
    let mut all = Vec::new();
    for (path, methods) in openapi["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let path = path
                .replace("{run}", run)
                .replace("{org}", "vm0")
                .replace("{name}", "demo");
            all.push((method.to_uppercase().parse().unwrap(), path));
        }
    }
    all
}

const OPEN: [&str; 3] = ["/healthz", "/readyz", "/openapi.json"];
const WEBHOOKS: [&str; 5] = [
    "heartbeat",
    "events",
    "telemetry",
    "checkpoints",
    "complete",
];

#[tokio::test(flavor = "multi_thread")]
async fn a_guests_token_opens_its_own_webhooks_and_nothing_else() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let client = world.as_client(&replica.url);
    let runner = world.as_runner(&replica.url);
    let me = RunnerId::random();
    let (mine, others) = (
        client.create(json!({})).await.run_id,
        client.create(json!({})).await.run_id,
    );
    let token = runner.claim(me, mine).await.sandbox_token;
    runner.claim(me, others).await;
    let guest = Api::new(&replica.url, &token);
    let paths = all_paths(&mine.to_string());
    assert!(paths.len() > 25, "{paths:?}");
    for (method, path) in paths {
        let own = WEBHOOKS
            .iter()
            .any(|hook| path == format!("/api/webhooks/agent/{hook}"));
        if own || OPEN.contains(&path.as_str()) {
            continue;
        }
        let body = json!({"runId": mine, "runnerId": me, "epoch": 1});
        let query = format!("{path}?runnerId={me}&group={GROUP}&epoch=1&argv=[]");
        let path = if method == Method::GET { query } else { path };
        let answer = guest
            .try_send(guest.request(method, &path).json(&body))
            .await
            .unwrap();
        assert_eq!(
            answer.status,
            StatusCode::UNAUTHORIZED,
            "{path}: {answer:?}"
        );
        assert_eq!(answer.problem(), ProblemKind::Unauthorized);
    }
    let body = |run| json!({"runId": run, "events": [], "cliAgentSessionId": "c", "cliAgentSessionHistory": "", "exitCode": 0});
    for hook in WEBHOOKS {
        let path = format!("/api/webhooks/agent/{hook}");
        let foreign = guest.post(&path, body(others)).await;
        assert_eq!(foreign.problem(), ProblemKind::Forbidden, "{hook}");
        let own = guest.post(&path, body(mine)).await;
        assert!(own.status.is_success(), "{hook}: {own:?}");
    }
    // The run's end is the token's.
    runner.complete(me, mine, 1).await.ok::<Run>();
    for hook in WEBHOOKS {
        let late = guest
            .post(&format!("/api/webhooks/agent/{hook}"), body(mine))
            .await;
        assert_eq!(late.problem(), ProblemKind::Unauthorized, "{hook}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_but_health_and_description_is_open_and_no_kind_opens_anothers() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let run = world.as_client(&replica.url).create(json!({})).await.run_id;
    for (method, path) in all_paths(&run.to_string()) {
        if OPEN.contains(&path.as_str()) {
            continue;
        }
        for token in [
            "",
            "x",
            "vm0_key_0123456789abcdef_",
            "vm0_runner_0123456789abcdef_00",
        ] {
            let api = Api::new(&replica.url, token);
            let query = format!(
                "{path}?runnerId={}&group={GROUP}&epoch=1&argv=[]",
                RunnerId::random()
            );
            let answer = api
                .try_send(api.request(method.clone(), &query).json(&json!({})))
                .await
                .unwrap();
            assert_eq!(
                answer.status,
                StatusCode::UNAUTHORIZED,
                "{method} {path}: {answer:?}"
            );
        }
        // A client's key opens nothing of runners, a runner's nothing of clients; both nothing of guests.
        let runners = path.starts_with("/api/runners/") || path.ends_with("/firewall/auth");
        let guests = path.starts_with("/api/webhooks/") && !runners;
        for (token, may) in [
            (&world.client, !runners && !guests),
            (&world.runner, runners),
        ] {
            if may {
                continue;
            }
            let api = Api::new(&replica.url, token);
            let query = format!(
                "{path}?runnerId={}&group={GROUP}&epoch=1&argv=[]",
                RunnerId::random()
            );
            let answer = api
                .try_send(api.request(method.clone(), &query).json(&json!({})))
                .await
                .unwrap();
            let refused = [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN];
            assert!(
                refused.contains(&answer.status),
                "{method} {path}: {answer:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_changed_and_foreign_tokens_are_refused() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let client = world.as_client(&replica.url);
    let id = client.create(json!({})).await.run_id;
    let token = world
        .as_runner(&replica.url)
        .claim(RunnerId::random(), id)
        .await
        .sandbox_token;
    let parts: Vec<&str> = token.split('.').collect();
    let [header, claims, signature] = parts[..] else {
        panic!("{token}")
    };
    let decode =
        |part: &str| -> Value { serde_json::from_slice(&B64.decode(part).unwrap()).unwrap() };
    let encode = |value: &Value| B64.encode(value.to_string());
    let with = |part: &str, key: &str, value: Value| {
        let mut changed = decode(part);
        changed[key] = value;
        encode(&changed)
    };
    let signed = |header: &str, claims: &str, secret: &[u8]| {
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, secret);
        let text = format!("{header}.{claims}");
        format!(
            "{text}.{}",
            B64.encode(aws_lc_rs::hmac::sign(&key, text.as_bytes()))
        )
    };
    let none = with(header, "alg", json!("none"));
    let forged = [
        format!("{}.{claims}.", none),
        format!("{}.{claims}.{signature}", none),
        format!(
            "{}.{claims}.{signature}",
            with(header, "alg", json!("HS512"))
        ),
        format!(
            "{}.{claims}.{signature}",
            with(header, "kid", json!("0123456789abcdef"))
        ),
        format!(
            "{}.{claims}.{signature}",
            with(header, "kid", json!("../sign.x"))
        ),
        format!("{header}.{}.{signature}", with(claims, "epoch", json!(2))),
        format!(
            "{header}.{}.{signature}",
            with(claims, "exp", json!(u32::MAX))
        ),
        format!(
            "{header}.{}.{signature}",
            with(claims, "sub", json!(RunnerId::random()))
        ),
        format!("{header}.{claims}.{}", B64.encode([0; 32])),
        format!("{header}.{claims}"),
        format!("{header}.{claims}.{}", &signature[1..]),
        signed(header, claims, b""),
        signed(header, claims, b"secret"),
        "x".repeat(100_000),
    ];
    for token in &forged {
        let shown: String = token.chars().take(300).collect();
        let request = reqwest::Client::new()
            .post(format!("{}{HEARTBEAT}", replica.url))
            .bearer_auth(token)
            .json(&json!({"runId": id}));
        match request.send().await {
            // The server may end a connection whose headers are too large.
            Err(error) => assert!(token.len() > 10_000, "{shown}: {error}"),
            Ok(answer) => assert!(
                [401, 431].contains(&answer.status().as_u16()),
                "{shown}: {}",
                answer.status()
            ),
        }
    }
    // The real one, to know that it was not something else.
    let alive = Api::new(&replica.url, &token)
        .post(HEARTBEAT, json!({"runId": id}))
        .await;
    assert_eq!(alive.status, StatusCode::OK);
    // And that of another installation, with keys of its own.
    let Some(elsewhere) = crate::world(Kind::default()).await else {
        return;
    };
    let there = elsewhere.replica(Config::default()).await;
    let foreign = Api::new(&there.url, &token)
        .post(HEARTBEAT, json!({"runId": id}))
        .await;
    assert_eq!(foreign.problem(), ProblemKind::Unauthorized);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_expires_by_the_replicas_clock_with_five_minutes_to_spare() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let id = world
        .as_client(&replica.url)
        .create(json!({"timeoutSecs": 60}))
        .await
        .run_id;
    let runner = world.as_runner(&replica.url);
    let token = runner.claim(RunnerId::random(), id).await.sandbox_token;
    let guest = Api::new(&replica.url, &token);
    let lifetime = (60 + 600) * 1000;
    let spare = 300 * 1000;
    // The claim was a while ago, so only two of the ends can be told to the second.
    for (offset, status) in [
        (0, 200),
        (-spare + 2000, 200),
        (-spare - 60_000, 401),
        (lifetime + spare - 60_000, 200),
        (lifetime + spare + 2000, 401),
    ] {
        replica.clock.set_offset(offset);
        let answer = guest.post(HEARTBEAT, json!({"runId": id})).await;
        assert_eq!(answer.status.as_u16(), status, "{offset}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_rotate_and_what_the_old_ones_made_stays_good() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let (a, b) = (
        world.replica(Config::default()).await,
        world.replica(Config::default()).await,
    );
    let runner = world.as_runner(&a.url);
    let secret = json!([{"name": "KEY", "value": "hunter22", "hosts": ["api.example.com"]}]);
    let week = json!({"secrets": secret, "timeoutSecs": 604_800});
    let me = RunnerId::random();
    let id = world.as_client(&a.url).create(week).await.run_id;
    let old = runner.claim(me, id).await.sandbox_token;
    let kid = |token: &str| B64.decode(token.split('.').next().unwrap()).unwrap();
    let day = 25 * 3600 * 1000;
    a.clock.set_offset(day);
    b.clock.set_offset(day);
    let next = world.as_client(&a.url).create(json!({})).await.run_id;
    let new = runner.claim(me, next).await.sandbox_token;
    assert_ne!(kid(&old), kid(&new));
    // The other replica has not made the new key, and learns it from the token.
    for (token, id) in [(&old, id), (&new, next)] {
        let alive = Api::new(&b.url, token)
            .post(HEARTBEAT, json!({"runId": id}))
            .await;
        assert_eq!(alive.status, StatusCode::OK, "{alive:?}");
    }
    let ask = json!({"runId": id, "runnerId": me, "epoch": 1});
    let secrets: FirewallSecrets = world
        .as_runner(&b.url)
        .post("/api/webhooks/agent/firewall/auth", ask)
        .await
        .ok();
    assert_eq!(secrets.secrets[0].value, "hunter22");
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_for_the_claims_runner_only_and_nowhere_in_the_clear() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let value = "correct-horse-battery";
    let id = client
        .create(json!({"secrets": [{"name": "KEY", "value": value}]}))
        .await
        .run_id;
    let me = RunnerId::random();
    let context = runner.try_claim(me, id).await;
    assert!(
        !context.body.to_string().contains(value),
        "the claim has names only"
    );
    let token = context.body["sandboxToken"].as_str().unwrap().to_owned();
    let path = "/api/webhooks/agent/firewall/auth";
    let ask =
        |runner: RunnerId, epoch: u64| json!({"runId": id, "runnerId": runner, "epoch": epoch});
    let secrets: FirewallSecrets = runner.post(path, ask(me, 1)).await.ok();
    assert_eq!(secrets.secrets[0].value, value);
    for (who, epoch) in [(RunnerId::random(), 1), (me, 0), (me, 2)] {
        assert_eq!(
            runner.post(path, ask(who, epoch)).await.problem(),
            ProblemKind::LeaseLost
        );
    }
    let guest = Api::new(&replica.url, &token).post(path, ask(me, 1)).await;
    assert_eq!(guest.problem(), ProblemKind::Unauthorized);
    let foreign = Api::new(&replica.url, &world.other_runner)
        .post(path, ask(me, 1))
        .await;
    assert_eq!(foreign.problem(), ProblemKind::NotFound);
    runner.complete(me, id, 1).await.ok::<Run>();
    assert_eq!(
        runner.post(path, ask(me, 1)).await.problem(),
        ProblemKind::LeaseLost
    );
    // Everything that NATS has on disk.
    let token_secret = world.client.rsplit('_').next().unwrap();
    let master = std::fs::read_to_string(&world.key_file).unwrap();
    let mut files = 0;
    let mut left = vec![world.nats.dir().join("n0")];
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(
                std::fs::read_dir(path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
            continue;
        }
        let Ok(bytes) = std::fs::read(&path) else {
            continue;
        };
        files += 1;
        for needle in [
            value,
            token_secret,
            master.trim(),
            token.rsplit('.').next().unwrap(),
        ] {
            let found = bytes
                .windows(needle.len())
                .any(|window| window == needle.as_bytes());
            assert!(!found, "{needle} is in {}", path.display());
        }
    }
    assert!(files > 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_token_is_refused_by_every_replica() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let groups = BTreeSet::from([GROUP.parse().unwrap()]);
    let (token, id, record) = new_bearer(BearerKind::Client, "x", groups, 0).unwrap();
    replica.service.bearers.add(&id, &record).await.unwrap();
    let client = Api::new(&replica.url, &token);
    assert_eq!(client.get("/api/runs").await.status, StatusCode::OK);
    let elsewhere = world.replica(Config::default()).await;
    assert!(elsewhere.service.bearers.revoke(&id).await.unwrap());
    eventually("the token is refused", || async {
        client.get("/api/runs").await.status == StatusCode::UNAUTHORIZED
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_with_another_master_key_does_not_start() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let _replica = world.replica(Config::default()).await;
    let path = world.nats.dir().join("other.key");
    MasterKey::write_new(&path).unwrap();
    let master = MasterKey::read(&path).unwrap();
    let engine = open(&world.nats).await;
    let started = tokio::time::timeout(
        Duration::from_secs(20),
        Service::start(engine, master, Default::default(), Config::default()),
    );
    let error = started.await.unwrap().unwrap_err();
    assert!(
        matches!(error, StartError::Keyring(KeyringError::Foreign(_))),
        "{error}"
    );
    assert!(error.to_string().contains("same master key file"));
}
