//! Connections the kernel tracks: forgetting those of a network, and hearing of those that a rule lets past the proxy
//! (linux/netfilter/nfnetlink_conntrack.h).

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::address::NetworkId;
use super::netlink::Netlink;
use super::nfnetlink::{Attributes, Message, Request};

const NFNL_SUBSYS_CTNETLINK: u8 = 1;
const IPCTNL_MSG_CT_NEW: u8 = 0;
const IPCTNL_MSG_CT_DELETE: u8 = 2;
/// NFNLGRP_CONNTRACK_NEW is group 1, NFNLGRP_CONNTRACK_DESTROY group 3.
const NEW_AND_DESTROY: u32 = 1 << 0 | 1 << 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_MARK: u16 = 8;
const CTA_COUNTERS_ORIG: u16 = 9;
const CTA_COUNTERS_REPLY: u16 = 10;
const CTA_ID: u16 = 12;
const CTA_TIMESTAMP: u16 = 20;
const CTA_MARK_MASK: u16 = 21;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_COUNTERS_BYTES: u16 = 2;
const CTA_TIMESTAMP_START: u16 = 1;
const CTA_TIMESTAMP_STOP: u16 = 2;

/// Room for events while the daemon is busy: some thousands. A lost one is told as such.
const EVENT_BUFFER: usize = 4 << 20;

/// A connection past the proxy, from its VM's point of view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    /// The kernel's number of it, which tells apart connections with the same ends.
    pub id: u32,
    /// The VM's network.
    pub network: NetworkId,
    /// IP protocol number.
    pub protocol: u8,
    /// The slot address and the VM's port.
    pub source: SocketAddrV4,
    /// Where it goes.
    pub destination: SocketAddrV4,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowEnd {
    /// Bytes of packets the VM sent, headers included.
    pub sent: u64,
    /// Bytes of packets it got.
    pub received: u64,
    /// How long it lived, where the kernel says so.
    pub lasted: Option<Duration>,
}

/// A connection past the proxy began or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowEvent {
    /// It began.
    New(FlowKey),
    /// It is over: closed, timed out, or its network was flushed.
    End(FlowKey, FlowEnd),
}

/// A socket that hears of connections in the calling thread's namespace. Who reads it needs no privilege.
pub(crate) fn listen() -> io::Result<OwnedFd> {
    let socket = Netlink::netfilter_events(NEW_AND_DESTROY)?;
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, EVENT_BUFFER)?;
    Ok(socket.into_fd())
}

/// Forgets all connections of the calling thread's namespace: whatever still comes of them is a stranger's.
pub(crate) fn forget_all() -> io::Result<()> {
    request().send(&mut Netlink::netfilter()?)
}

/// Forgets, in the hub, those of one network.
pub(crate) fn forget(network: NetworkId) -> io::Result<()> {
    request()
        .attribute(CTA_MARK, &network.mark().to_be_bytes())
        .attribute(CTA_MARK_MASK, &u32::MAX.to_be_bytes())
        .send(&mut Netlink::netfilter()?)
}

fn request() -> Request {
    Request::new(NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE, 0, 0)
}

/// Reads one message; nothing if it is none of a VM's connection.
pub(super) fn parse(message: &Message<'_>) -> Option<FlowEvent> {
    let [subsystem, kind] = message.kind.to_be_bytes();
    if subsystem != NFNL_SUBSYS_CTNETLINK {
        return None;
    }
    let attributes = message.attributes();
    let key = key(attributes)?;
    match kind {
        IPCTNL_MSG_CT_NEW => Some(FlowEvent::New(key)),
        IPCTNL_MSG_CT_DELETE => {
            let bytes = |kind| attributes.nested(kind)?.be64(CTA_COUNTERS_BYTES);
            let lasted = attributes.nested(CTA_TIMESTAMP).and_then(|times| {
                let (start, stop) = (
                    times.be64(CTA_TIMESTAMP_START)?,
                    times.be64(CTA_TIMESTAMP_STOP)?,
                );
                Some(Duration::from_nanos(stop.checked_sub(start)?))
            });
            let end = FlowEnd {
                sent: bytes(CTA_COUNTERS_ORIG).unwrap_or(0),
                received: bytes(CTA_COUNTERS_REPLY).unwrap_or(0),
                lasted,
            };
            Some(FlowEvent::End(key, end))
        }
        _ => None,
    }
}

fn key(attributes: Attributes<'_>) -> Option<FlowKey> {
    let tuple = attributes.nested(CTA_TUPLE_ORIG)?;
    let (ip, ports) = (tuple.nested(CTA_TUPLE_IP)?, tuple.nested(CTA_TUPLE_PROTO)?);
    let end = |address, port| {
        let address = ip.be32(address).map(Ipv4Addr::from_bits)?;
        Some(SocketAddrV4::new(address, ports.be16(port)?))
    };
    let source = end(CTA_IP_V4_SRC, CTA_PROTO_SRC_PORT)?;
    Some(FlowKey {
        id: attributes.be32(CTA_ID)?,
        // The mark is the rules', the address the packet's: they agree, as spoofed sources are dropped before.
        network: attributes
            .be32(CTA_MARK)
            .and_then(NetworkId::of_mark)
            .or_else(|| NetworkId::of_slot_address(*source.ip()))?,
        protocol: ports.u8(CTA_PROTO_NUM)?,
        source,
        destination: end(CTA_IP_V4_DST, CTA_PROTO_DST_PORT)?,
    })
}

#[cfg(test)]
mod tests {
    use super::super::nfnetlink::messages;
    use super::super::nfnetlink::tests::{attribute, datagram};
    use super::*;
    use proptest::prelude::*;

    fn event(kind: u8, more: &[Vec<u8>]) -> Vec<u8> {
        let ip = [
            attribute(CTA_IP_V4_SRC, &[100, 96, 0, 3]),
            attribute(CTA_IP_V4_DST, &[198, 18, 0, 9]),
        ];
        let ports = [
            attribute(CTA_PROTO_NUM, &[6]),
            attribute(CTA_PROTO_SRC_PORT, &50_000_u16.to_be_bytes()),
            attribute(CTA_PROTO_DST_PORT, &5432_u16.to_be_bytes()),
        ];
        let tuple = [
            attribute(CTA_TUPLE_IP, &ip.concat()),
            attribute(CTA_TUPLE_PROTO, &ports.concat()),
        ];
        let mut attributes = vec![
            attribute(CTA_TUPLE_ORIG, &tuple.concat()),
            attribute(CTA_MARK, &2_u32.to_be_bytes()),
            attribute(CTA_ID, &77_u32.to_be_bytes()),
        ];
        attributes.extend_from_slice(more);
        datagram(NFNL_SUBSYS_CTNETLINK, kind, &attributes)
    }

    fn read(bytes: &[u8]) -> Option<FlowEvent> {
        messages(bytes).find_map(|message| parse(&message))
    }

    #[test]
    fn beginnings_and_ends_are_read_with_their_bytes_and_time() {
        let key = FlowKey {
            id: 77,
            network: NetworkId(1),
            protocol: 6,
            source: "100.96.0.3:50000".parse().unwrap(),
            destination: "198.18.0.9:5432".parse().unwrap(),
        };
        assert_eq!(
            read(&event(IPCTNL_MSG_CT_NEW, &[])),
            Some(FlowEvent::New(key))
        );
        let bytes = |n: u64| attribute(CTA_COUNTERS_BYTES, &n.to_be_bytes());
        let times = [
            attribute(CTA_TIMESTAMP_START, &1_000_u64.to_be_bytes()),
            attribute(CTA_TIMESTAMP_STOP, &3_500_u64.to_be_bytes()),
        ];
        let more = [
            attribute(CTA_COUNTERS_ORIG, &bytes(10)),
            attribute(CTA_COUNTERS_REPLY, &bytes(20)),
            attribute(CTA_TIMESTAMP, &times.concat()),
        ];
        let end = FlowEnd {
            sent: 10,
            received: 20,
            lasted: Some(Duration::from_nanos(2_500)),
        };
        assert_eq!(
            read(&event(IPCTNL_MSG_CT_DELETE, &more)),
            Some(FlowEvent::End(key, end))
        );
        let times = attribute(
            CTA_TIMESTAMP,
            &[times[0].clone(), attribute(CTA_TIMESTAMP_STOP, &[0; 8])].concat(),
        );
        let ended = read(&event(IPCTNL_MSG_CT_DELETE, &[times])).unwrap();
        assert_eq!(
            ended,
            FlowEvent::End(
                key,
                FlowEnd {
                    sent: 0,
                    received: 0,
                    lasted: None
                }
            )
        );
    }

    proptest! {
        #[test]
        fn damaged_events_are_passed_over(at in 0_usize..150, byte: u8, cut in 0_usize..200) {
            let mut bytes = event(IPCTNL_MSG_CT_DELETE, &[]);
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
            read(bytes.get(..cut.min(bytes.len())).unwrap());
        }
    }
}
