//! Processes of VMs as the host shows them, whoever looks after them: slot *n* runs as uid `uid_base + n`.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use host::slot::{SLOTS, SlotId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// One process of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VmProcess {
    /// Its slot, by its uid.
    pub(crate) slot: SlotId,
    /// Its number.
    pub(crate) pid: u32,
    /// When it started, clock ticks after the boot: with the number it is one process only.
    pub(crate) started: u64,
    /// Its name.
    pub(crate) name: String,
}

/// Every process whose real uid is a slot's. Zombies are not counted: they hold nothing.
pub(crate) fn processes(uid_base: u32) -> Vec<VmProcess> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| examine(entry.file_name().to_str()?.parse().ok()?, uid_base))
        .collect()
}

fn examine(pid: u32, uid_base: u32) -> Option<VmProcess> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()
    };
    let uid: u32 = field("Uid:")?.parse().ok()?;
    let number = u16::try_from(uid.checked_sub(uid_base)?).ok()?;
    if number >= SLOTS || field("State:")? == "Z" {
        return None;
    }
    Some(VmProcess {
        slot: SlotId(number),
        pid,
        started: started(pid)?,
        name: field("Name:")?.to_owned(),
    })
}

/// Field 22 of /proc/<pid>/stat (proc_pid_stat(5)); the name before it may hold anything.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after) = stat.rsplit_once(") ")?;
    after.split(' ').nth(19)?.parse().ok()
}

/// By slot.
pub(crate) fn by_slot(processes: &[VmProcess]) -> BTreeMap<SlotId, Vec<&VmProcess>> {
    let mut slots: BTreeMap<SlotId, Vec<&VmProcess>> = BTreeMap::new();
    for process in processes {
        slots.entry(process.slot).or_default().push(process);
    }
    slots
}

/// A process held so that nobody else can take its number unnoticed.
#[derive(Debug)]
pub(crate) struct Held {
    fd: OwnedFd,
}

impl VmProcess {
    /// Holds exactly this process; nothing if it has ended, whoever has its number now.
    pub(crate) fn hold(&self, uid_base: u32) -> Option<Held> {
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let fd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // The number is ours from here on: whoever has it now is who we hold.
        (examine(self.pid, uid_base).as_ref() == Some(self)).then_some(Held { fd })
    }
}

impl Held {
    /// Kills it and waits for its end; false if it does not end in time.
    pub(crate) fn kill(&self, limit: Duration) -> rustix::io::Result<bool> {
        match pidfd_send_signal(&self.fd, Signal::KILL) {
            Ok(()) => {}
            Err(Errno::SRCH) => return Ok(true),
            Err(error) => return Err(error),
        }
        let limit = Timespec::try_from(limit).map_err(|_| Errno::INVAL)?;
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        Ok(poll(&mut fds, Some(&limit))? > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_known_by_more_than_its_number() {
        let uid = rustix::process::getuid().as_raw();
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        // We ourselves play the slot of number 0.
        let found = processes(uid).into_iter().find(|one| one.pid == child.id());
        let found = found.unwrap();
        assert_eq!((found.slot, found.name.as_str()), (SlotId(0), "cat"));
        let other = VmProcess {
            started: found.started + 1,
            ..found.clone()
        };
        assert!(other.hold(uid).is_none());
        assert!(found.hold(uid + 1).is_none());
        let held = found.hold(uid).unwrap();
        assert!(held.kill(Duration::from_secs(10)).unwrap());
        child.wait().unwrap();
        assert!(found.hold(uid).is_none());
        assert!(held.kill(Duration::ZERO).unwrap());
    }
}
