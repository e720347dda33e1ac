//! What the resolver asks the daemon: who is behind an address, and what an answer opens.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use host::launcher::Launcher;
use host::net::{NetworkId, RESOLVER_FOR_PROXY};
use policy::log::Line;
use policy::ranges::Reach;
use policy::{ApiAccess, Host, InternalAllow};
use resolver::{Client, Directory, Unusable, Vm};

use super::kernel::Names;
use super::registrations::Registrations;

/// Programs use an answer a little longer than they may.
const GRACE: Duration = Duration::from_secs(60);

pub(super) struct RunDirectory {
    pub(super) launcher: Launcher,
    pub(super) registrations: Arc<Registrations>,
    pub(super) names: Names,
    /// The API of the runner's jobs.
    pub(super) api: Option<ApiAccess>,
    /// What the operator excepts from the refused ranges.
    pub(super) internal_allow: InternalAllow,
}

#[async_trait]
impl Directory for RunDirectory {
    fn client(&self, address: Ipv4Addr) -> Option<Client> {
        if address == RESOLVER_FOR_PROXY {
            return Some(Client::Proxy);
        }
        let registration = self.registrations.find(address)?;
        Some(Client::Vm(Arc::new(Vm {
            address,
            generation: registration.generation,
            run_id: registration.run.to_string(),
            policy: registration.decides,
        })))
    }

    async fn on_answer(
        &self,
        client: &Client,
        name: &Host,
        addresses: &[Reach],
        ttl: Duration,
    ) -> Result<(), Unusable> {
        let unusable = |error: host::launcher::LauncherError| Unusable(error.to_string());
        let ttl = ttl.saturating_add(GRACE);
        let api = self.api.as_ref().filter(|api| api.host() == name);
        if let Some(api) = api {
            let at = addresses.iter().filter_map(|reach| match reach {
                Reach::Internal(address) | Reach::Public(address) => {
                    Some(SocketAddrV4::new(*address, api.port()))
                }
                Reach::Refused(_) => None,
            });
            self.launcher
                .admit_api(at.collect(), ttl)
                .await
                .map_err(unusable)?;
        }
        // For the API alone nothing but its own port is opened.
        let excepted = |address: Ipv4Addr| {
            let reach = self.internal_allow.judge(address.into(), Some(name));
            api.is_none() || matches!(reach, Reach::Internal(_))
        };
        let internal: Vec<Ipv4Addr> = addresses
            .iter()
            .filter_map(|reach| match reach {
                Reach::Internal(address) => excepted(*address).then_some(*address),
                Reach::Public(_) | Reach::Refused(_) => None,
            })
            .collect();
        if !internal.is_empty() {
            let launcher = &self.launcher;
            launcher
                .allow_internal(internal, ttl)
                .await
                .map_err(unusable)?;
        }
        let Client::Vm(vm) = client else {
            return Ok(());
        };
        let ports = vm.policy.open_ports(name);
        let Some(network) = NetworkId::of_slot_address(vm.address).filter(|_| !ports.is_empty())
        else {
            return Ok(());
        };
        let mut destinations = Vec::new();
        for reach in addresses {
            let (Reach::Public(address) | Reach::Internal(address)) = reach else {
                continue;
            };
            self.names.remember(vm.address, *address, name);
            destinations.extend(ports.iter().map(|port| SocketAddrV4::new(*address, *port)));
        }
        if !self.registrations.opens(vm.address, vm.generation) {
            return Err(Unusable("the run that asked is over".to_owned()));
        }
        self.launcher
            .open_destinations(network, destinations, ttl)
            .await
            .map_err(unusable)
    }

    fn log(&self, vm: &Vm, line: Line) {
        self.registrations
            .write(vm.address, Some(vm.generation), &line);
    }
}
