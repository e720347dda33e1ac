//! A replica: what its handlers share, and the tasks that keep it up to date.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use api_types::runner::{Heartbeat, MAX_WAIT_SECS, RunnerInfo, RunnerMode};
use api_types::{GroupName, RunId, RunnerId};
use futures_util::StreamExt as _;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::clock::Clock;
use crate::engine::{Applied, Engine, EngineError, FLEET_MEMORY, holds_value, parse_entry};
use crate::follow::Hub;
use crate::http::limits::Limits;
use crate::index::{Index, Timing};
use crate::read_model::ReadModel;
use crate::run::{Command, Entry, State};
use crate::tokens::{Bearers, Keyring, KeyringError, MasterKeys};

/// What an operator may set.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// How long a lease lasts without being renewed.
    pub lease: Duration,
    /// How long a run whose client says nothing may take: what its token is good for.
    pub default_timeout_secs: u64,
    /// How long a runner's request for work is held at most, whatever it asks for.
    pub max_wait: Duration,
    /// Most runs of one group that wait.
    pub max_queued: u64,
    /// How long finished runs are kept.
    pub run_retention: Duration,
    /// How often it is looked for what is to be removed.
    pub housekeeping: Duration,
    /// How often WebSockets are pinged; one that is silent for three times as long is dead.
    pub ping: Duration,
    /// Requests, waiters and followers at once.
    pub limits: crate::http::limits::Ceilings,
    /// Of offers.
    pub timing: Timing,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(60),
            default_timeout_secs: 7200,
            max_wait: Duration::from_secs(MAX_WAIT_SECS),
            max_queued: 100_000,
            run_retention: Duration::from_secs(30 * 24 * 3600),
            housekeeping: Duration::from_secs(600),
            ping: Duration::from_secs(15),
            limits: crate::http::limits::Ceilings::default(),
            timing: Timing::default(),
        }
    }
}

/// The runners that this replica has heard of: an id is known within its group only, who says it in another is another.
#[derive(Debug, Default)]
pub struct Fleet(RwLock<HashMap<(GroupName, RunnerId), (RunnerInfo, Instant)>>);

impl Fleet {
    /// Takes note of a heartbeat; who has not been heard of for too long.
    fn note(&self, info: RunnerInfo) -> Vec<(GroupName, RunnerId)> {
        let mut fleet = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let gone = fleet.extract_if(|_, (_, at)| at.elapsed() >= FLEET_MEMORY);
        let gone = gone.map(|(key, _)| key).collect();
        let key = (info.heartbeat.group.clone(), info.heartbeat.runner_id);
        if info.heartbeat.mode == RunnerMode::Stopped {
            fleet.remove(&key);
        } else {
            fleet.insert(key, (info, Instant::now()));
        }
        gone
    }

    /// Those of these groups.
    pub fn of(&self, groups: &BTreeSet<GroupName>) -> Vec<RunnerInfo> {
        let fleet = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut runners: Vec<RunnerInfo> = fleet
            .values()
            .filter(|(info, at)| {
                at.elapsed() < FLEET_MEMORY && groups.contains(&info.heartbeat.group)
            })
            .map(|(info, _)| info.clone())
            .collect();
        runners.sort_by(|a, b| a.heartbeat.runner_name.cmp(&b.heartbeat.runner_name));
        runners
    }
}

/// The replica.
#[derive(Debug)]
pub struct Service {
    /// NATS.
    pub engine: Engine,
    /// Runs that are not done.
    pub index: Index,
    /// All runs, for lists.
    pub read_model: Arc<ReadModel>,
    /// Keys.
    pub keyring: Keyring,
    /// Tokens.
    pub bearers: Bearers,
    /// The time.
    pub clock: Clock,
    /// Followers.
    pub hub: Hub,
    /// Runners.
    pub fleet: Fleet,
    /// Settings.
    pub config: Config,
    /// Who is let in.
    pub limits: Limits,
    ready: AtomicBool,
}

/// Why a replica does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Keys.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// The list of runs.
    #[error(transparent)]
    ReadModel(#[from] crate::read_model::ReadModelError),
}

/// Ends the replica's tasks when it is dropped.
#[derive(Debug)]
pub struct Tasks(#[expect(dead_code, reason = "held for its drop")] JoinSet<()>);

impl Service {
    /// Makes a replica and starts its tasks.
    pub async fn start(
        engine: Engine,
        masters: impl Into<MasterKeys>,
        clock: Clock,
        config: Config,
    ) -> Result<(Arc<Self>, Tasks), StartError> {
        let service = Arc::new(Self {
            keyring: Keyring::open(engine.keys.clone(), masters.into(), clock.clone()).await?,
            bearers: Bearers::new(engine.tokens.clone()),
            index: Index::new(config.timing),
            read_model: Arc::new(ReadModel::open()?),
            hub: Hub::new(engine.clone()),
            fleet: Fleet::default(),
            limits: Limits::new(config.limits),
            ready: AtomicBool::new(false),
            engine,
            clock,
            config,
        });
        let mut tasks = JoinSet::new();
        let (listed, to_list) = mpsc::channel(4096);
        let model = Arc::clone(&service.read_model);
        // SQLite blocks, so it has a thread of its own.
        tasks.spawn_blocking(move || write_lists(&model, to_list));
        tasks.spawn(Arc::clone(&service).watch_runs(listed));
        tasks.spawn(Arc::clone(&service).watch_tokens());
        tasks.spawn(Arc::clone(&service).watch_fleet());
        tasks.spawn(Arc::clone(&service).tick());
        tasks.spawn(Arc::clone(&service).reap());
        tasks.spawn(Arc::clone(&service).keep_house());
        Ok((service, Tasks(tasks)))
    }

    /// Whether it knows all runs.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Takes note of what this replica wrote itself, before the watch tells it.
    pub fn note(&self, applied: &Applied) {
        if applied.changed {
            self.noted(&applied.entry, applied.revision);
        }
    }

    fn noted(&self, entry: &Entry, revision: u64) {
        self.index.note(entry, revision, Instant::now());
        self.tell_followers(entry);
    }

    fn tell_followers(&self, entry: &Entry) {
        if entry.is_done() {
            self.hub.ended(entry.run);
        }
    }

    /// Learns what a run is now, where the storage has just said that it is not what this replica believed. News that come
    /// late, from a handler that was slow, could be believed for good: the watch says nothing twice.
    pub async fn look_again(&self, run: RunId) {
        let before = self.index.revision(run);
        match self.engine.run(run).await {
            Ok(Some((entry, revision))) => self.noted(&entry, revision),
            Ok(None) => self.index.forget_if(run, before),
            Err(error) => tracing::warn!(%run, %error, "a run cannot be looked at again"),
        }
    }

    /// Tells a runner that something about its run is new.
    pub async fn push_look(&self, entry: &Entry) {
        use api_types::push::ToRunner;
        use api_types::runner::LeaseRef;
        let State::Running(lease) = &entry.state else {
            return;
        };
        let look = ToRunner::Look(LeaseRef {
            run_id: entry.run,
            epoch: entry.epoch,
        });
        let subject = self
            .engine
            .push_subject(&entry.group, lease.holder.runner_id);
        if let Ok(body) = serde_json::to_vec(&look) {
            // A hint: the next renewal tells it anyway.
            let _ = self.engine.client().publish(subject, body.into()).await;
        }
    }

    async fn watch_runs(self: Arc<Self>, listed: mpsc::Sender<Listed>) {
        loop {
            if let Err(error) = self.watch_runs_once(&listed).await {
                tracing::warn!(%error, "runs cannot be watched; trying again");
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    async fn watch_runs_once(&self, listed: &mpsc::Sender<Listed>) -> Result<(), EngineError> {
        let bucket = self.engine.runs_bucket();
        if bucket.messages().await? == 0 {
            self.ready.store(true, Ordering::Release);
        }
        let mut watch = bucket.watch().await?;
        while let Some(change) = watch.next().await {
            let change = change.map_err(|error| EngineError::Unavailable(error.to_string()))?;
            if holds_value(change.operation) {
                match parse_entry(&change.value) {
                    Ok(entry) => {
                        self.index.heard(&entry, change.revision, Instant::now());
                        self.tell_followers(&entry);
                        let news = Listed::Changed(Box::new(entry), change.revision);
                        let _ = listed.send(news).await;
                    }
                    Err(error) => tracing::error!(%error, key = change.key, "an entry is damaged"),
                }
            } else if let Ok(run) = change.key.parse::<RunId>() {
                self.index.forget(run);
                let _ = listed.send(Listed::Removed(run)).await;
            }
            if change.delta == 0 {
                self.ready.store(true, Ordering::Release);
            }
        }
        Ok(())
    }

    async fn watch_tokens(self: Arc<Self>) {
        loop {
            if let Err(error) = self.watch_tokens_once().await {
                tracing::warn!(%error, "tokens cannot be watched; trying again");
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    async fn watch_tokens_once(&self) -> Result<(), EngineError> {
        let bucket = &self.engine.tokens;
        let mut there = BTreeSet::new();
        let mut first = bucket.messages().await? > 0;
        let mut watch = bucket.watch().await?;
        while let Some(change) = watch.next().await {
            let change = change.map_err(|error| EngineError::Unavailable(error.to_string()))?;
            let value = holds_value(change.operation).then_some(change.value.as_ref());
            self.bearers.note(&change.key, value);
            if first && value.is_some() {
                there.insert(change.key);
            }
            if first && change.delta == 0 {
                self.bearers.retain(&there);
                first = false;
            }
        }
        Ok(())
    }

    async fn watch_fleet(self: Arc<Self>) {
        loop {
            if let Err(error) = self.watch_fleet_once().await {
                tracing::warn!(%error, "the fleet cannot be watched; trying again");
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    async fn watch_fleet_once(&self) -> Result<(), EngineError> {
        let mut watch = self.engine.fleet.watch().await?;
        while let Some(change) = watch.next().await {
            let change = change.map_err(|error| EngineError::Unavailable(error.to_string()))?;
            if holds_value(change.operation)
                && change.key.starts_with("runner.")
                && let Ok(info) = serde_json::from_slice::<RunnerInfo>(&change.value)
            {
                self.note_runner(info);
            }
        }
        Ok(())
    }

    /// Takes note of a heartbeat.
    pub fn note_runner(&self, info: RunnerInfo) {
        let beat: &Heartbeat = &info.heartbeat;
        let held: &[_] = match beat.mode {
            RunnerMode::Running => &beat.held_sessions,
            RunnerMode::Draining | RunnerMode::Stopped => &[],
        };
        let (group, runner, held) = (beat.group.clone(), beat.runner_id, held.to_vec());
        for (group, gone) in self.fleet.note(info) {
            self.index.holds(&group, gone, &[]);
        }
        // After that: it may have been among them itself.
        self.index.holds(&group, runner, &held);
    }

    async fn tick(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(Duration::from_millis(250));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.index.tick(Instant::now());
        }
    }

    /// Ends leases that are silent. Silence is counted by this replica's steady clock and only while the storage took
    /// writes: an outage of NATS or of all replicas is not the runners' fault.
    async fn reap(self: Arc<Self>) {
        let period =
            (self.config.lease / 10).clamp(Duration::from_millis(100), Duration::from_secs(5));
        let mut ticks = tokio::time::interval(period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut floor = Instant::now();
        let mut proved = Instant::now();
        loop {
            ticks.tick().await;
            let asked = Instant::now();
            if self.engine.probe().await.is_err() {
                continue;
            }
            // Between the last proof and this one there may have been an outage of up to that long.
            if proved.elapsed() > period.saturating_mul(3)
                || asked.elapsed() > period.saturating_mul(2)
            {
                floor = Instant::now();
            }
            proved = Instant::now();
            for silent in self.index.silent(self.config.lease, floor, Instant::now()) {
                let command = Command::Expire {
                    epoch: silent.entry.epoch,
                };
                let now = self.clock.now();
                let outcome = self
                    .engine
                    .apply_to(&silent.entry, silent.revision, now, &command)
                    .await;
                match outcome {
                    Ok(Some(applied)) => {
                        tracing::warn!(run = %silent.entry.run, epoch = silent.entry.epoch, "runner lost");
                        self.note(&applied);
                    }
                    // Somebody else was faster, and the watch may have said so before this replica noted less.
                    Ok(None) => self.look_again(silent.entry.run).await,
                    Err(error) => {
                        tracing::warn!(run = %silent.entry.run, %error, "a lost run cannot be ended yet")
                    }
                }
            }
        }
    }
}

enum Listed {
    Changed(Box<Entry>, u64),
    Removed(RunId),
}

/// Writes what has come together, one transaction at a time.
fn write_lists(model: &ReadModel, mut news: mpsc::Receiver<Listed>) {
    let mut batch = Vec::new();
    while let Some(first) = news.blocking_recv() {
        let mut next = Some(first);
        while let Some(listed) = next {
            match listed {
                Listed::Changed(entry, revision) => batch.push((*entry, revision)),
                Listed::Removed(run) => {
                    let written = model.note(&batch).and_then(|()| model.forget(run));
                    batch.clear();
                    if let Err(error) = written {
                        tracing::error!(%error, "the list of runs is incomplete");
                    }
                }
            }
            next = if batch.len() < 1000 {
                news.try_recv().ok()
            } else {
                None
            };
        }
        if let Err(error) = model.note(&batch) {
            tracing::error!(%error, "the list of runs is incomplete");
        }
        batch.clear();
    }
}
