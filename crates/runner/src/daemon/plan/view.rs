//! The plan, as others see it.

use super::{Plan, Run, Stage, VmState};
use crate::names::RunId;
use crate::resource_budget::estimated_capacity;
use crate::status::{ActiveRun, BudgetStatus, Clock, IdleVm, Mode, WarmPool};

impl Plan {
    pub(in crate::daemon) fn mode(&self) -> Mode {
        if self.exit.is_some() {
            Mode::Stopped
        } else {
            self.mode
        }
    }

    /// Runs that are ours, oldest first. Who waits for the end of a runner that drains or stops also waits for those
    /// that may become ours yet.
    pub(in crate::daemon) fn active_runs(&self, clock: &Clock) -> Vec<ActiveRun> {
        let leaving = self.mode != Mode::Running;
        let mut runs: Vec<(&RunId, &Run)> = self
            .runs
            .iter()
            .filter(|(_, run)| leaving || !matches!(run.stage, Stage::Claiming { .. }))
            .collect();
        runs.sort_by_key(|(_, run)| run.admitted_at);
        runs.into_iter()
            .map(|(id, run)| ActiveRun {
                run_id: *id,
                slot: run.slot.0,
                profile: run.head.profile.clone(),
                group: self.rules.group.clone(),
                phase: run.phase,
                phase_started_at: clock.time(run.phase_since),
            })
            .collect()
    }

    pub(in crate::daemon) fn idle_vms(&self, clock: &Clock) -> Vec<IdleVm> {
        let slots = self.idle_lru();
        let shown = slots.into_iter().filter_map(|slot| {
            let vm = self.vms.get(&slot)?;
            let VmState::Idle(key) = &vm.state else {
                return None;
            };
            Some(IdleVm {
                session_id: key.session.clone(),
                slot: slot.0,
                profile: vm.profile.clone(),
                idle_since: clock.time(vm.since),
                balloon: None,
            })
        });
        shown.collect()
    }

    pub(in crate::daemon) fn warm_pools(&self) -> Vec<WarmPool> {
        let pools = self.pools.iter().map(|(profile, pool)| WarmPool {
            profile: profile.clone(),
            ready: self.ready(profile),
            preparing: pool.preparing(),
            target: pool.target(),
            last_error: pool.last_error().map(str::to_owned),
        });
        pools.collect()
    }

    pub(in crate::daemon) fn waiting(&self) -> u32 {
        u32::try_from(self.waiting.len()).unwrap_or(u32::MAX)
    }

    pub(in crate::daemon) fn capacity(&self) -> u32 {
        let shapes = self.rules.profiles.values().map(|profile| profile.shape);
        estimated_capacity(self.rules.limits, shapes, self.rules.max_concurrent)
    }

    pub(in crate::daemon) fn budget(&self) -> BudgetStatus {
        BudgetStatus {
            host: self.usage,
            total: self.rules.limits.total,
        }
    }
}
