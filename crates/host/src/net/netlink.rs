//! A netlink socket: it keeps working in the namespace it was opened in, wherever its owner goes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

/// Longest datagram the kernel sends us, bytes: it packs its own into 32 KiB at most.
pub(crate) const MAX_DATAGRAM: usize = 64 * 1024;

/// A socket and the number of its last request.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// For links, addresses, routes and neighbours.
    pub(crate) fn route() -> io::Result<Netlink> {
        // Protocol 0, which is also what no protocol is.
        Netlink::open(None, 0)
    }

    /// For connection tracking and logging.
    pub(crate) fn netfilter() -> io::Result<Netlink> {
        Netlink::open(Some(netlink::NETFILTER), 0)
    }

    /// The same, and hears what is told to these groups, each a bit.
    pub(crate) fn netfilter_events(groups: u32) -> io::Result<Netlink> {
        Netlink::open(Some(netlink::NETFILTER), groups)
    }

    fn open(protocol: Option<Protocol>, groups: u32) -> io::Result<Netlink> {
        let kind = SocketType::RAW;
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, kind, flags, protocol)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups))?;
        // Process 0 is the kernel: nobody else can send to it then.
        rustix::net::connect(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Netlink {
            socket,
            sequence: 0,
            buffer: vec![0; MAX_DATAGRAM],
        })
    }

    pub(crate) fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    pub(crate) fn send(&self, request: &[u8]) -> io::Result<()> {
        rustix::net::send(&self.socket, request, SendFlags::empty())?;
        Ok(())
    }

    /// The next datagram. The kernel answers before the call that asked returns, so this never waits for long.
    pub(crate) fn receive(&mut self) -> io::Result<&[u8]> {
        let (received, _) = rustix::io::retry_on_intr(|| {
            rustix::net::recv(&self.socket, &mut self.buffer[..], RecvFlags::empty())
        })?;
        self.buffer
            .get(..received)
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    pub(crate) fn into_fd(self) -> OwnedFd {
        self.socket
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
