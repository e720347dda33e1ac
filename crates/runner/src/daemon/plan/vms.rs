//! The plan, of VMs: keeping, giving up, pools.

use std::collections::BTreeSet;
use std::time::Instant;

use host::slot::{HostUsage, Resources, SlotId};

use super::{LONGEST_QUIET, Plan, REFILL_QUIET, Reuse, Run, Vm, VmState};
use crate::daemon::event::{Action, Warmed};
use crate::names::{ProfileName, RunId};
use crate::pool::Pool;
use crate::resource_budget::to_revoke;
use crate::status::Mode;

impl Plan {
    pub(super) fn may_park(&self) -> bool {
        self.mode == Mode::Running
            && self.rules.idle_max > 0
            && !self.rules.idle_timeout.is_zero()
            && !self.waiting.is_blocked()
    }

    /// One VM a session: an older one would have stale files.
    pub(super) fn drop_idle_of(&mut self, key: &Reuse) {
        let same = |vm: &Vm| match &vm.state {
            VmState::Idle(other) | VmState::Parking(other) => {
                other.session == key.session && other.submitter == key.submitter
            }
            _ => false,
        };
        for slot in self.slots_where(same) {
            self.destroy(slot);
        }
    }

    pub(super) fn slots_where(&self, which: impl Fn(&Vm) -> bool) -> Vec<SlotId> {
        let matching = self.vms.iter().filter(|(_, vm)| which(vm));
        matching.map(|(slot, _)| *slot).collect()
    }

    /// Returns a VM whose lease was made firm for a job that is not ours after all.
    pub(super) fn give_back(&mut self, slot: SlotId, idle: Option<Reuse>, now: Instant) {
        if let Some(vm) = self.vms.get_mut(&slot)
            && !matches!(vm.state, VmState::Dying)
        {
            vm.enter(VmState::Demoting(idle), now);
            self.actions.push(Action::Demote(slot));
        }
    }

    pub(super) fn on_demoted(&mut self, slot: SlotId, now: Instant) {
        if let Some(vm) = self.vms.get_mut(&slot)
            && let VmState::Demoting(idle) = &mut vm.state
        {
            let idle = idle.take();
            self.settle(slot, idle, now);
            self.room_came_free();
        }
    }

    /// Makes a paused VM available, or destroys it if it is dead or there is no use for it in this mode.
    pub(super) fn settle(&mut self, slot: SlotId, idle: Option<Reuse>, now: Instant) {
        let running = self.mode == Mode::Running;
        let Some(vm) = self.vms.get_mut(&slot) else {
            return;
        };
        if !running || vm.dead {
            self.destroy(slot);
        } else if !matches!(vm.state, VmState::Dying) {
            vm.enter(idle.map_or(VmState::Warm, VmState::Idle), now);
        }
    }

    pub(super) fn on_parked(&mut self, slot: SlotId, parked: bool, now: Instant) {
        let Some(vm) = self.vms.get_mut(&slot) else {
            return;
        };
        if !parked {
            self.destroy(slot);
        } else if let VmState::Parking(key) = &vm.state {
            let key = key.clone();
            self.settle(slot, Some(key), now);
            self.room_came_free();
            while let idle = self.idle_lru()
                && idle.len() > self.rules.idle_max
                && let Some(oldest) = idle.first()
            {
                self.destroy(*oldest);
            }
        }
    }

    pub(super) fn on_warmed(&mut self, profile: ProfileName, outcome: Warmed, now: Instant) {
        let Some(pool) = self.pools.get_mut(&profile) else {
            return;
        };
        match outcome {
            Warmed::Ready(slot) => {
                pool.succeeded();
                // Somebody waited for it: it came too late.
                if self.waiting.wants(&profile) {
                    pool.missed(now);
                }
                self.vms.insert(slot, Vm::new(profile, VmState::Warm, now));
                self.settle(slot, None, now);
            }
            Warmed::NoRoom => pool.had_no_room(now),
            Warmed::Failed(error) => {
                tracing::warn!(%profile, error, "a warm VM could not be prepared");
                pool.failed(error, now);
            }
        }
    }

    pub(super) fn on_vm_died(&mut self, slot: SlotId, reason: String, now: Instant) {
        let Some(vm) = self.vms.get_mut(&slot) else {
            return;
        };
        match vm.state {
            // Its executor finds out by itself, if it gets one.
            VmState::Used => vm.dead = true,
            // It is meant to.
            VmState::Dying => {}
            VmState::Warm => {
                tracing::warn!(slot = slot.0, reason, "a warm VM died");
                if let Some(pool) = self.pools.get_mut(&vm.profile) {
                    pool.broke(reason, now);
                }
                self.destroy(slot);
            }
            VmState::Parking(_) | VmState::Idle(_) | VmState::Demoting(_) => {
                tracing::warn!(slot = slot.0, reason, "an idle VM died");
                self.destroy(slot);
            }
        }
    }

    /// The only place that destroys: a VM gets here once, because it leaves in the state `Dying`.
    pub(super) fn destroy(&mut self, slot: SlotId) {
        if let Some(vm) = self.vms.get_mut(&slot)
            && !matches!(vm.state, VmState::Dying)
        {
            vm.state = VmState::Dying;
            self.actions.push(Action::Destroy(slot));
        }
    }

    pub(super) fn on_released(&mut self, slot: SlotId) {
        self.vms.remove(&slot);
        self.room_came_free();
        let ids: Vec<RunId> = self
            .runs
            .iter_mut()
            .filter_map(|(id, run)| run.evicting.remove(&slot).then_some(*id))
            .collect();
        for id in ids {
            self.start_if_there_is_room(id);
        }
    }

    pub(super) fn idle_lru(&self) -> Vec<SlotId> {
        self.lru(|vm| matches!(vm.state, VmState::Idle(_)))
    }

    /// The slots of matching VMs, least recently used first.
    pub(super) fn lru(&self, which: impl Fn(&Vm) -> bool) -> Vec<SlotId> {
        let mut slots = self.slots_where(which);
        slots.sort_by_key(|slot| self.vms.get(slot).map(|vm| vm.since));
        slots
    }

    /// Gives up what the host needs back, least recently used first. Returns the VMs that have to be gone before
    /// there is room for everything held: none if there is room already.
    pub(super) fn revoke_for(&mut self, usage: HostUsage) -> BTreeSet<SlotId> {
        self.usage = usage;
        // The figures still count what is dying: it goes first, and is not made up for a second time.
        let dying = self.slots_where(|vm| matches!(vm.state, VmState::Dying));
        let paused = self.lru(|vm| matches!(vm.state, VmState::Warm | VmState::Idle(_)));
        let order: Vec<SlotId> = dying.iter().chain(&paused).copied().collect();
        let revoked = to_revoke(usage, self.rules.limits, &self.shapes(&order));
        for slot in &revoked {
            self.destroy(*slot);
        }
        revoked.into_iter().collect()
    }

    pub(super) fn shapes(&self, slots: &[SlotId]) -> Vec<(SlotId, Resources)> {
        let shape = |slot: &SlotId| {
            let vm = self.vms.get(slot)?;
            Some((*slot, self.rules.profiles.get(&vm.profile)?.shape))
        };
        slots.iter().filter_map(shape).collect()
    }

    pub(super) fn ready(&self, profile: &ProfileName) -> u32 {
        let warm = |vm: &&Vm| matches!(vm.state, VmState::Warm) && vm.profile == *profile;
        u32::try_from(self.vms.values().filter(warm).count()).unwrap_or(u32::MAX)
    }

    /// Until when the CPU is left to jobs that are starting: the more of them started together, the longer.
    pub(super) fn quiet_until(&self) -> Option<Instant> {
        let last = self.runs.values().map(|run| run.started).max()?;
        let together = |run: &&Run| last.duration_since(run.started) < LONGEST_QUIET;
        let together = self.runs.values().filter(together).count();
        let turns = together.div_ceil(usize::try_from(self.rules.parallel.max(1)).unwrap_or(1));
        let quiet = REFILL_QUIET.saturating_mul(u32::try_from(turns).unwrap_or(u32::MAX));
        Some(last + quiet.min(LONGEST_QUIET))
    }

    pub(super) fn refill(&mut self, now: Instant) {
        if self.mode != Mode::Running
            || !self.waiting.is_empty()
            || self.admitting.is_some()
            || self.quiet_until().is_some_and(|until| until > now)
        {
            return;
        }
        let mut preparing: u32 = self.pools.values().map(Pool::preparing).sum();
        for profile in self.rules.profiles.keys() {
            let ready = self.ready(profile);
            let Some(pool) = self.pools.get_mut(profile) else {
                continue;
            };
            while preparing < self.rules.parallel && pool.wants_one(ready, now) {
                pool.started();
                preparing = preparing.saturating_add(1);
                self.actions.push(Action::Warm(profile.clone()));
            }
        }
    }
}
