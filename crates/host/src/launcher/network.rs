//! Networks, from the daemon's side: the hub, what is made in it, and what is opened for a VM.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::wire::{Op, Reply};
use super::{Launcher, LauncherError, failed, unexpected};
use crate::net::{HubConfig, HubNumber, NetworkId};

/// A hub that was made, and what the daemon hears and serves in it.
#[derive(Debug)]
pub struct Hub {
    /// Its number, from which its addresses follow.
    pub number: HubNumber,
    /// Name queries of VMs and of the proxy: bound to port 53 of every address of the hub, not blocking.
    pub dns_udp: OwnedFd,
    /// The same over TCP, listening.
    pub dns_tcp: OwnedFd,
    /// For [`RefusalEvents`](crate::net::RefusalEvents).
    pub refusals: OwnedFd,
    /// For [`FlowEvents`](crate::net::FlowEvents).
    pub flows: OwnedFd,
}

impl Launcher {
    /// Makes this runner's hub. There is one, and it goes with the launcher.
    pub async fn make_hub(&self, config: HubConfig) -> Result<Hub, LauncherError> {
        let (reply, fds) = self.ask(Op::MakeHub(config)).await?;
        let fds: Result<[OwnedFd; 4], _> = fds.try_into();
        match (reply, fds) {
            (Reply::Hub(number), Ok([dns_udp, dns_tcp, refusals, flows])) => Ok(Hub {
                number,
                dns_udp,
                dns_tcp,
                refusals,
                flows,
            }),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Makes a network for a VM to come. A caller that is cancelled meanwhile loses nothing: it is destroyed again.
    /// [`NetworkPool`](crate::net::NetworkPool) keeps some ready.
    pub async fn make_network(&self) -> Result<NetworkId, LauncherError> {
        match self.ask(Op::MakeNetwork).await?.0 {
            Reply::Network(network) => Ok(network),
            other => Err(unexpected(&other)),
        }
    }

    /// A device for a VM's network card that leads nowhere: for VMs that are made only to be saved or measured.
    pub async fn unplugged_device(&self) -> Result<OwnedFd, LauncherError> {
        let (reply, fds) = self.ask(Op::UnpluggedDevice).await?;
        match (reply, fds.into_iter().next()) {
            (Reply::Device, Some(device)) => Ok(device),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Makes it as new once its VM is dead: no destination open, no connection alive. If this fails it must not be
    /// given to another VM, only destroyed.
    pub async fn flush_network(&self, network: NetworkId) -> Result<(), LauncherError> {
        self.done(Op::FlushNetwork(network)).await
    }

    /// Ends every connection of a VM and takes back what was opened for it, while the VM lives: between two jobs.
    pub async fn cut_network(&self, network: NetworkId) -> Result<(), LauncherError> {
        self.done(Op::CutNetwork(network)).await
    }

    /// Ends it once its VM is dead.
    pub async fn destroy_network(&self, network: NetworkId) -> Result<(), LauncherError> {
        self.done(Op::DestroyNetwork(network)).await
    }

    /// Lets the network's VM reach TCP destinations past the proxy, from now on for `ttl` (rounded up to seconds) and
    /// until it is flushed. Connections that were made outlive it. Public addresses, or internal ones that are allowed.
    pub async fn open_destinations(
        &self,
        network: NetworkId,
        destinations: Vec<SocketAddrV4>,
        ttl: Duration,
    ) -> Result<(), LauncherError> {
        let seconds = seconds(ttl)?;
        self.done(Op::OpenDestinations(network, destinations, seconds))
            .await
    }

    /// Lets everything in the hub reach addresses of refused ranges for `ttl` (rounded up to seconds): VMs through the
    /// proxy, and the proxy itself. For names that the operator allowed, when they were resolved.
    pub async fn allow_internal(
        &self,
        addresses: Vec<Ipv4Addr>,
        ttl: Duration,
    ) -> Result<(), LauncherError> {
        let seconds = seconds(ttl)?;
        self.done(Op::AllowInternal(addresses, seconds)).await
    }

    /// Lets VMs reach the runner's own API through the proxy, and the proxy itself, at these addresses and ports for `ttl`
    /// (rounded up to seconds), also on ports and in ranges that are refused otherwise.
    pub async fn admit_api(
        &self,
        at: Vec<SocketAddrV4>,
        ttl: Duration,
    ) -> Result<(), LauncherError> {
        let seconds = seconds(ttl)?;
        self.done(Op::AdmitApi(at, seconds)).await
    }

    pub(super) async fn done(&self, op: Op) -> Result<(), LauncherError> {
        match self.ask(op).await?.0 {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

/// The rules count in seconds. nft knows no time without end and none above what 32 bits of milliseconds hold on old
/// kernels, so a month is the longest.
fn seconds(ttl: Duration) -> Result<u32, LauncherError> {
    let seconds = ttl.as_millis().div_ceil(1000).min(30 * 24 * 3600);
    match u32::try_from(seconds) {
        Ok(seconds) if seconds > 0 => Ok(seconds),
        _ => Err(failed(
            "open a destination",
            "it was to be open for no time at all",
        )),
    }
}
