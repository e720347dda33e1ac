//! Forking, and the control group a child is born in.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::process::Pid;

/// clone3's flag, from linux/sched.h; the libc crate's constant is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Which side of the fork one is on.
#[derive(Debug)]
pub(super) enum Forked {
    Parent(Pid),
    Child {
        /// Whether it was born in the group asked for; otherwise it has to join.
        in_group: bool,
    },
}

/// Forks. With `group`, the directory of a group of the unified hierarchy, the child is born in it if the kernel can
/// do that (since 5.7): moving a process there afterwards stops every fork and exit on the host for 5 to 9 ms.
///
/// # Safety
///
/// As `fork`: where the process has other threads, the child may only do what is sound in the middle of anything those
/// threads were doing. The child must end in exec or `_exit` and never return into its parent's code.
pub(super) unsafe fn fork(group: Option<BorrowedFd<'_>>) -> io::Result<Forked> {
    if let Some(group) = group
        // SAFETY: passed on to the caller.
        && let Ok(forked) = unsafe { clone(Some(group), 0) }
    {
        return Ok(forked);
    }
    // SAFETY: passed on to the caller.
    forked(unsafe { libc::fork() }.into(), false)
}

/// As [`fork`], and the child is the first process of a process namespace, which ends with it.
///
/// # Safety
///
/// As [`fork`].
pub(super) unsafe fn fork_first(group: Option<BorrowedFd<'_>>) -> io::Result<Forked> {
    let namespace = u64::from(libc::CLONE_NEWPID.unsigned_abs());
    if let Some(group) = group
        // SAFETY: passed on to the caller.
        && let Ok(forked) = unsafe { clone(Some(group), namespace) }
    {
        return Ok(forked);
    }
    // SAFETY: passed on to the caller.
    unsafe { clone(None, namespace) }
}

/// # Safety
///
/// As [`fork`].
unsafe fn clone(group: Option<BorrowedFd<'_>>, flags: u64) -> io::Result<Forked> {
    // SAFETY: plain integers, for which zero means "not asked for".
    let mut args = unsafe { std::mem::zeroed::<libc::clone_args>() };
    args.flags = flags;
    args.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
    if let Some(group) = group {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(group.as_raw_fd().unsigned_abs());
    }
    // SAFETY: `args` is a valid clone_args of the size given, asking for a copy of the process without shared memory
    // and on the same stack, which is what fork is.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const args,
            size_of::<libc::clone_args>(),
        )
    };
    forked(result, group.is_some())
}

fn forked(result: libc::c_long, in_group: bool) -> io::Result<Forked> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child { in_group }),
        pid => i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .map(Forked::Parent)
            .ok_or_else(|| io::Error::other("fork gave no process")),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;
    use std::path::PathBuf;

    use rustix::process::WaitOptions;

    use super::*;

    /// Removes a group when the test ends, whatever its end.
    struct Group(PathBuf);

    impl Drop for Group {
        fn drop(&mut self) {
            let _ = fs::remove_dir(&self.0);
        }
    }

    fn unified_hierarchy() -> Option<PathBuf> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mounts.lines().find(|line| line.contains(" - cgroup2 "))?;
        line.split(' ').nth(4).map(PathBuf::from)
    }

    #[test]
    fn a_child_is_born_in_its_group() {
        let made = unified_hierarchy().map(|mount| {
            let group = Group(mount.join(format!("vm0-fork-test-{}", std::process::id())));
            fs::create_dir(&group.0).map(|()| group)
        });
        let Some(Ok(group)) = made else {
            crate::test_support::skip("needs root and a mounted cgroup2 file system");
            return;
        };
        let directory = fs::File::open(&group.0).unwrap();
        // SAFETY: the child makes system calls only, and waits to be killed.
        match unsafe { fork(Some(directory.as_fd())) }.unwrap() {
            Forked::Child { in_group } => loop {
                // SAFETY: neither takes pointers; the second ends the process at once.
                unsafe {
                    if !in_group {
                        libc::_exit(1);
                    }
                    libc::pause();
                }
            },
            Forked::Parent(pid) => {
                let groups = fs::read_to_string(format!("/proc/{}/cgroup", pid.as_raw_pid()));
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
                rustix::process::waitpid(Some(pid), WaitOptions::empty()).unwrap();
                let name = group.0.file_name().unwrap().to_str().unwrap();
                assert!(groups.unwrap().lines().any(|l| l == format!("0::/{name}")));
            }
        }
    }
}
