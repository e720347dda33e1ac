//! Ending: a process that died, a slot that is killed or given back, a dead owner's slot, and everything at the end.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Signal, WaitOptions, WaitStatus};

use super::{Ending, Main, Server, not_ours};
use crate::cgroup::Cgroups;
use crate::launcher::Reaped;
use crate::launcher::wire::{Refusal, Reply, Unit};
use crate::process;
use crate::slot::SlotId;

/// How often a slot that is ending is looked at again, beside every death that is reported.
pub(super) const LOOK: Duration = Duration::from_millis(10);
/// How often it is tried again to give back a slot that could not be.
pub(super) const TRY_AGAIN: Duration = Duration::from_secs(1);
/// How long an empty group may take until it can be removed: the kernel lets go of it a moment after its last process is
/// reaped by somebody else.
const LETTING_GO: Duration = Duration::from_millis(200);
/// How long the end of the connection may take. VMs are killed at once, and gone within a second of their daemon unless the
/// host is overloaded; what is left of them and of the network by name takes its time there, and nobody waits for it but
/// who stops the runner.
const LAST_CLEANING: Duration = Duration::from_secs(10);
/// How long processes of a dead owner may take to die.
const ORPHAN_LIMIT: Duration = Duration::from_secs(2);

impl Server {
    /// Reaps every dead child: main processes, and whatever they left to us as their subreaper.
    pub(super) fn reap(&mut self) {
        // Several deaths may be one signal; what matters is that it is no longer pending.
        let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
        while rustix::io::read(&self.signals, &mut info).is_ok_and(|read| read > 0) {}
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let unit = self.units.iter_mut().find_map(|(unit, held)| {
                let main = held.main.take_if(|main| main.pid == pid)?;
                Some((*unit, main))
            });
            if let Some((unit, main)) = unit {
                self.main_died(unit, main, status);
            } else {
                for held in self.units.values_mut() {
                    held.keeper.take_if(|(keeper, _)| *keeper == pid);
                }
            }
        }
    }

    fn main_died(&mut self, unit: Unit, mut main: Main, status: WaitStatus) {
        if let Some(starting) = main.starting.take() {
            // It died since we last looked: before exec, or after it.
            let request = starting.request;
            match main.outcome(starting) {
                Err(message) => main.failed = Some((request, message)),
                Ok((reply, fds)) => self.answer_with(request, Ok(reply), &fds),
            }
        }
        if let Some((_, keeper)) = self.units.get(&unit).and_then(|held| held.keeper.as_ref()) {
            let _ = rustix::process::pidfd_send_signal(keeper, Signal::KILL);
        }
        if let Some((request, message)) = main.failed {
            let step = format!("start a process in {unit}");
            self.answer(request, Err(Refusal::step(step, message)));
        }
        let oom_kills = self.cgroups.oom_kills(self.uid(unit));
        let Some(held) = self.units.get_mut(&unit) else {
            return;
        };
        let reaped = Reaped {
            code: status.exit_status(),
            signal: status.terminating_signal(),
            oom_killed: oom_kills > held.oom_before,
        };
        held.last = Some(reaped);
        for waiter in std::mem::take(&mut held.waiters) {
            self.answer(waiter, Ok(Reply::Reaped(Some(reaped))));
        }
    }

    /// Begins to end a slot's processes; the request is answered when nothing is left of them.
    pub(super) fn end(&mut self, unit: Unit, id: u64, requests: fn(&mut Ending) -> &mut Vec<u64>) {
        let Some(held) = self.units.get_mut(&unit) else {
            self.answer(id, Err(not_ours(unit)));
            return;
        };
        requests(held.ending.get_or_insert_default()).push(id);
        if let Some(main) = &held.main {
            // Our child, not reaped: the number is still its own.
            let _ = rustix::process::pidfd_send_signal(&main.pidfd, Signal::KILL);
        }
        self.continue_ending(unit);
    }

    pub(super) fn continue_endings(&mut self) {
        let ending: Vec<Unit> = self
            .units
            .iter()
            .filter(|(_, held)| held.ending.is_some())
            .map(|(unit, _)| *unit)
            .collect();
        for unit in ending {
            self.continue_ending(unit);
        }
    }

    /// Kills what is left of a slot that is ending, or answers when nothing is.
    fn continue_ending(&mut self, unit: Unit) {
        let uid = self.uid(unit);
        let Some(held) = self.units.get_mut(&unit) else {
            return;
        };
        let again = held.ending.as_ref().and_then(|ending| ending.again);
        if again.is_some_and(|at| at > Instant::now()) {
            return;
        }
        if held.main.is_some() || held.keeper.is_some() || !kill_rest(&self.cgroups, uid) {
            return;
        }
        let Some(ending) = held.ending.take() else {
            return;
        };
        let last = held.last;
        for id in ending.kills {
            self.answer(id, Ok(Reply::Reaped(last)));
        }
        if ending.releases.is_empty() && again.is_none() {
            return;
        }
        // Nobody else is kept waiting for what is tried again.
        let patience = if again.is_none() {
            LETTING_GO
        } else {
            Duration::ZERO
        };
        let result = self.give_back(unit, patience);
        if result.is_err()
            && let Some(held) = self.units.get_mut(&unit)
        {
            // Whoever asked thinks of it no more: without this it was held until the daemon ends.
            held.ending = Some(Ending {
                again: Some(Instant::now() + TRY_AGAIN),
                ..Ending::default()
            });
        }
        for id in ending.releases {
            let result = result.as_ref().map(|()| Reply::Done);
            self.answer(id, result.map_err(|e| Refusal::step("release a slot", e)));
        }
    }

    /// Removes what is named after an empty slot and unlocks it.
    fn give_back(&mut self, unit: Unit, patience: Duration) -> Result<(), String> {
        if !self.remove_group(self.uid(unit), patience) {
            return Err(format!("the cgroup of {unit} is not empty"));
        }
        let Some(held) = self.units.remove(&unit) else {
            return Ok(());
        };
        for waiter in held.waiters {
            self.answer(waiter, Err(not_ours(unit)));
        }
        match (unit, held.holding) {
            (Unit::Slot(slot), Some(holding)) => {
                self.unpublished = true;
                self.store.release(slot, holding).map_err(|e| e.to_string())
            }
            _ => Ok(()),
        }
    }

    /// Kills what a dead owner left running in a slot and removes its group; false if something stays.
    pub(super) fn clean_orphan(&self, slot: SlotId) -> bool {
        self.clean_uid(self.uid(Unit::Slot(slot)))
    }

    /// The same for a uid.
    pub(super) fn clean_uid(&self, uid: u32) -> bool {
        self.cgroups.forbid_forks(uid);
        process::kill_uid(uid, ORPHAN_LIMIT) && self.remove_group(uid, LETTING_GO)
    }

    fn remove_group(&self, uid: u32, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            match self.cgroups.remove(uid) {
                Ok(()) => return true,
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(_) => return false,
            }
        }
    }

    /// The daemon is gone: kill everything, reap it, and leave nothing named behind.
    pub(super) fn end_everything(&mut self) {
        let deadline = Instant::now() + LAST_CLEANING;
        self.drop_errands();
        self.begin_ending_hub();
        for held in self.units.values() {
            if let Some(main) = &held.main {
                let _ = rustix::process::pidfd_send_signal(&main.pidfd, Signal::KILL);
            }
        }
        while Instant::now() < deadline {
            self.reap();
            self.see_errands();
            let units: Vec<Unit> = self.units.keys().copied().collect();
            for unit in units {
                let dead = self
                    .units
                    .get(&unit)
                    .is_some_and(|held| held.main.is_none() && held.keeper.is_none());
                if dead && kill_rest(&self.cgroups, self.uid(unit)) {
                    // What stays behind is found by the next runner's reclaim.
                    let _ = self.give_back(unit, LETTING_GO);
                }
            }
            if self.units.is_empty() && !self.has_errands() {
                break;
            }
            let mut fds = [PollFd::new(&self.signals, PollFlags::IN)];
            let _ = rustix::event::poll(&mut fds, Timespec::try_from(LOOK).ok().as_ref());
        }
        self.publish();
        self.cgroups.remove_parents();
    }
}

/// Kills whatever else runs in a slot whose main process is dead; true if there was nothing.
fn kill_rest(cgroups: &Cgroups, uid: u32) -> bool {
    match cgroups.members(uid) {
        // A process cannot leave its group: it sees no cgroup file system.
        Some(members) if members.is_empty() => true,
        Some(_) | None => {
            // Otherwise whoever forks faster than we look would never be done with.
            cgroups.forbid_forks(uid);
            let left = process::of_uid(uid);
            for process in &left {
                let _ = rustix::process::pidfd_send_signal(process, Signal::KILL);
            }
            left.is_empty()
        }
    }
}
