//! A cluster is worth what it keeps copies of.

use std::process::Stdio;

use tokio::process::Command;
use web_api::tokens::MasterKey;

use crate::nats::{Kind, Nats};
use crate::replica::eventually;
use crate::skip;

/// As who follows the docs, whose first command makes a token, and forgets to say how many copies there are to be.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_does_not_start_over_fewer_copies_than_it_was_told() {
    let kind = Kind {
        nodes: 3,
        ..Kind::default()
    };
    let nats = match Nats::start(kind) {
        Ok(nats) => nats,
        Err(reason) => return skip(&reason),
    };
    let key = nats.dir().join("master.key");
    MasterKey::write_new(&key).unwrap();
    let program = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vm0-api"));
        command
            .env("VM0_NATS_URL", nats.url())
            .env("VM0_NATS_SYSTEM_URL", nats.system_url())
            .env_remove("VM0_NATS_REPLICAS")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    };
    // The cluster elects its leaders first.
    eventually("a token is made", || async {
        let mut create = program();
        create
            .args("token create --kind client --group vm0/demo --name ci --feed-mb 64".split(' '));
        create.output().await.unwrap().status.success()
    })
    .await;
    let mut serve = program();
    serve
        .args(["serve", "--listen", "127.0.0.1:0", "--master-key"])
        .arg(&key)
        .env("VM0_NATS_REPLICAS", "3");
    let refused = tokio::time::timeout(std::time::Duration::from_secs(60), serve.output());
    let refused = refused.await.expect("it starts").unwrap();
    assert!(!refused.status.success());
    let text = String::from_utf8_lossy(&refused.stderr);
    for part in [
        "KV_vm0_runs (1)",
        "vm0_feed (1)",
        "OBJ_vm0_blobs (1)",
        "--replicas 3",
    ] {
        assert!(text.contains(part), "{text}");
    }
}
