//! Addresses that no VM reaches, whatever its policy says, and the operator's exceptions.

use std::net::{IpAddr, Ipv4Addr};

pub use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::host::{Host, HostPattern};
use crate::policy::shown;

/// Most exceptions.
const MAX_EXCEPTIONS: usize = 256;

/// Why an address is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Range {
    /// "This" network, 0/8.
    Unspecified,
    /// RFC 1918.
    Private,
    /// Between customers and carriers, 100.64/10; the runner's own networks lie in it.
    Shared,
    /// The machine itself.
    Loopback,
    /// Link-local.
    LinkLocal,
    /// The address at which clouds tell a machine its credentials.
    Metadata,
    /// Documentation and protocol assignments.
    Reserved,
    /// Multicast.
    Multicast,
    /// All of IPv6: VMs have none.
    Ipv6,
}

impl Range {
    /// Its name in log lines: `kernel:private`, `resolver:private`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::Private => "private",
            Self::Shared => "shared",
            Self::Loopback => "loopback",
            Self::LinkLocal => "link-local",
            Self::Metadata => "metadata",
            Self::Reserved => "reserved",
            Self::Multicast => "multicast",
            Self::Ipv6 => "ipv6",
        }
    }
}

const fn net(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

/// All refused IPv4 networks (IANA special-purpose registry); where two overlap, the narrower comes first.
///
/// 198.18/15 is missing on purpose. It is set aside for benchmarks of network devices and nobody on the internet
/// answers there, so leaving it open costs nothing, and the runner's own tests put their upstreams there: they could
/// not show that public addresses work without one that is treated like any other.
pub const REFUSED: [(Ipv4Net, Range); 17] = [
    (net(0, 0, 0, 0, 8), Range::Unspecified),
    (net(10, 0, 0, 0, 8), Range::Private),
    // Alibaba Cloud's metadata service.
    (net(100, 100, 100, 200, 32), Range::Metadata),
    (net(100, 64, 0, 0, 10), Range::Shared),
    (net(127, 0, 0, 0, 8), Range::Loopback),
    (net(169, 254, 169, 254, 32), Range::Metadata),
    (net(169, 254, 0, 0, 16), Range::LinkLocal),
    // Azure's, at an address that looks public.
    (net(168, 63, 129, 16, 32), Range::Metadata),
    (net(172, 16, 0, 0, 12), Range::Private),
    (net(192, 0, 0, 0, 24), Range::Reserved),
    (net(192, 0, 2, 0, 24), Range::Reserved),
    (net(192, 88, 99, 0, 24), Range::Reserved),
    (net(192, 168, 0, 0, 16), Range::Private),
    (net(198, 51, 100, 0, 24), Range::Reserved),
    (net(203, 0, 113, 0, 24), Range::Reserved),
    (net(224, 0, 0, 0, 4), Range::Multicast),
    (net(240, 0, 0, 0, 4), Range::Reserved),
];

/// What no exception can open: the host's and the hub's own loopback, addresses that are no host's, and the networks
/// between VMs, hub and host (`docs/network.md`).
const NEVER: [Ipv4Net; 6] = [
    net(0, 0, 0, 0, 8),
    net(127, 0, 0, 0, 8),
    net(100, 96, 0, 0, 11),
    net(192, 168, 241, 0, 30),
    net(224, 0, 0, 0, 4),
    net(240, 0, 0, 0, 4),
];

/// The range for which an address is refused; `None` if it is public.
pub fn refused(address: IpAddr) -> Option<Range> {
    match address {
        IpAddr::V4(address) => refused_v4(address),
        // A mapped address is its IPv4 address in the mouth of a program; say why that one is refused.
        IpAddr::V6(address) => Some(
            address
                .to_ipv4_mapped()
                .and_then(refused_v4)
                .unwrap_or(Range::Ipv6),
        ),
    }
}

fn refused_v4(address: Ipv4Addr) -> Option<Range> {
    REFUSED
        .iter()
        .find(|(net, _)| net.contains(&address))
        .map(|(_, range)| *range)
}

/// What an address is to a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Public.
    Public(Ipv4Addr),
    /// In a refused range, and the operator made an exception for it.
    Internal(Ipv4Addr),
    /// Refused.
    Refused(Range),
}

/// `network.internal_allow`: CIDRs, addresses and host patterns that the operator excepts from the refused ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct InternalAllow {
    nets: Vec<Ipv4Net>,
    hosts: Vec<HostPattern>,
}

impl InternalAllow {
    /// Parses the entries.
    pub fn parse<T: AsRef<str>>(entries: &[T]) -> Result<Self, String> {
        if entries.len() > MAX_EXCEPTIONS {
            return Err(format!(
                "it has {} entries; it may have {MAX_EXCEPTIONS}",
                entries.len()
            ));
        }
        let mut allow = Self::default();
        for entry in entries.iter().map(AsRef::as_ref) {
            let refuse =
                |reason: &str| format!("{} cannot be an exception: {reason}", shown(entry));
            match (entry.parse::<Ipv4Net>(), entry.parse::<HostPattern>()) {
                (Ok(net), _) => allow.nets.push(exception(net).map_err(refuse)?),
                (_, Ok(HostPattern::Exactly(Host::Address(address)))) => {
                    allow
                        .nets
                        .push(exception(Ipv4Net::from(address)).map_err(refuse)?);
                }
                (_, Ok(HostPattern::Any)) => {
                    return Err(refuse("`*` would open every private network"));
                }
                (_, Ok(pattern)) => allow.hosts.push(pattern),
                (Err(_), Err(error)) => {
                    return Err(refuse(&format!(
                        "it is no CIDR such as 10.1.0.0/16, and as {error}"
                    )));
                }
            }
        }
        Ok(allow)
    }

    /// The same with one more name: that of the runner's own API.
    #[must_use]
    pub fn and_host(mut self, host: Host) -> Self {
        match host {
            // The kernel's rules know it; no query asks for it.
            Host::Address(_) => {}
            name @ Host::Name(_) => self.hosts.push(HostPattern::Exactly(name)),
        }
        self
    }

    /// The networks that stand in the kernel's set from the start.
    pub fn nets(&self) -> &[Ipv4Net] {
        &self.nets
    }

    /// The names whose addresses enter it when they are resolved.
    pub fn hosts(&self) -> &[HostPattern] {
        &self.hosts
    }

    /// Judges an address, and the name that was resolved to it.
    pub fn judge(&self, address: IpAddr, name: Option<&Host>) -> Reach {
        let v4 = match address {
            IpAddr::V4(address) => address,
            IpAddr::V6(_) => return Reach::Refused(refused(address).unwrap_or(Range::Ipv6)),
        };
        let Some(range) = refused_v4(v4) else {
            return Reach::Public(v4);
        };
        let excepted = self.nets.iter().any(|net| net.contains(&v4))
            || name.is_some_and(|name| self.hosts.iter().any(|pattern| pattern.matches(name)));
        if excepted && !NEVER.iter().any(|net| net.contains(&v4)) {
            Reach::Internal(v4)
        } else {
            Reach::Refused(range)
        }
    }
}

fn exception(net: Ipv4Net) -> Result<Ipv4Net, &'static str> {
    let net = net.trunc();
    // Only 192.168.0.0/16 as a whole holds networks of ours and is a network that people have; there, packets to ours
    // stay refused by `judge` and by the order of the kernel's rules.
    let ours =
        |never: &Ipv4Net| never.contains(&net) || (net.contains(never) && net.prefix_len() < 16);
    if NEVER.iter().any(ours) {
        return Err(
            "it covers loopback, multicast, reserved addresses or the runner's own networks",
        );
    }
    Ok(net)
}

impl TryFrom<Vec<String>> for InternalAllow {
    type Error = String;
    fn try_from(entries: Vec<String>) -> Result<Self, String> {
        Self::parse(&entries)
    }
}

impl From<InternalAllow> for Vec<String> {
    fn from(allow: InternalAllow) -> Self {
        let nets = allow.nets.iter().map(ToString::to_string);
        nets.chain(allow.hosts.iter().map(ToString::to_string))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(address: &str) -> Option<&'static str> {
        refused(address.parse().unwrap()).map(Range::name)
    }

    #[test]
    fn each_refused_address_is_refused_by_its_range() {
        for (address, name) in [
            ("0.0.0.0", "unspecified"),
            ("10.255.255.255", "private"),
            ("172.16.0.1", "private"),
            ("172.31.255.255", "private"),
            ("192.168.241.1", "private"),
            ("100.64.0.0", "shared"),
            ("100.127.255.255", "shared"),
            ("127.0.0.53", "loopback"),
            ("169.254.0.1", "link-local"),
            ("169.254.169.254", "metadata"),
            ("100.100.100.200", "metadata"),
            ("168.63.129.16", "metadata"),
            ("192.0.0.1", "reserved"),
            ("203.0.113.7", "reserved"),
            ("224.0.0.251", "multicast"),
            ("255.255.255.255", "reserved"),
            ("::1", "ipv6"),
            ("2606:4700::1111", "ipv6"),
            ("::ffff:127.0.0.1", "loopback"),
            ("::ffff:8.8.8.8", "ipv6"),
        ] {
            assert_eq!(range(address), Some(name), "{address}");
        }
        for public in [
            "1.1.1.1",
            "100.63.255.255",
            "100.128.0.0",
            "172.32.0.0",
            "192.169.0.0",
            "198.18.0.1",
            "223.255.255.255",
        ] {
            assert_eq!(range(public), None, "{public}");
        }
    }

    #[test]
    fn the_operators_exceptions_open_what_they_say_and_never_the_runners_own() {
        let allow = InternalAllow::parse(&[
            "10.1.0.0/16",
            "192.168.0.0/16",
            "169.254.169.254",
            "*.corp.example",
        ])
        .unwrap();
        let judge = |address: &str, name: Option<&str>| {
            allow.judge(
                address.parse().unwrap(),
                name.map(|name| name.parse().unwrap()).as_ref(),
            )
        };
        let internal = |address: &str| Reach::Internal(address.parse().unwrap());
        assert_eq!(judge("10.1.2.3", None), internal("10.1.2.3"));
        assert_eq!(judge("169.254.169.254", None), internal("169.254.169.254"));
        assert_eq!(judge("192.168.7.7", None), internal("192.168.7.7"));
        assert_eq!(judge("10.2.2.3", None), Reach::Refused(Range::Private));
        assert_eq!(
            judge("10.2.2.3", Some("git.corp.example")),
            internal("10.2.2.3")
        );
        assert_eq!(
            judge("10.2.2.3", Some("corp.example")),
            Reach::Refused(Range::Private)
        );
        for never in [
            "127.0.0.1",
            "100.96.0.7",
            "100.127.0.1",
            "192.168.241.1",
            "224.0.0.1",
            "0.0.0.0",
            "::1",
        ] {
            assert!(
                matches!(judge(never, Some("git.corp.example")), Reach::Refused(_)),
                "{never}"
            );
        }
        assert_eq!(
            judge("1.1.1.1", None),
            Reach::Public(Ipv4Addr::new(1, 1, 1, 1))
        );
    }

    #[test]
    fn exceptions_that_would_open_the_runner_itself_are_refused() {
        for bad in [
            "*",
            "0.0.0.0/0",
            "127.0.0.1",
            "127.0.0.0/8",
            "100.64.0.0/10",
            "100.96.0.0/16",
            "224.0.0.0/4",
            "::1",
            "a b",
            "10.0.0.0/33",
        ] {
            let error = InternalAllow::parse(&[bad]).unwrap_err();
            assert!(error.contains(bad), "{error}");
        }
    }

    #[test]
    fn exceptions_survive_a_round_trip() {
        let allow = InternalAllow::parse(&["10.1.2.3/16", "git.corp.example", "10.9.9.9"]).unwrap();
        let entries: Vec<String> = allow.clone().into();
        assert_eq!(entries, ["10.1.0.0/16", "10.9.9.9/32", "git.corp.example"]);
        assert_eq!(InternalAllow::parse(&entries).unwrap(), allow);
    }
}
