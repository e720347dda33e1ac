//! Making and ending a hub. Runs in a child of the launcher, which moves between namespaces freely.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;

use super::address::{HubNumber, MAX_HUBS};
use super::route::Route;
use super::rules::{self, HubConfig};
use super::{conntrack, namespace, nflog, nft, settings};

/// The hub's link to the host, as the hub knows it.
const UPLINK: &str = "up";
const DNS_PORT: u16 = 53;

/// What a hub is made of.
pub(crate) struct Made {
    pub(crate) number: HubNumber,
    pub(crate) namespace: OwnedFd,
    /// Name queries over UDP and TCP, refused packets, connections past the proxy.
    pub(crate) sockets: [OwnedFd; 4],
}

/// Makes a hub below the calling thread's namespace, which is the host's.
///
/// Which number is free is decided by the kernel: whoever makes the link of a number has it. A table is made after its
/// link and removed before it, so a table without a link is a dead runner's.
pub(crate) fn make(config: &HubConfig) -> Result<Made, String> {
    config.check()?;
    let cannot = |step: &'static str| move |e: io::Error| format!("{step}: {e}");
    let host = namespace::current().map_err(cannot("find the host's namespace"))?;
    let mut host_links = Route::open().map_err(cannot("speak to the host's network"))?;
    let hub = namespace::enter_new().map_err(cannot("make a namespace"))?;
    settings::of_hub().map_err(cannot("set it up"))?;
    let rules = nft::Transaction::start(&rules::hub(config))?;
    let mut hub_links = Route::open().map_err(cannot("speak to its network"))?;

    let number = take_number(&mut host_links, &hub)?;
    let made = (|| {
        start_loopback(&mut hub_links).map_err(cannot("start its loopback"))?;
        rules.finish()?;
        let sockets = sockets().map_err(cannot("open its sockets"))?;
        connect(&mut hub_links, UPLINK, number.hub_end())
            .map_err(cannot("connect it to the host"))?;

        namespace::enter(&host).map_err(cannot("return to the host's namespace"))?;
        settings::of_host(number).map_err(cannot("let the host forward for it"))?;
        connect(&mut host_links, &number.link(), number.host_end())
            .map_err(cannot("connect the host to it"))?;
        hub_links
            .add_default_route(number.host_end())
            .map_err(cannot("give it a route"))?;
        nft::apply(&rules::host(number, config))?;
        reclaim(&mut host_links, &hub)?;
        Ok(sockets)
    })();
    match made {
        Ok(sockets) => Ok(Made {
            number,
            namespace: hub,
            sockets,
        }),
        Err(message) => {
            // Nothing named may stay behind; what does, the next hub finds.
            let _ = namespace::enter(&host);
            let _ = end(number);
            Err(message)
        }
    }
}

fn take_number(host: &mut Route, hub: &OwnedFd) -> Result<HubNumber, String> {
    for number in (0..MAX_HUBS).map(HubNumber) {
        match host.add_veth(&number.link(), UPLINK, hub) {
            Ok(()) => return Ok(number),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(format!("make the link {}: {e}", number.link())),
        }
    }
    Err(format!("all {MAX_HUBS} hubs of this host are taken"))
}

/// One end of the link between host and hub.
fn connect(links: &mut Route, name: &str, address: Ipv4Addr) -> io::Result<()> {
    let index = links.index(name)?;
    links.add_address(index, address, 30)?;
    links.set_up(index)
}

fn start_loopback(links: &mut Route) -> io::Result<()> {
    let index = links.index("lo")?;
    links.set_up(index)
}

fn sockets() -> io::Result<[OwnedFd; 4]> {
    let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, DNS_PORT))?;
    udp.set_nonblocking(true)?;
    let tcp = TcpListener::bind((Ipv4Addr::UNSPECIFIED, DNS_PORT))?;
    tcp.set_nonblocking(true)?;
    Ok([
        udp.into(),
        tcp.into(),
        nflog::listen()?,
        conntrack::listen()?,
    ])
}

/// Removes the tables of hubs that are gone. Whoever removes one holds its link meanwhile, so that nobody can be making
/// a hub of that number.
fn reclaim(host: &mut Route, hub: &OwnedFd) -> Result<(), String> {
    for number in nft::tables()?
        .iter()
        .filter_map(|name| HubNumber::of_table(name))
    {
        let link = number.link();
        match host.add_veth(&link, "stale", hub) {
            Ok(()) => {
                let removed = nft::apply(&rules::no_host(number));
                let _ = host.delete_link(&link);
                removed?;
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(format!("take over the link {link}: {e}")),
        }
    }
    Ok(())
}

/// Takes a hub away from the calling thread's namespace, which is the host's. Its own namespace goes with the last
/// descriptor of it.
pub(crate) fn end(number: HubNumber) -> Result<(), String> {
    let removed = nft::apply(&rules::no_host(number));
    let unlinked = Route::open().and_then(|mut host| host.delete_link(&number.link()));
    removed?;
    unlinked.map_err(|e| format!("remove the link {}: {e}", number.link()))
}

/// Lets the hub's proxy reach the runner's own API for a while, and VMs through it.
pub(crate) fn admit_api(
    number: HubNumber,
    hub: &OwnedFd,
    at: &[SocketAddrV4],
    seconds: u32,
) -> Result<(), String> {
    let on_host = rules::admit_api_on_host(number, at, seconds);
    apply_to_both(hub, &on_host, &rules::admit_api_in_hub(at, seconds))
}

/// Opens addresses of refused ranges for a while, in the hub and, should they be the host's own, there.
pub(crate) fn allow(
    number: HubNumber,
    hub: &OwnedFd,
    addresses: &[Ipv4Addr],
    seconds: u32,
) -> Result<(), String> {
    let on_host = rules::allow_on_host(number, addresses, seconds);
    apply_to_both(hub, &on_host, &rules::allow_in_hub(addresses, seconds))
}

/// Applies rules on the host and in the hub, at the same time. The caller's thread is in the hub afterwards.
fn apply_to_both(hub: &OwnedFd, on_host: &str, in_hub: &str) -> Result<(), String> {
    let host = nft::Transaction::start(on_host)?;
    namespace::enter(hub).map_err(|e| format!("enter the hub: {e}"))?;
    nft::apply(in_hub)?;
    host.finish()
}
