//! Kernel settings of the namespaces: files of /proc/sys/net, which shows those of the reader's namespace.

use std::fs;
use std::io;

use super::address::HubNumber;

/// For every namespace of ours, before it has links, which inherit from `default`: no IPv6, no source that could not be
/// answered the way it came, no routes that a neighbour suggests, no routers but those made here.
const STRICT: &[(&str, &str)] = &[
    ("ipv4/ip_forward", "1"),
    ("ipv4/conf/all/rp_filter", "1"),
    ("ipv4/conf/default/rp_filter", "1"),
    ("ipv4/conf/all/accept_redirects", "0"),
    ("ipv4/conf/default/accept_redirects", "0"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    ("ipv4/conf/all/accept_source_route", "0"),
    ("ipv4/conf/default/accept_source_route", "0"),
    ("ipv4/conf/all/arp_ignore", "1"),
    // A connection is one from its first packet on: after its entry was removed, nothing of it may come back.
    ("netfilter/nf_conntrack_tcp_loose", "0"),
    // What is silent for two hours is gone: the kernel's five days would be the guest's to fill.
    ("netfilter/nf_conntrack_tcp_timeout_established", "7440"),
];

/// Where the kernel has no IPv6 there is nothing to switch off.
const NO_IPV6: [&str; 2] = [
    "ipv6/conf/all/disable_ipv6",
    "ipv6/conf/default/disable_ipv6",
];

/// In the hub alone: bytes and times are counted, and only connections that a rule names are told as events.
const COUNTED: &[(&str, &str)] = &[
    ("netfilter/nf_conntrack_acct", "1"),
    ("netfilter/nf_conntrack_timestamp", "1"),
    ("netfilter/nf_conntrack_events", "0"),
];

/// In the hub alone: what is refused is refused at once. The kernel's own pace, one ICMP error a second for each address
/// after the first six, would leave a VM waiting; this is one in 10 ms, and no flood.
const REFUSALS: (&str, &str) = ("ipv4/icmp_ratelimit", "10");

fn set(name: &str, value: &str) -> io::Result<()> {
    let path = format!("/proc/sys/net/{name}");
    fs::write(&path, value)
        .map_err(|e| io::Error::new(e.kind(), format!("{path} could not be set: {e}")))
}

fn set_where_known(name: &str, value: &str) -> io::Result<()> {
    match set(name, value) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The calling thread's namespace is a VM's.
pub(crate) fn of_vm() -> io::Result<()> {
    for name in NO_IPV6 {
        set_where_known(name, "1")?;
    }
    for (name, value) in STRICT {
        set(name, value)?;
    }
    Ok(())
}

/// The calling thread's namespace is a hub.
pub(crate) fn of_hub() -> io::Result<()> {
    of_vm()?;
    for (name, value) in COUNTED.iter().chain([&REFUSALS]) {
        set(name, value)?;
    }
    Ok(())
}

/// The calling thread's namespace is the host, which has to forward for the hub. Forwarding stays on: nobody can know
/// who else relies on it by then.
pub(crate) fn of_host(hub: HubNumber) -> io::Result<()> {
    let link = hub.link();
    set_where_known(&format!("ipv6/conf/{link}/disable_ipv6"), "1")?;
    set(&format!("ipv4/conf/{link}/rp_filter"), "1")?;
    set(&format!("ipv4/conf/{link}/accept_redirects"), "0")?;
    let forwards = fs::read_to_string("/proc/sys/net/ipv4/ip_forward")?;
    // Writing what it is already would reset settings of every link.
    if forwards.trim() == "0" {
        set("ipv4/ip_forward", "1")?;
    }
    Ok(())
}
