//! NATS over TLS: what is not certified by the right authority, for the right name, is not talked to.

use serde_json::json;
use web_api::engine::{Engine, OpenError};
use web_api::service::Config;

use api_types::RunnerId;
use api_types::client::Run;

use crate::nats::{Certified, Kind, certify};
use crate::world;

#[tokio::test(flavor = "multi_thread")]
async fn a_run_goes_over_tls_and_another_authority_is_not_believed() {
    let kind = Kind {
        tls: Some(Certified::Itself),
        ..Kind::default()
    };
    let Some(world) = world(kind).await else {
        return;
    };
    let replica = world.replica(Config::default()).await;
    let id = world.as_client(&replica.url).create(json!({})).await.run_id;
    let (me, runner) = (RunnerId::random(), world.as_runner(&replica.url));
    runner.claim(me, id).await;
    runner.complete(me, id, 1).await.ok::<Run>();

    let other = tempfile::tempdir().unwrap();
    certify(other.path(), "DNS:nats.example.com");
    let mut settings = world.nats.settings();
    for authority in [Some(other.path().join("ca.pem")), None] {
        settings.root_certificates = authority;
        let error = Engine::open(&settings).await.unwrap_err();
        assert!(matches!(error, OpenError::Connect(_)), "{error}");
        let text = error.to_string();
        assert!(text.contains("certificate"), "{text}");
        assert!(text.contains("Hint: --nats-ca"), "{text}");
        assert!(!text.contains("app:app"), "{text}");
    }
    // A file that is none is named.
    settings.root_certificates = Some(other.path().join("none.pem"));
    Engine::open(&settings).await.unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_for_another_name_is_not_believed() {
    let kind = Kind {
        tls: Some(Certified::Another),
        ..Kind::default()
    };
    let nats = match crate::nats::Nats::start(kind) {
        Ok(nats) => nats,
        Err(_) => {
            world(kind).await;
            return;
        }
    };
    let error = Engine::open(&nats.settings()).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("not valid for name"), "{text}");
    assert!(text.contains("Hint: the address"), "{text}");
}
