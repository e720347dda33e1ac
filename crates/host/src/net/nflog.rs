//! Refused packets, as the kernel tells them (linux/netfilter/nfnetlink_log.h): only the first bytes of each, which the
//! guest wrote and which are therefore believed nothing.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use super::address::NetworkId;
use super::netlink::Netlink;
use super::nfnetlink::{Message, Request};
use super::rules::{REFUSED_GROUP, SNAP};

const NFNL_SUBSYS_ULOG: u8 = 4;
const NFULNL_MSG_PACKET: u8 = 0;
const NFULNL_MSG_CONFIG: u8 = 1;
const NFULA_CFG_CMD: u16 = 1;
const NFULA_CFG_MODE: u16 = 2;
const NFULA_CFG_TIMEOUT: u16 = 4;
const NFULA_CFG_QTHRESH: u16 = 5;
const NFULNL_CFG_CMD_BIND: u8 = 1;
const NFULNL_COPY_PACKET: u8 = 2;
const NFULA_PAYLOAD: u16 = 9;
const NFULA_PREFIX: u16 = 10;

/// Why a packet was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RefusalReason {
    /// A VM's policy cannot allow it: its address, port or protocol is none that leaves.
    Refused,
    /// Its source is not its sender's.
    Spoofed,
    /// One connection too many, or too many at once.
    Limit,
    /// The proxy itself tried.
    Proxy,
}

impl RefusalReason {
    const ALL: [RefusalReason; 4] = [
        RefusalReason::Refused,
        RefusalReason::Spoofed,
        RefusalReason::Limit,
        RefusalReason::Proxy,
    ];

    /// The word the rules log it with.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            RefusalReason::Refused => "refused",
            RefusalReason::Spoofed => "spoofed",
            RefusalReason::Limit => "limit",
            RefusalReason::Proxy => "proxy",
        }
    }
}

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// Its destination port, unless the packet was a later fragment or too short.
    Tcp(Option<u16>),
    /// As for TCP.
    Udp(Option<u16>),
    /// Also what carries pings.
    Icmp,
    /// Any other, by its number.
    Other(u8),
}

/// A packet that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Refusal {
    /// Why.
    pub reason: RefusalReason,
    /// Who sent it: a slot address, the hub for the proxy, anything where it was spoofed.
    pub source: Ipv4Addr,
    /// Where it was to go. The gateway's address is told as the hub's end of the link.
    pub destination: Ipv4Addr,
    /// What it carried.
    pub protocol: Protocol,
}

impl Refusal {
    /// The network it came from, unless its source says otherwise.
    pub fn network(&self) -> Option<NetworkId> {
        match self.reason {
            RefusalReason::Spoofed | RefusalReason::Proxy => None,
            RefusalReason::Refused | RefusalReason::Limit => {
                NetworkId::of_slot_address(self.source)
            }
        }
    }
}

/// A socket that receives the refused packets of the calling thread's namespace. Who reads it needs no privilege.
pub(crate) fn listen() -> io::Result<OwnedFd> {
    let mut socket = Netlink::netfilter()?;
    let config = || Request::new(NFNL_SUBSYS_ULOG, NFULNL_MSG_CONFIG, 0, REFUSED_GROUP);
    config()
        .attribute(NFULA_CFG_CMD, &[NFULNL_CFG_CMD_BIND])
        .send(&mut socket)?;
    let mut mode = SNAP.to_be_bytes().to_vec();
    mode.extend([NFULNL_COPY_PACKET, 0]);
    config()
        .attribute(NFULA_CFG_MODE, &mode)
        // Told after a hundredth of a second, or when so many have come.
        .attribute(NFULA_CFG_TIMEOUT, &1_u32.to_be_bytes())
        .attribute(NFULA_CFG_QTHRESH, &32_u32.to_be_bytes())
        .send(&mut socket)?;
    Ok(socket.into_fd())
}

/// Reads one message; nothing if it is no refused IPv4 packet.
pub(super) fn parse(message: &Message<'_>) -> Option<Refusal> {
    if message.kind != u16::from(NFNL_SUBSYS_ULOG) << 8 | u16::from(NFULNL_MSG_PACKET) {
        return None;
    }
    let attributes = message.attributes();
    let prefix = attributes.get(NFULA_PREFIX)?;
    let prefix = prefix.split(|byte| *byte == 0).next().unwrap_or_default();
    let reason = RefusalReason::ALL
        .into_iter()
        .find(|reason| reason.prefix().as_bytes() == prefix)?;
    packet(reason, attributes.get(NFULA_PAYLOAD)?)
}

/// RFC 791: the header, whose length is in its first byte, then the payload.
fn packet(reason: RefusalReason, bytes: &[u8]) -> Option<Refusal> {
    let header: &[u8; 20] = bytes.first_chunk()?;
    let [
        first,
        _,
        _,
        _,
        _,
        _,
        fragment_high,
        fragment_low,
        _,
        protocol,
        ..,
    ] = *header;
    let address = |at: usize| {
        let octets: [u8; 4] = header.get(at..at.checked_add(4)?)?.first_chunk().copied()?;
        Some(Ipv4Addr::from(octets))
    };
    if first >> 4 != 4 {
        return None;
    }
    let later_fragment = u16::from_be_bytes([fragment_high & 0x1f, fragment_low]) != 0;
    let start = usize::from(first & 0x0f).saturating_mul(4).max(20);
    let port = || {
        let [_, _, high, low] = *bytes.get(start..)?.first_chunk()?;
        (!later_fragment).then(|| u16::from_be_bytes([high, low]))
    };
    Some(Refusal {
        reason,
        source: address(12)?,
        destination: address(16)?,
        protocol: match i32::from(protocol) {
            libc::IPPROTO_TCP => Protocol::Tcp(port()),
            libc::IPPROTO_UDP => Protocol::Udp(port()),
            libc::IPPROTO_ICMP => Protocol::Icmp,
            _ => Protocol::Other(protocol),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::super::nfnetlink::messages;
    use super::super::nfnetlink::tests::{attribute, datagram};
    use super::*;
    use proptest::prelude::*;

    fn read(prefix: &[u8], payload: &[u8]) -> Option<Refusal> {
        let attributes = [
            attribute(NFULA_PREFIX, prefix),
            attribute(NFULA_PAYLOAD, payload),
        ];
        let bytes = datagram(NFNL_SUBSYS_ULOG, NFULNL_MSG_PACKET, &attributes);
        messages(&bytes).find_map(|message| parse(&message))
    }

    fn tcp(options: usize, fragment: u8) -> Vec<u8> {
        let words = u8::try_from(5 + options).unwrap();
        let mut packet = vec![0x40 | words, 0, 0, 40, 0, 0, fragment, 0, 64, 6, 0, 0];
        packet.extend([100, 96, 0, 7, 169, 254, 169, 254]);
        packet.extend(vec![1; options * 4]);
        packet.extend([0xc0, 0, 0x1f, 0x90]);
        packet
    }

    #[test]
    fn a_refused_packet_is_told_with_its_port_behind_options_too() {
        for options in [0, 3] {
            let refusal = read(b"refused\0", &tcp(options, 0)).unwrap();
            assert_eq!(refusal.reason, RefusalReason::Refused);
            assert_eq!(refusal.network(), Some(NetworkId(3)));
            assert_eq!(refusal.destination, Ipv4Addr::new(169, 254, 169, 254));
            assert_eq!(refusal.protocol, Protocol::Tcp(Some(8080)));
        }
        let fragment = read(b"limit\0", &tcp(0, 0x01)).unwrap();
        assert_eq!(fragment.protocol, Protocol::Tcp(None));
        let short = read(b"spoofed\0", &tcp(0, 0)[..20]).unwrap();
        assert_eq!(
            (short.protocol, short.network()),
            (Protocol::Tcp(None), None)
        );
    }

    #[test]
    fn what_is_not_ours_is_passed_over() {
        assert_eq!(read(b"somebody\0", &tcp(0, 0)), None);
        assert_eq!(read(b"refused\0", &tcp(0, 0)[..19]), None);
        assert_eq!(read(b"refused\0", &[0x60; 40]), None);
    }

    proptest! {
        #[test]
        fn no_payload_makes_the_reader_fail(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            read(b"refused\0", &bytes);
        }
    }
}
