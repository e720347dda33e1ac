//! The guest's end of its network. Everything is fixed, so that one snapshot serves all VMs (docs/network.md, which the
//! host's side follows too), and set before the snapshot, so that a clone has it when it wakes.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketType};

const CARD: &str = "eth0";
const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 241, 2);
const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 252);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 241, 1);
const GATEWAY_MAC: [u8; 6] = [0x02, 0x76, 0x6d, 0x30, 0x00, 0x01];

/// Brings up the loopback, without which 127.0.0.1 does not answer, and the network card.
pub(crate) fn start() -> io::Result<()> {
    // Nothing answers over IPv6, and whoever tries it first would wait. A kernel without it has no such file.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
    let network = Network(rustix::net::socket(
        AddressFamily::INET,
        SocketType::DGRAM,
        None,
    )?);
    network.up("lo")?;
    network.set(CARD, libc::SIOCSIFADDR as _, ADDRESS)?;
    network.set(CARD, libc::SIOCSIFNETMASK as _, NETMASK)?;
    network.up(CARD)?;
    network.add_default_route()?;
    network.know_the_gateway()
}

/// A socket to speak to the kernel's network through (netdevice(7)).
struct Network(OwnedFd);

impl Network {
    fn up(&self, link: &str) -> io::Result<()> {
        let mut request = request(link);
        let flags = libc::IFF_UP | libc::IFF_RUNNING;
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or_default();
        self.ask(libc::SIOCSIFFLAGS as _, &request)
    }

    /// Sets an address or a netmask.
    fn set(&self, link: &str, what: libc::c_ulong, address: Ipv4Addr) -> io::Result<()> {
        let mut request = request(link);
        request.ifr_ifru.ifru_addr = socket_address(address);
        self.ask(what, &request)
    }

    fn add_default_route(&self) -> io::Result<()> {
        // SAFETY: an all-zero `rtentry` is a valid value of this plain C structure.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = socket_address(GATEWAY);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        self.ask(libc::SIOCADDRT as _, &route)
    }

    /// So that a clone sends at once instead of asking who the gateway is (arp(7)).
    fn know_the_gateway(&self) -> io::Result<()> {
        // SAFETY: an all-zero `arpreq` is a valid value of this plain C structure.
        let mut entry: libc::arpreq = unsafe { std::mem::zeroed() };
        entry.arp_pa = socket_address(GATEWAY);
        entry.arp_ha.sa_family = libc::ARPHRD_ETHER;
        copy(&GATEWAY_MAC, &mut entry.arp_ha.sa_data);
        entry.arp_flags = libc::ATF_PERM | libc::ATF_COM;
        copy(CARD.as_bytes(), &mut entry.arp_dev);
        self.ask(libc::SIOCSARP as _, &entry)
    }

    /// `request` must be the structure that `what` reads.
    fn ask<T>(&self, what: libc::c_ulong, request: &T) -> io::Result<()> {
        // SAFETY: the descriptor is an open socket, and every request used here reads one structure of the type that it
        // is given, which outlives the call.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), what as _, std::ptr::from_ref(request)) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

fn request(link: &str) -> libc::ifreq {
    // SAFETY: an all-zero `ifreq` is a valid value of this plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    copy(link.as_bytes(), &mut request.ifr_name);
    request
}

/// A `sockaddr_in` in the place that these structures have for one: two bytes of port, then the address.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: an all-zero `sockaddr` is a valid value of this plain C structure.
    let mut generic: libc::sockaddr = unsafe { std::mem::zeroed() };
    generic.sa_family = libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default();
    let [a, b, c, d] = address.octets();
    copy(&[0, 0, a, b, c, d], &mut generic.sa_data);
    generic
}

fn copy(from: &[u8], to: &mut [libc::c_char]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
}
