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

mod runs;
mod view;
mod vms;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use host::slot::{HostLimits, HostUsage, Resources, SlotId};

use super::event::{Action, CancelReason, Event};
use super::waiting::Waiting;
use crate::config::WarmConfig;
use crate::names::{GroupName, ProfileName, RunId, SessionId};
use crate::pool::Pool;
use crate::queue::{ClaimedJob, JobHead, JobResult, VariableNames};
use crate::status::{Mode, Phase};

/// A pool is not refilled while jobs that started just now are likely to be still starting: the CPU is worth more to
/// them. This long for as many of them as there are CPUs, twice as long for twice as many.
const REFILL_QUIET: Duration = Duration::from_millis(100);
/// However many started: a pool has to be refilled some time.
const LONGEST_QUIET: Duration = Duration::from_secs(2);
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
    variables: VariableNames,
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
    /// It died while it was set aside for a job: nobody may have it again.
    dead: bool,
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
    /// As what it was chosen.
    head: JobHead,
    /// Room has come free since: a refusal that is on its way knows nothing of it.
    outdated: bool,
    /// It was taken back since. If it waits again it may be another job under the same name: what is on its way is not for
    /// that one.
    gone: bool,
}

#[derive(Debug)]
enum Stage {
    Claiming {
        /// What the VM was kept for, if it goes back there.
        idle: Option<Reuse>,
        fresh: bool,
        /// Why it is cancelled as soon as it is ours.
        cancelled: Option<CancelReason>,
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
    phase_since: Instant,
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
    /// A successor takes the jobs: we leave when ours have ended.
    retiring: bool,
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
            retiring: false,
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
            // Offered again while its claim is on its way, it is ours all the same: it does not wait.
            Event::Found(head) if self.runs.contains_key(&head.run_id) => {}
            Event::Found(head) => {
                // An offer that was given up and came again is what it was.
                if let Some(one) = &mut self.admitting
                    && one.head.decides_like(&head)
                {
                    one.gone = false;
                }
                self.waiting.add(head);
            }
            Event::Gone(id) => {
                self.waiting.remove(id);
                if let Some(admitting) = self.admitting.as_mut().filter(|one| one.run == id) {
                    admitting.gone = true;
                }
            }
            Event::Admitted { run, slot, usage } => self.on_admitted(run, slot, usage, now),
            Event::Refused { run, usage } => self.on_refused(run, usage, now),
            Event::Claimed(job) => self.on_claimed(job, now),
            Event::Lost(run) => self.on_lost(run, now),
            Event::Progress { run, phase } => {
                if let Some(run) = self.runs.get_mut(&run)
                    && matches!(run.stage, Stage::Executing)
                {
                    run.enter(phase, now);
                }
            }
            Event::Ended { result, reusable } => self.on_ended(result, reusable, now),
            Event::Completed(run) => self.on_completed(run, now),
            Event::Cancel(run) => self.cancel(run, CancelReason::User, now),
            Event::Warmed { profile, outcome } => self.on_warmed(profile, outcome, now),
            Event::Parked { slot, parked } => self.on_parked(slot, parked, now),
            Event::Demoted { slot } => self.on_demoted(slot, now),
            Event::Released(slot) => self.on_released(slot),
            Event::VmDied { slot, reason } => self.on_vm_died(slot, reason, now),
            // Pressure on the host, ours or another runner's, is answered; room that came free is tried.
            Event::Usage(usage) => {
                self.revoke_for(usage);
                self.room_came_free();
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
            Event::Resume if self.mode == Mode::Draining && !self.retiring => {
                self.mode = Mode::Running;
            }
            Event::Retire => {
                self.retiring = true;
                if self.mode == Mode::Running {
                    self.mode = Mode::Draining;
                }
            }
            Event::Drain | Event::Resume => {}
            Event::Stop if self.mode == Mode::Stopping => self.cancel_all(now),
            Event::Stop => {
                self.mode = Mode::Stopping;
                self.stop_at = Some(now + self.rules.stop_timeout);
            }
            Event::Time => {}
        }
    }

    fn keep_time(&mut self, now: Instant) {
        for pool in self.pools.values_mut() {
            pool.settle(now);
        }
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            self.room_came_free();
        }
        if self.stop_at.is_some_and(|at| at <= now) {
            self.stop_at = None;
            self.cancel_all(now);
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

    /// Everybody who waits for room may be tried again, also whoever is being refused at this moment.
    fn room_came_free(&mut self) {
        self.waiting.unblock();
        if let Some(admitting) = &mut self.admitting {
            admitting.outdated = true;
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
                self.complete(JobResult::failed(id, 1, reason), false, now);
            }
        }
    }

    fn finish(&mut self, now: Instant) {
        let done = self.runs.is_empty() && self.admitting.is_none();
        if self.retiring && self.mode == Mode::Draining && done {
            self.mode = Mode::Stopping;
        }
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
}

impl Run {
    fn enter(&mut self, phase: Phase, now: Instant) {
        self.phase = phase;
        self.phase_since = now;
    }
}

impl Vm {
    fn new(profile: ProfileName, state: VmState, now: Instant) -> Self {
        Self {
            profile,
            state,
            since: now,
            dead: false,
        }
    }

    fn enter(&mut self, state: VmState, now: Instant) {
        self.state = state;
        self.since = now;
    }
}

#[cfg(test)]
mod tests;
