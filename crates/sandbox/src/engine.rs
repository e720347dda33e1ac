//! The traits an engine implements. The runner talks to [`crate::Sandbox`] handles, never to a [`Vm`] directly.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use guest_control::Client;
use host::slot::SlotId;

use crate::error::SandboxError;
use crate::types::{
    BalloonStats, Capabilities, Death, DeviceStats, EngineKind, ImageFiles, IoLimits, MemoryStats,
    Place, Shape, SnapshotInputs, SnapshotOutcome, StepTimes,
};

/// Progress of a long step, for a person.
pub trait Progress: Send + Sync {
    /// A new step has begun.
    fn step(&self, what: &str);
}

/// One way to run VMs on this host.
#[async_trait]
pub trait Engine: Send + Sync {
    /// Which.
    fn kind(&self) -> EngineKind;
    /// What it can do beyond the minimum.
    fn capabilities(&self) -> Capabilities;
    /// Whatever beside the image and the shape decides whether a snapshot can be used: hashed into its name.
    fn snapshot_key(&self) -> Vec<(String, String)>;
    /// Cold boots the image in `slot`, without a network, warms it up and saves it. No writable disk is mounted when it is saved.
    async fn create_snapshot(
        &self,
        slot: SlotId,
        inputs: SnapshotInputs,
        progress: &dyn Progress,
    ) -> Result<SnapshotOutcome, SandboxError>;
    /// Opens a snapshot for cloning. The files in `snapshot_dir` were verified against the manifest.
    async fn open(
        &self,
        image: ImageFiles,
        shape: Shape,
        snapshot_dir: &std::path::Path,
        outcome: &SnapshotOutcome,
    ) -> Result<Arc<dyn Template>, SandboxError>;
    /// Cold boots without a snapshot and without a network (used by the proof of an engine and by benchmarks); the disk
    /// is mounted.
    async fn cold_boot(
        &self,
        slot: SlotId,
        image: ImageFiles,
        shape: Shape,
        limit: Duration,
    ) -> Result<Box<dyn Vm>, SandboxError>;
}

/// An opened snapshot: makes clones.
#[async_trait]
pub trait Template: Send + Sync {
    /// Size of its VMs.
    fn shape(&self) -> Shape;
    /// Host memory one VM takes beyond `shape().memory_mb` at most, MiB: added to the cgroup's limit.
    fn overhead_mb(&self) -> u64;
    /// Resident host memory the template itself takes once, MiB.
    fn resident_mb(&self) -> u64;
    /// The same template, whose clones are held to these limits; `Unavailable` where the engine has none.
    fn limited(&self, limits: IoLimits) -> Result<Arc<dyn Template>, SandboxError>;
    /// Restores a clone in `place`: process started, state loaded, handshake done, fresh disk mounted. It runs; the
    /// caller warms it up and pauses it.
    async fn restore(&self, place: Place) -> Result<Box<dyn Vm>, SandboxError>;
}

/// One VM process, as the engine knows it. Owned by one task; everybody else talks to that task.
#[async_trait]
pub trait Vm: Send + Sync {
    /// Its control channel (handshake done).
    fn control(&self) -> Client;
    /// Host process id.
    fn pid(&self) -> u32;
    /// Stops the virtual CPUs.
    async fn pause(&mut self) -> Result<(), SandboxError>;
    /// Starts them again.
    async fn resume(&mut self) -> Result<(), SandboxError>;
    /// Kills the process and waits until it is reaped. The slot stays with the caller.
    async fn destroy(self: Box<Self>) -> Result<(), SandboxError>;
    /// Resolves when the process has died by itself. Cancel-safe.
    async fn died(&mut self) -> Death;
    /// Memory on the host.
    fn memory(&self) -> Result<MemoryStats, SandboxError>;
    /// Gives parked memory back (balloon) and tells what the balloon then holds; `Unavailable` without the capability.
    /// May be dropped at any point, after which only [`Vm::pause`], [`Vm::resume`] and [`Vm::destroy`] tell what state the
    /// virtual CPUs are in.
    async fn reclaim_memory(&mut self) -> Result<BalloonStats, SandboxError>;
    /// What its devices did since this was last asked, or since it was started; `Unavailable` without the capability.
    async fn take_device_stats(&mut self) -> Result<DeviceStats, SandboxError>;
    /// Where the time of its start went.
    fn steps(&self) -> StepTimes;
}
