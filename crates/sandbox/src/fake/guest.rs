//! One fake VM: the test's handle on it, and the [`Vm`] the owner task gets.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use guest_control::{Client, MountSource};
use host::slot::SlotId;
use tokio::io::DuplexStream;
use tokio::sync::watch;

use super::os::FakeOs;
use super::{Gate, Program, pass};
use crate::engine::Vm;
use crate::error::SandboxError;
use crate::types::{BalloonStats, Death, DeviceStats, MemoryStats, StepTimes};

/// Something that happened to a fake VM, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FakeEvent {
    /// Its root was built.
    Mounted(MountSource),
    /// Its root was dropped.
    Unmounted,
    /// All its processes were killed.
    KilledAll,
    /// Clock and entropy were set.
    Woken,
    /// A process was started: its program.
    Started(String),
    /// Its CPUs were stopped.
    Paused,
    /// They were started again.
    Resumed,
    /// It was destroyed.
    Destroyed,
}

/// The test's handle on one fake VM. Clones share it.
#[derive(Clone)]
pub struct FakeGuest {
    pub(super) state: Arc<GuestState>,
}

pub(super) struct GuestState {
    slot: SlotId,
    pid: u32,
    log: Log,
    pauses: watch::Sender<Gate>,
    resumes: watch::Sender<Gate>,
    reclaims: watch::Sender<Gate>,
    devices: watch::Sender<DeviceStats>,
    death: watch::Sender<Option<Death>>,
    /// True once the control channel is to end.
    cut: watch::Sender<bool>,
    /// True once nothing that is said over it is heard any more.
    deaf: watch::Sender<bool>,
}

/// What has happened, and a way to wait for more.
#[derive(Clone)]
pub(super) struct Log(Arc<watch::Sender<Vec<FakeEvent>>>);

impl Log {
    pub(super) fn add(&self, event: FakeEvent) {
        self.0.send_modify(|events| events.push(event));
    }
}

impl FakeGuest {
    /// Starts the guest's end of the control protocol; returns the host's end of its stream.
    pub(super) fn start(slot: SlotId, program: Program) -> (FakeGuest, DuplexStream) {
        static NEXT_PID: AtomicU32 = AtomicU32::new(1_000_000);
        let (host, mut guest) = tokio::io::duplex(256 * 1024);
        let log = Log(Arc::new(watch::Sender::new(Vec::new())));
        let (cut, mut cut_rx) = watch::channel(false);
        let (deaf, mut deaf_rx) = watch::channel(false);
        let os = Arc::new(FakeOs::new(program, log.clone()));
        tokio::spawn(async move {
            // The stream is dropped, and with it closed, when this task ends.
            let turns_deaf = async {
                let _ = deaf_rx.wait_for(|deaf| *deaf).await;
            };
            let hears = async {
                tokio::select! {
                    _ = guest_control::server::serve(&mut guest, &os) => {}
                    () = turns_deaf => std::future::pending().await,
                }
            };
            tokio::select! {
                () = hears => {}
                _ = cut_rx.wait_for(|cut| *cut) => {}
            }
        });
        let state = GuestState {
            slot,
            pid: NEXT_PID.fetch_add(1, Ordering::Relaxed),
            log,
            pauses: watch::Sender::new(Gate::Open),
            resumes: watch::Sender::new(Gate::Open),
            reclaims: watch::Sender::new(Gate::Open),
            devices: watch::Sender::new(DeviceStats::default()),
            death: watch::Sender::new(None),
            cut,
            deaf,
        };
        let guest = FakeGuest {
            state: Arc::new(state),
        };
        (guest, host)
    }

    /// The slot it was made in.
    pub fn slot(&self) -> SlotId {
        self.state.slot
    }

    /// Its devices have done this much more.
    pub fn count(&self, more: DeviceStats) {
        self.state.devices.send_modify(|sum| *sum += more);
    }

    /// What has happened to it so far.
    pub fn events(&self) -> Vec<FakeEvent> {
        self.state.log.0.borrow().clone()
    }

    /// Waits until `event` has happened.
    pub async fn happened(&self, event: &FakeEvent) {
        let mut log = self.state.log.0.subscribe();
        // The sender is ours: it cannot be gone.
        let _ = log.wait_for(|events| events.contains(event)).await;
    }

    /// The gate of its pauses.
    pub fn set_pauses(&self, gate: Gate) {
        self.state.pauses.send_replace(gate);
    }

    /// The gate of its resumes.
    pub fn set_resumes(&self, gate: Gate) {
        self.state.resumes.send_replace(gate);
    }

    /// The gate of giving its memory back, which it cannot.
    pub fn set_reclaims(&self, gate: Gate) {
        self.state.reclaims.send_replace(gate);
    }

    /// Its process dies, and its control channel ends with it.
    pub fn die(&self, death: Death) {
        self.state.death.send_replace(Some(death));
        self.close_channel();
    }

    /// The guest reads nothing more from its control channel and answers nothing, but keeps it open.
    pub fn turn_deaf(&self) {
        self.state.deaf.send_replace(true);
    }

    /// The guest closes its control channel; the process lives on.
    pub fn close_channel(&self) {
        self.state.cut.send_replace(true);
    }
}

/// What the owner task holds.
pub(super) struct FakeVm {
    guest: FakeGuest,
    client: Client,
    live: watch::Sender<usize>,
}

impl FakeVm {
    pub(super) fn new(guest: FakeGuest, client: Client, live: watch::Sender<usize>) -> FakeVm {
        live.send_modify(|live| *live += 1);
        FakeVm {
            guest,
            client,
            live,
        }
    }
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        self.live.send_modify(|live| *live = live.saturating_sub(1));
    }
}

#[async_trait]
impl Vm for FakeVm {
    fn control(&self) -> Client {
        self.client.clone()
    }

    fn pid(&self) -> u32 {
        self.guest.state.pid
    }

    async fn pause(&mut self) -> Result<(), SandboxError> {
        pass(self.guest.state.pauses.subscribe(), "pause").await?;
        self.guest.state.log.add(FakeEvent::Paused);
        Ok(())
    }

    async fn resume(&mut self) -> Result<(), SandboxError> {
        pass(self.guest.state.resumes.subscribe(), "resume").await?;
        self.guest.state.log.add(FakeEvent::Resumed);
        Ok(())
    }

    async fn destroy(self: Box<Self>) -> Result<(), SandboxError> {
        self.guest.close_channel();
        self.guest.state.log.add(FakeEvent::Destroyed);
        Ok(())
    }

    async fn died(&mut self) -> Death {
        let mut death = self.guest.state.death.subscribe();
        match death.wait_for(Option::is_some).await {
            Ok(death) => death.clone(),
            Err(_) => None,
        }
        .unwrap_or_else(|| Death {
            reason: "the fake VM is gone".to_owned(),
            oom: false,
        })
    }

    fn memory(&self) -> Result<MemoryStats, SandboxError> {
        Ok(MemoryStats::default())
    }

    async fn reclaim_memory(&mut self) -> Result<BalloonStats, SandboxError> {
        pass(self.guest.state.reclaims.subscribe(), "reclaim memory").await?;
        Err(SandboxError::Unavailable {
            engine: "fake",
            reason: "it has no memory".to_owned(),
        })
    }

    async fn take_device_stats(&mut self) -> Result<DeviceStats, SandboxError> {
        Ok(self
            .guest
            .state
            .devices
            .send_replace(DeviceStats::default()))
    }

    fn steps(&self) -> StepTimes {
        StepTimes(vec![("handshake", Duration::ZERO)])
    }
}

/// A mutex whose poisoning does not matter: its holder only assigns.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
