//! An engine without VMs, for tests that decide the order of events.
//!
//! Every restore gives the test a [`FakeGuest`]. The guest side of the real control protocol runs in process, so
//! clients, sessions and output behave as with a VM; what a "process" does is up to the test, through a [`FakeExec`]
//! for every one that is started. Restores, pauses and resumes pass [`Gate`]s that a test may hold or make fail.
//! Nothing here sleeps.

mod guest;
mod os;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use guest_control::{Client, MountSource};
use host::slot::SlotId;
use tokio::sync::{mpsc, watch};

pub use guest::{FakeEvent, FakeGuest};
pub use os::FakeExec;

use crate::engine::{Engine, Progress, Template, Vm};
use crate::error::SandboxError;
use crate::types::{
    Capabilities, EngineKind, ImageFiles, IoLimits, Place, Shape, SnapshotInputs, SnapshotOutcome,
};
use guest::FakeVm;

/// What happens to an operation that comes to a gate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Gate {
    /// It goes on.
    #[default]
    Open,
    /// It waits until the gate is something else.
    Held,
    /// It fails with these words.
    Fails(String),
}

/// Waits at a gate.
async fn pass(mut gate: watch::Receiver<Gate>, step: &'static str) -> Result<(), SandboxError> {
    let state = match gate.wait_for(|gate| *gate != Gate::Held).await {
        Ok(state) => state.clone(),
        // Nobody is left who could open it.
        Err(_) => Gate::Open,
    };
    match state {
        Gate::Open | Gate::Held => Ok(()),
        Gate::Fails(message) => Err(SandboxError::Engine { step, message }),
    }
}

type Program = Arc<dyn Fn(FakeExec) + Send + Sync>;

/// The engine. Clones share everything.
#[derive(Clone)]
pub struct FakeEngine {
    shared: Arc<Shared>,
}

struct Shared {
    guests: mpsc::UnboundedSender<FakeGuest>,
    restores: watch::Sender<Gate>,
    program: Mutex<Program>,
    live: watch::Sender<usize>,
}

impl FakeEngine {
    /// An engine whose processes all exit with 0 at once, and the guests it will make.
    pub fn new() -> (FakeEngine, mpsc::UnboundedReceiver<FakeGuest>) {
        let (guests, made) = mpsc::unbounded_channel();
        let shared = Shared {
            guests,
            restores: watch::Sender::new(Gate::Open),
            program: Mutex::new(Arc::new(|exec: FakeExec| exec.exit(0))),
            live: watch::Sender::new(0),
        };
        let engine = FakeEngine {
            shared: Arc::new(shared),
        };
        (engine, made)
    }

    /// What every process started from now on does. The closure may answer at once, or send the process to the test.
    pub fn on_exec(&self, program: impl Fn(FakeExec) + Send + Sync + 'static) {
        *self
            .shared
            .program
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(program);
    }

    /// The gate of every restore and cold boot from now on, including those that wait at it.
    pub fn set_restores(&self, gate: Gate) {
        self.shared.restores.send_replace(gate);
    }

    /// Number of VMs that were made and not destroyed.
    pub fn live(&self) -> watch::Receiver<usize> {
        self.shared.live.subscribe()
    }

    /// A template of VMs of this shape, without the detour over a snapshot.
    pub fn template(&self, shape: Shape) -> Arc<dyn Template> {
        Arc::new(FakeTemplate {
            engine: self.clone(),
            shape,
        })
    }

    async fn make(&self, slot: SlotId, mount: MountSource) -> Result<Box<dyn Vm>, SandboxError> {
        pass(self.shared.restores.subscribe(), "restore").await?;
        let program = Arc::clone(
            &self
                .shared
                .program
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let (guest, stream) = FakeGuest::start(slot, program);
        let client = Client::connect(stream, Duration::from_secs(60)).await?;
        client.mount(mount).await?;
        let vm = FakeVm::new(guest.clone(), client, self.shared.live.clone());
        // A test that has stopped listening needs no guests.
        let _ = self.shared.guests.send(guest);
        Ok(Box::new(vm))
    }
}

#[async_trait]
impl Engine for FakeEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Fake
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            balloon: false,
            pause: true,
            device_stats: true,
        }
    }

    fn snapshot_key(&self) -> Vec<(String, String)> {
        vec![("engine".to_owned(), "fake".to_owned())]
    }

    async fn create_snapshot(
        &self,
        _slot: SlotId,
        inputs: SnapshotInputs,
        progress: &dyn Progress,
    ) -> Result<SnapshotOutcome, SandboxError> {
        progress.step("save the snapshot");
        let path = inputs.dir.join("state");
        std::fs::write(&path, b"fake").map_err(|source| SandboxError::Io {
            action: format!("write {}", path.display()),
            source,
        })?;
        Ok(SnapshotOutcome {
            files: vec!["state".to_owned()],
            facts: BTreeMap::new(),
            cold_boot: Duration::ZERO,
        })
    }

    async fn open(
        &self,
        _image: ImageFiles,
        shape: Shape,
        snapshot_dir: &Path,
        _outcome: &SnapshotOutcome,
    ) -> Result<Arc<dyn Template>, SandboxError> {
        let path = snapshot_dir.join("state");
        if std::fs::read(&path).ok().as_deref() != Some(b"fake") {
            return Err(SandboxError::BadImage {
                path,
                reason: "it is not the fake engine's".to_owned(),
            });
        }
        Ok(self.template(shape))
    }

    async fn cold_boot(
        &self,
        slot: SlotId,
        _image: ImageFiles,
        _shape: Shape,
        limit: Duration,
    ) -> Result<Box<dyn Vm>, SandboxError> {
        tokio::time::timeout(limit, self.make(slot, MountSource::Disk))
            .await
            .unwrap_or(Err(SandboxError::Timeout {
                step: "handshake",
                limit,
                detail: String::new(),
            }))
    }
}

struct FakeTemplate {
    engine: FakeEngine,
    shape: Shape,
}

#[async_trait]
impl Template for FakeTemplate {
    fn shape(&self) -> Shape {
        self.shape
    }

    fn overhead_mb(&self) -> u64 {
        0
    }

    fn resident_mb(&self) -> u64 {
        0
    }

    fn limited(&self, _: IoLimits) -> Result<Arc<dyn Template>, SandboxError> {
        Err(SandboxError::Unavailable {
            engine: "fake",
            reason: "it has no devices to limit".to_owned(),
        })
    }

    async fn restore(&self, place: Place) -> Result<Box<dyn Vm>, SandboxError> {
        self.engine.make(place.slot, MountSource::Disk).await
    }
}
