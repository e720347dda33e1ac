//! The launcher: a small single-threaded root process, forked before any thread exists, that alone makes slots,
//! namespaces and cgroups and starts processes. It kills every child when its socket to the daemon closes.
//!
//! The daemon holds a [`Launcher`] and speaks to it over a packet socket (`wire`, `client`); the launcher's own loop
//! is `server`, what happens between fork and exec is `child`, what a process sees of the file system is `jail`. The
//! handle's methods for networks are in `network`, for services in `service`. Processes that a jailer puts away are
//! `jailed` for the daemon, `jailer` between fork and exec, and `keeper` for as long as they live.

mod child;
mod client;
mod fork;
mod jail;
mod jailed;
mod jailer;
mod keeper;
mod network;
mod server;
mod service;
mod signals;
mod wire;

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, WaitOptions};

use crate::net::NetworkId;
use crate::process::{ProcessMemory, come_before_vms, may_open_many};
use crate::slot::{DEFAULT_UID_BASE, HostLimits, HostUsage, SlotId, SlotRecord};
use fork::Forked;
pub use jailed::{CONTROL_DIR, JailFile, JailName, JailSpec, Jailed, METRICS_PIPE};
pub use network::Hub;
pub use service::{SERVICES, ServiceId, ServiceSpec};
use wire::{LaunchKind, LaunchOrder, Op, Refusal, Reply, Unit};

/// Where the launcher keeps things and which ids it hands out.
#[derive(Clone, Debug)]
pub struct LauncherConfig {
    /// `/run/vm0` unless a test isolates itself.
    pub run_dir: PathBuf,
    /// Slot *n* runs as uid and gid `uid_base + n`, service number *n* of the run directory as `uid_base + SLOTS + n`.
    pub uid_base: u32,
    /// Id of this runner process, written into slot records.
    pub instance: String,
}

/// A process to start in a slot: own uid and gid, no capabilities, no new privileges, a network namespace that is empty
/// or its VM's, private mount namespace that shows only what it needs, the slot's cgroup.
#[derive(Debug)]
pub struct LaunchSpec {
    /// Which slot.
    pub slot: SlotId,
    /// Absolute path of the program, below /usr (or /bin, /lib...): processes see nothing else of the host.
    pub program: PathBuf,
    /// Arguments after argv\[0\].
    pub args: Vec<OsString>,
    /// Descriptors the child gets, each under exactly this number. Those of 0 to 2 that are not given are /dev/null.
    pub fds: Vec<(OwnedFd, i32)>,
    /// Device nodes it may see and open beside null, zero, full and random: of /dev/kvm, /dev/vhost-vsock and
    /// /dev/net/tun.
    pub devices: Vec<PathBuf>,
    /// The network it is put into, which no other process may be in; an empty one if none is given.
    pub network: Option<NetworkUse>,
    /// Limits of the slot's cgroup.
    pub limits: CgroupLimits,
}

/// How a process uses a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkUse {
    /// Which.
    pub network: NetworkId,
    /// The number under which the process gets the device that leads to it.
    pub tap: i32,
}

/// Limits of a slot's cgroup; v1 and v2 alike. 0 is no limit.
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

impl LauncherConfig {
    /// The run directory unless `VM0_RUNNER_RUN_DIR` names another (for tests and unusual hosts: runners share a
    /// host's budget only if they share its run directory).
    pub const DEFAULT_RUN_DIR: &str = "/run/vm0";

    /// Reads `VM0_RUNNER_RUN_DIR` and `VM0_RUNNER_UID_BASE`, for tests and unusual hosts. Two run directories on one
    /// host need uid bases at least [`SLOTS`](crate::slot::SLOTS) and [`SERVICES`] apart: everything of a slot's uid dies with it.
    pub fn from_env(instance: String) -> Result<LauncherConfig, LauncherError> {
        let run_dir = std::env::var_os("VM0_RUNNER_RUN_DIR");
        let uid_base = match std::env::var("VM0_RUNNER_UID_BASE") {
            Err(std::env::VarError::NotPresent) => DEFAULT_UID_BASE,
            Ok(text) => parse_uid_base(&text)?,
            Err(e) => return Err(bad_uid_base(&e)),
        };
        Ok(LauncherConfig {
            run_dir: run_dir.map_or_else(|| PathBuf::from(Self::DEFAULT_RUN_DIR), PathBuf::from),
            uid_base,
            instance,
        })
    }
}

/// Below 65536 are the accounts of people and services; from 2^31 on signed tools break.
fn parse_uid_base(text: &str) -> Result<u32, LauncherError> {
    match text.parse::<u32>() {
        Ok(base) if (65_536..i32::MAX.unsigned_abs() - 4096 - 16).contains(&base) => Ok(base),
        Ok(_) => Err(bad_uid_base(&"it must lie between 65536 and 2147479534")),
        Err(e) => Err(bad_uid_base(&e)),
    }
}

fn bad_uid_base(message: &dyn ToString) -> LauncherError {
    LauncherError::Step {
        step: "read VM0_RUNNER_UID_BASE".to_owned(),
        message: message.to_string(),
    }
}

/// Asynchronous handle on the launcher. Clones share it; when the last is dropped the launcher ends, and with it
/// everything it started.
#[derive(Clone, Debug)]
pub struct Launcher {
    connection: Arc<client::Connection>,
}

/// The launcher before there is a runtime. Dropping it ends the launcher.
#[derive(Debug)]
pub struct ForkedLauncher {
    socket: OwnedFd,
    pidfd: OwnedFd,
    pid: Pid,
}

impl ForkedLauncher {
    /// Forks it. Call before any thread exists; the caller may drop privileges afterwards.
    ///
    /// Needs root.
    pub fn fork(config: LauncherConfig) -> Result<ForkedLauncher, LauncherError> {
        let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
        if threads != 1 {
            return Err(failed(
                "be forked",
                format!("{threads} threads run already"),
            ));
        }
        ForkedLauncher::fork_anyway(config)
    }

    /// As [`ForkedLauncher::fork`], from a process that has threads already: for test harnesses, which always do.
    ///
    /// Of what another thread may have held at the moment of the fork, the launcher needs only the allocator, whose
    /// locks the C library resets in the child. Everything else that is open is closed.
    #[cfg(feature = "test-support")]
    pub fn fork_in_tests(config: LauncherConfig) -> Result<ForkedLauncher, LauncherError> {
        ForkedLauncher::fork_anyway(config)
    }

    fn fork_anyway(config: LauncherConfig) -> Result<ForkedLauncher, LauncherError> {
        if !rustix::process::geteuid().is_root() {
            return Err(failed(
                "be started",
                "it makes namespaces and changes users, which needs root: run it with sudo",
            ));
        }
        let (ours, theirs) = socket_pair().map_err(|e| failed("be connected", e))?;
        // SAFETY: the caller is single-threaded (or, in tests, see above); the child never returns from `serve`.
        let pid = match unsafe { fork::fork(None) } {
            Ok(Forked::Parent(pid)) => pid,
            Ok(Forked::Child { .. }) => {
                drop(ours);
                serve(theirs, config)
            }
            Err(e) => return Err(failed("be forked", e)),
        };
        drop(theirs);
        // Our child, not reaped: the number is its own.
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            .map_err(|e| failed("be watched", e))?;
        let mut buffer = vec![0; 64 * 1024];
        let hello = wire::receive::<Result<(), Refusal>>(&ours, &mut buffer, RecvFlags::empty());
        match hello {
            Ok(Some((Ok(()), _))) => Ok(ForkedLauncher {
                socket: ours,
                pidfd,
                pid,
            }),
            Ok(Some((Err(refusal), _))) => {
                let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
                Err(refusal.into())
            }
            Ok(None) | Err(_) => Err(LauncherError::Gone),
        }
    }

    /// Its process id, for people and /proc.
    pub fn pid(&self) -> u32 {
        u32::try_from(self.pid.as_raw_pid()).unwrap_or(0)
    }

    /// Attaches it to the current tokio runtime.
    pub fn attach(self) -> Result<Launcher, LauncherError> {
        let connection = client::Connection::new(self).map_err(|e| failed("be attached", e))?;
        Ok(Launcher {
            connection: Arc::new(connection),
        })
    }
}

/// The launcher's life, from fork to exit.
fn serve(socket: OwnedFd, config: LauncherConfig) -> ! {
    // Whatever happens, nothing of the daemon's code may run here after this: a panic ends the process as well.
    let ran = std::panic::catch_unwind(|| {
        let prepared = settle(&socket).and_then(|()| {
            let socket = socket
                .try_clone()
                .map_err(|e| Refusal::step("duplicate its socket", e))?;
            server::Server::new(socket, config)
        });
        let (hello, server) = match prepared {
            Ok(server) => (Ok(()), Some(server)),
            Err(refusal) => (Err(refusal), None),
        };
        let greeted = wire::encode::<Result<(), Refusal>>(&hello)
            .and_then(|bytes| wire::send(&socket, &bytes, &[]));
        if let (Ok(()), Some(server)) = (greeted, server) {
            server.run();
        }
    });
    // SAFETY: ends the process without running anything of the daemon's, such as its exit handlers.
    unsafe { libc::_exit(i32::from(ran.is_err())) }
}

/// Parts from the daemon: own session, own name, none of its descriptors, and no threads' business.
fn settle(socket: &OwnedFd) -> Result<(), Refusal> {
    rustix::process::setsid().map_err(|e| Refusal::step("start a session", e))?;
    close_others(socket).map_err(|e| Refusal::step("close descriptors", e))?;
    let null = rustix::fs::open(
        "/dev/null",
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    );
    let null = null.map_err(|e| Refusal::step("open /dev/null", e))?;
    rustix::stdio::dup2_stdin(&null).map_err(|e| Refusal::step("close stdin", e))?;
    rustix::stdio::dup2_stdout(&null).map_err(|e| Refusal::step("close stdout", e))?;
    let _ = rustix::thread::set_name(c"vm0-launcher");
    rustix::process::chdir("/").map_err(|e| Refusal::step("enter /", e))?;
    come_before_vms();
    may_open_many();
    // What a slot's main process leaves behind becomes our child, so that we see it die.
    rustix::process::set_child_subreaper(Pid::from_raw(1))
        .map_err(|e| Refusal::step("become a subreaper", e))
}

/// Closes every descriptor of the daemon's that came along with the fork, but for stderr and `keep`.
fn close_others(keep: &OwnedFd) -> std::io::Result<()> {
    let keep = u32::try_from(keep.as_raw_fd()).unwrap_or(u32::MAX);
    for (first, last) in [
        (3, keep.saturating_sub(1)),
        (keep.saturating_add(1), u32::MAX),
    ] {
        // SAFETY: the only descriptors in use from here on are the ones kept.
        if first <= last && unsafe { libc::syscall(libc::SYS_close_range, first, last, 0_u32) } != 0
        {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

fn socket_pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
}

fn failed(step: &str, message: impl ToString) -> LauncherError {
    LauncherError::Step {
        step: step.to_owned(),
        message: message.to_string(),
    }
}

impl Launcher {
    async fn ask(&self, op: Op) -> Result<(Reply, Vec<OwnedFd>), LauncherError> {
        self.connection.ask(op, &[]).await
    }

    /// Takes a free slot under the host lock. Firm: only if the host's firm reservations with it stay within
    /// `limits`, or none is held at all. Whatever a dead owner left in the slot is reclaimed first. A caller that is
    /// cancelled meanwhile loses nothing: the slot is given back.
    pub async fn reserve(
        &self,
        record: SlotRecord,
        limits: HostLimits,
    ) -> Result<SlotId, LauncherError> {
        match self.ask(Op::Reserve(record, limits)).await?.0 {
            Reply::Slot(slot) => Ok(slot),
            other => Err(unexpected(&other)),
        }
    }

    /// Rewrites the record of a slot we hold; revocable to firm is checked against `limits` as in `reserve`.
    pub async fn update(
        &self,
        slot: SlotId,
        record: SlotRecord,
        limits: HostLimits,
    ) -> Result<(), LauncherError> {
        match self.ask(Op::Update(slot, record, limits)).await?.0 {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Kills and reaps whatever runs in the slot, removes its named things, unlocks it.
    pub async fn release(&self, slot: SlotId) -> Result<(), LauncherError> {
        match self.ask(Op::Release(slot)).await?.0 {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Starts a process in a slot we hold; returns when its program runs. One at a time in a slot.
    pub async fn launch(&self, spec: LaunchSpec) -> Result<Process, LauncherError> {
        let targets = spec.fds.iter().map(|(_, target)| *target).collect();
        let devices = spec.devices.into_iter();
        let order = LaunchOrder {
            kind: LaunchKind::Vm {
                slot: spec.slot,
                devices: devices
                    .map(|device| device.into_os_string().into_vec())
                    .collect(),
                network: spec.network.map(|used| (used.network, used.tap)),
            },
            program: spec.program.into_os_string().into_vec(),
            args: spec.args.into_iter().map(OsString::into_vec).collect(),
            targets,
            limits: spec.limits,
        };
        let fds: Vec<_> = spec.fds.iter().map(|(fd, _)| fd.as_fd()).collect();
        self.start(order, &fds).await
    }

    async fn start(
        &self,
        order: LaunchOrder,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Process, LauncherError> {
        let (reply, received) = self.connection.ask(Op::Launch(order), fds).await?;
        match (reply, received.into_iter().next()) {
            (Reply::Started { pid }, Some(pidfd)) => Ok(Process { pid, pidfd }),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Kills the slot's processes and waits until they are reaped; the slot stays ours. Nothing if none was started
    /// in it; what it left if it had died before.
    pub async fn kill(&self, slot: SlotId) -> Result<Option<Reaped>, LauncherError> {
        self.kill_unit(Unit::Slot(slot)).await
    }

    async fn kill_unit(&self, unit: Unit) -> Result<Option<Reaped>, LauncherError> {
        match self.ask(Op::Kill(unit)).await?.0 {
            Reply::Reaped(reaped) => Ok(reaped),
            other => Err(unexpected(&other)),
        }
    }

    /// Waits until the slot's process has died.
    pub async fn wait(&self, slot: SlotId) -> Result<Reaped, LauncherError> {
        self.wait_unit(Unit::Slot(slot)).await
    }

    async fn wait_unit(&self, unit: Unit) -> Result<Reaped, LauncherError> {
        match self.ask(Op::Wait(unit)).await?.0 {
            Reply::Reaped(Some(reaped)) => Ok(reaped),
            other => Err(unexpected(&other)),
        }
    }

    /// Memory of the slot's process. The launcher opens the file, as only root may; it is read here, as that takes
    /// milliseconds for a large VM.
    pub async fn memory(&self, slot: SlotId) -> Result<ProcessMemory, LauncherError> {
        let (reply, fds) = self.ask(Op::Memory(slot)).await?;
        let (Reply::MemoryFile, Some(fd)) = (&reply, fds.into_iter().next()) else {
            return Err(unexpected(&reply));
        };
        let read = tokio::task::spawn_blocking(move || {
            std::io::read_to_string(std::fs::File::from(fd)).map(|text| ProcessMemory::parse(&text))
        });
        let step = format!("read the memory of slot {}", slot.0);
        match read.await {
            Ok(Ok(Some(memory))) => Ok(memory),
            Ok(Ok(None)) => Err(failed(&step, "its process is gone")),
            Ok(Err(e)) => Err(failed(&step, e)),
            Err(e) => Err(failed(&step, e)),
        }
    }

    /// Takes what `owner` handed over under `name`, which only root may read beside them.
    pub async fn take_handover(&self, name: &str, owner: u32) -> Result<File, LauncherError> {
        let (reply, fds) = self.ask(Op::TakeHandover(name.to_owned(), owner)).await?;
        match (reply, fds.into_iter().next()) {
            (Reply::Handover, Some(file)) => Ok(file.into()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// What all held slots of the host take (any runner's).
    pub async fn usage(&self) -> Result<HostUsage, LauncherError> {
        match self.ask(Op::Usage).await?.0 {
            Reply::Usage(usage) => Ok(usage),
            other => Err(unexpected(&other)),
        }
    }

    /// Reclaims every slot whose owner is dead; returns how many had left something.
    pub async fn reclaim_orphans(&self) -> Result<u32, LauncherError> {
        match self.ask(Op::ReclaimOrphans).await?.0 {
            Reply::Count(count) => Ok(count),
            other => Err(unexpected(&other)),
        }
    }

    /// Resolves when the launcher has died.
    pub async fn gone(&self) {
        self.connection.gone().await;
    }

    /// Ends the launcher and waits until it has killed and cleaned everything.
    pub async fn shutdown(&self) {
        self.connection.close();
        self.connection.gone().await;
    }
}

fn unexpected(reply: &Reply) -> LauncherError {
    failed("be understood", format!("it answered {reply:?}"))
}
