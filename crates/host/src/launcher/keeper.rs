//! The first process of a jailed process's namespace: it does nothing but end when the launcher has.
//!
//! A VM's process dies with the launcher by asking the kernel for a signal, which a change of uid takes back; and a jailer
//! changes its uid between us and the program. So the namespace's first process waits for the launcher's death, and
//! the kernel kills whatever is in a namespace with its first process.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};

use super::child;
use crate::cgroup::Cgroups;

/// The keeper's life. `launcher` is the launcher's pidfd.
pub(super) fn keep(uid: u32, cgroups: &Cgroups, in_group: bool, launcher: &OwnedFd) -> ! {
    // Where any of this fails there is no keeper, and therefore no namespace to start a process in.
    if prepare(uid, cgroups, in_group, launcher).is_some() {
        let mut fds = [PollFd::new(launcher, PollFlags::IN)];
        while rustix::event::poll(&mut fds, None) != Ok(1) {}
    }
    // SAFETY: ends the process without running anything of the launcher's.
    unsafe { libc::_exit(0) }
}

fn prepare(uid: u32, cgroups: &Cgroups, in_group: bool, launcher: &OwnedFd) -> Option<()> {
    rustix::process::setsid().ok()?;
    let _ = rustix::thread::set_name(c"vm0-keeper");
    cgroups.join(uid, in_group).ok()?;
    let keep = launcher.as_raw_fd().unsigned_abs();
    for (first, last) in [(0, keep.checked_sub(1)?), (keep.checked_add(1)?, u32::MAX)] {
        // SAFETY: the one descriptor in use from here on is the one kept.
        if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0_u32) } != 0 {
            return None;
        }
    }
    child::drop_privileges(uid).ok()
}
