//! Processes by number, told apart safely: by uid from /proc, by pidfd before anything is done to them.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal, getrlimit, setrlimit};

/// Memory of one process, bytes, from `/proc/<pid>/smaps_rollup`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ProcessMemory {
    /// Resident, shared pages counted whole.
    pub rss: u64,
    /// Resident, shared pages divided by their users.
    pub pss: u64,
    /// Dirty pages that nobody else maps: what this process costs the host for good.
    pub private_dirty: u64,
}

impl ProcessMemory {
    /// Reads the text of a `smaps_rollup` file; nothing if the process is gone (the file is then empty).
    pub fn parse(smaps_rollup: &str) -> Option<ProcessMemory> {
        let field = |name: &str| {
            smaps_rollup.lines().find_map(|line| {
                let kib = line.strip_prefix(name)?.strip_prefix(':')?.trim();
                kib.strip_suffix(" kB")?.trim().parse::<u64>().ok()
            })
        };
        Some(ProcessMemory {
            rss: field("Rss")?.saturating_mul(1024),
            pss: field("Pss")?.saturating_mul(1024),
            private_dirty: field("Private_Dirty")?.saturating_mul(1024),
        })
    }
}

/// Puts the calling process, which is root, before its VMs where memory or CPU are short: a busy guest must not starve
/// control. VMs carry an `oom_score_adj` of +500 and nice 0. What the caller starts itself inherits both. Fails without
/// root, where nothing depends on it.
pub fn come_before_vms() {
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    let _ = rustix::process::setpriority_process(None, -10);
}

/// Lets the calling process open as many files as it may at all. A VM's network and its process take four descriptors in
/// the launcher, and its sockets and pidfd some in the daemon: the usual limit would be reached with 250 of them.
pub fn may_open_many() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // What cannot be raised shows when it is reached.
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    );
}

/// The real, effective, saved and file-system uid of a process, from `/proc/<pid>/status`.
fn uids(pid: u32) -> Option<[u32; 4]> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let mut fields = line.split_whitespace().map(str::parse::<u32>);
    let mut next = || fields.next()?.ok();
    Some([next()?, next()?, next()?, next()?])
}

/// Whether the process, dead ones not counted, runs as `uid` and nothing but `uid`.
fn runs_as(pid: u32, uid: u32) -> bool {
    uids(pid) == Some([uid; 4])
}

/// Every live process that runs as `uid`, as descriptors checked after they were opened: a number reused in between
/// is noticed.
pub(crate) fn of_uid(uid: u32) -> Vec<OwnedFd> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| open_if_uid(pid, uid))
        .collect()
}

fn open_if_uid(pid: u32, uid: u32) -> Option<OwnedFd> {
    if !runs_as(pid, uid) {
        return None;
    }
    let pidfd = rustix::process::pidfd_open(pid_of(pid)?, PidfdFlags::empty()).ok()?;
    // A dead process that nobody has reaped still has its uid; its pidfd is readable and it needs no killing.
    (runs_as(pid, uid) && !is_dead(&pidfd)).then_some(pidfd)
}

/// Kills every process that runs as `uid` and waits until all are dead; false if some are left after `limit`.
///
/// Only for uids that are ours alone (`uid_base + n`): everything of that uid dies.
pub(crate) fn kill_uid(uid: u32, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let processes = of_uid(uid);
        if processes.is_empty() {
            return true;
        }
        for process in &processes {
            // ESRCH: it died meanwhile, which is what we want.
            let _ = rustix::process::pidfd_send_signal(process, Signal::KILL);
        }
        for process in &processes {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            wait_dead(process, left);
        }
    }
}

pub(crate) fn pid_of(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(pid).ok()?)
}

fn is_dead(pidfd: &OwnedFd) -> bool {
    wait_dead(pidfd, Duration::ZERO)
}

/// Waits until the process behind a pidfd has died; false after `limit`.
fn wait_dead(pidfd: &OwnedFd, limit: Duration) -> bool {
    let timeout = Timespec::try_from(limit).ok();
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    matches!(rustix::event::poll(&mut fds, timeout.as_ref()), Ok(n) if n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_kernels_text() {
        let text = "00400000-7fff0000 ---p 00000000 00:00 0    [rollup]\n\
            Rss:              123456 kB\nPss:               60000 kB\nPss_Dirty:         100 kB\n\
            Shared_Dirty:        7 kB\nPrivate_Clean:       9 kB\nPrivate_Dirty:     40960 kB\n";
        let memory = ProcessMemory::parse(text).unwrap();
        assert_eq!(memory.rss, 123_456 << 10);
        assert_eq!(memory.pss, 60_000 << 10);
        assert_eq!(memory.private_dirty, 40 << 20);
        assert_eq!(ProcessMemory::parse(""), None);
    }

    #[test]
    fn a_process_is_told_by_all_of_its_uids() {
        let me = std::process::id();
        let uid = rustix::process::geteuid().as_raw();
        assert!(runs_as(me, uid));
        assert!(!runs_as(me, uid + 1));
        assert!(open_if_uid(me, uid).is_some());
    }
}
