//! The master key is replaced while replicas run.

use std::process::{Command, Output, Stdio};

use api_types::RunnerId;
use api_types::client::Run;
use api_types::runner::FirewallSecrets;
use futures_util::StreamExt as _;
use reqwest::{Method, StatusCode};
use serde_json::json;
use web_api::service::{Config, Service, StartError};
use web_api::tokens::{KeyringError, MasterKey, MasterKeys};

use crate::nats::Kind;
use crate::replica::{Api, World, open, run};
use crate::world;

fn rotation(world: &World, old: &str, new: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vm0-api"));
    command
        .args(["master-key", "rotate", "--old"])
        .arg(world.nats.dir().join(old))
        .arg("--new")
        .arg(world.nats.dir().join(new))
        .env("VM0_NATS_URL", world.nats.url())
        .env("VM0_NATS_SYSTEM_URL", world.nats.system_url())
        .stdin(Stdio::null());
    command
}

async fn rotate(world: &World, old: &str, new: &str) -> Output {
    let mut command = rotation(world, old, new);
    tokio::task::spawn_blocking(move || command.output())
        .await
        .unwrap()
        .unwrap()
}

/// How many keys were wrapped anew, and how many were before.
fn counts(output: &Output) -> (usize, usize) {
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    let (anew, already) = text
        .trim()
        .strip_prefix("rewrapped ")
        .and_then(|rest| rest.split_once(", already "))
        .unwrap();
    (anew.parse().unwrap(), already.parse().unwrap())
}

fn read(world: &World, name: &str) -> MasterKey {
    MasterKey::read(&world.nats.dir().join(name)).unwrap()
}

fn masters(world: &World, first: &str, other: &str) -> MasterKeys {
    MasterKeys::new(read(world, first), vec![read(world, other)])
}

async fn starts(world: &World, masters: impl Into<MasterKeys>) -> Result<(), StartError> {
    let engine = open(&world.nats).await;
    Service::start(engine, masters, Default::default(), Config::default())
        .await
        .map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_key_is_replaced_while_runs_with_secrets_wait() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    MasterKey::write_new(&world.nats.dir().join("new.key")).unwrap();
    let before = world.replica(Config::default()).await;
    let secret = json!([{"name": "KEY", "value": "hunter22", "hosts": ["api.example.com"]}]);
    let body = run(json!({"secrets": secret}));
    let create = |url: String| {
        let client = Api::new(&url, &world.client);
        let request = client
            .request(Method::POST, "/api/runs")
            .header("Idempotency-Key", "build-42")
            .json(&body);
        async move { request.send().await.unwrap() }
    };
    let answer = create(before.url.clone()).await;
    assert_eq!(answer.status(), StatusCode::CREATED);
    let id = answer.json::<Run>().await.unwrap().run_id;
    let me = RunnerId::random();
    let token = world
        .as_runner(&before.url)
        .claim(me, id)
        .await
        .sandbox_token;

    // The three steps of docs/api-mode.md: both files, rotate, the other way round.
    let new = world.nats.dir().join("new.key");
    let both = world.process(&["--other-master-key", new.to_str().unwrap()]);
    let (anew, already) = counts(&rotate(&world, "master.key", "new.key").await);
    assert!(anew >= 3 && already == 0, "{anew} {already}");
    let (anew, already) = counts(&rotate(&world, "master.key", "new.key").await);
    assert!(anew == 0 && already >= 3, "said again, it changes nothing");
    starts(&world, read(&world, "new.key")).await.unwrap();
    let error = starts(&world, read(&world, "master.key"))
        .await
        .unwrap_err();
    assert!(
        matches!(error, StartError::Keyring(KeyringError::Foreign(_))),
        "{error}"
    );
    assert!(error.to_string().contains("--other-master-key"), "{error}");
    let after = world
        .replica_with(
            masters(&world, "new.key", "master.key"),
            Config::default(),
            0,
        )
        .await;
    // Everywhere: the same request is the same run, its token and its secrets are good.
    for url in [&before.url, &both.url, &after.url] {
        let again = create(url.clone()).await;
        assert_eq!(again.status(), StatusCode::OK, "{url}");
        assert_eq!(again.json::<Run>().await.unwrap().run_id, id);
        let alive = Api::new(url, &token)
            .post("/api/webhooks/agent/heartbeat", json!({"runId": id}))
            .await;
        assert_eq!(alive.status, StatusCode::OK, "{alive:?}");
        let ask = json!({"runId": id, "runnerId": me, "epoch": 1});
        let secrets: FirewallSecrets = world
            .as_runner(url)
            .post("/api/webhooks/agent/firewall/auth", ask)
            .await
            .ok();
        assert_eq!(secrets.secrets[0].value, "hunter22");
    }
    // A file that wrapped nothing is told, and changes nothing.
    MasterKey::write_new(&world.nats.dir().join("third.key")).unwrap();
    let wrong = rotate(&world, "third.key", "master.key").await;
    assert!(!wrong.status.success());
    starts(&world, read(&world, "new.key")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_that_is_killed_half_way_is_finished_by_the_next() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    MasterKey::write_new(&world.nats.dir().join("new.key")).unwrap();
    let replica = world.replica(Config::default()).await;
    let mut sealed = Vec::new();
    for day in 0..150_i64 {
        replica.clock.set_offset(day * 25 * 3600 * 1000);
        sealed.push(
            replica
                .service
                .keyring
                .seal("run", b"hunter22")
                .await
                .unwrap(),
        );
    }
    let keys = replica.service.engine.keys.messages().await.unwrap();
    let (mut old, mut new) = ("master.key", "new.key");
    for turn in 0.. {
        let mut watch = replica.service.engine.keys.watch().await.unwrap();
        while watch.next().await.unwrap().unwrap().delta > 0 {}
        let mut command = rotation(&world, old, new);
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        // Some keys are wrapped anew by now.
        watch.next().await.unwrap().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        if let Err(error) = starts(&world, read(&world, new)).await {
            assert!(
                matches!(error, StartError::Keyring(KeyringError::Foreign(_))),
                "{error}"
            );
            break;
        }
        // It had done all of it before it was killed. The other way round there is as much to do.
        assert!(turn < 10, "no rotation is killed half way");
        (old, new) = (new, old);
    }
    for (first, other) in [(old, new), (new, old)] {
        starts(&world, masters(&world, first, other)).await.unwrap();
    }
    let (anew, already) = counts(&rotate(&world, old, new).await);
    assert!(anew >= 1 && already >= 1, "{anew} {already}");
    assert_eq!(anew + already, usize::try_from(keys).unwrap());
    let after = world
        .replica_with(read(&world, new), Config::default(), 0)
        .await;
    for sealed in &sealed {
        let opened = after.service.keyring.open_sealed("run", sealed).await;
        assert_eq!(opened.unwrap().as_slice(), b"hunter22");
    }
}
