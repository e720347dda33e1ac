//! `proxy-registry.json`: who is behind which address, for people. Nothing reads it back, and no secret stands in it.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use host::fs::Dir;
use policy::log::Timestamp;
use serde::Serialize;
use tokio::sync::watch;

use super::registrations::Registration;
use crate::home::rel;
use crate::names::RunId;

/// Its name, in the instance's directory and as a link in the runner's.
pub(crate) const REGISTRY_FILE: &str = "proxy-registry.json";

/// One VM.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Entry {
    #[serde(skip)]
    pub(super) address: Ipv4Addr,
    run_id: RunId,
    generation: u64,
    registered_at: Timestamp,
    /// Below the home.
    network_log_path: String,
    /// Which of the proxy's ports its web traffic is redirected to.
    #[serde(skip_serializing_if = "Option::is_none")]
    proxy_port: Option<u16>,
    policy: serde_json::Value,
    /// Names only.
    secrets: Vec<String>,
}

impl Entry {
    pub(super) fn of(registration: &Registration) -> Self {
        let names = registration.secrets.iter().map(policy::Secret::name);
        Self {
            address: registration.address,
            run_id: registration.run,
            generation: registration.generation,
            registered_at: registration.since,
            network_log_path: rel::network_log(&registration.run).display().to_string(),
            proxy_port: None,
            // The canonical form is JSON by construction.
            policy: serde_json::from_str(&registration.policy.to_json()).unwrap_or_default(),
            secrets: names.map(|name| name.as_str().to_owned()).collect(),
        }
    }
}

/// The whole file.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct File<'a> {
    /// By address in the hub.
    vms: BTreeMap<Ipv4Addr, &'a Entry>,
    updated_at: Timestamp,
}

/// Writes the file whenever something changed, until the sender is gone. `port_of` says which worker serves an address.
pub(crate) async fn write_all(
    directory: Dir,
    mut entries: watch::Receiver<Vec<Entry>>,
    port_of: impl Fn(Ipv4Addr) -> Option<u16>,
) {
    let mut failed = false;
    loop {
        let mut now = entries.borrow_and_update().clone();
        for entry in &mut now {
            entry.proxy_port = port_of(entry.address);
        }
        let file = File {
            vms: now.iter().map(|entry| (entry.address, entry)).collect(),
            updated_at: Timestamp::now(),
        };
        let written = serde_json::to_vec_pretty(&file)
            .map_err(std::io::Error::other)
            .and_then(|text| Ok(directory.replace(REGISTRY_FILE, 0o600, &text)?));
        match written {
            Err(error) if !failed => {
                failed = true;
                tracing::error!(%error, "{REGISTRY_FILE} cannot be written");
            }
            Err(_) => {}
            Ok(()) => failed = false,
        }
        if entries.changed().await.is_err() {
            return;
        }
    }
}
