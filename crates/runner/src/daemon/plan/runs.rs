//! The plan, of jobs: admission, claim, start, end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use host::slot::{HostUsage, SlotId};

use super::{Admitting, Chosen, Plan, RETRY, Reuse, Run, Stage, Vm, VmState};
use crate::daemon::event::{Action, CancelReason};
use crate::names::{ProfileName, RunId};
use crate::pool::Pool;
use crate::queue::{ClaimedJob, JobHead, JobResult};
use crate::status::{Mode, Phase};

impl Plan {
    /// Sets about admitting the next job, unless one is under way.
    pub(super) fn admit_next(&mut self) {
        let cap = usize::try_from(self.rules.max_concurrent).unwrap_or(usize::MAX);
        if self.mode != Mode::Running
            || self.admitting.is_some()
            || (cap != 0 && self.runs.len() >= cap)
        {
            return;
        }
        let Some((head, slot)) = self.choose() else {
            return;
        };
        let (run, profile) = (head.run_id, head.profile.clone());
        self.actions.push(Action::Admit { run, profile, slot });
        let vm = slot.map(|slot| Chosen {
            slot,
            idle: self.take(slot),
        });
        self.admitting = Some(Admitting {
            run,
            head,
            vm,
            outdated: false,
            gone: false,
        });
    }

    /// The job to admit next, and the VM that is there for it. A job whose VM is being prepared waits for that one:
    /// another restore would only slow both down.
    pub(super) fn choose(&self) -> Option<(JobHead, Option<SlotId>)> {
        let mut spoken_for: BTreeMap<&ProfileName, u32> = BTreeMap::new();
        for head in self.waiting.candidates() {
            if self.is_about_to_keep(head) {
                continue;
            }
            let profile = &head.profile;
            let slot = self.idle_for(head).or_else(|| self.warm_for(profile));
            if slot.is_none() {
                let coming = self.pools.get(profile).map_or(0, Pool::preparing);
                let taken = spoken_for.entry(profile).or_default();
                if *taken < coming {
                    *taken = taken.saturating_add(1);
                    continue;
                }
            }
            return Some((head.clone(), slot));
        }
        None
    }

    pub(super) fn reuse_key(&self, head: &JobHead) -> Option<Reuse> {
        let profile = self.rules.profiles.get(&head.profile)?;
        Some(Reuse {
            group: self.rules.group.clone(),
            submitter: head.submitter,
            session: head.session_id.clone()?,
            profile: head.profile.clone(),
            image: profile.image.clone(),
            variables: head.variables,
        })
    }

    pub(super) fn idle_for(&self, head: &JobHead) -> Option<SlotId> {
        let wanted = self.reuse_key(head)?;
        let mut vms = self.vms.iter();
        vms.find(|(_, vm)| matches!(&vm.state, VmState::Idle(key) if *key == wanted))
            .map(|(slot, _)| *slot)
    }

    /// Whether the VM of the session's last job is about to be kept: whoever sends the next job as soon as he has read the
    /// answer finds the files of the last.
    fn is_about_to_keep(&self, head: &JobHead) -> bool {
        let Some(wanted) = self.reuse_key(head) else {
            return false;
        };
        let is_parking = |vm: &Vm| matches!(&vm.state, VmState::Parking(key) if *key == wanted);
        let will_park = |run: &Run| {
            matches!(run.stage, Stage::Completing { reusable: true })
                && self.reuse_key(&run.head).as_ref() == Some(&wanted)
        };
        self.vms.values().any(is_parking) || (self.may_park() && self.runs.values().any(will_park))
    }

    /// The warm VM that was made last: its memory is the warmest in the host's caches.
    pub(super) fn warm_for(&self, profile: &ProfileName) -> Option<SlotId> {
        self.vms
            .iter()
            .filter(|(_, vm)| matches!(vm.state, VmState::Warm) && vm.profile == *profile)
            .max_by_key(|(_, vm)| vm.since)
            .map(|(slot, _)| *slot)
    }

    /// Sets a VM aside for a job; returns what it was kept for.
    pub(super) fn take(&mut self, slot: SlotId) -> Option<Reuse> {
        let vm = self.vms.get_mut(&slot)?;
        match std::mem::replace(&mut vm.state, VmState::Used) {
            VmState::Idle(key) => Some(key),
            _ => None,
        }
    }

    pub(super) fn on_admitted(
        &mut self,
        id: RunId,
        slot: SlotId,
        usage: Option<HostUsage>,
        now: Instant,
    ) {
        let (chosen, gone) = match self.admitting.take() {
            Some(admitting) if admitting.run == id => (admitting.vm, admitting.gone),
            other => {
                // The provider broke meanwhile, and we are on our way out.
                self.admitting = other;
                self.add_vm_for_nobody(slot, now);
                return;
            }
        };
        // It may have been taken back, or cancelled and answered, while its lease was on its way. And who drains or stops
        // takes nothing new: then it waits on.
        let running = self.mode == Mode::Running;
        let wanted = running && !gone;
        let head = wanted.then(|| self.waiting.admit(id)).flatten();
        // One that is ours already has its VM, and is not replaced: nobody would answer it.
        let Some(head) = head.filter(|_| !self.runs.contains_key(&id)) else {
            match chosen {
                Some(vm) => self.give_back(vm.slot, vm.idle, now),
                None => self.add_vm_for_nobody(slot, now),
            }
            return;
        };
        let fresh = chosen.is_none();
        if fresh {
            self.vms
                .insert(slot, Vm::new(head.profile.clone(), VmState::Used, now));
            if let Some(pool) = self.pools.get_mut(&head.profile) {
                pool.missed(now);
            }
        }
        let evicting = usage.map_or_else(BTreeSet::new, |usage| self.revoke_for(usage));
        self.admitted = self.admitted.wrapping_add(1);
        self.actions.push(Action::Claim(id));
        self.runs.insert(
            id,
            Run {
                head,
                slot,
                stage: Stage::Claiming {
                    idle: chosen.and_then(|vm| vm.idle),
                    fresh,
                    cancelled: None,
                },
                evicting,
                phase: Phase::Preparing,
                phase_since: now,
                started: now,
                admitted_at: self.admitted,
            },
        );
    }

    pub(super) fn add_vm_for_nobody(&mut self, slot: SlotId, now: Instant) {
        if let Some(profile) = self.rules.profiles.keys().next().cloned() {
            let vm = || Vm::new(profile, VmState::Used, now);
            self.vms.entry(slot).or_insert_with(vm);
        }
        self.destroy(slot);
    }

    pub(super) fn on_refused(&mut self, id: RunId, usage: Option<HostUsage>, now: Instant) {
        let admitting = self.admitting.take_if(|admitting| admitting.run == id);
        let gone = admitting.as_ref().is_some_and(|one| one.gone);
        let outdated = admitting.as_ref().is_some_and(|one| one.outdated);
        if let Some(vm) = admitting.and_then(|admitting| admitting.vm) {
            // Its lease was never made firm.
            self.settle(vm.slot, vm.idle, now);
        }
        match usage {
            Some(usage) => self.usage = usage,
            None => self.retry_at = Some(now + RETRY),
        }
        // Whoever is blocked is tried again when room comes free, and that may have been just now.
        let says_nothing = gone || (outdated && usage.is_some());
        if !says_nothing {
            self.waiting.block(id);
        }
    }

    pub(super) fn on_claimed(&mut self, job: Box<ClaimedJob>, now: Instant) {
        let id = job.job.run_id;
        let Some(run) = self.runs.get_mut(&id) else {
            return;
        };
        let head = JobHead::of(&job.job, job.submitter, job.submitted);
        let same = run.head.decides_like(&head);
        run.head = head;
        run.started = now;
        run.enter(Phase::Preparing, now);
        let cancelled = match std::mem::replace(&mut run.stage, Stage::MakingRoom(job)) {
            Stage::Claiming { cancelled, .. } => cancelled,
            _ => None,
        };
        if let Some(reason) = &self.failed {
            let result = JobResult::failed(id, 1, reason);
            self.complete(result, false, now);
        } else if !same {
            // Somebody rewrote it after it was found: what was decided for it was decided for another job.
            let result = JobResult::failed(id, 1, "the job file was changed while it was claimed");
            self.complete(result, false, now);
        } else if let Some(why) = cancelled {
            self.complete(why.result(id), false, now);
        } else {
            self.start_if_there_is_room(id);
        }
    }

    pub(super) fn start_if_there_is_room(&mut self, id: RunId) {
        let Some(run) = self.runs.get_mut(&id) else {
            return;
        };
        if !run.evicting.is_empty() {
            return;
        }
        match std::mem::replace(&mut run.stage, Stage::Executing) {
            Stage::MakingRoom(job) => self.actions.push(Action::Start {
                slot: run.slot,
                profile: run.head.profile.clone(),
                job,
            }),
            other => run.stage = other,
        }
    }

    pub(super) fn on_lost(&mut self, id: RunId, now: Instant) {
        let Some(run) = self.runs.remove(&id) else {
            return;
        };
        match run.stage {
            Stage::Claiming {
                idle, fresh: false, ..
            } => self.give_back(run.slot, idle, now),
            _ => self.destroy(run.slot),
        }
    }

    pub(super) fn cancel(&mut self, id: RunId, why: CancelReason, now: Instant) {
        match self.runs.get_mut(&id).map(|run| &mut run.stage) {
            Some(Stage::MakingRoom(_)) => self.complete(why.result(id), false, now),
            Some(Stage::Executing) => self.actions.push(Action::Cancel { run: id, why }),
            Some(Stage::Claiming { cancelled, .. }) => *cancelled = cancelled.or(Some(why)),
            // Completing: too late. Nothing of ours: the provider answers it.
            Some(Stage::Completing { .. }) | None => {}
        }
    }

    /// The runner stops and has waited long enough.
    pub(super) fn cancel_all(&mut self, now: Instant) {
        let ids: Vec<RunId> = self.runs.keys().copied().collect();
        for id in ids {
            self.cancel(id, CancelReason::Stopping, now);
        }
    }

    pub(super) fn on_ended(&mut self, result: JobResult, reusable: bool, now: Instant) {
        if let Some(run) = self.runs.get(&result.run_id)
            && matches!(run.stage, Stage::Executing)
        {
            self.complete(result, reusable, now);
        }
    }

    /// The only place that answers: a run gets here once, because it leaves in the stage `Completing`.
    pub(super) fn complete(&mut self, result: JobResult, reusable: bool, now: Instant) {
        if let Some(run) = self.runs.get_mut(&result.run_id)
            && !matches!(run.stage, Stage::Completing { .. })
        {
            run.stage = Stage::Completing { reusable };
            run.enter(Phase::Finishing, now);
            self.actions.push(Action::Complete(result));
        }
    }

    pub(super) fn on_completed(&mut self, id: RunId, now: Instant) {
        let Some(run) = self.runs.remove(&id) else {
            return;
        };
        let reusable = matches!(run.stage, Stage::Completing { reusable: true });
        match self.reuse_key(&run.head) {
            Some(key) if reusable && self.may_park() => {
                self.drop_idle_of(&key);
                if let Some(vm) = self.vms.get_mut(&run.slot) {
                    vm.enter(VmState::Parking(key), now);
                    self.actions.push(Action::Park(run.slot));
                }
            }
            _ => self.destroy(run.slot),
        }
    }
}
