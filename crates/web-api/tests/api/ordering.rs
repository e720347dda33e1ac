//! What is done at the same time, or told late: the place of a run, checkpoints, removals.

use std::collections::BTreeSet;

use api_types::RunnerId;
use bytes::Bytes;
use futures_util::future::join_all;
use serde_json::json;
use web_api::engine::Swap;
use web_api::service::Config;
use web_api::tokens::{BearerKind, Bearers, new_bearer};

use crate::nats::Kind;
use crate::replica::open;
use crate::world;

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_spoken_to_while_it_waits_keeps_its_place() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let (client, runner) = (world.as_client(&replica.url), world.as_runner(&replica.url));
    let first = client.create(json!({"acceptsInput": true})).await.run_id;
    let second = client.create(json!({})).await.run_id;
    for text in ["a", "b"] {
        let said = client.post_owned(format!("/api/runs/{first}/input"), json!({"text": text}));
        assert!(said.await.status.is_success());
    }
    let me = RunnerId::random();
    assert_eq!(runner.poll(me, 5).await.unwrap().run_id, first);
    assert_eq!(runner.poll(me, 5).await.unwrap().run_id, second);
    // Also where it is claimed and given back after that.
    let epoch = runner.claim(me, first).await.epoch;
    let lease = json!({"runnerId": me, "epoch": epoch});
    let back = runner.job(first, "release", lease).await;
    assert!(back.status.is_success(), "{back:?}");
    let third = client.create(json!({})).await.run_id;
    assert_eq!(runner.poll(me, 5).await.unwrap().run_id, first);
    assert_eq!(runner.poll(me, 5).await.unwrap().run_id, third);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_checkpoints_that_come_at_once_one_is_kept_whole_and_nothing_of_the_others() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let engine = open(&world.nats).await;
    for round in 0..3_u32 {
        let all = (0..6_u32).map(|n| {
            let (name, engine) = (format!("{round}-{n}"), &engine);
            async move {
                let history = name.repeat(1000);
                engine
                    .keep_checkpoint("vm0.demo.00", name, history.as_bytes())
                    .await
            }
        });
        for kept in join_all(all).await {
            kept.unwrap();
        }
        let kept = engine.checkpoint("vm0.demo.00").await.unwrap().unwrap();
        assert!(kept.cli_session.starts_with(&format!("{round}-")));
        assert!(kept.history == kept.cli_session.repeat(1000).as_bytes());
    }
    let nothing = BTreeSet::new();
    assert_eq!(engine.remove_strays(&nothing).await.unwrap(), nothing);

    // A history whose record was never written, because its writer was killed.
    engine.put_blob("session/lost", b"x").await.unwrap();
    let lost = BTreeSet::from(["session/lost".to_owned()]);
    assert_eq!(engine.remove_strays(&nothing).await.unwrap(), lost);
    assert_eq!(engine.remove_strays(&lost).await.unwrap(), nothing);
    assert_eq!(engine.blob("session/lost").await.unwrap(), None);
    assert!(engine.checkpoint("vm0.demo.00").await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_removed_at_a_revision_is_that_revision_and_a_revocation_is_never_forgotten() {
    let Some(world) = world(Kind::default()).await else {
        return;
    };
    let engine = open(&world.nats).await;
    let bucket = &engine.policies;
    let Swap::Done(first) = bucket.create("k", Bytes::from("1")).await.unwrap() else {
        panic!("nothing was there");
    };
    assert!(bucket.remove_at("k", first).await.unwrap());
    assert!(!bucket.remove_at("k", first).await.unwrap());
    let Swap::Done(second) = bucket.create("k", Bytes::from("2")).await.unwrap() else {
        panic!("it was removed");
    };
    assert!(!bucket.remove_at("k", first).await.unwrap());
    assert_eq!(bucket.get("k").await.unwrap().unwrap().revision, second);

    let (_, id, record) = new_bearer(BearerKind::Runner, "metal-1", BTreeSet::new(), 1).unwrap();
    let bearers = Bearers::new(engine.tokens.clone());
    bearers.add(&id, &record).await.unwrap();
    assert!(bearers.revoke(&id).await.unwrap());
    bucket.remove("k").await.unwrap();
    let context = async_nats::jetstream::new(world.nats.client().await);
    let lifetime = async |bucket: &str, key: &str| {
        let stream = context
            .get_stream(format!("KV_vm0_{bucket}"))
            .await
            .unwrap();
        let subject = format!("$KV.vm0_{bucket}.{key}");
        let mark = stream
            .get_last_raw_message_by_subject(&subject)
            .await
            .unwrap();
        mark.headers.get("Nats-TTL").map(ToString::to_string)
    };
    assert!(lifetime("policies", "k").await.is_some());
    assert_eq!(lifetime("tokens", &id).await, None);
}
