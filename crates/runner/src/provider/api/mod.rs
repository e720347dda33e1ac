//! The Web API as a provider: offers come by long poll, leases are renewed by heartbeats, answers are spooled.
//!
//! ```text
//!   discover ── poll ──▶ Found ─▶ (daemon reserves) ─▶ claim() ─▶ claims ── context ──▶ Claimed
//!   beat ── heartbeat: leases ──▶ Cancelled (wanted, or lost), policy ──▶ Networks, inputs ──▶ the executor
//!   bring, one for each claim ── logs as they grow ──▶ complete() ─▶ spool ─▶ Completed ─▶ the API, until it has it
//! ```
//!
//! The daemon is told `Completed` when the answer is on disk. From then on the answer is this module's: it is brought
//! however long the API is away, also by the next process. A run whose lease was lost is somebody else's: its result is
//! dropped, and the API would refuse it anyway.

mod beat;
mod bring;
mod claims;
mod client;
mod discover;
mod feed;
mod inputs;
mod push;
mod spool;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use api_types::runner::LeaseRef;
use api_types::{Epoch, RunnerId};
use host::fs::Dir;
use host::slot::Resources;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

pub(crate) use client::{ApiSettings, CallError};

use self::bring::LogStarts;
use self::client::Api;
use self::spool::{Spool, Spooled};
use super::{Provider, ProviderEvent};
use crate::audit::Audit;
use crate::control::server::RunLookup;
use crate::home::Home;
use crate::names::{GroupName, ProfileName, RunId, RunnerName};
use crate::network::JobNetworks;
use crate::queue::{JobHead, JobResult, QueueError};
use crate::status::{Clock, Mode, Status, Time};
use crate::sync::lock;

/// Shortest and longest pause before a call is made again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
/// How long a stopping daemon tries to bring what it has; the rest is brought by the next one.
const LAST_TRY: Duration = Duration::from_secs(10);

/// What the provider needs to know of its runner.
#[derive(Debug)]
pub(crate) struct ApiRunner {
    /// Its name.
    pub(crate) name: RunnerName,
    /// This process of it.
    pub(crate) instance: String,
    /// The group of runs it takes.
    pub(crate) group: GroupName,
    /// What it serves, and what a VM of each takes.
    pub(crate) profiles: Vec<(ProfileName, Resources)>,
    /// Most runs at once; 0: as many as fit.
    pub(crate) max_concurrent: u32,
    /// Whom claimed runs count as submitted by: the home's owner.
    pub(crate) submitter: u32,
    /// The networks of its jobs, for policies that change.
    pub(crate) networks: Option<Arc<JobNetworks>>,
}

/// How it stands with the API, for `status.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ApiStatus {
    /// Its address.
    pub(crate) url: String,
    /// Who we are to it.
    pub(crate) runner_id: RunnerId,
    /// When it last took a heartbeat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) last_contact: Option<Time>,
    /// Why it did not take the last heartbeat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    /// Answers that it does not have yet.
    pub(crate) undelivered: usize,
}

/// What we say of ourselves, from the daemon's newest status.
#[derive(Clone, Debug, Default)]
struct View {
    mode: Option<Mode>,
    allocated: Resources,
    total: Resources,
    active: u32,
    held: Vec<api_types::SessionId>,
}

/// A run that we have, or had and have not brought the answer of.
#[derive(Debug)]
struct Held {
    epoch: Epoch,
    /// Who claimed it: us, or a process before us.
    runner: RunnerId,
    policy: beat::PolicyState,
    logs: LogStarts,
    /// How many inputs there are for its agent, where it takes any.
    inputs: Option<watch::Sender<u64>>,
    /// The daemon has been told to end it.
    cancelled: bool,
    lost: bool,
    /// The answer, once there is one.
    answer: watch::Sender<Option<JobResult>>,
    /// Its secrets, until the network has taken them.
    secrets: Option<host::handover::Handover>,
}

#[derive(Debug, Default)]
struct State {
    /// Offered to the daemon and not claimed yet.
    offered: HashMap<RunId, JobHead>,
    known: discover::Known,
    held: HashMap<RunId, Held>,
    /// Answers of ours or of processes before us that the API does not have.
    undelivered: usize,
    /// Runs whose claim is on its way.
    claiming: HashSet<RunId>,
    /// How many runs the API is being given back.
    returning: usize,
    error: Option<String>,
    last_contact: Option<Instant>,
}

struct Inner {
    api: Api,
    id: RunnerId,
    runner: ApiRunner,
    home: Dir,
    spool: Arc<Spool>,
    tell: Box<dyn Fn(ProviderEvent) + Send + Sync>,
    state: Mutex<State>,
    view: watch::Sender<View>,
    /// An offer was claimed or is gone: the next may come.
    settled: Notify,
    /// Say it now rather than at the next heartbeat.
    beat: Notify,
    tasks: Mutex<JoinSet<()>>,
}

/// A handle on the provider's tasks, which run on the runtime that started them.
pub(crate) struct ApiProvider(Arc<Inner>);

impl ApiProvider {
    /// Starts it. `tell` must not block.
    pub(crate) fn start(
        settings: ApiSettings,
        home: &Home,
        runner: ApiRunner,
        tell: impl Fn(ProviderEvent) + Send + Sync + 'static,
    ) -> Result<Self, StartError> {
        let api = Api::new(settings)?;
        let spool = Arc::new(Spool::open(home, &runner.name, &runner.instance)?);
        let inner = Arc::new(Inner {
            api,
            id: RunnerId::random(),
            runner,
            home: home.dir().try_clone()?,
            spool,
            tell: Box::new(tell),
            state: Mutex::default(),
            view: watch::Sender::new(View::default()),
            settled: Notify::new(),
            beat: Notify::new(),
            tasks: Mutex::default(),
        });
        inner.adopt();
        inner.spawn(discover::run(Arc::clone(&inner)));
        inner.spawn(beat::run(Arc::clone(&inner)));
        Ok(Self(inner))
    }

    /// Lets operators run commands in VMs, through the API.
    pub(crate) fn serve(&self, lookup: Arc<dyn RunLookup>, audit: Audit) {
        let operators = push::Operators { lookup, audit };
        self.0.spawn(push::run(Arc::clone(&self.0), operators));
    }

    /// How it stands.
    pub(crate) fn report(&self, clock: &Clock) -> ApiStatus {
        let state = self.0.lock();
        ApiStatus {
            url: self.0.api.url().to_owned(),
            runner_id: self.0.id,
            last_contact: state.last_contact.map(|at| clock.time(at.into_std())),
            error: state.error.clone(),
            undelivered: state.undelivered,
        }
    }

    /// Brings what there is, within a limit, and says goodbye.
    pub(crate) async fn finish(&self) {
        let inner = &self.0;
        let brought = async {
            loop {
                // Before the look: whatever happens after it is heard.
                let delivered = inner.settled.notified();
                let (undelivered, returning) = {
                    let state = inner.lock();
                    (state.undelivered, state.returning)
                };
                if undelivered == 0 && returning == 0 {
                    break;
                }
                delivered.await;
            }
            beat::goodbye(inner).await;
        };
        if tokio::time::timeout(LAST_TRY, brought).await.is_err() {
            let left = inner.lock().undelivered;
            tracing::warn!(
                left,
                "answers stay on disk for the next process of this runner"
            );
        }
        let mut tasks = std::mem::take(&mut *lock(&inner.tasks));
        tasks.abort_all();
        while tasks.join_next().await.is_some() {}
    }
}

/// Why it cannot be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// The client.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The home.
    #[error(transparent)]
    Home(#[from] crate::home::HomeError),
    /// The home's files.
    #[error(transparent)]
    Fs(#[from] host::fs::FsError),
}

impl Provider for ApiProvider {
    fn claim(&self, id: RunId) {
        let offer = {
            let mut state = self.0.lock();
            let offer = state.offered.remove(&id);
            // Its last answer may have been found on disk since it was offered.
            let offer = offer.filter(|_| !state.held.contains_key(&id));
            if offer.is_some() {
                state.claiming.insert(id);
            }
            offer
        };
        self.0.settled.notify_one();
        match offer {
            Some(head) => self.0.spawn(claims::claim(Arc::clone(&self.0), head)),
            None => (self.0.tell)(ProviderEvent::Lost(id)),
        }
    }

    fn complete(&self, result: JobResult) {
        self.0.answered(result);
    }

    fn collect_dir(&self, _: RunId) -> Result<Dir, QueueError> {
        // A run of the API names no files to copy out.
        Err(QueueError::Watch(std::io::Error::from(
            std::io::ErrorKind::Unsupported,
        )))
    }

    fn observe(&self, status: &Status) {
        self.0.observe(status);
    }

    fn api(&self, clock: &Clock) -> Option<ApiStatus> {
        Some(self.report(clock))
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    fn observe(&self, status: &Status) {
        let view = View {
            mode: Some(status.mode),
            allocated: status.budget.host.firm,
            total: status.budget.total,
            active: u32::try_from(status.active_runs.len()).unwrap_or(u32::MAX),
            held: status
                .idle_vms
                .iter()
                .map(|vm| vm.session_id.clone())
                .collect(),
        };
        let mode = view.mode;
        let before = self.view.send_replace(view).mode;
        if before != mode {
            self.beat.notify_one();
        }
    }

    /// A run is ours from now on; its logs are brought as they grow.
    fn hold(
        self: &Arc<Self>,
        lease: LeaseRef,
        runner: RunnerId,
        policy_revision: u64,
        logs: LogStarts,
    ) {
        let (answer, answered) = watch::channel(None);
        let held = Held {
            epoch: lease.epoch,
            runner,
            policy: beat::PolicyState::of(policy_revision),
            logs,
            inputs: None,
            cancelled: false,
            lost: false,
            answer,
            secrets: None,
        };
        {
            let mut state = self.lock();
            state.claiming.remove(&lease.run_id);
            state.held.insert(lease.run_id, held);
        }
        self.spawn(bring::run(Arc::clone(self), lease, runner, logs, answered));
    }

    /// Brings what other processes of this runner left on disk. What is left of a run that we have (or may have in a
    /// moment) by a later claim stays there until we have not: one run has one bringer here, and one file.
    fn adopt(self: &Arc<Self>) {
        let left = {
            let state = self.lock();
            let ours = |run| state.held.contains_key(&run) || state.claiming.contains(&run);
            self.spool.adopt(ours)
        };
        for left in left {
            tracing::info!(run = %left.result.run_id, "bringing an answer that an earlier process left");
            self.take_over(left);
        }
    }

    /// A run of a process before us, which has been answered.
    fn take_over(self: &Arc<Self>, left: Spooled) {
        let lease = LeaseRef {
            run_id: left.result.run_id,
            epoch: left.epoch,
        };
        self.hold(lease, left.runner_id, 0, left.logs);
        let mut state = self.lock();
        state.undelivered = state.undelivered.saturating_add(1);
        if let Some(held) = state.held.get(&lease.run_id) {
            held.answer.send_replace(Some(left.result));
        }
    }

    /// Keeps a run's answer, and tells the daemon when it is kept.
    fn answered(self: &Arc<Self>, result: JobResult) {
        let run = result.run_id;
        let spooled = {
            let mut state = self.lock();
            match state.held.get(&run).filter(|held| !held.lost) {
                Some(held) => {
                    let spooled = Spooled {
                        runner_id: held.runner,
                        epoch: held.epoch,
                        logs: held.logs,
                        result,
                    };
                    state.undelivered = state.undelivered.saturating_add(1);
                    Some(spooled)
                }
                None => None,
            }
        };
        let Some(spooled) = spooled else {
            tracing::warn!(%run, "its lease was lost, so its result is dropped");
            self.forget(run);
            (self.tell)(ProviderEvent::Completed(run));
            return;
        };
        let inner = Arc::clone(self);
        self.spawn(async move {
            let mut pause = Pause::default();
            loop {
                let (spool, answer) = (Arc::clone(&inner.spool), spooled.clone());
                let kept = tokio::task::spawn_blocking(move || spool.keep(&answer)).await;
                match kept {
                    Ok(Ok(())) => break,
                    Ok(Err(error)) => {
                        tracing::error!(%run, %error, "the answer cannot be kept on disk; trying again");
                    }
                    // The runtime is shutting down.
                    Err(_) => return,
                }
                pause.wait(None).await;
            }
            if let Some(held) = inner.lock().held.get(&run) {
                held.answer.send_replace(Some(spooled.result));
            }
            (inner.tell)(ProviderEvent::Completed(run));
        });
    }

    /// A run that we claimed is not ours. Told under the lock: whoever finds it offered again tells so later, and the daemon
    /// does not take that for the claim that it still believes in.
    fn lost(&self, run: RunId) {
        let mut state = self.lock();
        state.claiming.remove(&run);
        state.held.remove(&run);
        (self.tell)(ProviderEvent::Lost(run));
    }

    /// Changes how many runs are being given back.
    fn returning(&self, change: impl FnOnce(usize) -> usize) {
        let mut state = self.lock();
        state.returning = change(state.returning);
        drop(state);
        self.settled.notify_waiters();
    }

    /// Nothing more is said about a run.
    fn forget(&self, run: RunId) {
        self.lock().held.remove(&run);
    }

    /// The answer of a run has been brought, or will never be taken.
    fn delivered(&self, run: RunId) {
        self.spool.remove(run);
        let mut state = self.lock();
        state.held.remove(&run);
        state.undelivered = state.undelivered.saturating_sub(1);
        drop(state);
        self.settled.notify_waiters();
        (self.tell)(ProviderEvent::Changed);
    }
}

/// How long to wait before trying again: longer each time.
#[derive(Debug)]
struct Pause(Duration);

impl Default for Pause {
    fn default() -> Self {
        Self(PAUSE.0)
    }
}

impl Pause {
    /// Waits, at least for what the API asked for.
    async fn wait(&mut self, error: Option<&CallError>) {
        let asked = error.and_then(CallError::retry_after).unwrap_or_default();
        tokio::time::sleep(self.0.max(asked).min(PAUSE.1.max(asked))).await;
        self.0 = self.0.saturating_mul(2).min(PAUSE.1);
    }
}
