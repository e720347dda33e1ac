//! The daemon's ends of the hub's event sockets.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::conntrack::{self, FlowEvent};
use super::netlink::MAX_DATAGRAM;
use super::nflog::{self, Refusal};
use super::nfnetlink::{Message, messages};

/// Why there is no next event now.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    /// The kernel had no room for events that were not read in time; those after them follow.
    #[error("the kernel dropped events of the network because they were not read in time")]
    Lost,
    /// The socket is of no more use.
    #[error("events of the network cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// Refused packets of a hub.
pub type RefusalEvents = Events<Refusal>;

/// Connections past the proxy of a hub.
pub type FlowEvents = Events<FlowEvent>;

impl RefusalEvents {
    /// Attaches the hub's socket to the current runtime.
    pub fn new(socket: OwnedFd) -> io::Result<RefusalEvents> {
        Events::attach(socket, nflog::parse)
    }
}

impl FlowEvents {
    /// Attaches the hub's socket to the current runtime.
    pub fn new(socket: OwnedFd) -> io::Result<FlowEvents> {
        Events::attach(socket, conntrack::parse)
    }
}

/// What the kernel tells over one of the hub's sockets.
#[derive(Debug)]
pub struct Events<T> {
    socket: AsyncFd<OwnedFd>,
    parse: fn(&Message<'_>) -> Option<T>,
    buffer: Vec<u8>,
    /// The rest of the last datagram, which holds a few hundred at most.
    read: VecDeque<T>,
}

impl<T> Events<T> {
    fn attach(socket: OwnedFd, parse: fn(&Message<'_>) -> Option<T>) -> io::Result<Events<T>> {
        // SAFETY: an OwnedFd answers `as_raw_fd` with the same open descriptor as long as it lives.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? };
        Ok(Events {
            socket,
            parse,
            buffer: vec![0; MAX_DATAGRAM],
            read: VecDeque::new(),
        })
    }

    /// Waits for the next. Cancel-safe.
    pub async fn next(&mut self) -> Result<T, EventError> {
        loop {
            if let Some(event) = self.read.pop_front() {
                return Ok(event);
            }
            let buffer = &mut self.buffer;
            let received = self.socket.async_io(Interest::READABLE, |socket| {
                let (received, _) =
                    rustix::net::recv(socket, &mut buffer[..], RecvFlags::DONTWAIT)?;
                Ok(received)
            });
            let received = match received.await {
                Ok(received) => received,
                Err(e) if Errno::from_io_error(&e) == Some(Errno::NOBUFS) => {
                    return Err(EventError::Lost);
                }
                Err(e) => return Err(e.into()),
            };
            let datagram = self.buffer.get(..received).unwrap_or_default();
            self.read
                .extend(messages(datagram).filter_map(|message| (self.parse)(&message)));
        }
    }
}
