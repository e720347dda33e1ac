//! WebSockets: words to runners, and commands that operators run in their VMs.

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
use crate::replica::{Api, run};
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

    async fn receive(&mut self) -> Value {
        loop {
            if let Message::Text(text) = self.0.next().await.unwrap().unwrap() {
                return serde_json::from_str(&text).unwrap();
            }
        }
    }
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
    crate::replica::eventually("the fleet is known", || async {
        let fleet: Fleet = world.as_client(&fresh.url).get("/api/runners").await.ok();
        fleet.runners.len() == 1
    })
    .await;
}
