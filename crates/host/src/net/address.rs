//! The addresses of docs/network.md, all of which follow from two numbers.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The guest's address, the same in every VM.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 241, 2);
/// Its router and name server: `tap0` in the VM's namespace.
pub const GATEWAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 241, 1);
/// Prefix length of both.
pub const GUEST_PREFIX: u8 = 30;
/// The guest's hardware address (locally administered; "vm0" in the middle).
pub const GUEST_MAC: [u8; 6] = [0x02, 0x76, 0x6d, 0x30, 0x00, 0x02];
/// The gateway's.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x76, 0x6d, 0x30, 0x00, 0x01];
/// Where the proxy, which lives in the hub, asks the hub's resolver.
pub const RESOLVER_FOR_PROXY: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// Most networks of one hub.
pub const MAX_NETWORKS: u16 = 4096;
/// Most hubs of one host.
pub(crate) const MAX_HUBS: u16 = 1024;

/// First address of the links between hub and VMs.
const SLOTS_BASE: Ipv4Addr = Ipv4Addr::new(100, 96, 0, 0);
/// First address of the links between host and hubs.
const HUBS_BASE: Ipv4Addr = Ipv4Addr::new(100, 127, 0, 0);

fn offset(base: Ipv4Addr, by: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(base.to_bits().saturating_add(by))
}

/// A VM's network inside its hub. It is not the VM's slot: slots are the host's, networks the hub's, made before
/// anybody knows which VM will have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NetworkId(pub u16);

impl NetworkId {
    /// How the hub, the proxy and the logs know the VM: its end of the link to the hub.
    pub fn slot_address(self) -> Ipv4Addr {
        offset(self.hub_end(), 1)
    }

    /// The hub's end of that link.
    pub fn hub_end(self) -> Ipv4Addr {
        offset(SLOTS_BASE, u32::from(self.0).saturating_mul(2))
    }

    /// The network whose slot address this is.
    pub fn of_slot_address(address: Ipv4Addr) -> Option<NetworkId> {
        let distance = address.to_bits().checked_sub(SLOTS_BASE.to_bits())?;
        let number = u16::try_from(distance / 2).ok()?;
        (distance % 2 == 1 && number < MAX_NETWORKS).then_some(NetworkId(number))
    }

    /// The link's name in the hub.
    pub(crate) fn link(self) -> String {
        format!("v{}", self.0)
    }

    /// The mark of its connections in the hub; 0 is nobody's.
    pub(crate) fn mark(self) -> u32 {
        u32::from(self.0).saturating_add(1)
    }

    /// The network whose mark this is.
    pub(crate) fn of_mark(mark: u32) -> Option<NetworkId> {
        let number = u16::try_from(mark.checked_sub(1)?).ok()?;
        (number < MAX_NETWORKS).then_some(NetworkId(number))
    }
}

impl fmt::Display for NetworkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A hub among those of this host, 0 to 1023.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HubNumber(pub u16);

impl HubNumber {
    /// The host's end of the link between host and hub.
    pub fn host_end(self) -> Ipv4Addr {
        offset(
            HUBS_BASE,
            u32::from(self.0).saturating_mul(4).saturating_add(1),
        )
    }

    /// The hub's end: the source of everything that leaves it.
    pub fn hub_end(self) -> Ipv4Addr {
        offset(self.host_end(), 1)
    }

    /// The link's name on the host.
    pub fn link(self) -> String {
        format!("vm0h{}", self.0)
    }

    /// The nft table's name on the host.
    pub fn table(self) -> String {
        format!("vm0_hub{}", self.0)
    }

    /// The hub whose table has this name.
    pub fn of_table(name: &str) -> Option<HubNumber> {
        let number = name.strip_prefix("vm0_hub")?;
        let parsed = HubNumber(number.parse().ok()?);
        // Nobody else's that merely looks alike.
        (parsed.0 < MAX_HUBS && parsed.table() == name).then_some(parsed)
    }
}

/// A range of IPv4 addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u32, u8)", into = "(u32, u8)")]
pub struct Cidr {
    network: Ipv4Addr,
    prefix: u8,
}

/// Why something is no range of addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is not an IPv4 range: write an address, or the first address of a range with its prefix length, as in 10.0.0.0/8"
)]
pub struct CidrError(String);

impl Cidr {
    /// The range of `prefix` bits that begins with `network`.
    pub fn new(network: Ipv4Addr, prefix: u8) -> Result<Cidr, CidrError> {
        let rest = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
        if prefix > 32 || network.to_bits() & rest != 0 {
            return Err(CidrError(format!("{network}/{prefix}")));
        }
        Ok(Cidr { network, prefix })
    }

    /// Whether the address lies in it.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        let rest = u32::MAX.checked_shr(u32::from(self.prefix)).unwrap_or(0);
        address.to_bits() & !rest == self.network.to_bits()
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Cidr, CidrError> {
        let bad = || CidrError(text.escape_debug().to_string());
        let (network, prefix) = text.split_once('/').unwrap_or((text, "32"));
        let network = network.parse().map_err(|_| bad())?;
        Cidr::new(network, prefix.parse().map_err(|_| bad())?).map_err(|_| bad())
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl TryFrom<(u32, u8)> for Cidr {
    type Error = CidrError;

    fn try_from((network, prefix): (u32, u8)) -> Result<Cidr, CidrError> {
        Cidr::new(Ipv4Addr::from_bits(network), prefix)
    }
}

impl From<Cidr> for (u32, u8) {
    fn from(range: Cidr) -> (u32, u8) {
        (range.network.to_bits(), range.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_follow_from_numbers_and_back() {
        let first = NetworkId(0);
        assert_eq!(first.hub_end().to_string(), "100.96.0.0");
        assert_eq!(first.slot_address().to_string(), "100.96.0.1");
        let last = NetworkId(MAX_NETWORKS - 1);
        assert_eq!(last.slot_address().to_string(), "100.96.31.255");
        for id in [first, NetworkId(3), last] {
            assert_eq!(NetworkId::of_slot_address(id.slot_address()), Some(id));
            assert_eq!(NetworkId::of_slot_address(id.hub_end()), None);
            assert_eq!(NetworkId::of_mark(id.mark()), Some(id));
        }
        for other in ["100.95.255.255", "100.96.32.1", "8.8.8.8"] {
            assert_eq!(NetworkId::of_slot_address(other.parse().unwrap()), None);
        }
        assert_eq!(NetworkId::of_mark(0), None);
        assert_eq!(NetworkId::of_mark(u32::MAX), None);

        let hub = HubNumber(MAX_HUBS - 1);
        assert_eq!(hub.host_end().to_string(), "100.127.15.253");
        assert_eq!(hub.hub_end().to_string(), "100.127.15.254");
        assert_eq!(HubNumber::of_table(&hub.table()), Some(hub));
        for other in ["vm0_hub", "vm0_hub01", "vm0_hub1024", "vm0_hub-1", "filter"] {
            assert_eq!(HubNumber::of_table(other), None);
        }
    }

    #[test]
    fn ranges_are_parsed_once_and_hold_no_stray_bits() {
        let range: Cidr = "10.0.0.0/8".parse().unwrap();
        assert!(range.contains(Ipv4Addr::new(10, 255, 0, 1)));
        assert!(!range.contains(Ipv4Addr::new(11, 0, 0, 0)));
        let all: Cidr = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains(Ipv4Addr::BROADCAST));
        let one: Cidr = "192.0.2.7".parse().unwrap();
        assert_eq!(one.to_string(), "192.0.2.7/32");
        for bad in [
            "10.0.0.1/8",
            "10.0.0.0/33",
            "::1",
            "10.0.0.0/",
            "a; flush ruleset",
        ] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
        assert!(Cidr::try_from((1, 8)).is_err());
    }
}
