//! Processes, looked at through /proc and held by pidfd.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::search::{Needle, found_in};

/// A process held by pidfd: what is killed or waited for is the process that was found, whatever became of its number.
#[derive(Debug)]
pub struct Proc {
    /// Its number.
    pub pid: u32,
    /// Its command name.
    pub name: String,
    fd: OwnedFd,
}

impl Proc {
    /// Holds a process; `None` if there is none of that number.
    pub fn open(pid: u32) -> Option<Self> {
        let fd = pidfd_open(Pid::from_raw(pid.try_into().ok()?)?, PidfdFlags::empty()).ok()?;
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        Some(Self {
            pid,
            name: name.trim().to_owned(),
            fd,
        })
    }

    /// Sends a signal; one that is dead already is fine.
    pub fn signal(&self, signal: Signal) {
        // ESRCH: it has ended, which is no failure of the test's.
        let _ = pidfd_send_signal(&self.fd, signal);
    }

    /// SIGKILL.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Waits until it has ended (a zombie counts: it runs no more); false after the deadline.
    pub fn ends_within(&self, deadline: Duration) -> bool {
        let timeout = Timespec::try_from(deadline).expect("a sane deadline");
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        poll(&mut fds, Some(&timeout)).expect("poll works") > 0
    }

    /// Which of these its memory, the memory of a VM included, holds somewhere.
    pub fn memory_holds(&self, needles: &[Needle]) -> BTreeSet<String> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid)).unwrap_or_default();
        let memory = File::open(format!("/proc/{}/mem", self.pid)).expect("root may read it");
        let writable = maps.lines().filter_map(|line| {
            let (range, rest) = line.split_once(' ')?;
            let (first, end) = range.split_once('-')?;
            let number = |text| u64::from_str_radix(text, 16).ok();
            (rest.starts_with("rw")).then_some((number(first)?, number(end)?))
        });
        let mut found = BTreeSet::new();
        for (first, end) in writable {
            let part = Memory {
                memory: &memory,
                at: first,
                end,
            };
            found.extend(found_in(part, needles));
        }
        found
    }

    /// Which of these the files that it has open hold somewhere, whether they have a name or not: a VM's disk, the memory
    /// it was restored from.
    pub fn open_files_hold(&self, needles: &[Needle]) -> BTreeSet<String> {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.pid)).expect("root may read it");
        let mut found = BTreeSet::new();
        for descriptor in descriptors.flatten() {
            // Through the link of /proc, which opens the file itself.
            let Ok(held) = fs::metadata(descriptor.path()) else {
                continue;
            };
            if held.is_file() {
                let file = File::open(descriptor.path()).expect("root may read it");
                found.extend(found_in(file, needles));
            }
        }
        found
    }

    /// Its direct children.
    pub fn children(&self) -> Vec<Proc> {
        let mut found = Vec::new();
        for task in fs::read_dir(format!("/proc/{}/task", self.pid))
            .into_iter()
            .flatten()
            .flatten()
        {
            let list = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            found.extend(
                list.split_whitespace()
                    .filter_map(|pid| Proc::open(pid.parse().ok()?)),
            );
        }
        found
    }
}

/// A stretch of a process's memory, to read.
struct Memory<'m> {
    memory: &'m File,
    at: u64,
    end: u64,
}

impl Read for Memory<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let length = left.min(buffer.len());
        // What cannot be read (a device's memory, a page beyond a file's end) ends the stretch.
        let read = self
            .memory
            .read_at(&mut buffer[..length], self.at)
            .unwrap_or(0);
        self.at += read as u64;
        Ok(read)
    }
}

/// Numbers of all processes.
fn pids() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc")
        .expect("/proc is mounted")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Processes whose real uid lies in the range: the VMs of one host. Zombies are not counted: they wait for their
/// parent, and hold nothing.
pub fn processes_of_uids(range: &Range<u32>) -> Vec<Proc> {
    pids()
        .filter_map(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let field = |name: &str| {
                let line = status.lines().find(|line| line.starts_with(name))?;
                line.split_whitespace().nth(1)
            };
            let uid: u32 = field("Uid:")?.parse().ok()?;
            (range.contains(&uid) && field("State:")? != "Z")
                .then(|| Proc::open(pid))
                .flatten()
        })
        .collect()
}

/// Live processes whose environment holds `entry` (such as `VM0_RUNNER_RUN_DIR=…`).
pub(crate) fn processes_with_environment(entry: &str) -> Vec<Proc> {
    pids()
        .filter_map(|pid| {
            let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
            environment
                .split(|byte| *byte == 0)
                .any(|one| one == entry.as_bytes())
                .then(|| Proc::open(pid))
                .flatten()
        })
        .collect()
}
