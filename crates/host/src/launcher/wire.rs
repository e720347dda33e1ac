//! What travels between daemon and launcher: one typed message a packet over a `SOCK_SEQPACKET` pair, descriptors
//! beside it.

use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::jailed::JailName;
use super::{CgroupLimits, LauncherError, Reaped, ServiceId};
use crate::net::{HubConfig, HubNumber, NetworkId};
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
    LaunchJailed(JailOrder),
    /// Stops every thread of a slot's process, or lets them run again.
    Freeze(SlotId, bool),
    Kill(Unit),
    Wait(Unit),
    Usage,
    ReclaimOrphans,
    Memory(SlotId),
    /// Name and uid of whoever left it.
    TakeHandover(String, u32),
    MakeHub(HubConfig),
    MakeNetwork,
    UnpluggedDevice,
    FlushNetwork(NetworkId),
    CutNetwork(NetworkId),
    DestroyNetwork(NetworkId),
    /// With the seconds it holds.
    OpenDestinations(NetworkId, Vec<SocketAddrV4>, u32),
    AllowInternal(Vec<Ipv4Addr>, u32),
    AdmitApi(Vec<SocketAddrV4>, u32),
}

/// Where a process runs and whose uid and cgroup it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Unit {
    Slot(SlotId),
    Service(ServiceId),
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unit::Slot(slot) => write!(f, "slot {}", slot.0),
            Unit::Service(service) => write!(f, "service {}", service.0),
        }
    }
}

/// A `LaunchSpec` or a `ServiceSpec` without its descriptors, which travel beside it: those in the order of `targets`,
/// then those of a service's directories.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct LaunchOrder {
    pub(super) kind: LaunchKind,
    pub(super) program: Vec<u8>,
    pub(super) args: Vec<Vec<u8>>,
    pub(super) targets: Vec<i32>,
    pub(super) limits: CgroupLimits,
}

/// A `JailSpec` without its descriptors, which travel beside it: jailer, program, console, then the files in their order.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct JailOrder {
    pub(super) slot: SlotId,
    pub(super) network: Option<NetworkId>,
    pub(super) args: Vec<Vec<u8>>,
    /// And whether it may be written.
    pub(super) files: Vec<(JailName, bool)>,
    pub(super) limits: CgroupLimits,
}

/// What is particular to a VM's process and to a service.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum LaunchKind {
    Vm {
        slot: SlotId,
        devices: Vec<Vec<u8>>,
        /// And the number under which the process gets the network's device.
        network: Option<(NetworkId, i32)>,
    },
    Service {
        service: ServiceId,
        /// `NAME=value`.
        environment: Vec<Vec<u8>>,
        resolv_conf: String,
        /// Where the directories beside the message are shown.
        shown: Vec<Vec<u8>>,
    },
}

impl LaunchKind {
    pub(super) fn unit(&self) -> Unit {
        match self {
            LaunchKind::Vm { slot, .. } => Unit::Slot(*slot),
            LaunchKind::Service { service, .. } => Unit::Service(*service),
        }
    }
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
    /// With the pidfd beside it, and behind it a jailed process's control directory.
    Started {
        pid: u32,
    },
    Reaped(Option<Reaped>),
    Usage(HostUsage),
    Count(u32),
    /// With the process's opened `smaps_rollup` beside it.
    MemoryFile,
    /// With the file beside it.
    Handover,
    /// With its sockets beside it.
    Hub(HubNumber),
    Network(NetworkId),
    /// With it beside it.
    Device,
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
