//! What is decided about packets: the nft rulesets of a hub, of a VM's namespace and of the host, as text.

use std::fmt::Display;
use std::net::{Ipv4Addr, SocketAddrV4};

use serde::{Deserialize, Serialize};

use super::address::{
    Cidr, GATEWAY_ADDRESS, GUEST_ADDRESS, GUEST_MAC, HubNumber, MAX_NETWORKS, NetworkId,
    RESOLVER_FOR_PROXY,
};
use super::nflog::RefusalReason;

/// NFLOG group of refused packets in the hub.
pub(crate) const REFUSED_GROUP: u16 = 1;
/// Bytes of a refused packet that are told: the longest IPv4 header and the ports.
pub(crate) const SNAP: u32 = 80;

/// What a hub is made with; it stays so for its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubConfig {
    /// Most networks it may hold at once, 1 to [`MAX_NETWORKS`].
    pub networks: u16,
    /// Ports of the proxy's workers, each 1024 or above.
    pub workers: Vec<u16>,
    /// Ranges no VM and not even the proxy may reach.
    pub refused: Vec<Cidr>,
    /// Exceptions from them that the operator made.
    pub internal: Vec<Cidr>,
    /// What one VM may have.
    pub limits: NetworkLimits,
}

/// Limits of one VM's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkLimits {
    /// Open at once.
    pub connections: u32,
    /// Begun in a second, in the long run.
    pub new_per_second: u32,
    /// Begun at once before that counts.
    pub burst: u32,
}

impl Default for NetworkLimits {
    /// A package manager opens some dozens at once; a browser a few hundred.
    fn default() -> NetworkLimits {
        NetworkLimits {
            connections: 1024,
            new_per_second: 200,
            burst: 600,
        }
    }
}

/// The ranges that belong to nobody on the public internet (IANA's special-purpose registry, multicast and reserved),
/// but for 198.18.0.0/15, which stands for the public internet in tests.
pub fn standard_refused() -> Vec<Cidr> {
    [
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    ]
    .iter()
    .filter_map(|range| range.parse().ok())
    .collect()
}

impl HubConfig {
    /// Which worker serves a network, by its place in [`HubConfig::workers`].
    pub fn worker_of(&self, network: NetworkId) -> Option<usize> {
        usize::from(network.0).checked_rem(self.workers.len())
    }

    /// One sentence why no hub can be made with it.
    pub(crate) fn check(&self) -> Result<(), String> {
        if !(1..=MAX_NETWORKS).contains(&self.networks) {
            return Err(format!("a hub holds 1 to {MAX_NETWORKS} networks"));
        }
        let mut ports = self.workers.clone();
        ports.sort_unstable();
        ports.dedup();
        if ports.is_empty() || ports.len() != self.workers.len() {
            return Err("the proxy's workers need ports of their own".to_owned());
        }
        if ports.iter().any(|port| *port < 1024) {
            return Err("the proxy's ports must be 1024 or above: it has no privileges".to_owned());
        }
        let NetworkLimits {
            connections,
            new_per_second,
            burst,
        } = self.limits;
        if connections == 0 || new_per_second == 0 || burst == 0 {
            return Err("a limit of no connections at all is no network".to_owned());
        }
        Ok(())
    }

    fn ids(&self) -> impl Iterator<Item = NetworkId> {
        (0..self.networks).map(NetworkId)
    }
}

/// `elements = { a, b }`, which nft refuses where there is none.
fn elements<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<_> = items.into_iter().map(|item| item.to_string()).collect();
    if items.is_empty() {
        String::new()
    } else {
        format!("elements = {{ {} }}", items.join(", "))
    }
}

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<_> = items.into_iter().map(|item| item.to_string()).collect();
    items.join(", ")
}

/// The hub's: where everything is decided. Interfaces `v*` lead to VMs, `up` to the host.
pub(crate) fn hub(config: &HubConfig) -> String {
    let refused = elements(&config.refused);
    let internal = elements(&config.internal);
    let marks = elements(
        config
            .ids()
            .map(|id| format!("{} : {}", id.slot_address(), id.mark())),
    );
    let workers = elements(config.ids().filter_map(|id| {
        let port = config.workers.get(config.worker_of(id)?)?;
        Some(format!("{} : {port}", id.slot_address()))
    }));
    let ports = list(&config.workers);
    let NetworkLimits {
        connections,
        new_per_second,
        burst,
    } = config.limits;
    let log = |reason: RefusalReason| {
        format!(
            "log prefix \"{}\" group {REFUSED_GROUP} snaplen {SNAP}",
            reason.prefix()
        )
    };
    let (refused_log, spoofed_log) = (log(RefusalReason::Refused), log(RefusalReason::Spoofed));
    let (limit_log, proxy_log) = (log(RefusalReason::Limit), log(RefusalReason::Proxy));
    format!(
        r#"table inet vm0 {{
  set refused_nets {{ type ipv4_addr; flags interval; auto-merge; {refused}
  }}
  set internal_nets {{ type ipv4_addr; flags interval; auto-merge; {internal}
  }}
  set internal {{ type ipv4_addr; flags timeout; size 16384;
  }}
  set api {{ type ipv4_addr . inet_service; flags timeout; size 1024;
  }}
  set open {{ type ipv4_addr . ipv4_addr . inet_service; flags timeout; size 65536;
  }}
  set connections {{ type ipv4_addr; flags dynamic; size 8192;
  }}
  set pace {{ type ipv4_addr; flags dynamic,timeout; timeout 1m; size 8192;
  }}
  set refusals {{ type ipv4_addr; flags dynamic; size 8192; counter;
  }}
  set told {{ type ipv4_addr; flags dynamic,timeout; timeout 1m; size 8192;
  }}
  map mark_of {{ type ipv4_addr : mark; {marks}
  }}
  map worker_of {{ type ipv4_addr : inet_service; {workers}
  }}

  chain arrive {{
    type filter hook prerouting priority mangle; policy accept;
    meta nfproto ipv6 drop
    iifname != "v*" return
    fib saddr . iif oif eq 0 goto spoofed
    ip saddr != @mark_of goto spoofed
    ct mark set ip saddr map @mark_of
  }}
  chain spoofed {{
    update @told {{ ip saddr limit rate 5/second burst 20 packets }} {spoofed_log}
    counter drop
  }}

  chain to_proxy {{
    meta l4proto tcp redirect to :ip saddr map @worker_of
  }}
  chain web {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname != "v*" return
    ip daddr . tcp dport @api goto to_proxy
    tcp dport != {{ 80, 443 }} return
    ip daddr @internal_nets goto to_proxy
    ip daddr @internal goto to_proxy
    ip daddr @refused_nets return
    fib daddr type != unicast return
    goto to_proxy
  }}

  chain input {{
    type filter hook input priority filter; policy drop;
    ct state established,related accept
    iifname "lo" accept
    iifname != "v*" drop
    ct state invalid drop
    ct status dnat tcp dport {{ {ports} }} jump admit
    fib daddr . iif type local meta l4proto {{ tcp, udp }} th dport 53 jump admit
    goto refuse
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname != "v*" drop
    ct state invalid drop
    oifname != "up" goto refuse
    ip daddr @internal_nets jump opened
    ip daddr @internal jump opened
    ip daddr @refused_nets goto refuse
    jump opened
    goto refuse
  }}
  chain opened {{
    ip saddr . ip daddr . tcp dport @open ct event set new,destroy jump admit
  }}
  chain admit {{
    update @pace {{ ip saddr limit rate over {new_per_second}/second burst {burst} packets }} goto too_many
    add @connections {{ ip saddr ct count over {connections} }} goto too_many
    accept
  }}
  chain too_many {{
    update @refusals {{ ip saddr }}
    update @told {{ ip saddr limit rate 5/second burst 20 packets }} {limit_log}
    goto answer
  }}
  chain refuse {{
    update @refusals {{ ip saddr }}
    update @told {{ ip saddr limit rate 5/second burst 20 packets }} {refused_log}
    goto answer
  }}
  chain answer {{
    meta l4proto tcp reject with tcp reset
    reject with icmp admin-prohibited
  }}

  chain output {{
    type filter hook output priority filter; policy drop;
    ct state established,related accept
    oifname "v*" icmp type destination-unreachable accept
    ct state invalid drop
    oifname "v*" goto refuse_proxy
    oifname "lo" ip daddr {RESOLVER_FOR_PROXY} meta l4proto {{ tcp, udp }} th dport 53 accept
    ip daddr . tcp dport @api oifname "up" accept
    ip daddr @internal_nets meta l4proto tcp oifname "up" accept
    ip daddr @internal meta l4proto tcp oifname "up" accept
    ip daddr @refused_nets goto refuse_proxy
    oifname "up" meta l4proto tcp accept
    goto refuse_proxy
  }}
  chain refuse_proxy {{
    limit rate 20/second burst 40 packets {proxy_log}
    counter
    goto answer
  }}

  chain translate {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "up" masquerade
  }}
}}
"#
    )
}

/// A VM's namespace: only the guest itself gets out, under its slot address. Whatever it sends to an address of the
/// namespace goes to the hub, which alone decides and tells.
pub(crate) fn vm(network: NetworkId) -> String {
    let (slot, hub) = (network.slot_address(), network.hub_end());
    let guest_mac = mac(GUEST_MAC);
    format!(
        r#"table inet vm0 {{
  chain arrive {{
    type filter hook prerouting priority raw; policy drop;
    iifname "tap0" ether saddr {guest_mac} ip saddr {GUEST_ADDRESS} accept
    iifname "up0" meta nfproto ipv4 accept
    counter
  }}
  chain gateway {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname "tap0" ip daddr {{ {GATEWAY_ADDRESS}, {slot} }} dnat ip to {hub}
  }}
  chain translate {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "up0" snat ip to {slot}
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    ct state invalid drop
    iifname "tap0" oifname "up0" accept
  }}
  chain output {{
    type filter hook output priority filter; policy drop;
    oifname "tap0" icmp type {{ destination-unreachable, time-exceeded }} accept
  }}
}}
"#
    )
}

fn mac(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}

/// The host's, for one hub: nothing of the host itself can be reached from it, nothing new gets into it, and the world
/// sees the host's address. Takes the place of what a dead runner's hub of the same number left.
pub(crate) fn host(hub: HubNumber, config: &HubConfig) -> String {
    let (table, link, source) = (hub.table(), hub.link(), hub.hub_end());
    let internal = elements(&config.internal);
    format!(
        r#"add table ip {table}
delete table ip {table}
table ip {table} {{
  set internal_nets {{ type ipv4_addr; flags interval; auto-merge; {internal}
  }}
  set internal {{ type ipv4_addr; flags timeout; size 16384;
  }}
  set api {{ type ipv4_addr . inet_service; flags timeout; size 1024;
  }}
  chain arrive {{
    type filter hook prerouting priority raw; policy accept;
    iifname "{link}" ip saddr != {source} drop
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname != "{link}" accept
    ct state established,related accept
    ip daddr . tcp dport @api accept
    ip daddr @internal_nets accept
    ip daddr @internal accept
    meta l4proto tcp reject with tcp reset
    reject with icmp admin-prohibited
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname "{link}" accept
    oifname != "{link}" accept
    ct state established,related accept
    drop
  }}
  chain translate {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {source} oifname != "{link}" masquerade
  }}
}}
"#
    )
}

/// Removes the host's table of a hub, there or not.
pub(crate) fn no_host(hub: HubNumber) -> String {
    let table = hub.table();
    format!("add table ip {table}\ndelete table ip {table}\n")
}

/// Puts elements into a set for `seconds` from now, also those that are in it already: an element's time is not
/// changed by adding it again, so it is removed first, and added before that because what is not there cannot be removed.
fn renew(table: &str, set: &str, items: &[String], seconds: u32) -> String {
    let timed = list(
        items
            .iter()
            .map(|item| format!("{item} timeout {seconds}s")),
    );
    let plain = list(items);
    format!(
        "add element {table} {set} {{ {timed} }}\ndelete element {table} {set} {{ {plain} }}\nadd element {table} {set} {{ {timed} }}\n"
    )
}

fn opened(network: NetworkId, to: &[SocketAddrV4]) -> Vec<String> {
    let from = network.slot_address();
    to.iter()
        .map(|to| format!("{from} . {} . {}", to.ip(), to.port()))
        .collect()
}

/// In the hub: destinations a VM may reach past the proxy. Removing elements makes the kernel wait for all processors,
/// so it is only done where some of them may be there already.
pub(crate) fn open(network: NetworkId, to: &[SocketAddrV4], seconds: u32, anew: bool) -> String {
    let items = opened(network, to);
    if anew {
        return renew("inet vm0", "open", &items, seconds);
    }
    let timed = list(
        items
            .iter()
            .map(|item| format!("{item} timeout {seconds}s")),
    );
    format!("add element inet vm0 open {{ {timed} }}\n")
}

/// Takes them back, whether their time has passed or not.
pub(crate) fn close(network: NetworkId, to: &[SocketAddrV4]) -> String {
    let items = list(opened(network, to));
    format!("add element inet vm0 open {{ {items} }}\ndelete element inet vm0 open {{ {items} }}\n")
}

/// In the hub: addresses of refused ranges that may be reached nevertheless.
pub(crate) fn allow_in_hub(addresses: &[Ipv4Addr], seconds: u32) -> String {
    renew("inet vm0", "internal", &texts(addresses), seconds)
}

/// On the host: the same, in case they are the host's own.
pub(crate) fn allow_on_host(hub: HubNumber, addresses: &[Ipv4Addr], seconds: u32) -> String {
    renew(
        &format!("ip {}", hub.table()),
        "internal",
        &texts(addresses),
        seconds,
    )
}

/// In the hub: where the runner's own API is. VMs reach it through the proxy only, whatever its port and range.
pub(crate) fn admit_api_in_hub(at: &[SocketAddrV4], seconds: u32) -> String {
    renew("inet vm0", "api", &sockets(at), seconds)
}

/// On the host: the same, in case it is the host's own.
pub(crate) fn admit_api_on_host(hub: HubNumber, at: &[SocketAddrV4], seconds: u32) -> String {
    renew(&format!("ip {}", hub.table()), "api", &sockets(at), seconds)
}

fn sockets(at: &[SocketAddrV4]) -> Vec<String> {
    at.iter()
        .map(|at| format!("{} . {}", at.ip(), at.port()))
        .collect()
}

fn texts(addresses: &[Ipv4Addr]) -> Vec<String> {
    addresses.iter().map(Ipv4Addr::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> HubConfig {
        HubConfig {
            networks: 3,
            workers: vec![8080, 8081],
            refused: standard_refused(),
            internal: Vec::new(),
            limits: NetworkLimits::default(),
        }
    }

    #[test]
    fn networks_take_turns_among_workers() {
        let text = hub(&config());
        assert!(text.contains("100.96.0.1 : 8080, 100.96.0.3 : 8081, 100.96.0.5 : 8080"));
        assert_eq!(config().worker_of(NetworkId(2)), Some(0));
    }

    #[test]
    fn a_config_that_cannot_work_is_refused_with_a_sentence() {
        assert_eq!(config().check(), Ok(()));
        let changes: [fn(&mut HubConfig); 6] = [
            |c| c.networks = 0,
            |c| c.networks = MAX_NETWORKS + 1,
            |c| c.workers.clear(),
            |c| c.workers = vec![8080, 8080],
            |c| c.workers = vec![80],
            |c| c.limits.connections = 0,
        ];
        for change in changes {
            let mut config = config();
            change(&mut config);
            assert!(config.check().is_err(), "{config:?}");
        }
    }

    #[test]
    fn the_test_network_counts_as_public_and_the_metadata_address_does_not() {
        let refused = |address: [u8; 4]| {
            standard_refused()
                .iter()
                .any(|range| range.contains(address.into()))
        };
        assert_eq!(standard_refused().len(), 14);
        for address in [
            [169, 254, 169, 254],
            [127, 0, 0, 1],
            [100, 96, 0, 1],
            [255; 4],
            [0; 4],
        ] {
            assert!(refused(address), "{address:?}");
        }
        for address in [[198, 18, 0, 1], [198, 19, 255, 255], [8, 8, 8, 8]] {
            assert!(!refused(address), "{address:?}");
        }
    }
}
