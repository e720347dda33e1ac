//! `proxy-registry.json`: who is behind which address, for people. Nothing reads it back, and no secret stands in it.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use host::fs::Dir;
use policy::Policy;
use policy::log::Timestamp;
use serde::{Serialize, Serializer};

use super::registrations::{Registration, Registrations};
use crate::home::rel;
use crate::names::RunId;

/// Its name, in the instance's directory and as a link in the runner's.
pub(crate) const REGISTRY_FILE: &str = "proxy-registry.json";

/// One VM.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    run_id: RunId,
    generation: u64,
    registered_at: Timestamp,
    /// Below the home.
    network_log_path: String,
    /// Which of the proxy's ports its web traffic is redirected to.
    #[serde(skip_serializing_if = "Option::is_none")]
    proxy_port: Option<u16>,
    #[serde(serialize_with = "shared")]
    policy: Arc<Policy>,
    /// Names only.
    secrets: Vec<String>,
}

fn shared<S: Serializer>(policy: &Arc<Policy>, serializer: S) -> Result<S::Ok, S::Error> {
    policy.as_ref().serialize(serializer)
}

impl Entry {
    fn of(registration: &Registration, proxy_port: Option<u16>) -> Self {
        let names = registration.secrets.iter().map(policy::Secret::name);
        Self {
            run_id: registration.run,
            generation: registration.generation,
            registered_at: registration.since,
            network_log_path: rel::network_log(&registration.run).display().to_string(),
            proxy_port,
            policy: Arc::clone(&registration.policy),
            secrets: names.map(|name| name.as_str().to_owned()).collect(),
        }
    }
}

/// The whole file.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct File {
    /// By address in the hub.
    vms: BTreeMap<Ipv4Addr, Entry>,
    updated_at: Timestamp,
}

/// Writes the file whenever something changed. `port_of` says which worker serves an address.
///
/// Apart from the jobs that change it, which do not wait for it: what changes meanwhile is written in one.
pub(crate) async fn write_all(
    directory: Dir,
    registrations: Arc<Registrations>,
    port_of: impl Fn(Ipv4Addr) -> Option<u16>,
) {
    let directory = Arc::new(directory);
    let mut changes = registrations.changes();
    let mut failed = false;
    loop {
        changes.mark_unchanged();
        let vms = registrations.all();
        let vms = vms.iter().map(|registration| {
            let address = registration.address;
            (address, Entry::of(registration, port_of(address)))
        });
        let file = File {
            vms: vms.collect(),
            updated_at: Timestamp::now(),
        };
        let target = Arc::clone(&directory);
        let written = tokio::task::spawn_blocking(move || write(&target, &file)).await;
        match written {
            Ok(Err(error)) if !failed => {
                failed = true;
                tracing::error!(%error, "{REGISTRY_FILE} cannot be written");
            }
            Ok(Err(_)) => {}
            Ok(Ok(())) => failed = false,
            // The runtime is shutting down.
            Err(_) => return,
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

fn write(directory: &Dir, file: &File) -> std::io::Result<()> {
    let text = serde_json::to_vec_pretty(file).map_err(std::io::Error::other)?;
    Ok(directory.replace(REGISTRY_FILE, 0o600, &text)?)
}
