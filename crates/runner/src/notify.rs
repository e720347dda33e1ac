//! What the daemon tells the service manager that started it, if one did: sd_notify(3).
//!
//! The messages come from the loop that decides everything, so a daemon whose loop hangs misses its watchdog and is
//! started again. Without a manager (`NOTIFY_SOCKET` is not set) all of this is silence.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Interval, MissedTickBehavior};

use crate::status::{Mode, Status};

/// How long the manager waits for a sign of life, seconds: `WatchdogSec=` of the units that `runner service` writes. The
/// loop never waits for anything, but a host whose memory is short may stop it for many seconds.
pub(crate) const WATCHDOG_SECS: u64 = 60;

/// Set when another process has become the one the manager listens to.
static HANDED_OVER: AtomicBool = AtomicBool::new(false);

/// The service manager.
#[derive(Debug)]
pub(crate) struct Manager {
    beat: Option<Interval>,
    told: Option<(Mode, String)>,
}

impl Manager {
    /// The one that started this process; on a Tokio runtime.
    pub(crate) fn new() -> Self {
        let listens = std::env::var_os("NOTIFY_SOCKET").is_some();
        // A successor is no child of the manager, which therefore tells it no interval; that of our units holds.
        let limit = sd_notify::watchdog_enabled().unwrap_or(Duration::from_secs(WATCHDOG_SECS));
        let beat = listens.then(|| {
            let mut beat = tokio::time::interval((limit / 3).max(Duration::from_millis(100)));
            beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
            beat
        });
        Self { beat, told: None }
    }

    /// Tells what the daemon is up to, where that has changed: ready the first time, stopping once, and a line for
    /// `systemctl status`.
    pub(crate) fn tell(&mut self, status: &Status) {
        if self.beat.is_none() {
            return;
        }
        let line = line(status);
        let last = self.told.as_ref();
        if last.is_some_and(|(mode, told)| *mode == status.mode && *told == line) {
            return;
        }
        let mut states = Vec::new();
        if last.is_none() {
            states.push(NotifyState::Ready);
        }
        let ends = matches!(status.mode, Mode::Stopping | Mode::Stopped);
        if ends && !last.is_some_and(|(mode, _)| matches!(mode, Mode::Stopping | Mode::Stopped)) {
            states.push(NotifyState::Stopping);
        }
        states.push(NotifyState::Status(&line));
        send(&states);
        self.told = Some((status.mode, line));
    }

    /// Resolves after each sign of life, which keeps the watchdog quiet.
    pub(crate) async fn beat(&mut self) {
        match &mut self.beat {
            Some(beat) => {
                beat.tick().await;
                send(&[NotifyState::Watchdog]);
            }
            None => std::future::pending().await,
        }
    }
}

/// Makes another process of this service the one that the manager watches. From then on this one is silent.
pub(crate) fn hand_over(successor: u32) {
    send(&[NotifyState::MainPid(successor)]);
    HANDED_OVER.store(true, Ordering::Relaxed);
}

fn send(states: &[NotifyState<'_>]) {
    if HANDED_OVER.load(Ordering::Relaxed) {
        return;
    }
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

fn line(status: &Status) -> String {
    let mode = match status.mode {
        Mode::Starting => "starting",
        Mode::Running => "running",
        Mode::Draining => "draining",
        Mode::Stopping => "stopping",
        Mode::Stopped => "stopped",
    };
    format!(
        "{mode}: {} active, {} waiting, room for {}",
        status.active_runs.len(),
        status.waiting,
        status.max_concurrent
    )
}
