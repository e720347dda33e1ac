//! What travels between daemon and launcher: one typed message a packet over a `SOCK_SEQPACKET` pair, descriptors
//! beside it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{CgroupLimits, LauncherError, Reaped};
use crate::slot::{HostLimits, HostUsage, SlotId, SlotRecord};

/// Longest message, bytes. An engine's command line is a few KiB; the kernel's default socket buffer holds 208 KiB.
pub(super) const MAX_MESSAGE: usize = 128 * 1024;
/// Most descriptors beside one message (the kernel's own limit is 253).
pub(super) const MAX_FDS: usize = 64;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) id: u64,
    pub(super) op: Op,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Op {
    Reserve(SlotRecord, HostLimits),
    Update(SlotId, SlotRecord, HostLimits),
    Release(SlotId),
    Launch(LaunchOrder),
    Kill(SlotId),
    Wait(SlotId),
    Usage,
    ReclaimOrphans,
    Memory(SlotId),
}

/// A `LaunchSpec` without its descriptors, which travel beside it in the order of `targets`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct LaunchOrder {
    pub(super) slot: SlotId,
    pub(super) program: Vec<u8>,
    pub(super) args: Vec<Vec<u8>>,
    pub(super) targets: Vec<i32>,
    pub(super) devices: Vec<Vec<u8>>,
    pub(super) limits: CgroupLimits,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Response {
    pub(super) id: u64,
    pub(super) result: Result<Reply, Refusal>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    Done,
    Slot(SlotId),
    /// With the pidfd beside it.
    Started {
        pid: u32,
    },
    Reaped(Option<Reaped>),
    Usage(HostUsage),
    Count(u32),
    /// With the process's opened `smaps_rollup` beside it.
    MemoryFile,
}

/// A `LauncherError` that can travel.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Refusal {
    NoRoom(HostUsage),
    NoSlot(u16),
    Step { step: String, message: String },
}

impl Refusal {
    pub(super) fn step(step: impl Into<String>, message: impl ToString) -> Refusal {
        Refusal::Step {
            step: step.into(),
            message: message.to_string(),
        }
    }
}

impl From<Refusal> for LauncherError {
    fn from(refusal: Refusal) -> LauncherError {
        match refusal {
            Refusal::NoRoom(usage) => LauncherError::NoRoom(usage),
            Refusal::NoSlot(slots) => LauncherError::NoSlot(slots),
            Refusal::Step { step, message } => LauncherError::Step { step, message },
        }
    }
}

pub(super) fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, Errno> {
    let bytes = postcard::to_stdvec(message).map_err(|_| Errno::INVAL)?;
    if bytes.len() > MAX_MESSAGE {
        return Err(Errno::MSGSIZE);
    }
    Ok(bytes)
}

/// Sends one message and descriptors beside it; they stay ours.
pub(super) fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOMANYREFS);
    }
    let sent = rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(
            socket.as_fd(),
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
    })?;
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(Errno::MSGSIZE)
    }
}

/// Receives one message with its descriptors (close-on-exec); nothing at the end of the connection.
pub(super) fn receive<T: DeserializeOwned>(
    socket: impl AsFd,
    buffer: &mut [u8],
    flags: RecvFlags,
) -> Result<Option<(T, Vec<OwnedFd>)>, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(
            socket.as_fd(),
            &mut [IoSliceMut::new(buffer)],
            &mut ancillary,
            flags | RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    if received
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(Errno::MSGSIZE);
    }
    let bytes = buffer.get(..received.bytes).ok_or(Errno::MSGSIZE)?;
    let message = postcard::from_bytes(bytes).map_err(|_| Errno::BADMSG)?;
    Ok(Some((message, fds)))
}
