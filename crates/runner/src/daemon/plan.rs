//! The daemon's decisions, without anything that does them.
//!
//! [`Plan`] owns all state about jobs and VMs. It is told what happened and when, and says what to do; it never
//! waits, sleeps or touches the system, so every order of events can be tried in a test.
//!
//! ```text
//! a run:   waiting ─Admit─▶ admitting ─Claim─▶ claiming ─┬▶ making room ─Start─▶ preparing ▶ running ▶ finishing
//!             ▲                │ Refused       │ Lost    │     (revoked VMs are reaped first)       │ Complete
//!             └────────────────┘               ▼         └──────────────────────────────────────────┤
//!                                         its VM returns                                      Completed
//!
//! a VM:    (Warm) ─▶ warm ─▶ used ─▶ parking ─▶ idle ─▶ used …
//!                      │       │        │         │
//!                      └───────┴────────┴─────────┴─▶ dying ─▶ released
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use host::slot::{HostLimits, HostUsage, Resources, SlotId};

use super::event::{Action, CancelReason, Event, Warmed};
use super::waiting::Waiting;
use crate::config::WarmConfig;
use crate::names::{GroupName, ProfileName, RunId, SessionId};
use crate::pool::Pool;
use crate::queue::{ClaimedJob, JobHead, JobResult};
use crate::resource_budget::{estimated_capacity, to_revoke};
use crate::status::{ActiveRun, BudgetStatus, IdleVm, Mode, Phase, Time, WarmPool};

/// A pool is not refilled while a job that started less than this ago is likely to be still starting: the CPU is
/// worth more to the job.
const REFILL_QUIET: Duration = Duration::from_millis(100);
/// A job that was refused for another reason than room is tried again after this.
const RETRY: Duration = Duration::from_secs(1);
/// How long a stopping daemon waits for its VMs to be reaped; the launcher kills what is left.
const REAP_LIMIT: Duration = Duration::from_secs(15);

/// One profile we serve.
#[derive(Clone, Debug)]
pub(super) struct ProfilePlan {
    /// What one of its VMs takes.
    pub(super) shape: Resources,
    /// The snapshot's address: part of what decides whether an idle VM fits.
    pub(super) image: String,
    /// Marks of its pool.
    pub(super) warm: WarmConfig,
}

/// What does not change while the daemon runs.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) group: GroupName,
    pub(super) profiles: BTreeMap<ProfileName, ProfilePlan>,
    pub(super) limits: HostLimits,
    /// 0: no cap.
    pub(super) max_concurrent: u32,
    pub(super) idle_timeout: Duration,
    pub(super) idle_max: usize,
    pub(super) stop_timeout: Duration,
    /// Warm VMs prepared at the same time.
    pub(super) parallel: u32,
}

/// Whose next job may have an idle VM: all of it has to be equal.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reuse {
    group: GroupName,
    submitter: u32,
    session: SessionId,
    profile: ProfileName,
    image: String,
    variables: Vec<String>,
}

#[derive(Clone, Debug)]
enum VmState {
    Warm,
    Used,
    Parking(Reuse),
    Idle(Reuse),
    /// On its way back to what it was.
    Demoting(Option<Reuse>),
    Dying,
}

#[derive(Debug)]
struct Vm {
    profile: ProfileName,
    state: VmState,
    /// Since when it is in this state: the least recently used go first.
    since: Instant,
    since_time: Time,
}

/// A VM that was set aside for a job.
#[derive(Debug)]
struct Chosen {
    slot: SlotId,
    /// What it was kept for, if it goes back there.
    idle: Option<Reuse>,
}

/// A job whose lease is on its way.
#[derive(Debug)]
struct Admitting {
    run: RunId,
    vm: Option<Chosen>,
}

#[derive(Debug)]
enum Stage {
    Claiming {
        /// What the VM was kept for, if it goes back there.
        idle: Option<Reuse>,
        fresh: bool,
    },
    MakingRoom(Box<ClaimedJob>),
    Executing,
    Completing {
        reusable: bool,
    },
}

#[derive(Debug)]
struct Run {
    head: JobHead,
    slot: SlotId,
    stage: Stage,
    /// VMs that have to be reaped before its own is made.
    evicting: BTreeSet<SlotId>,
    phase: Phase,
    phase_since: Time,
    started: Instant,
    admitted_at: u64,
}

/// All of the daemon's state.
#[derive(Debug)]
pub(super) struct Plan {
    rules: Rules,
    mode: Mode,
    waiting: Waiting,
    /// The one job that is being admitted, and the VM that was set aside for it. One at a time keeps the order.
    admitting: Option<Admitting>,
    runs: HashMap<RunId, Run>,
    vms: BTreeMap<SlotId, Vm>,
    pools: BTreeMap<ProfileName, Pool>,
    usage: HostUsage,
    retry_at: Option<Instant>,
    stop_at: Option<Instant>,
    give_up_at: Option<Instant>,
    exit: Option<u8>,
    failed: Option<String>,
    admitted: u64,
    actions: Vec<Action>,
}

impl Plan {
    pub(super) fn new(rules: Rules, now: Instant) -> Self {
        let pools = rules
            .profiles
            .iter()
            .map(|(name, profile)| (name.clone(), Pool::new(profile.warm, now)))
            .collect();
        Self {
            rules,
            mode: Mode::Running,
            waiting: Waiting::default(),
            admitting: None,
            runs: HashMap::new(),
            vms: BTreeMap::new(),
            pools,
            usage: HostUsage::default(),
            retry_at: None,
            stop_at: None,
            give_up_at: None,
            exit: None,
            failed: None,
            admitted: 0,
            actions: Vec::new(),
        }
    }

    /// What follows from an event.
    pub(super) fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        self.digest(event, now);
        self.keep_time(now);
        self.admit_next();
        self.refill(now);
        self.finish(now);
        std::mem::take(&mut self.actions)
    }

    fn digest(&mut self, event: Event, now: Instant) {
        match event {
            Event::Found(head) => self.waiting.add(head),
            Event::Gone(id) => drop(self.waiting.remove(id)),
            Event::Admitted { run, slot, usage } => self.on_admitted(run, slot, usage, now),
            Event::Refused { run, usage } => self.on_refused(run, usage, now),
            Event::Claimed(job) => self.on_claimed(job, now),
            Event::Lost(run) => self.on_lost(run, now),
            Event::Progress { run, phase } => {
                if let Some(run) = self.runs.get_mut(&run)
                    && matches!(run.stage, Stage::Executing)
                {
                    run.enter(phase);
                }
            }
            Event::Ended { result, reusable } => self.on_ended(result, reusable),
            Event::Completed(run) => self.on_completed(run, now),
            Event::Cancel(run) => self.cancel(run, CancelReason::User),
            Event::Warmed { profile, outcome } => self.on_warmed(profile, outcome, now),
            Event::Parked { slot, parked } => self.on_parked(slot, parked, now),
            Event::Demoted { slot } => self.on_demoted(slot, now),
            Event::Released(slot) => self.on_released(slot),
            Event::VmDied { slot, reason } => self.on_vm_died(slot, reason, now),
            // Pressure on the host, ours or another runner's, is answered; room that came free is tried.
            Event::Usage(usage) => {
                self.revoke_for(usage);
                self.waiting.unblock();
            }
            Event::LauncherGone => self.fail(
                "the launcher process has ended; every VM of this runner was stopped with it",
                now,
            ),
            Event::ProviderBroken(reason) => {
                // Nobody can be answered by us any more; the next runner does it.
                self.fail(&reason, now);
                self.runs.clear();
                self.admitting = None;
            }
            Event::Drain if self.mode == Mode::Running => self.mode = Mode::Draining,
            Event::Resume if self.mode == Mode::Draining => self.mode = Mode::Running,
            Event::Drain | Event::Resume => {}
            Event::Stop if self.mode == Mode::Stopping => self.cancel_all(CancelReason::Stopping),
            Event::Stop => {
                self.mode = Mode::Stopping;
                self.stop_at = Some(now + self.rules.stop_timeout);
            }
            Event::Time => {}
        }
    }

    // ── admission ──────────────────────────────────────────────────────────────────────────────────────────

    /// Sets about admitting the next job, unless one is under way.
    fn admit_next(&mut self) {
        let cap = usize::try_from(self.rules.max_concurrent).unwrap_or(usize::MAX);
        if self.mode != Mode::Running
            || self.admitting.is_some()
            || (cap != 0 && self.runs.len() >= cap)
        {
            return;
        }
        let Some((run, profile, slot)) = self.choose() else {
            return;
        };
        self.actions.push(Action::Admit { run, profile, slot });
        let vm = slot.map(|slot| Chosen {
            slot,
            idle: self.take(slot),
        });
        self.admitting = Some(Admitting { run, vm });
    }

    /// The job to admit next, and the VM that is there for it. A job whose VM is being prepared waits for that one:
    /// another restore would only slow both down.
    fn choose(&self) -> Option<(RunId, ProfileName, Option<SlotId>)> {
        let mut spoken_for: BTreeMap<&ProfileName, u32> = BTreeMap::new();
        for head in self.waiting.candidates() {
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
            return Some((head.run_id, profile.clone(), slot));
        }
        None
    }

    fn reuse_key(&self, head: &JobHead) -> Option<Reuse> {
        let profile = self.rules.profiles.get(&head.profile)?;
        Some(Reuse {
            group: self.rules.group.clone(),
            submitter: head.submitter,
            session: head.session_id.clone()?,
            profile: head.profile.clone(),
            image: profile.image.clone(),
            variables: head.variables.clone(),
        })
    }

    fn idle_for(&self, head: &JobHead) -> Option<SlotId> {
        let wanted = self.reuse_key(head)?;
        let mut vms = self.vms.iter();
        vms.find(|(_, vm)| matches!(&vm.state, VmState::Idle(key) if *key == wanted))
            .map(|(slot, _)| *slot)
    }

    /// The warm VM that was made last: its memory is the warmest in the host's caches.
    fn warm_for(&self, profile: &ProfileName) -> Option<SlotId> {
        self.vms
            .iter()
            .filter(|(_, vm)| matches!(vm.state, VmState::Warm) && vm.profile == *profile)
            .max_by_key(|(_, vm)| vm.since)
            .map(|(slot, _)| *slot)
    }

    /// Sets a VM aside for a job; returns what it was kept for.
    fn take(&mut self, slot: SlotId) -> Option<Reuse> {
        let vm = self.vms.get_mut(&slot)?;
        match std::mem::replace(&mut vm.state, VmState::Used) {
            VmState::Idle(key) => Some(key),
            _ => None,
        }
    }

    fn on_admitted(&mut self, id: RunId, slot: SlotId, usage: Option<HostUsage>, now: Instant) {
        let chosen = match self.admitting.take() {
            Some(admitting) if admitting.run == id => admitting.vm,
            other => {
                // The provider broke meanwhile, and we are on our way out.
                self.admitting = other;
                self.add_vm_for_nobody(slot, now);
                return;
            }
        };
        // It may have been taken back, or cancelled and answered, while its lease was on its way.
        let Some(head) = self.waiting.admit(id) else {
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
                },
                evicting,
                phase: Phase::Preparing,
                phase_since: Time::now(),
                started: now,
                admitted_at: self.admitted,
            },
        );
    }

    fn add_vm_for_nobody(&mut self, slot: SlotId, now: Instant) {
        if let Some(profile) = self.rules.profiles.keys().next().cloned() {
            let vm = || Vm::new(profile, VmState::Used, now);
            self.vms.entry(slot).or_insert_with(vm);
        }
        self.destroy(slot);
    }

    fn on_refused(&mut self, id: RunId, usage: Option<HostUsage>, now: Instant) {
        if let Some(admitting) = self.admitting.take_if(|admitting| admitting.run == id)
            && let Some(vm) = admitting.vm
        {
            // Its lease was never made firm.
            self.settle(vm.slot, vm.idle, now);
        }
        match usage {
            Some(usage) => self.usage = usage,
            None => self.retry_at = Some(now + RETRY),
        }
        self.waiting.block(id);
    }

    // ── a run ──────────────────────────────────────────────────────────────────────────────────────────────

    fn on_claimed(&mut self, job: Box<ClaimedJob>, now: Instant) {
        let id = job.job.run_id;
        let Some(run) = self.runs.get_mut(&id) else {
            return;
        };
        let head = JobHead::of(&job.job, job.submitter, job.submitted);
        let same = head == run.head;
        run.started = now;
        run.enter(Phase::Preparing);
        run.stage = Stage::MakingRoom(job);
        if let Some(reason) = &self.failed {
            let result = JobResult::failed(id, 1, reason);
            self.complete(result, false);
        } else if !same {
            // Somebody rewrote it after it was found: what was decided for it was decided for another job.
            let result = JobResult::failed(id, 1, "the job file was changed while it was claimed");
            self.complete(result, false);
        } else {
            self.start_if_there_is_room(id);
        }
    }

    fn start_if_there_is_room(&mut self, id: RunId) {
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

    fn on_lost(&mut self, id: RunId, now: Instant) {
        let Some(run) = self.runs.remove(&id) else {
            return;
        };
        match run.stage {
            Stage::Claiming { idle, fresh: false } => self.give_back(run.slot, idle, now),
            _ => self.destroy(run.slot),
        }
    }

    fn cancel(&mut self, id: RunId, why: CancelReason) {
        match self.runs.get(&id).map(|run| &run.stage) {
            Some(Stage::MakingRoom(_)) => self.complete(why.result(id), false),
            Some(Stage::Executing) => self.actions.push(Action::Cancel { run: id, why }),
            // Not claimed yet: the provider answers it, or tells us again when it is. Completing: too late.
            Some(Stage::Claiming { .. } | Stage::Completing { .. }) | None => {}
        }
    }

    fn cancel_all(&mut self, why: CancelReason) {
        let ids: Vec<RunId> = self.runs.keys().copied().collect();
        for id in ids {
            self.cancel(id, why);
        }
    }

    fn on_ended(&mut self, result: JobResult, reusable: bool) {
        if let Some(run) = self.runs.get(&result.run_id)
            && matches!(run.stage, Stage::Executing)
        {
            self.complete(result, reusable);
        }
    }

    /// The only place that answers: a run gets here once, because it leaves in the stage `Completing`.
    fn complete(&mut self, result: JobResult, reusable: bool) {
        if let Some(run) = self.runs.get_mut(&result.run_id)
            && !matches!(run.stage, Stage::Completing { .. })
        {
            run.stage = Stage::Completing { reusable };
            run.enter(Phase::Finishing);
            self.actions.push(Action::Complete(result));
        }
    }

    fn on_completed(&mut self, id: RunId, now: Instant) {
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

    // ── VMs ────────────────────────────────────────────────────────────────────────────────────────────────

    fn may_park(&self) -> bool {
        self.mode == Mode::Running
            && self.rules.idle_max > 0
            && !self.rules.idle_timeout.is_zero()
            && !self.waiting.is_blocked()
    }

    /// One VM a session: an older one would have stale files.
    fn drop_idle_of(&mut self, key: &Reuse) {
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

    fn slots_where(&self, which: impl Fn(&Vm) -> bool) -> Vec<SlotId> {
        let matching = self.vms.iter().filter(|(_, vm)| which(vm));
        matching.map(|(slot, _)| *slot).collect()
    }

    /// Returns a VM whose lease was made firm for a job that is not ours after all.
    fn give_back(&mut self, slot: SlotId, idle: Option<Reuse>, now: Instant) {
        if let Some(vm) = self.vms.get_mut(&slot)
            && !matches!(vm.state, VmState::Dying)
        {
            vm.enter(VmState::Demoting(idle), now);
            self.actions.push(Action::Demote(slot));
        }
    }

    fn on_demoted(&mut self, slot: SlotId, now: Instant) {
        if let Some(vm) = self.vms.get_mut(&slot)
            && let VmState::Demoting(idle) = &mut vm.state
        {
            let idle = idle.take();
            self.settle(slot, idle, now);
            self.waiting.unblock();
        }
    }

    /// Makes a paused VM available, or destroys it if there is no use for it in this mode.
    fn settle(&mut self, slot: SlotId, idle: Option<Reuse>, now: Instant) {
        if self.mode != Mode::Running {
            self.destroy(slot);
        } else if let Some(vm) = self.vms.get_mut(&slot)
            && !matches!(vm.state, VmState::Dying)
        {
            vm.enter(idle.map_or(VmState::Warm, VmState::Idle), now);
        }
    }

    fn on_parked(&mut self, slot: SlotId, parked: bool, now: Instant) {
        let Some(vm) = self.vms.get_mut(&slot) else {
            return;
        };
        if !parked {
            self.destroy(slot);
        } else if let VmState::Parking(key) = &vm.state {
            let key = key.clone();
            self.settle(slot, Some(key), now);
            self.waiting.unblock();
            while let idle = self.idle_lru()
                && idle.len() > self.rules.idle_max
                && let Some(oldest) = idle.first()
            {
                self.destroy(*oldest);
            }
        }
    }

    fn on_warmed(&mut self, profile: ProfileName, outcome: Warmed, now: Instant) {
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

    fn on_vm_died(&mut self, slot: SlotId, reason: String, now: Instant) {
        let Some(vm) = self.vms.get(&slot) else {
            return;
        };
        match vm.state {
            // Its executor finds out by itself; a dying one is meant to.
            VmState::Used | VmState::Dying => {}
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
    fn destroy(&mut self, slot: SlotId) {
        if let Some(vm) = self.vms.get_mut(&slot)
            && !matches!(vm.state, VmState::Dying)
        {
            vm.state = VmState::Dying;
            self.actions.push(Action::Destroy(slot));
        }
    }

    fn on_released(&mut self, slot: SlotId) {
        self.vms.remove(&slot);
        self.waiting.unblock();
        let ids: Vec<RunId> = self
            .runs
            .iter_mut()
            .filter_map(|(id, run)| run.evicting.remove(&slot).then_some(*id))
            .collect();
        for id in ids {
            self.start_if_there_is_room(id);
        }
    }

    fn idle_lru(&self) -> Vec<SlotId> {
        self.lru(|vm| matches!(vm.state, VmState::Idle(_)))
    }

    /// The slots of matching VMs, least recently used first.
    fn lru(&self, which: impl Fn(&Vm) -> bool) -> Vec<SlotId> {
        let mut slots = self.slots_where(which);
        slots.sort_by_key(|slot| self.vms.get(slot).map(|vm| vm.since));
        slots
    }

    /// Gives up what the host needs back, least recently used first. Returns the VMs that have to be gone before
    /// there is room for everything held: none if there is room already.
    fn revoke_for(&mut self, usage: HostUsage) -> BTreeSet<SlotId> {
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

    fn shapes(&self, slots: &[SlotId]) -> Vec<(SlotId, Resources)> {
        let shape = |slot: &SlotId| {
            let vm = self.vms.get(slot)?;
            Some((*slot, self.rules.profiles.get(&vm.profile)?.shape))
        };
        slots.iter().filter_map(shape).collect()
    }

    // ── pools ──────────────────────────────────────────────────────────────────────────────────────────────

    fn ready(&self, profile: &ProfileName) -> u32 {
        let warm = |vm: &&Vm| matches!(vm.state, VmState::Warm) && vm.profile == *profile;
        u32::try_from(self.vms.values().filter(warm).count()).unwrap_or(u32::MAX)
    }

    /// Until when the CPU is left to jobs that are starting.
    fn quiet_until(&self) -> Option<Instant> {
        let young = self.runs.values().map(|run| run.started + REFILL_QUIET);
        young.max()
    }

    fn refill(&mut self, now: Instant) {
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

    // ── time, and the end ──────────────────────────────────────────────────────────────────────────────────

    fn keep_time(&mut self, now: Instant) {
        for pool in self.pools.values_mut() {
            pool.settle(now);
        }
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            self.waiting.unblock();
        }
        if self.stop_at.is_some_and(|at| at <= now) {
            self.stop_at = None;
            self.cancel_all(CancelReason::Stopping);
        }
        let timeout = self.rules.idle_timeout;
        let running = self.mode == Mode::Running;
        let useless = |vm: &Vm| match vm.state {
            VmState::Idle(_) => !running || vm.since + timeout <= now,
            VmState::Warm => !running,
            _ => false,
        };
        for slot in self.slots_where(useless) {
            self.destroy(slot);
        }
    }

    /// When [`Event::Time`] is due.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        let idle = self
            .vms
            .values()
            .filter(|vm| matches!(vm.state, VmState::Idle(_)))
            .map(|vm| vm.since + self.rules.idle_timeout);
        let pools = self
            .pools
            .iter()
            .filter_map(|(profile, pool)| pool.deadline(self.ready(profile)));
        let short = self.pools.iter().any(|(profile, pool)| {
            self.ready(profile).saturating_add(pool.preparing()) < pool.target()
        });
        let quiet = self.quiet_until().filter(|until| short && *until > now);
        idle.chain(pools)
            .chain(quiet)
            .chain(self.retry_at)
            .chain(self.stop_at)
            .chain(self.give_up_at)
            .min()
    }

    /// Something that the daemon cannot be without is gone: every run is answered as failed, and we leave.
    fn fail(&mut self, reason: &str, now: Instant) {
        tracing::error!(reason, "the runner cannot go on");
        self.failed = Some(reason.to_owned());
        self.mode = Mode::Stopping;
        self.stop_at = None;
        self.give_up_at = Some(now + REAP_LIMIT);
        self.admitting = None;
        let ids: Vec<RunId> = self.runs.keys().copied().collect();
        for id in ids {
            let claimed = |run: &Run| !matches!(run.stage, Stage::Claiming { .. });
            if self.runs.get(&id).is_some_and(claimed) {
                self.complete(JobResult::failed(id, 1, reason), false);
            }
        }
    }

    fn finish(&mut self, now: Instant) {
        if self.mode != Mode::Stopping || !self.runs.is_empty() || self.exit.is_some() {
            return;
        }
        if self.failed.is_some() {
            self.exit = Some(1);
            return;
        }
        let limit = *self.give_up_at.get_or_insert(now + REAP_LIMIT);
        let preparing: u32 = self.pools.values().map(Pool::preparing).sum();
        let busy = self.admitting.is_some() || preparing > 0 || !self.vms.is_empty();
        if !busy || limit <= now {
            self.exit = Some(0);
        }
    }

    /// The daemon's exit status, once it is done.
    pub(super) fn exit(&self) -> Option<u8> {
        self.exit
    }

    // ── what others see ────────────────────────────────────────────────────────────────────────────────────

    pub(super) fn mode(&self) -> Mode {
        if self.exit.is_some() {
            Mode::Stopped
        } else {
            self.mode
        }
    }

    /// Runs that are ours, oldest first.
    pub(super) fn active_runs(&self) -> Vec<ActiveRun> {
        let mut runs: Vec<(&RunId, &Run)> = self
            .runs
            .iter()
            .filter(|(_, run)| !matches!(run.stage, Stage::Claiming { .. }))
            .collect();
        runs.sort_by_key(|(_, run)| run.admitted_at);
        runs.into_iter()
            .map(|(id, run)| ActiveRun {
                run_id: *id,
                slot: run.slot.0,
                profile: run.head.profile.clone(),
                group: self.rules.group.clone(),
                phase: run.phase,
                phase_started_at: run.phase_since,
            })
            .collect()
    }

    pub(super) fn idle_vms(&self) -> Vec<IdleVm> {
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
                idle_since: vm.since_time,
            })
        });
        shown.collect()
    }

    pub(super) fn warm_pools(&self) -> Vec<WarmPool> {
        let pools = self.pools.iter().map(|(profile, pool)| WarmPool {
            profile: profile.clone(),
            ready: self.ready(profile),
            preparing: pool.preparing(),
            target: pool.target(),
            last_error: pool.last_error().map(str::to_owned),
        });
        pools.collect()
    }

    pub(super) fn waiting(&self) -> u32 {
        u32::try_from(self.waiting.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn capacity(&self) -> u32 {
        let shapes = self.rules.profiles.values().map(|profile| profile.shape);
        estimated_capacity(self.rules.limits, shapes, self.rules.max_concurrent)
    }

    pub(super) fn budget(&self) -> BudgetStatus {
        BudgetStatus {
            host: self.usage,
            total: self.rules.limits.total,
        }
    }
}

impl Run {
    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.phase_since = Time::now();
    }
}

impl Vm {
    fn new(profile: ProfileName, state: VmState, now: Instant) -> Self {
        Self {
            profile,
            state,
            since: now,
            since_time: Time::now(),
        }
    }

    fn enter(&mut self, state: VmState, now: Instant) {
        self.state = state;
        self.since = now;
        self.since_time = Time::now();
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
