//! Making, cleaning and ending the network of one VM. Runs in a child of the launcher, which moves between namespaces
//! freely.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::OwnedFd;

use super::address::{
    GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, GUEST_PREFIX, NetworkId,
};
use super::route::Route;
use super::{conntrack, namespace, nft, rules, settings, tap};

/// The VM's link to its hub, as its namespace knows it.
const UPLINK: &str = "up0";
/// Prefix length of a link with two ends and nothing else (RFC 3021).
const POINT_TO_POINT: u8 = 31;

/// What the network of a VM is made of.
pub(crate) struct Made {
    pub(crate) namespace: OwnedFd,
    pub(crate) tap: OwnedFd,
}

fn cannot(step: &'static str) -> impl Fn(io::Error) -> String {
    move |e| format!("{step}: {e}")
}

/// Makes one below a hub.
pub(crate) fn make(network: NetworkId, hub: &OwnedFd) -> Result<Made, String> {
    let namespace = namespace::enter_new().map_err(cannot("make a namespace"))?;
    // The slowest part, so it goes on beside the rest.
    let rules = nft::Transaction::start(&rules::vm(network))?;
    settings::of_vm().map_err(cannot("set it up"))?;
    let mut links = Route::open().map_err(cannot("speak to its network"))?;
    let tap = tap::open().map_err(cannot("make the VM's device"))?;
    guest_side(&mut links).map_err(cannot("set up the VM's device"))?;
    connect(&mut links, network, hub).map_err(cannot("connect it to the hub"))?;
    rules.finish()?;
    Ok(Made { namespace, tap })
}

fn guest_side(links: &mut Route) -> io::Result<()> {
    let tap = links.index(tap::NAME)?;
    links.set_up_as(tap, GATEWAY_MAC)?;
    links.add_address(tap, GATEWAY_ADDRESS, GUEST_PREFIX)?;
    // A restored guest sends at once, without having asked for anybody's address.
    links.add_neighbour(tap, GUEST_ADDRESS, GUEST_MAC)
}

fn connect(links: &mut Route, network: NetworkId, hub: &OwnedFd) -> io::Result<()> {
    let there = network.link();
    links.add_veth(UPLINK, &there, hub)?;
    let up = links.index(UPLINK)?;
    links.add_address(up, network.slot_address(), POINT_TO_POINT)?;
    links.set_up(up)?;
    links.add_default_route(network.hub_end())?;

    namespace::enter(hub)?;
    let mut hub_links = Route::open()?;
    let down = hub_links.index(&there)?;
    hub_links.add_address(down, network.hub_end(), POINT_TO_POINT)?;
    hub_links.set_up(down)
}

/// A device like a VM's that leads nowhere. Its namespace is its own and goes with it.
pub(crate) fn unplugged() -> Result<OwnedFd, String> {
    namespace::enter_new().map_err(cannot("make a namespace"))?;
    tap::open().map_err(cannot("make the device"))
}

/// What becomes of the device when its network is flushed.
#[derive(Debug)]
pub(crate) enum Device<'a> {
    /// A VM still uses it.
    InUse,
    /// It is ours: what is on its way is thrown away.
    Ours(&'a OwnedFd),
    /// It was left to a VM's process, which is dead: it becomes ours again.
    LeftTo,
}

/// Makes it as if no VM had ever used it: no destination opened, no connection known and, unless a VM still uses the
/// device, no packet on its way. Returns the device if it was taken back.
pub(crate) fn flush(
    network: NetworkId,
    hub: &OwnedFd,
    namespace: &OwnedFd,
    device: Device<'_>,
    opened: &[SocketAddrV4],
) -> Result<Option<OwnedFd>, String> {
    namespace::enter(hub).map_err(cannot("enter the hub"))?;
    // First, so that no connection is made anew after it was forgotten.
    if !opened.is_empty() {
        nft::apply(&rules::close(network, opened))?;
    }
    conntrack::forget(network).map_err(cannot("forget its connections in the hub"))?;
    namespace::enter(namespace).map_err(cannot("enter its namespace"))?;
    conntrack::forget_all().map_err(cannot("forget its connections"))?;
    match device {
        Device::InUse => Ok(None),
        Device::Ours(tap) => tap::drain(tap)
            .map(|()| None)
            .map_err(cannot("empty the VM's device")),
        // With its last descriptor went what was on its way.
        Device::LeftTo => tap::take_back()
            .map(Some)
            .map_err(cannot("take the VM's device back")),
    }
}

/// Takes it away from the hub. Its namespace and its device go with the last descriptor of them.
pub(crate) fn end(network: NetworkId, hub: &OwnedFd) -> Result<(), String> {
    namespace::enter(hub).map_err(cannot("enter the hub"))?;
    // Not left to the kernel, which would do it some time after the namespace is gone: the name must be free by then.
    let unlink = Route::open().and_then(|mut links| links.delete_link(&network.link()));
    unlink.map_err(cannot("remove its link"))?;
    conntrack::forget(network).map_err(cannot("forget its connections in the hub"))
}

/// Lets a VM reach destinations past the proxy for a while; `anew` if some of them may be open already.
pub(crate) fn open(
    network: NetworkId,
    hub: &OwnedFd,
    to: &[SocketAddrV4],
    seconds: u32,
    anew: bool,
) -> Result<(), String> {
    namespace::enter(hub).map_err(cannot("enter the hub"))?;
    nft::apply(&rules::open(network, to, seconds, anew))
}
