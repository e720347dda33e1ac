//! WebSockets: words to runners, and commands that operators run in their VMs.

use std::time::Duration;

use api_types::client::Run;
use api_types::runner::Fleet;
use api_types::{RunId, RunnerId};
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{ClientRequestBuilder, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};
use web_api::service::Config;

use crate::nats::Kind;
use crate::replica::{Api, Replica, World, eventually, run};
use crate::world;

/// One end of a WebSocket.
struct Socket(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Socket {
    async fn open(url: String, token: &str) -> Self {
        let uri = url.replace("http://", "ws://").parse().unwrap();
        let request =
            ClientRequestBuilder::new(uri).with_header("Authorization", format!("Bearer {token}"));
        Self(tokio_tungstenite::connect_async(request).await.unwrap().0)
    }

    async fn runner(url: &str, token: &str, runner: RunnerId, group: &str) -> Self {
        let url = format!("{url}/api/runners/connect?runnerId={runner}&group={group}");
        Self::open(url, token).await
    }

    /// Of an operator who wants `cat` run.
    async fn exec(url: &str, token: &str, run: RunId) -> Self {
        let url = format!("{url}/api/runs/{run}/exec?argv=%5B%22cat%22%5D&columns=80&rows=24");
        Self::open(url, token).await
    }

    async fn send(&mut self, value: Value) {
        self.0.send(Message::text(value.to_string())).await.unwrap();
    }

    /// The next word of this kind.
    async fn until(&mut self, kind: &str) -> Value {
        let found = async {
            loop {
                let word = self.receive().await;
                if word["type"] == kind {
                    return word;
                }
            }
        };
        let found = tokio::time::timeout(Duration::from_secs(60), found).await;
        found.unwrap_or_else(|_| panic!("never: {kind}"))
    }

    async fn receive(&mut self) -> Value {
        loop {
            if let Message::Text(text) = self.0.next().await.unwrap().unwrap() {
                return serde_json::from_str(&text).unwrap();
            }
        }
    }
}

/// A replica at which a runner has a run, with what is needed to talk about it.
struct Stage {
    world: World,
    replica: Replica,
    me: RunnerId,
    run: RunId,
}

impl Stage {
    /// At a replica that pings, and gives up who is silent, so often that a test can wait for it.
    async fn new() -> Option<Self> {
        Self::with(Config {
            ping: PING,
            ..Config::default()
        })
        .await
    }

    async fn with(config: Config) -> Option<Self> {
        let world = world(Kind::default()).await?;
        let replica = world.replica(config).await;
        let me = RunnerId::random();
        let run = world.as_client(&replica.url).create(json!({})).await.run_id;
        world.as_runner(&replica.url).claim(me, run).await;
        Some(Self {
            world,
            replica,
            me,
            run,
        })
    }

    async fn runner(&self) -> Socket {
        Socket::runner(&self.replica.url, &self.world.runner, self.me, "vm0/demo").await
    }

    async fn operator(&self) -> Socket {
        Socket::exec(&self.replica.url, &self.world.client, self.run).await
    }
}

/// Who does not read while a test is busy elsewhere answers no ping, and is given up after three times as long.
const PING: Duration = Duration::from_secs(2);

/// The id in a token.
fn id(token: &str) -> &str {
    token.rsplit('_').nth(1).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_on_with_a_token_ends_when_it_is_revoked() {
    let Some(stage) = Stage::new().await else {
        return;
    };
    let mut runner = stage.runner().await;
    let mut operator = stage.operator().await;
    let start = runner.receive().await;
    assert_eq!(start["type"], "execStart");
    assert_eq!(start["by"], id(&stage.world.client));
    let bearers = &stage.replica.service.bearers;
    assert!(bearers.revoke(id(&stage.world.client)).await.unwrap());
    // The runner answers pings meanwhile.
    let listening = tokio::spawn(async move { while let Some(Ok(_)) = runner.0.next().await {} });
    assert_eq!(reason(&mut operator).await, "the API key was revoked");
    assert!(bearers.revoke(id(&stage.world.runner)).await.unwrap());
    tokio::time::timeout(Duration::from_secs(60), listening)
        .await
        .expect("the runner's WebSocket ends")
        .unwrap();
}

/// The command's last word, which says why it ended.
async fn reason(operator: &mut Socket) -> String {
    let exit = operator.until("execExit").await;
    exit["error"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_ends_with_a_word_when_its_runner_or_run_does() {
    let Some(stage) = Stage::new().await else {
        return;
    };
    let mut runner = stage.runner().await;
    // Both say nothing yet, as a command may.
    let mut cut = stage.operator().await;
    assert_eq!(runner.receive().await["type"], "execStart");
    drop(runner);
    let why = reason(&mut cut).await;
    assert!(why.contains("WebSocket has ended"), "{why}");

    let mut runner = stage.runner().await;
    let mut over = stage.operator().await;
    assert_eq!(runner.receive().await["type"], "execStart");
    // The runner answers pings meanwhile.
    let listening = tokio::spawn(async move { while let Some(Ok(_)) = runner.0.next().await {} });
    let (url, world) = (&stage.replica.url, &stage.world);
    let ended = world.as_runner(url).complete(stage.me, stage.run, 1).await;
    assert!(ended.status.is_success(), "{ended:?}");
    let why = reason(&mut over).await;
    assert!(why.contains("the run has ended"), "{why}");
    listening.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_whose_operator_is_silent_is_ended_at_the_runner() {
    let Some(stage) = Stage::new().await else {
        return;
    };
    let mut runner = stage.runner().await;
    // Not read, so no ping is answered.
    let _operator = stage.operator().await;
    let start = runner.until("execStart").await;
    let end = runner.until("execEnd").await;
    assert_eq!(end["execId"], start["execId"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_whose_answers_get_lost_or_stop_is_ended_with_a_word() {
    let Some(stage) = Stage::new().await else {
        return;
    };
    let nats = stage.world.nats.client().await;
    let subject = format!("vm0.push.vm0.demo.{}", stage.me);
    let mut pushes = nats.subscribe(subject).await.unwrap();
    nats.flush().await.unwrap();
    for (numbers, expected) in [
        // Of a replica that is killed nothing comes any more.
        (&["0"][..], "nothing is heard"),
        (&["0", "1", "3"][..], "lost on its way"),
    ] {
        let mut operator = stage.operator().await;
        let start = loop {
            let push = pushes.next().await.unwrap();
            let push: Value = serde_json::from_slice(&push.payload).unwrap();
            if push["type"] == "execStart" {
                break push;
            }
        };
        let id = start["execId"].as_str().unwrap();
        for number in numbers {
            let mut headers = async_nats::HeaderMap::new();
            headers.insert("Vm0-Number", *number);
            let output = json!({"type": "execOutput", "execId": id, "data": "aGk="}).to_string();
            let body = if *number == "0" { "" } else { &output };
            nats.publish_with_headers(format!("vm0.exec.{id}"), headers, body.to_owned().into())
                .await
                .unwrap();
        }
        let why = reason(&mut operator).await;
        assert!(why.contains(expected), "{why}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_who_reads_too_slowly_is_given_up_and_told() {
    let Some(stage) = Stage::with(Config::default()).await else {
        return;
    };
    let mut runner = stage.runner().await;
    let mut operator = stage.operator().await;
    let id = runner.receive().await["execId"].clone();
    // Many times what waits for one, beside what the kernel holds.
    let data = "QUJD".repeat(32 << 10);
    let output = json!({"type": "execOutput", "execId": id, "data": data});
    for _ in 0..800 {
        runner.send(output.clone()).await;
    }
    assert_eq!(runner.until("execEnd").await["execId"], id);
    let why = reason(&mut operator).await;
    assert!(why.contains("more than is read"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn input_that_a_runner_does_not_read_ends_its_command_and_no_other() {
    let Some(stage) = Stage::with(Config::default()).await else {
        return;
    };
    let mut runner = stage.runner().await;
    let mut calm = stage.operator().await;
    let calm_id = runner.until("execStart").await["execId"].clone();
    let mut hasty = stage.operator().await;
    let hasty_id = runner.until("execStart").await["execId"].clone();
    let data = "QUJD".repeat(32 << 10);
    for _ in 0..800 {
        let input = json!({"type": "execInput", "execId": "", "data": data});
        // It is told before it has said all.
        if hasty
            .0
            .send(Message::text(input.to_string()))
            .await
            .is_err()
        {
            break;
        }
    }
    let why = reason(&mut hasty).await;
    assert!(why.contains("than it reads"), "{why}");
    assert_eq!(runner.until("execEnd").await["execId"], hasty_id);
    let exit = json!({"type": "execExit", "execId": calm_id, "exitCode": 0, "error": null});
    runner.send(exit).await;
    assert_eq!(calm.until("execExit").await["exitCode"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_is_told_at_once_and_an_exec_goes_through_two_replicas() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let (a, b) = (
        world.replica(Config::default()).await,
        world.replica(Config::default()).await,
    );
    let me = RunnerId::random();
    let mut socket = Socket::runner(&a.url, &world.runner, me, "vm0/demo").await;
    socket
        .send(json!({"type": "ready", "profiles": ["vm0/small"]}))
        .await;
    let run = world.as_client(&b.url).create(json!({})).await.run_id;
    let job = socket.receive().await;
    assert_eq!(
        (job["type"].as_str(), job["runId"].as_str()),
        (Some("job"), Some(run.to_string().as_str()))
    );
    world.as_runner(&a.url).claim(me, run).await;

    // An operator at the other replica.
    let mut operator = Socket::exec(&b.url, &world.client, run).await;
    let start = socket.receive().await;
    assert_eq!(
        (start["type"].as_str(), &start["argv"], &start["pty"]),
        (Some("execStart"), &json!(["cat"]), &json!([80, 24]))
    );
    let id = start["execId"].clone();
    operator
        .send(json!({"type": "execInput", "execId": "", "data": "aGk="}))
        .await;
    let input = socket.receive().await;
    assert_eq!(
        (&input["execId"], input["data"].as_str()),
        (&id, Some("aGk="))
    );
    socket
        .send(json!({"type": "execOutput", "execId": id, "data": "aGk="}))
        .await;
    socket
        .send(json!({"type": "execExit", "execId": id, "exitCode": 0, "error": null}))
        .await;
    assert_eq!(operator.receive().await["type"], "execOutput");
    assert_eq!(operator.receive().await["exitCode"], 0);

    world
        .as_client(&b.url)
        .post(&format!("/api/runs/{run}/cancel"), json!({}))
        .await
        .ok::<Run>();
    let look = socket.receive().await;
    assert_eq!(
        (look["type"].as_str(), look["epoch"].as_u64()),
        (Some("look"), Some(1))
    );
}

/// An id is no secret: another group's runner may say it, and is another runner then.
#[tokio::test(flavor = "multi_thread")]
async fn a_runners_id_opens_nothing_in_another_group() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let url = &replica.url;
    let (client, runner) = (world.as_client(url), world.as_runner(url));
    let (other_client, other_runner) = (
        Api::new(url, &world.other_client),
        Api::new(url, &world.other_runner),
    );
    let me = RunnerId::random();
    let ours = client.create(json!({})).await.run_id;
    runner.claim(me, ours).await;
    let theirs: Run = other_client
        .post("/api/runs", run(json!({"group": "vm0/other"})))
        .await
        .ok();
    other_runner.claim(me, theirs.run_id).await;

    let mut spy = Socket::runner(url, &world.other_runner, me, "vm0/other").await;
    let mut socket = Socket::runner(url, &world.runner, me, "vm0/demo").await;
    let _operator = Socket::exec(url, &world.client, ours).await;
    assert_eq!(socket.receive().await["type"], "execStart");
    // What comes for the other runner comes behind what would have come before.
    other_client
        .post(&format!("/api/runs/{}/cancel", theirs.run_id), json!({}))
        .await
        .ok::<Run>();
    let look = spy.receive().await;
    assert_eq!(look["runId"], json!(theirs.run_id), "{look}");

    let beat = |group: &str, mode: &str| {
        json!({"runnerId": me, "runnerName": "metal-1", "group": group, "profiles": ["vm0/small"], "mode": mode,
            "heldSessions": []})
    };
    for (who, group, mode) in [
        (&runner, "vm0/demo", "running"),
        (&other_runner, "vm0/other", "running"),
        (&other_runner, "vm0/other", "stopped"),
    ] {
        let answer = who.post("/api/runners/heartbeat", beat(group, mode)).await;
        assert!(answer.status.is_success(), "{answer:?}");
    }
    let fleet: Fleet = client.get("/api/runners").await.ok();
    assert_eq!(fleet.runners.len(), 1, "{fleet:?}");
    // Also at a replica that knows only what NATS keeps.
    let fresh = world.replica(Config::default()).await;
    eventually("the fleet is known", || async {
        let fleet: Fleet = world.as_client(&fresh.url).get("/api/runners").await.ok();
        fleet.runners.len() == 1
    })
    .await;
}
