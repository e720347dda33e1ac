//! The launcher: a small single-threaded root process, forked before any thread exists, that alone makes slots,
//! namespaces and cgroups and starts processes. It kills every child when its socket to the daemon closes.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::slot::{HostLimits, HostUsage, Resources, SlotId, SlotRecord};

/// Where the launcher keeps things and which ids it hands out.
#[derive(Clone, Debug)]
pub struct LauncherConfig {
    /// `/run/vm0` unless a test isolates itself.
    pub run_dir: PathBuf,
    /// Slot *n* runs as uid and gid `uid_base + n`.
    pub uid_base: u32,
    /// Id of this runner process, written into slot records.
    pub instance: String,
}

/// A process to start in a slot: own uid and gid, no capabilities, no new privileges, empty network namespace,
/// private mount namespace that shows only what it needs, the slot's cgroup.
#[derive(Debug)]
pub struct LaunchSpec {
    /// Which slot.
    pub slot: SlotId,
    /// Absolute path of the program.
    pub program: PathBuf,
    /// Arguments after argv\[0\].
    pub args: Vec<OsString>,
    /// Descriptors the child gets, each under exactly this number (3 and up).
    pub fds: Vec<(OwnedFd, i32)>,
    /// Device nodes it may see and open (such as /dev/kvm).
    pub devices: Vec<PathBuf>,
    /// Limits of the slot's cgroup.
    pub limits: CgroupLimits,
}

/// Limits of a slot's cgroup; v1 and v2 alike.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct CgroupLimits {
    /// Bytes: the profile's memory plus the engine's measured overhead.
    pub memory_max: u64,
    /// Processes and threads.
    pub pids_max: u32,
    /// 1 to 10000, 100 is neutral.
    pub cpu_weight: u32,
}

/// A started process, held by pidfd. Dropping it does not kill it; the slot's release does.
#[derive(Debug)]
pub struct Process {
    /// Process id, for people and /proc.
    pub pid: u32,
    /// Becomes readable when it has died.
    pub pidfd: OwnedFd,
}

/// What a dead child left, as the launcher (its parent) reaped it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Reaped {
    /// Exit code, if it exited.
    pub code: Option<i32>,
    /// Signal, if it was killed.
    pub signal: Option<i32>,
    /// Whether the slot's cgroup counted an out-of-memory kill.
    pub oom_killed: bool,
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum LauncherError {
    /// It is gone; everything it started is dead.
    #[error("the launcher process has ended; every VM of this runner was stopped with it")]
    Gone,
    /// The host has no room for this reservation now.
    #[error("the host has no room for it now")]
    NoRoom(HostUsage),
    /// All slots taken.
    #[error("all {0} slots of this host are taken")]
    NoSlot(u16),
    /// A system call failed.
    #[error("the launcher could not {step}: {message}")]
    Step {
        /// What it was doing.
        step: String,
        /// Why it failed.
        message: String,
    },
}

/// Asynchronous handle on the launcher. Clones share it.
#[derive(Clone, Debug)]
pub struct Launcher {}

/// The launcher before there is a runtime.
#[derive(Debug)]
pub struct ForkedLauncher {}

impl ForkedLauncher {
    /// Forks it. Call before any thread exists; the caller may drop privileges afterwards.
    pub fn fork(config: LauncherConfig) -> Result<ForkedLauncher, LauncherError> {
        let _ = config;
        Err(LauncherError::Gone)
    }
    /// Attaches it to the current tokio runtime.
    pub fn attach(self) -> Result<Launcher, LauncherError> {
        Err(LauncherError::Gone)
    }
}

impl Launcher {
    /// Takes a free slot under the host lock. Firm: only if the host's firm reservations with it stay within
    /// `limits`, or none is held at all. Whatever a dead owner left in the slot is reclaimed first.
    pub async fn reserve(
        &self,
        record: SlotRecord,
        limits: HostLimits,
    ) -> Result<SlotId, LauncherError> {
        let _ = (record, limits);
        Err(LauncherError::Gone)
    }
    /// Rewrites the record of a slot we hold; revocable to firm is checked against `limits` as in `reserve`.
    pub async fn update(
        &self,
        slot: SlotId,
        record: SlotRecord,
        limits: HostLimits,
    ) -> Result<(), LauncherError> {
        let _ = (slot, record, limits);
        Err(LauncherError::Gone)
    }
    /// Kills and reaps whatever runs in the slot, removes its named things, unlocks it.
    pub async fn release(&self, slot: SlotId) -> Result<(), LauncherError> {
        let _ = slot;
        Err(LauncherError::Gone)
    }
    /// Starts a process in a slot we hold.
    pub async fn launch(&self, spec: LaunchSpec) -> Result<Process, LauncherError> {
        let _ = spec;
        Err(LauncherError::Gone)
    }
    /// Kills the slot's processes and waits until they are reaped; the slot stays ours.
    pub async fn kill(&self, slot: SlotId) -> Result<Option<Reaped>, LauncherError> {
        let _ = slot;
        Err(LauncherError::Gone)
    }
    /// Waits until the slot's process has died.
    pub async fn wait(&self, slot: SlotId) -> Result<Reaped, LauncherError> {
        let _ = slot;
        Err(LauncherError::Gone)
    }
    /// What all held slots of the host take (any runner's).
    pub async fn usage(&self) -> Result<HostUsage, LauncherError> {
        Err(LauncherError::Gone)
    }
    /// Reclaims every slot whose owner is dead; returns how many had left something.
    pub async fn reclaim_orphans(&self) -> Result<u32, LauncherError> {
        Err(LauncherError::Gone)
    }
    /// Resolves when the launcher has died.
    pub async fn gone(&self) {}
}

/// Cheap sum for callers that compare.
impl std::ops::Add for Resources {
    type Output = Resources;
    fn add(self, other: Resources) -> Resources {
        Resources {
            vcpu: self.vcpu.saturating_add(other.vcpu),
            memory_mb: self.memory_mb.saturating_add(other.memory_mb),
            disk_mb: self.disk_mb.saturating_add(other.disk_mb),
        }
    }
}
