//! Whether the servers can be trusted with what they acknowledge.
//!
//! A NATS server tells its clients its version, but not whether it syncs each write to disk before it acknowledges it:
//! that stands only in `varz`, which servers send to users of the system account (`$SYS.REQ.SERVER.PING.VARZ`, NATS
//! documentation, "System Events"). So a second connection asks for it, of every server that answers.

use std::time::Duration;

use futures_util::StreamExt;
use serde::Deserialize;

use super::{OpenError, Settings, connect};

/// The oldest server that is taken. Older ones that distributions have, such as 2.9, have lost replicated streams when nodes
/// were killed; the tests run with the version pinned in `tests/nats/requirements.txt`.
pub const MIN_VERSION: (u64, u64) = (2, 12);

/// Why a server is not trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServerFault {
    /// Too old.
    #[error(
        "NATS server {name} is version {version}; at least {}.{} is needed. Hint: replace it, or start with --allow-data-loss",
        MIN_VERSION.0, MIN_VERSION.1
    )]
    Old {
        /// The server.
        name: String,
        /// What it is.
        version: String,
    },
    /// Acknowledges before it wrote.
    #[error(
        "NATS server {0} acknowledges writes before they are on disk. Hint: set `sync_interval: always` in its \
         `jetstream` section, or start with --allow-data-loss"
    )]
    Lazy(String),
    /// No JetStream.
    #[error("NATS server {0} has no JetStream. Hint: start it with a `jetstream` section")]
    NoJetStream(String),
    /// Nobody can say.
    #[error(
        "whether the NATS servers sync each write to disk can only be learnt from their system account. Hint: give \
         --nats-system-url, or start with --allow-data-loss"
    )]
    Unknown,
    /// The system account does not say.
    #[error(
        "{answered} of at least {expected} NATS servers said by the system account how they write. Hint: is the user of \
         --nats-system-url one of the system account?"
    )]
    Silent {
        /// So many said it.
        answered: usize,
        /// So many have to.
        expected: usize,
    },
}

#[derive(Deserialize)]
struct Answer {
    server: Server,
    data: Varz,
}

#[derive(Deserialize)]
struct Server {
    name: String,
    #[serde(default)]
    ver: String,
}

#[derive(Deserialize)]
struct Varz {
    jetstream: Option<JetStream>,
}

#[derive(Deserialize)]
struct JetStream {
    config: Option<JetStreamConfig>,
}

#[derive(Deserialize)]
struct JetStreamConfig {
    #[serde(default)]
    sync_always: bool,
}

pub(super) async fn servers(
    client: &async_nats::Client,
    settings: &Settings,
) -> Result<(), OpenError> {
    let info = client.server_info();
    let fault = match version(&info.server_name, &info.version) {
        Ok(()) => writes(settings).await?,
        Err(fault) => Some(fault),
    };
    match fault {
        None => Ok(()),
        Some(fault) if settings.allow_data_loss => {
            tracing::warn!(%fault, "runs may be lost: --allow-data-loss");
            Ok(())
        }
        Some(fault) => Err(fault.into()),
    }
}

fn version(name: &str, version: &str) -> Result<(), ServerFault> {
    let mut parts = version.split(['.', '-']).map(str::parse::<u64>);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= MIN_VERSION => Ok(()),
        _ => Err(ServerFault::Old {
            name: name.to_owned(),
            version: version.to_owned(),
        }),
    }
}

async fn writes(settings: &Settings) -> Result<Option<ServerFault>, OpenError> {
    let Some(url) = &settings.system_url else {
        return Ok(Some(ServerFault::Unknown));
    };
    let system = connect(url, settings).await?;
    let outcome = ask(&system, settings.replicas).await;
    let _ = system.drain().await;
    outcome.map_err(OpenError::Connect)
}

async fn ask(system: &async_nats::Client, expected: usize) -> Result<Option<ServerFault>, String> {
    let inbox = system.new_inbox();
    let mut answers = system
        .subscribe(inbox.clone())
        .await
        .map_err(|e| e.to_string())?;
    system
        .publish_with_reply("$SYS.REQ.SERVER.PING.VARZ", inbox, "".into())
        .await
        .map_err(|e| e.to_string())?;
    let mut answered = 0_usize;
    // The first may take its time; once one has answered, the others do so within milliseconds.
    let mut patience = Duration::from_secs(3);
    while let Ok(Some(message)) = tokio::time::timeout(patience, answers.next()).await {
        let Ok(answer) = serde_json::from_slice::<Answer>(&message.payload) else {
            continue;
        };
        answered = answered.saturating_add(1);
        patience = Duration::from_millis(500);
        if let Err(fault) = judge(&answer) {
            return Ok(Some(fault));
        }
    }
    let expected = expected.max(1);
    Ok((answered < expected).then_some(ServerFault::Silent { answered, expected }))
}

fn judge(answer: &Answer) -> Result<(), ServerFault> {
    let name = &answer.server.name;
    version(name, &answer.server.ver)?;
    let config = answer
        .data
        .jetstream
        .as_ref()
        .and_then(|j| j.config.as_ref());
    match config {
        None => Err(ServerFault::NoJetStream(name.clone())),
        Some(config) if !config.sync_always => Err(ServerFault::Lazy(name.clone())),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_unreadable_versions_are_refused() {
        for good in ["2.12.0", "2.15.1", "3.0.0", "2.12.0-RC.1"] {
            assert!(version("n", good).is_ok(), "{good}");
        }
        for bad in ["2.9.10", "2.11.9", "1.99.0", "", "x", "2"] {
            assert!(version("n", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_server_that_syncs_later_is_told_from_one_that_syncs_always() {
        let judged = |varz: &str| {
            let text = format!(r#"{{"server":{{"name":"n","ver":"2.15.1"}},"data":{varz}}}"#);
            judge(&serde_json::from_str::<Answer>(&text).unwrap())
        };
        assert!(judged(r#"{"jetstream":{"config":{"sync_always":true}}}"#).is_ok());
        assert_eq!(
            judged(r#"{"jetstream":{"config":{"sync_interval":120000000000}}}"#),
            Err(ServerFault::Lazy("n".to_owned()))
        );
        assert_eq!(
            judged(r#"{"jetstream":{}}"#),
            Err(ServerFault::NoJetStream("n".to_owned()))
        );
    }
}
