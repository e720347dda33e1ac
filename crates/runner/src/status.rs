//! `status.json`: what the daemon is doing, for people, `doctor` and tests.
//!
//! The daemon publishes whole snapshots; one task writes them. It always writes the newest one published, at most
//! one every [`INTERVAL`] (a burst of 200 jobs is not 1000 files), and never an older one after a newer: readers
//! see time go forward only. The file is replaced atomically, so it is always whole.

use std::io::Write;
use std::time::{Duration, Instant};

use host::fs::{Access, Dir};
use host::slot::{HostUsage, Resources};
use jiff::Timestamp;
use sandbox::BalloonStats;
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};

use crate::names::{GroupName, ProfileName, RunId, RunnerName, SessionId};
use crate::provider::api::ApiStatus;

/// Shortest time between two writes.
const INTERVAL: Duration = Duration::from_millis(50);

/// How long a change is left to be followed by others before it is written.
const SETTLE: Duration = Duration::from_millis(10);

/// File name in the instance's directory.
pub(crate) const STATUS_FILE: &str = "status.json";

/// What the daemon is up to as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Mode {
    /// Opening images, reconciling.
    Starting,
    /// Taking jobs.
    Running,
    /// Finishing what it has, taking nothing new; can be resumed.
    Draining,
    /// On its way out.
    Stopping,
    /// Gone.
    Stopped,
}

/// Where a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// Claimed; its VM is being made or resumed.
    Preparing,
    /// The agent runs.
    Running,
    /// The agent has ended; files are collected, the answer is written.
    Finishing,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ActiveRun {
    /// Which.
    pub(crate) run_id: RunId,
    /// The slot of its VM.
    pub(crate) slot: u16,
    /// Its profile.
    pub(crate) profile: ProfileName,
    /// The group it came from.
    pub(crate) group: GroupName,
    /// Where it is.
    pub(crate) phase: Phase,
    /// Since when.
    pub(crate) phase_started_at: Time,
}

/// One VM kept for its session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IdleVm {
    /// The session it is kept for.
    pub(crate) session_id: SessionId,
    /// Its slot.
    pub(crate) slot: u16,
    /// Its profile.
    pub(crate) profile: ProfileName,
    /// Since when.
    pub(crate) idle_since: Time,
    /// What it has given back of its memory, once it has and where its engine can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) balloon: Option<BalloonStats>,
}

/// The warm pool of one profile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WarmPool {
    /// Which profile.
    pub(crate) profile: ProfileName,
    /// VMs ready to be claimed.
    pub(crate) ready: u32,
    /// VMs being prepared.
    pub(crate) preparing: u32,
    /// How many it tries to keep ready.
    pub(crate) target: u32,
    /// Why the last preparation failed, until one succeeds.
    pub(crate) last_error: Option<String>,
}

/// One run that has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RecentRun {
    /// Which.
    pub(crate) run_id: RunId,
    /// Its profile.
    pub(crate) profile: ProfileName,
    /// The result's exit code.
    pub(crate) exit_code: i32,
    /// Why it ended, where it was not the agent's own end; shortened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    /// When it ended.
    pub(crate) ended_at: Time,
    /// From its claim to its end, seconds.
    pub(crate) took_secs: u64,
}

/// One process of the proxy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProxyWorker {
    /// How it is.
    pub(crate) state: WorkerState,
    /// Why it is down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
}

/// How a process of the proxy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum WorkerState {
    /// On its way up.
    Starting,
    /// It carries jobs' traffic.
    Ready,
    /// It died and will be started again.
    Down,
}

/// What is used of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BudgetStatus {
    /// Firm and revocable leases of all runners of the host.
    pub(crate) host: HostUsage,
    /// What firm leases may take in all.
    pub(crate) total: Resources,
}

/// An instant as ISO 8601 in UTC with milliseconds: `2026-11-23T22:24:28.123Z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Time(Timestamp);

/// Turns the instants the daemon reckons with into times for people.
///
/// Instants never jump, the host's clock may: a time noted when something happened would be an hour off, or in the
/// future, after such a step. So times are reckoned backwards from the clock as it is now. Small corrections of the
/// clock are not followed, or every time in the file would change with each of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    instant: Instant,
    wall: Timestamp,
}

impl Clock {
    /// Corrections of the host's clock that are not worth following.
    const SLACK: Duration = Duration::from_millis(500);

    /// The host's clock, which shows `wall` at `now`.
    pub(crate) fn new(now: Instant, wall: Timestamp) -> Self {
        Self { instant: now, wall }
    }

    /// Follows the host's clock, if it has been set meanwhile.
    pub(crate) fn follow(&mut self, now: Instant, wall: Timestamp) {
        let off = wall.duration_since(self.time(now).0).unsigned_abs();
        if off > Self::SLACK {
            *self = Self::new(now, wall);
        }
    }

    /// What the clock, as it is set now, would have shown then.
    pub(crate) fn time(&self, at: Instant) -> Time {
        let wall = match at.checked_duration_since(self.instant) {
            Some(later) => self.wall.saturating_add(later),
            None => self
                .wall
                .saturating_sub(self.instant.saturating_duration_since(at)),
        };
        // Only a span of calendar units would be refused.
        Time(wall.unwrap_or(self.wall))
    }
}

impl Time {
    /// Seconds since the Unix epoch.
    pub(crate) fn unix_secs(self) -> u64 {
        u64::try_from(self.0.as_second()).unwrap_or(0)
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::Finishing => "finishing",
        })
    }
}

impl std::fmt::Display for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.3}", self.0)
    }
}

impl Serialize for Time {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(serde::de::Error::custom)
    }
}

/// The whole file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// The runner.
    pub(crate) name: RunnerName,
    /// This process of it.
    pub(crate) instance: String,
    /// Its process id.
    pub(crate) pid: u32,
    /// `runner --version` of it.
    pub(crate) version: String,
    /// The engine its VMs run on.
    pub(crate) engine: sandbox::EngineKind,
    /// What it is up to.
    pub(crate) mode: Mode,
    /// About how many jobs it can run at once.
    pub(crate) max_concurrent: u32,
    /// Its runs, oldest first.
    pub(crate) active_runs: Vec<ActiveRun>,
    /// Jobs it has seen and has no room for yet.
    pub(crate) waiting: u32,
    /// VMs kept for their session, least recently used first.
    pub(crate) idle_vms: Vec<IdleVm>,
    /// Warm pools by profile.
    pub(crate) warm: Vec<WarmPool>,
    /// The host's budget.
    pub(crate) budget: BudgetStatus,
    /// The proxy's workers.
    #[serde(default)]
    pub(crate) proxy: Vec<ProxyWorker>,
    /// Runs that ended last, the newest first.
    #[serde(default)]
    pub(crate) recent: Vec<RecentRun>,
    /// How it stands with the Web API, where runs come from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) api: Option<ApiStatus>,
    /// When this process started.
    pub(crate) started_at: Time,
    /// When this was true.
    pub(crate) updated_at: Time,
}

/// Hands snapshots to the task that writes them.
#[derive(Debug)]
pub(crate) struct StatusWriter {
    newest: watch::Sender<Status>,
    written: oneshot::Receiver<()>,
}

impl StatusWriter {
    /// Starts the task on the current runtime; `instance` is the directory of this instance. `first` is written
    /// at once.
    pub(crate) fn start(instance: Dir, first: Status) -> Self {
        let (newest, receiver) = watch::channel(first);
        let (done, written) = oneshot::channel();
        tokio::spawn(async move {
            write_all(instance, receiver).await;
            let _ = done.send(());
        });
        Self { newest, written }
    }

    /// Publishes a snapshot; returns at once.
    pub(crate) fn publish(&self, status: Status) {
        self.newest.send_replace(status);
    }

    /// Waits until the newest snapshot is on disk, and ends the task.
    pub(crate) async fn finish(self) {
        drop(self.newest);
        let _ = self.written.await;
    }
}

/// Replaces the file as a whole, without making it durable: after a power loss it means nothing, and every fsync
/// would hold up those of claims and answers, which share its file system's journal.
fn replace(instance: &Dir, json: &[u8]) -> std::io::Result<()> {
    let temporary = format!(".{STATUS_FILE}");
    instance.remove_file(&temporary)?;
    let mut file = instance.open_file(&temporary, Access::CreateNew { mode: 0o600 })?;
    file.write_all(json)?;
    instance.rename(&temporary, instance, STATUS_FILE)?;
    Ok(())
}

/// Writes until the sender is gone and its last snapshot is written.
async fn write_all(mut instance: Dir, mut newest: watch::Receiver<Status>) {
    let mut failed = false;
    loop {
        let status = newest.borrow_and_update().clone();
        let write = tokio::task::spawn_blocking(move || {
            let result = serde_json::to_vec_pretty(&status)
                .map_err(std::io::Error::other)
                .and_then(|mut json| {
                    json.push(b'\n');
                    replace(&instance, &json)
                });
            (instance, result)
        });
        let result;
        (instance, result) = match write.await {
            Ok(outcome) => outcome,
            // The runtime is shutting down.
            Err(_) => return,
        };
        // Said once, not twenty times a second while the disk is full.
        match result {
            Err(error) if !failed => {
                failed = true;
                tracing::error!(%error, "status.json cannot be written");
            }
            Err(_) => {}
            Ok(()) => failed = false,
        }
        if newest.has_changed().is_ok() {
            tokio::time::sleep(INTERVAL).await;
        }
        // What was sent last is still seen after the sender is gone; only then this is an error.
        if newest.changed().await.is_err() {
            return;
        }
        // What changed is a job on its way, most likely: the CPU is its own first.
        if newest.has_changed().is_ok() {
            tokio::time::sleep(SETTLE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(waiting: u32) -> Status {
        Status {
            name: "alice".parse().unwrap(),
            instance: "i".to_owned(),
            pid: 1,
            version: "0".to_owned(),
            engine: sandbox::EngineKind::QemuTcg,
            mode: Mode::Running,
            max_concurrent: 2,
            active_runs: vec![ActiveRun {
                run_id: RunId::random(),
                slot: 3,
                profile: "vm0/small".parse().unwrap(),
                group: "vm0/demo".parse().unwrap(),
                phase: Phase::Preparing,
                phase_started_at: Time(Timestamp::UNIX_EPOCH),
            }],
            waiting,
            idle_vms: Vec::new(),
            warm: Vec::new(),
            budget: BudgetStatus {
                host: HostUsage::default(),
                total: Resources::default(),
            },
            proxy: Vec::new(),
            recent: Vec::new(),
            api: None,
            started_at: Time(Timestamp::UNIX_EPOCH),
            updated_at: Time(Timestamp::UNIX_EPOCH),
        }
    }

    #[test]
    fn times_are_utc_with_milliseconds() {
        let time: Time = serde_json::from_str("\"2026-11-23T22:24:28.1239Z\"").unwrap();
        assert_eq!(time.to_string(), "2026-11-23T22:24:28.123Z");
        let whole: Time = serde_json::from_str("\"2026-11-23T22:24:28Z\"").unwrap();
        assert_eq!(whole.to_string(), "2026-11-23T22:24:28.000Z");
    }

    #[test]
    fn what_happened_stays_as_long_ago_as_it_is_when_the_clock_is_set() {
        const HOUR: Duration = Duration::from_secs(3600);
        let begin = Instant::now();
        let wall: Timestamp = "2026-11-23T12:00:00Z".parse().unwrap();
        let mut clock = Clock::new(begin, wall);
        let later = begin + HOUR;
        let event = begin + HOUR / 2;
        // A small correction is not followed: what was written once stays as it is.
        clock.follow(later, wall + HOUR + Duration::from_millis(20));
        assert_eq!(clock.time(event).to_string(), "2026-11-23T12:30:00.000Z");
        assert_eq!(clock.time(later).to_string(), "2026-11-23T13:00:00.000Z");
        for (set, then, now) in [
            (
                wall + HOUR * 2,
                "2026-11-23T13:30:00.000Z",
                "2026-11-23T14:00:00.000Z",
            ),
            (wall, "2026-11-23T11:30:00.000Z", "2026-11-23T12:00:00.000Z"),
        ] {
            clock.follow(later, set);
            assert_eq!(clock.time(event).to_string(), then);
            assert_eq!(clock.time(later).to_string(), now);
        }
    }

    #[tokio::test]
    async fn a_burst_ends_with_the_newest_snapshot_on_disk() {
        let root = tempfile::tempdir().unwrap();
        let writer = StatusWriter::start(Dir::open(root.path()).unwrap(), status(0));
        for waiting in 1..=500 {
            writer.publish(status(waiting));
            tokio::task::yield_now().await;
        }
        writer.finish().await;
        let text = std::fs::read(root.path().join(STATUS_FILE)).unwrap();
        let read: Status = serde_json::from_slice(&text).unwrap();
        assert_eq!(read.waiting, 500);
        let names: Vec<_> = std::fs::read_dir(root.path()).unwrap().collect();
        assert_eq!(names.len(), 1, "{names:?}");
    }
}
