//! The owner task: carries out what the plan says, and keeps what has to be kept (leases, VM handles).

mod start;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use host::fs::Lock;
use host::slot::{Resources, SlotId};
use jiff::Timestamp;
use sandbox::{BalloonStats, EngineKind, Sandbox, Template};
use tokio::sync::watch;

use super::directory::Directory;
use super::event::{Action, CancelReason, Event, Warmed};
use super::message::Message;
use super::plan::{Plan, ProfilePlan, Rules};
use super::traces::Traces;
use super::watchers::{Inbox, Mailbox};
use crate::config::{Config, WarmConfig};
use crate::control::server::RunLookup;
use crate::executor::Setting;
use crate::metrics::{Meter, Metrics};
use crate::names::{ProfileName, RunId, RunnerName};
use crate::notify::Manager;
use crate::provider::Provider;
use crate::resource_budget::{self, Budget, Lease};
use crate::status::{Clock, Status, StatusWriter};
use crate::telemetry::Telemetry;

/// Who this daemon is.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// The runner's name.
    pub(crate) name: RunnerName,
    /// This process of it.
    pub(crate) instance: String,
    /// Version text.
    pub(crate) version: String,
    /// The engine of its VMs.
    pub(crate) engine: EngineKind,
}

/// Everything the daemon is made of.
pub(crate) struct Parts {
    /// Who it is.
    pub(crate) identity: Identity,
    /// `runner.yaml`.
    pub(crate) config: Config,
    /// An opened snapshot for every profile.
    pub(crate) templates: BTreeMap<ProfileName, Arc<dyn Template>>,
    /// The host's budget.
    pub(crate) budget: Budget,
    /// The queue.
    pub(crate) provider: Arc<dyn Provider>,
    /// What every job needs.
    pub(crate) setting: Setting,
    /// What is counted.
    pub(crate) metrics: Arc<Metrics>,
    /// Where traces of jobs go.
    pub(crate) telemetry: Telemetry,
    /// What makes this the one daemon of its name.
    pub(crate) name: Option<Lock>,
    /// Messages that are sent to the daemon.
    pub(crate) mailbox: Mailbox,
    /// The daemon's end of it.
    pub(crate) inbox: Inbox,
}

/// A slot we hold.
#[derive(Debug)]
struct Held {
    /// `None` while a task changes it.
    lease: Option<Lease>,
    sandbox: Option<Sandbox>,
}

pub(super) struct Owner {
    identity: Identity,
    started: Instant,
    clock: Clock,
    plan: Plan,
    pub(super) templates: BTreeMap<ProfileName, Arc<dyn Template>>,
    pub(super) shapes: BTreeMap<ProfileName, Resources>,
    pub(super) budget: Budget,
    provider: Arc<dyn Provider>,
    pub(super) setting: Setting,
    pub(super) mailbox: Mailbox,
    held: HashMap<SlotId, Held>,
    /// To be destroyed as soon as their lease is back from its task.
    doomed: HashSet<SlotId>,
    /// Whose VM had a job before.
    parked: HashSet<SlotId>,
    /// What they have given back of their memory while they wait.
    balloons: HashMap<SlotId, BalloonStats>,
    cancels: HashMap<RunId, watch::Sender<Option<CancelReason>>>,
    directory: Arc<Directory>,
    metrics: Arc<Metrics>,
    meter: Meter,
    traces: Traces,
}

/// Runs the daemon until it is told to stop or cannot go on; returns its exit status. `serve` gets what the control
/// socket looks at; `status` what `status.json` is to say.
pub(crate) async fn run(
    parts: Parts,
    status: impl FnOnce(Status) -> StatusWriter,
    serve: impl FnOnce(Arc<dyn RunLookup>),
) -> u8 {
    let mut inbox = parts.inbox;
    let networks = parts.setting.networks.clone();
    if let Some(networks) = &networks {
        let mailbox = parts.mailbox.clone();
        // What becomes of the proxy is told in the status.
        networks
            .proxy()
            .on_change(move || mailbox.event(Event::Time));
    }
    let directory = Arc::new(Directory::new(parts.mailbox.clone(), networks, parts.name));
    let shapes: BTreeMap<ProfileName, Resources> =
        resource_budget::of_profiles(&parts.templates).collect();
    let rules = rules(&parts.config, &shapes, &parts.budget);
    let mut owner = Owner {
        identity: parts.identity,
        started: now(),
        clock: Clock::new(now(), Timestamp::now()),
        plan: Plan::new(rules, now()),
        templates: parts.templates,
        shapes,
        budget: parts.budget,
        provider: parts.provider,
        setting: parts.setting,
        mailbox: parts.mailbox,
        held: HashMap::new(),
        doomed: HashSet::new(),
        parked: HashSet::new(),
        balloons: HashMap::new(),
        cancels: HashMap::new(),
        directory: Arc::clone(&directory),
        meter: Meter::new(Arc::clone(&parts.metrics)),
        traces: Traces::new(parts.telemetry),
        metrics: parts.metrics,
    };
    let writer = status(owner.status());
    let first = owner.status();
    owner.provider.observe(&first);
    directory.update(first);
    serve(directory);
    owner.digest(Event::Time);
    let mut manager = Manager::new();
    manager.tell(&owner.status());
    loop {
        let deadline = owner.plan.deadline(now());
        let message = tokio::select! {
            biased;
            () = manager.beat() => continue,
            message = inbox.0.recv() => match message {
                Some(message) => message,
                // We hold a mailbox ourselves.
                None => break,
            },
            () = until(deadline) => Message::Event(Event::Time),
        };
        owner.hear(message);
        let status = owner.status();
        owner.directory.update(status.clone());
        owner.provider.observe(&status);
        manager.tell(&status);
        writer.publish(status);
        if owner.plan.exit().is_some() {
            break;
        }
    }
    writer.finish().await;
    owner.plan.exit().unwrap_or(1)
}

fn rules(config: &Config, shapes: &BTreeMap<ProfileName, Resources>, budget: &Budget) -> Rules {
    let profiles = config.profiles.iter().filter_map(|(name, profile)| {
        let plan = ProfilePlan {
            shape: *shapes.get(name)?,
            image: profile.snapshot_hash.as_str().to_owned(),
            warm: WarmConfig { ..profile.warm },
        };
        Some((name.clone(), plan))
    });
    let parallel = std::thread::available_parallelism().map_or(1, usize::from);
    Rules {
        group: config.group.clone(),
        profiles: profiles.collect(),
        limits: budget.limits(),
        max_concurrent: config.sandbox.max_concurrent,
        idle_timeout: Duration::from_secs(config.sandbox.idle_timeout_secs),
        idle_max: usize::try_from(config.sandbox.idle_max).unwrap_or(usize::MAX),
        stop_timeout: config.stop_timeout(),
        parallel: u32::try_from(parallel).unwrap_or(u32::MAX),
    }
}

/// The runtime's clock, which a test may hold.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

impl Owner {
    fn hear(&mut self, message: Message) {
        let event = match message {
            Message::Event(event) => event,
            Message::Admitted { run, lease, usage } => {
                let slot = lease.slot();
                self.keep(lease, None);
                Event::Admitted { run, slot, usage }
            }
            Message::Refused { run, lease, usage } => {
                if let Some(lease) = lease {
                    self.keep(lease, None);
                }
                Event::Refused { run, usage }
            }
            Message::VmUp { run, sandbox } => {
                self.directory.add_client(run, sandbox.client().clone());
                if let Some(held) = self.held.get_mut(&sandbox.slot())
                    && held.sandbox.is_none()
                {
                    self.watch_over(&sandbox);
                    if let Some(held) = self.held.get_mut(&sandbox.slot()) {
                        held.sandbox = Some(sandbox);
                    }
                }
                return;
            }
            Message::Warm {
                profile,
                lease,
                sandbox,
            } => {
                let slot = lease.slot();
                self.watch_over(&sandbox);
                self.keep(lease, Some(sandbox));
                let outcome = Warmed::Ready(slot);
                Event::Warmed { profile, outcome }
            }
            Message::Parked { lease, parked } => {
                let slot = lease.slot();
                self.keep(lease, None);
                if parked {
                    self.parked.insert(slot);
                }
                Event::Parked { slot, parked }
            }
            Message::Reclaimed { slot, pid, balloon } => {
                if self.is_vm(slot, pid) && self.parked.contains(&slot) {
                    self.balloons.insert(slot, balloon);
                }
                return;
            }
            Message::Demoted { lease } => {
                let slot = lease.slot();
                self.keep(lease, None);
                Event::Demoted { slot }
            }
            Message::Died { slot, pid, reason } => {
                if !self.is_vm(slot, pid) {
                    return;
                }
                Event::VmDied { slot, reason }
            }
        };
        if let Event::Completed(run) = &event {
            self.cancels.remove(run);
        }
        self.digest(event);
    }

    fn digest(&mut self, event: Event) {
        match &event {
            Event::Claimed(job) => self.meter.claimed(job, now()),
            Event::Progress { run, phase } => self.meter.progress(*run, *phase, now()),
            Event::Completed(run) => self.meter.completed(*run, now()),
            _ => {}
        }
        self.traces.event(&event, now());
        for action in self.plan.handle(event, now()) {
            self.traces.action(&action, now());
            self.carry_out(action);
        }
        self.traces.settled(now());
    }

    /// Whether a slot's VM is still the one with this process.
    fn is_vm(&self, slot: SlotId, pid: u32) -> bool {
        let vm = self.held.get(&slot).and_then(|held| held.sandbox.as_ref());
        vm.is_some_and(|sandbox| sandbox.pid() == pid)
    }

    /// Takes a lease (back) into our keeping.
    fn keep(&mut self, lease: Lease, sandbox: Option<Sandbox>) {
        let slot = lease.slot();
        let held = self.held.entry(slot).or_insert(Held {
            lease: None,
            sandbox: None,
        });
        held.lease = Some(lease);
        if sandbox.is_some() {
            held.sandbox = sandbox;
        }
        if self.doomed.remove(&slot) {
            self.destroy(slot);
        }
    }

    pub(super) fn take_lease(&mut self, slot: SlotId) -> Option<Lease> {
        self.held.get_mut(&slot)?.lease.take()
    }

    /// Where a VM of this slot goes.
    fn vm_place(&self, slot: SlotId) -> sandbox::Place {
        let lease = self.held.get(&slot).and_then(|held| held.lease.as_ref());
        lease.map_or_else(|| sandbox::Place::unplugged(slot), Lease::vm_place)
    }

    pub(super) fn sandbox(&self, slot: SlotId) -> Option<Sandbox> {
        self.held.get(&slot)?.sandbox.clone()
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Admit { run, profile, slot } => self.admit(run, &profile, slot),
            Action::Claim(run) => self.provider.claim(run),
            Action::Start { slot, profile, job } => self.start(slot, &profile, job),
            Action::Cancel { run, why } => {
                if let Some(cancel) = self.cancels.get(&run) {
                    cancel.send_replace(Some(why));
                }
            }
            Action::Complete(result) => {
                tracing::info!(run = %result.run_id, exit_code = result.exit_code, error = result.error, "job ended");
                self.meter.ended(&result, now());
                self.provider.complete(result);
            }
            Action::Warm(profile) => self.warm(profile),
            Action::Park(slot) => self.park(slot),
            Action::Demote(slot) => {
                if let Some(mut lease) = self.take_lease(slot) {
                    let mailbox = self.mailbox.clone();
                    tokio::spawn(async move {
                        if let Err(error) = lease.make_revocable().await {
                            tracing::warn!(slot = slot.0, %error, "a lease stays firm");
                        }
                        mailbox.send(Message::Demoted { lease });
                    });
                }
            }
            Action::Destroy(slot) => self.destroy(slot),
        }
    }

    fn destroy(&mut self, slot: SlotId) {
        let Some(held) = self.held.get_mut(&slot) else {
            return;
        };
        let Some(lease) = held.lease.take() else {
            self.doomed.insert(slot);
            return;
        };
        let sandbox = held.sandbox.take();
        self.held.remove(&slot);
        self.parked.remove(&slot);
        self.balloons.remove(&slot);
        let mailbox = self.mailbox.clone();
        tokio::spawn(async move {
            if let Some(sandbox) = sandbox {
                sandbox.destroy().await;
            }
            if let Err(error) = lease.release().await {
                tracing::error!(slot = slot.0, %error, "a slot could not be released");
            }
            mailbox.event(Event::Released(slot));
        });
    }

    /// Tells us when a VM dies by itself.
    fn watch_over(&self, sandbox: &Sandbox) {
        let (slot, pid) = (sandbox.slot(), sandbox.pid());
        // Not a handle, which would keep the VM alive.
        let mut state = sandbox.state();
        let mailbox = self.mailbox.clone();
        tokio::spawn(async move {
            let reason = match state.wait_for(|state| state.death().is_some()).await {
                Ok(state) => state.death().map(|death| death.reason.clone()),
                Err(_) => None,
            };
            let reason = reason.unwrap_or_else(|| "nobody looks after it".to_owned());
            mailbox.send(Message::Died { slot, pid, reason });
        });
    }

    fn status(&mut self) -> Status {
        let now = now();
        self.clock.follow(now, Timestamp::now());
        let mut idle_vms = self.plan.idle_vms(&self.clock);
        for idle in &mut idle_vms {
            idle.balloon = self.balloons.get(&SlotId(idle.slot)).copied();
        }
        Status {
            name: self.identity.name.clone(),
            instance: self.identity.instance.clone(),
            pid: std::process::id(),
            version: self.identity.version.clone(),
            engine: self.identity.engine,
            mode: self.plan.mode(),
            max_concurrent: self.plan.capacity(),
            active_runs: self.plan.active_runs(&self.clock),
            waiting: self.plan.waiting(),
            idle_vms,
            warm: self.plan.warm_pools(),
            budget: self.plan.budget(),
            proxy: self
                .setting
                .networks
                .as_ref()
                .map(|networks| networks.proxy().states())
                .unwrap_or_default(),
            recent: self.meter.recent(&self.clock),
            api: self.provider.api(&self.clock),
            started_at: self.clock.time(self.started),
            updated_at: self.clock.time(now),
        }
    }
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Owner")
            .field("plan", &self.plan)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "owner_tests.rs"]
mod tests;
