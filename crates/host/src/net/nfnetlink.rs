//! Messages of the netfilter subsystems: `nlmsghdr`, `nfgenmsg` and attributes (linux/netlink.h,
//! linux/netfilter/nfnetlink.h).

use std::io;

use netlink_packet_core::NlasIterator;

use super::netlink::Netlink;

const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;

/// A request in the making.
pub(super) struct Request(Vec<u8>);

impl Request {
    /// `resource` is what `nfgenmsg.res_id` means to the subsystem.
    pub(super) fn new(subsystem: u8, message: u8, family: u8, resource: u16) -> Request {
        let mut bytes = vec![0; 4];
        bytes.extend((u16::from(subsystem) << 8 | u16::from(message)).to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend([family, 0]);
        bytes.extend(resource.to_be_bytes());
        Request(bytes)
    }

    pub(super) fn attribute(mut self, kind: u16, value: &[u8]) -> Request {
        let length = u16::try_from(value.len().saturating_add(4)).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        while !self.0.len().is_multiple_of(4) {
            self.0.push(0);
        }
        self
    }

    /// Sends it and waits for the acknowledgement.
    pub(super) fn send(mut self, socket: &mut Netlink) -> io::Result<()> {
        let sequence = socket.next_sequence();
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        for (at, value) in [(0, length), (8, sequence)] {
            if let Some(place) = self.0.get_mut(at..at + 4) {
                place.copy_from_slice(&value.to_ne_bytes());
            }
        }
        socket.send(&self.0)?;
        loop {
            for message in messages(socket.receive()?) {
                if message.kind != NLMSG_ERROR || message.sequence != sequence {
                    continue;
                }
                let code = message.raw.first_chunk().copied().map(i32::from_ne_bytes);
                return match code {
                    Some(0) => Ok(()),
                    Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
                    None => Err(io::ErrorKind::InvalidData.into()),
                };
            }
        }
    }
}

/// One message of a datagram.
pub(super) struct Message<'a> {
    /// Subsystem in the high byte, message in the low one; below 16 netlink's own.
    pub(super) kind: u16,
    sequence: u32,
    raw: &'a [u8],
}

impl<'a> Message<'a> {
    /// Its attributes; what cannot be read ends them.
    pub(super) fn attributes(&self) -> Attributes<'a> {
        Attributes(self.raw.get(FAMILY_HEADER..).unwrap_or_default())
    }
}

/// The messages of a datagram; what cannot be read ends them.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let field = |at: usize| rest.get(at..at.checked_add(4)?)?.first_chunk().copied();
        let length = usize::try_from(u32::from_ne_bytes(field(0)?)).ok()?;
        let [a, b, ..] = field(4)?;
        let message = Message {
            kind: u16::from_ne_bytes([a, b]),
            sequence: u32::from_ne_bytes(field(8)?),
            raw: rest.get(HEADER..length)?,
        };
        rest = rest
            .get(length.checked_next_multiple_of(4)?..)
            .unwrap_or_default();
        Some(message)
    })
}

/// A run of attributes.
#[derive(Clone, Copy)]
pub(super) struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// Kinds and values, in order.
    pub(super) fn iter(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        let mut rest = self.0;
        // The iterator of the crate checks each attribute's bounds; where one is wrong there are no more.
        std::iter::from_fn(move || {
            let attribute = NlasIterator::new(rest).next()?.ok()?;
            let length = usize::from(attribute.length());
            let (kind, value) = (attribute.kind(), rest.get(4..length)?);
            rest = rest
                .get(length.checked_next_multiple_of(4)?..)
                .unwrap_or_default();
            Some((kind, value))
        })
    }

    /// The first of a kind.
    pub(super) fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.iter()
            .find_map(|(found, value)| (found == kind).then_some(value))
    }

    /// What is nested in the first of a kind.
    pub(super) fn nested(self, kind: u16) -> Option<Attributes<'a>> {
        self.get(kind).map(Attributes)
    }

    pub(super) fn u8(self, kind: u16) -> Option<u8> {
        self.get(kind)?.first().copied()
    }

    /// Numbers of the netfilter subsystems are in network order.
    pub(super) fn be16(self, kind: u16) -> Option<u16> {
        self.get(kind)?
            .first_chunk()
            .copied()
            .map(u16::from_be_bytes)
    }

    pub(super) fn be32(self, kind: u16) -> Option<u32> {
        self.get(kind)?
            .first_chunk()
            .copied()
            .map(u32::from_be_bytes)
    }

    pub(super) fn be64(self, kind: u16) -> Option<u64> {
        self.get(kind)?
            .first_chunk()
            .copied()
            .map(u64::from_be_bytes)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An attribute as the kernel writes it.
    pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        Request(Vec::new()).attribute(kind, value).0
    }

    /// A datagram of one message.
    pub(crate) fn datagram(subsystem: u8, message: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = Request::new(subsystem, message, 2, 0).0;
        bytes.extend(attributes.concat());
        let length = u32::try_from(bytes.len()).unwrap();
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = datagram(
            1,
            2,
            &[attribute(5, b"abcde"), attribute(6, &7_u32.to_be_bytes())],
        );
        let twice = [bytes.clone(), bytes].concat();
        let read: Vec<_> = messages(&twice).collect();
        assert_eq!(read.len(), 2);
        for message in read {
            assert_eq!(message.kind, 0x0102);
            assert_eq!(message.attributes().get(5), Some(&b"abcde"[..]));
            assert_eq!(message.attributes().be32(6), Some(7));
            assert_eq!(message.attributes().be32(5 + 2), None);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_fail(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in messages(&bytes) {
                for (kind, _) in message.attributes().iter() {
                    let _ = message.attributes().nested(kind).map(|inner| inner.iter().count());
                }
            }
            Attributes(&bytes).iter().count();
        }
    }
}
