//! From fork to exec: what turns a copy of the launcher into a process that can do nothing but its work.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};
use rustix::thread::{Gid, Uid};

use crate::cgroup::Cgroups;
use crate::net;

/// An engine holds a few dozen.
const MAX_OPEN_FILES: u64 = 4096;

/// Everything the child needs, gathered before the fork.
pub(super) struct Plan<'a> {
    pub(super) uid: u32,
    pub(super) program: CString,
    pub(super) argv: Vec<CString>,
    pub(super) environment: Vec<CString>,
    /// Descriptors and the numbers they get.
    pub(super) fds: Vec<(OwnedFd, RawFd)>,
    pub(super) mount_namespace: BorrowedFd<'a>,
    /// An empty one of its own if none is given.
    pub(super) network: Option<BorrowedFd<'a>>,
    pub(super) oom_score_adj: i32,
    pub(super) cgroups: &'a Cgroups,
    pub(super) pids_max: u32,
    /// The launcher.
    pub(super) parent: Option<Pid>,
}

pub(super) type Step<T> = Result<T, (&'static str, io::Error)>;

pub(super) trait At<T> {
    fn at(self, step: &'static str) -> Step<T>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, step: &'static str) -> Step<T> {
        self.map_err(|e| (step, e.into()))
    }
}

/// What the C library answers for -1.
pub(super) fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Runs in the child, which may have been born in the slot's group of the unified hierarchy, and ends in exec. Only returns with the step that failed.
pub(super) fn become_program(plan: &Plan<'_>, in_group: bool) -> Step<Infallible> {
    rustix::process::setsid().at("start a session")?;
    raise_oom_score(plan.oom_score_adj).at("set oom_score_adj")?;
    rustix::process::setpriority_process(None, 0).at("take the usual priority")?;
    plan.cgroups
        .join(plan.uid, in_group)
        .at("join the slot's cgroup")?;

    if let Some(network) = plan.network {
        net::enter(network).at("enter its network")?;
    }
    let of_its_own = match plan.network {
        Some(_) => libc::CLONE_NEWIPC | libc::CLONE_NEWUTS,
        None => libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWNET,
    };
    // SAFETY: takes no pointers; the process is single-threaded.
    checked(unsafe { libc::unshare(of_its_own) }).at("enter namespaces of its own")?;
    rustix::thread::move_into_link_name_space(
        plan.mount_namespace,
        Some(rustix::thread::LinkNameSpaceType::Mount),
    )
    .at("enter the mount namespace")?;
    rustix::process::chdir("/").at("enter /")?;

    arrange_descriptors(&plan.fds).at("arrange descriptors")?;

    limit(Resource::Core, 0).at("forbid core files")?;
    limit(Resource::Nofile, MAX_OPEN_FILES).at("limit open files")?;
    // Processes are counted by uid, and the uid is the slot's alone: this holds where cgroups cannot be had.
    if plan.pids_max > 0 {
        limit(Resource::Nproc, u64::from(plan.pids_max)).at("limit processes")?;
    }

    drop_privileges(plan.uid)?;

    // After the change of uid, which clears it. The launcher has a single thread, so this fires when it dies and not
    // before.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .at("die with the launcher")?;
    if rustix::process::getppid() != plan.parent {
        return Err(("find the launcher alive", io::ErrorKind::NotFound.into()));
    }
    reset_signals().at("reset signals")?;
    // SAFETY: umask has no preconditions.
    unsafe { libc::umask(0o077) };

    let argv = pointers(&plan.argv);
    let environment = pointers(&plan.environment);
    // SAFETY: program, every argument and every variable are NUL-terminated strings that outlive the call; both arrays end in NULL.
    unsafe { libc::execve(plan.program.as_ptr(), argv.as_ptr(), environment.as_ptr()) };
    Err(("execute the program", io::Error::last_os_error()))
}

/// Raises it to this. Lowering it, should the launcher's be higher, takes a privilege that not every root has.
pub(super) fn raise_oom_score(to: i32) -> io::Result<()> {
    const FILE: &str = "/proc/self/oom_score_adj";
    let current = fs::read_to_string(FILE)?;
    match current.trim().parse::<i32>() {
        Ok(current) if current >= to => Ok(()),
        _ => fs::write(FILE, to.to_string()),
    }
}

/// The array that `execve` wants.
pub(super) fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    let pointers = strings.iter().map(|string| string.as_ptr());
    pointers.chain(std::iter::once(std::ptr::null())).collect()
}

/// Gives every descriptor its number, /dev/null to those of 0 to 2 that are not given, and marks all others to be
/// closed by exec.
pub(super) fn arrange_descriptors(fds: &[(OwnedFd, RawFd)]) -> io::Result<()> {
    // Sources may stand where targets must go: move them above all targets first.
    let above = fds
        .iter()
        .map(|(_, target)| *target)
        .max()
        .unwrap_or(2)
        .max(2);
    let above = above.saturating_add(1);
    let mut moves = Vec::with_capacity(fds.len().saturating_add(3));
    for (fd, target) in fds {
        moves.push((rustix::io::fcntl_dupfd_cloexec(fd, above)?, *target));
    }
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    for standard in 0..=2 {
        if !fds.iter().any(|(_, target)| *target == standard) {
            moves.push((rustix::io::fcntl_dupfd_cloexec(&null, above)?, standard));
        }
    }
    // Whatever else is open, from whoever opened it without the flag.
    // SAFETY: marks descriptors only; takes no pointers.
    let marked = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3_u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if marked != 0 {
        return Err(io::Error::last_os_error());
    }
    for (source, target) in &moves {
        // SAFETY: dup2 replaces `target`, which no owner in this process uses again before exec.
        checked(unsafe { libc::dup2(source.as_raw_fd(), *target) })?;
    }
    Ok(())
}

pub(super) fn limit(resource: Resource, value: u64) -> rustix::io::Result<()> {
    let limit = Rlimit {
        current: Some(value),
        maximum: Some(value),
    };
    rustix::process::setrlimit(resource, limit)
}

/// Leaves the process with one uid and gid, no group, no capability in any set, and no way to gain one.
pub(super) fn drop_privileges(uid: u32) -> Step<()> {
    drop_bounding(&[]).at("drop capabilities")?;
    rustix::thread::clear_ambient_capability_set().at("drop ambient capabilities")?;
    rustix::thread::set_thread_groups(&[]).at("leave groups")?;
    let gid = Gid::from_raw(uid);
    rustix::thread::set_thread_res_gid(gid, gid, gid).at("change gid")?;
    let user = Uid::from_raw(uid);
    rustix::thread::set_thread_res_uid(user, user, user).at("change uid")?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).at("drop capabilities")?;
    rustix::thread::set_no_new_privs(true).at("forbid new privileges")
}

/// Makes sure that the process and its children never have capabilities but these.
pub(super) fn drop_bounding(but: &[u32]) -> io::Result<()> {
    for capability in (0..64_u32).filter(|capability| !but.contains(capability)) {
        // SAFETY: PR_CAPBSET_DROP takes one number and no pointers.
        let dropped = checked(unsafe {
            libc::prctl(
                libc::PR_CAPBSET_DROP,
                libc::c_ulong::from(capability),
                0,
                0,
                0,
            )
        });
        match dropped {
            // The kernel knows no capability of this number, nor any above it.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => break,
            other => other.map(drop)?,
        }
    }
    Ok(())
}

/// The launcher ignores some signals and blocks another; both would survive exec.
pub(super) fn reset_signals() -> io::Result<()> {
    for signal in super::signals::IGNORED_SIGNALS {
        // SAFETY: SIG_DFL is a valid disposition for these signals.
        if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: sigset_t is plain data; sigemptyset initialises it before it is read.
    checked(unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut())
    })?;
    Ok(())
}
