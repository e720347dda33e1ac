//! Processes that a jailer of their engine puts away: from the daemon's side.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

use serde::{Deserialize, Serialize};

use super::wire::{JailOrder, Op, Reply};
use super::{CgroupLimits, Launcher, LauncherError, Process, unexpected};
use crate::net::NetworkId;
use crate::slot::SlotId;

/// Directory in every jail in which the process makes its sockets; see [`Jailed::control`].
pub const CONTROL_DIR: &str = "control";
/// A named pipe in it, for figures that the process writes and whoever has the directory may read.
pub const METRICS_PIPE: &str = "metrics";

/// A VM's process to start under Firecracker's jailer, in a slot we hold: own uid and gid, a root directory of its own
/// that holds what is listed here and nothing else, a process namespace, a network namespace that is empty or its
/// VM's, the slot's cgroup.
///
/// The root directory is made for this one start, on a tmpfs in a mount namespace of the process's own: whatever becomes
/// of process, launcher or host, nothing of it can stay behind. In an empty network namespace there is a device `tap0`
/// as there is in a VM's.
#[derive(Debug)]
pub struct JailSpec {
    /// Which slot.
    pub slot: SlotId,
    /// The jailer and the program it starts, opened for reading. Both statically linked, root's, and writable by root
    /// only: the first runs as root.
    pub jailer: File,
    /// See `jailer`.
    pub program: File,
    /// The program's own arguments, after those that the jailer gives it.
    pub args: Vec<OsString>,
    /// What it finds in its root directory.
    pub files: Vec<JailFile>,
    /// Becomes its standard output and error.
    pub console: OwnedFd,
    /// The network it is put into, which no other process may be in; an empty one if none is given.
    pub network: Option<NetworkId>,
    /// Limits of the slot's cgroup.
    pub limits: CgroupLimits,
}

/// A file that a jailed process finds in its root directory, under the same name in every jail.
#[derive(Debug)]
pub struct JailFile {
    /// The file itself: bytes that are shared with whoever else has it. It must have a name on disk meanwhile, since
    /// the kernel shows nothing by a name that has none itself; afterwards that may go.
    pub file: File,
    /// Under which name.
    pub name: JailName,
    /// Whether it may be written, for which its mode must let the slot's user as well.
    pub writable: bool,
}

/// Name of a file in a jail's root directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum JailName {
    /// Guest kernel.
    Kernel,
    /// Initial RAM file system.
    Initrd,
    /// Root file system.
    Rootfs,
    /// Private disk.
    Disk,
    /// Guest memory of a snapshot.
    Memory,
    /// Device state of a snapshot.
    State,
}

impl JailName {
    /// As the process knows it.
    pub fn as_str(self) -> &'static str {
        match self {
            JailName::Kernel => "kernel",
            JailName::Initrd => "initrd",
            JailName::Rootfs => "rootfs",
            JailName::Disk => "disk",
            JailName::Memory => "memory",
            JailName::State => "state",
        }
    }
}

/// A started process and the way to its sockets.
#[derive(Debug)]
pub struct Jailed {
    /// It.
    pub process: Process,
    /// Its directory [`CONTROL_DIR`], in which only the process and root can make anything: reached by
    /// `/proc/self/fd/<n>` and by no path of the host.
    pub control: OwnedFd,
}

impl Launcher {
    /// Starts a process under a jailer; returns when the jailer runs. One at a time in a slot.
    pub async fn launch_jailed(&self, spec: JailSpec) -> Result<Jailed, LauncherError> {
        let order = JailOrder {
            slot: spec.slot,
            network: spec.network,
            args: spec.args.into_iter().map(OsString::into_vec).collect(),
            files: spec
                .files
                .iter()
                .map(|file| (file.name, file.writable))
                .collect(),
            limits: spec.limits,
        };
        let first = [
            spec.jailer.as_fd(),
            spec.program.as_fd(),
            spec.console.as_fd(),
        ];
        let files = spec.files.iter().map(|file| file.file.as_fd());
        let fds: Vec<_> = first.into_iter().chain(files).collect();
        let (reply, received) = self.connection.ask(Op::LaunchJailed(order), &fds).await?;
        let fds: Result<[OwnedFd; 2], _> = received.try_into();
        match (reply, fds) {
            (Reply::Started { pid }, Ok([pidfd, control])) => Ok(Jailed {
                process: Process { pid, pidfd },
                control,
            }),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Stops every thread of the slot's process, whatever it does at the moment.
    pub async fn freeze(&self, slot: SlotId) -> Result<(), LauncherError> {
        self.done(Op::Freeze(slot, true)).await
    }

    /// Lets a frozen process run again.
    pub async fn thaw(&self, slot: SlotId) -> Result<(), LauncherError> {
        self.done(Op::Freeze(slot, false)).await
    }
}
