//! Control groups: one for all agent processes, below it one for each session.
//!
//! ```text
//!   /sys/fs/cgroup            guest-init
//!   └ agent                   memory.max, pids.max: whatever happens below, guest-init keeps working
//!     ├ s1  s2 …              one for each session that runs; kept and used again, because making one costs
//!                             milliseconds under emulation
//! ```
//!
//! guest-init needs no `oom_score_adj` of its own: the kernel never picks the first process of the system.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use guest_control::server::OsError;
use rustix::fs::{Mode, OFlags};

use crate::boot::{attach, make_dir, open_dir};
use crate::kmsg;

const ROOT: &str = "/sys/fs/cgroup";
const AGENT: &str = "/sys/fs/cgroup/agent";

/// Bytes kept from agent processes: a twentieth, but enough for what guest-init and the kernel take on their behalf, and
/// never more than those can use.
const RESERVE_MIN: u64 = 24 << 20;
const RESERVE_MAX: u64 = 128 << 20;
/// Most processes and threads of all sessions together, whatever the guest's size.
const PIDS_MAX: u64 = 8192;
/// Fewest.
const PIDS_MIN: u64 = 256;
/// Memory that even a small process takes with its page tables and stacks. With more processes than that a fork bomb
/// would not be refused but starve itself, and everybody beside it, of memory.
const BYTES_PER_PROCESS: u64 = 512 * 1024;

/// Mounts the hierarchy and limits the agent's part of it.
pub(crate) fn prepare() -> Result<(), OsError> {
    use rustix::mount::MountFlags;
    attach(
        "cgroup2",
        ROOT,
        c"",
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
    )?;
    set(&format!("{ROOT}/cgroup.subtree_control"), "+memory +pids")?;
    make_dir(AGENT)?;
    set(&format!("{AGENT}/cgroup.subtree_control"), "+memory +pids")?;
    let memory = agent_memory(available_memory()?);
    set(&format!("{AGENT}/memory.max"), &memory.to_string())?;
    set(
        &format!("{AGENT}/pids.max"),
        &agent_processes(memory).to_string(),
    )
}

/// Memory the agent may have of the bytes that are `available` at boot. With a limit above that, it would be the whole
/// guest that runs out and not the agent.
fn agent_memory(available: u64) -> u64 {
    available.saturating_sub((available / 20).clamp(RESERVE_MIN, RESERVE_MAX))
}

/// Bytes that could be allocated now without swapping, as the kernel estimates.
fn available_memory() -> Result<u64, OsError> {
    let meminfo = fs::read_to_string("/proc/meminfo")
        .map_err(|error| OsError::new("reading /proc/meminfo", error))?;
    Ok(crate::stats::kilobytes(&meminfo, "MemAvailable:") * 1024)
}

/// Processes and threads the agent may have with so many bytes of memory. That is below the kernel's own limit of a user's
/// processes (one for each 256 KiB), so that a fork bomb meets the limit that is counted.
fn agent_processes(memory: u64) -> u64 {
    (memory / BYTES_PER_PROCESS).clamp(PIDS_MIN, PIDS_MAX)
}

fn set(path: &str, value: &str) -> Result<(), OsError> {
    fs::write(path, value)
        .map_err(|error| OsError::new(format_args!("writing {value:?} to {path}"), error))
}

/// Kills everything below `agent`, however fast it forks.
pub(crate) fn kill_agent() -> Result<(), OsError> {
    set(&format!("{AGENT}/cgroup.kill"), "1")
}

/// A session's cgroup, with its files held open.
#[derive(Debug)]
pub(crate) struct Cgroup {
    dir: OwnedFd,
    kill: OwnedFd,
    events: OwnedFd,
    memory_events: OwnedFd,
    pids_events: OwnedFd,
    /// Counters when the present session began.
    before: Counters,
}

/// What the kernel has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    /// Processes killed for want of memory.
    pub(crate) oom_kills: u32,
    /// Forks refused.
    pub(crate) pids_limit_hits: u32,
}

impl Cgroup {
    fn create(number: u32) -> Result<Self, OsError> {
        let path = format!("{AGENT}/s{number}");
        make_dir(&path)?;
        let dir = open_dir(&path)?;
        let open = |name: &str, flags: OFlags| {
            rustix::fs::openat(&dir, name, flags | OFlags::CLOEXEC, Mode::empty())
                .map_err(|error| OsError::new(format_args!("opening {path}/{name}"), error))
        };
        // A little below the limit of all sessions, so that one that forks without end leaves room for an operator's.
        let all = fs::read_to_string(format!("{AGENT}/pids.max"))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(PIDS_MIN);
        set(&format!("{path}/pids.max"), &(all - all / 10).to_string())?;
        Ok(Self {
            kill: open("cgroup.kill", OFlags::WRONLY)?,
            events: open("cgroup.events", OFlags::RDONLY)?,
            memory_events: open("memory.events", OFlags::RDONLY)?,
            pids_events: open("pids.events", OFlags::RDONLY)?,
            dir,
            before: Counters::default(),
        })
    }

    /// For `CLONE_INTO_CGROUP`.
    pub(crate) fn dir(&self) -> &OwnedFd {
        &self.dir
    }

    /// Kills every process in it.
    pub(crate) fn kill(&self) {
        if let Err(error) = rustix::io::write(&self.kill, b"1") {
            kmsg::log(&format!("killing a session: {error}"));
        }
    }

    /// Whether a process lives in it.
    pub(crate) fn populated(&self) -> bool {
        // When in doubt it is not used again.
        field(&self.events, "populated").is_none_or(|count| count > 0)
    }

    /// Counts since the session began.
    pub(crate) fn counters(&self) -> Counters {
        let now = self.absolute();
        Counters {
            oom_kills: now.oom_kills.saturating_sub(self.before.oom_kills),
            pids_limit_hits: now
                .pids_limit_hits
                .saturating_sub(self.before.pids_limit_hits),
        }
    }

    fn absolute(&self) -> Counters {
        Counters {
            oom_kills: field(&self.memory_events, "oom_kill").unwrap_or(0),
            pids_limit_hits: field(&self.pids_events, "max").unwrap_or(0),
        }
    }
}

/// Value of a line `name value` in a cgroup file.
fn field(fd: &impl AsFd, name: &str) -> Option<u32> {
    let mut buffer = [0; 512];
    let length = rustix::io::pread(fd, &mut buffer, 0).ok()?;
    parse_field(std::str::from_utf8(buffer.get(..length)?).ok()?, name)
}

fn parse_field(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(' ')?;
        (key == name).then(|| value.trim().parse().ok())?
    })
}

/// All session cgroups.
#[derive(Debug)]
pub(crate) struct Cgroups {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    free: Vec<Cgroup>,
    /// Of sessions that left processes behind.
    left: Vec<Cgroup>,
    made: u32,
}

impl Cgroups {
    /// With one in stock, so that the first session of a restored guest need not wait for it.
    pub(crate) fn new() -> Result<Self, OsError> {
        let first = Cgroup::create(1)?;
        Ok(Self {
            state: Mutex::new(State {
                free: vec![first],
                left: Vec::new(),
                made: 1,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty cgroup.
    pub(crate) fn take(&self) -> Result<Cgroup, OsError> {
        let mut state = self.lock();
        if state.free.is_empty() {
            let (left, empty) = std::mem::take(&mut state.left)
                .into_iter()
                .partition(Cgroup::populated);
            state.left = left;
            state.free = empty;
        }
        if let Some(mut cgroup) = state.free.pop() {
            cgroup.before = cgroup.absolute();
            return Ok(cgroup);
        }
        state.made += 1;
        Cgroup::create(state.made)
    }

    /// Takes a cgroup back.
    pub(crate) fn give_back(&self, cgroup: Cgroup) {
        let populated = cgroup.populated();
        let mut state = self.lock();
        if populated {
            state.left.push(cgroup);
        } else {
            state.free.push(cgroup);
        }
    }
}

/// A session's cgroup, returned to the stock when the last handle goes.
#[derive(Debug)]
pub(crate) struct Lease {
    cgroup: Option<Cgroup>,
    stock: Arc<Cgroups>,
}

impl Lease {
    pub(crate) fn take(stock: &Arc<Cgroups>) -> Result<Self, OsError> {
        Ok(Self {
            cgroup: Some(stock.take()?),
            stock: Arc::clone(stock),
        })
    }

    /// The cgroup; there is one until the lease is dropped.
    pub(crate) fn get(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(cgroup) = self.cgroup.take() {
            self.stock.give_back(cgroup);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_memory_for_the_rest_of_the_guest() {
        assert_eq!(agent_memory(200 << 20), 176 << 20);
        assert_eq!(agent_memory(2000 << 20), 1900 << 20);
        assert_eq!(agent_memory(64_000 << 20), 63_872 << 20);
        assert_eq!(agent_memory(1 << 20), 0);
        assert_eq!(agent_processes(0), PIDS_MIN);
        assert_eq!(agent_processes(160 << 20), 320);
        assert_eq!(agent_processes(64 << 30), PIDS_MAX);
    }

    #[test]
    fn finds_a_field_by_its_whole_name() {
        let text = "low 0\noom 1\noom_kill 12\noom_group_kill 0\n";
        assert_eq!(parse_field(text, "oom_kill"), Some(12));
        assert_eq!(parse_field(text, "oom"), Some(1));
        assert_eq!(parse_field(text, "kill"), None);
        assert_eq!(parse_field("max nonsense\n", "max"), None);
    }
}
