//! Plain types that engines and the runner share.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use host::net::NetworkId;
use host::slot::SlotId;
use serde::{Deserialize, Serialize};

/// Which engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineKind {
    /// Firecracker under its jailer (arrives with the production engine).
    Firecracker,
    /// QEMU with hardware KVM.
    QemuKvm,
    /// QEMU with software emulation (TCG).
    QemuTcg,
    /// In-process fake, tests only.
    Fake,
}

/// Optional abilities.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Memory of a parked VM can be given back.
    pub balloon: bool,
    /// Pausing and resuming.
    pub pause: bool,
    /// It counts what a VM's devices do.
    pub device_stats: bool,
}

/// Where a VM is on this host: what its process runs as, and what its network card leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The slot.
    pub slot: SlotId,
    /// The network, which no other VM may have meanwhile; the card leads nowhere without one.
    pub network: Option<NetworkId>,
}

impl Place {
    /// A place for a VM that needs no network: one to be saved, proved or measured.
    pub fn unplugged(slot: SlotId) -> Place {
        Place {
            slot,
            network: None,
        }
    }
}

/// Size of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Virtual CPUs.
    pub vcpu: u32,
    /// Memory, MiB.
    pub memory_mb: u64,
    /// Writable disk, MiB.
    pub disk_mb: u64,
}

/// The built image an engine boots: paths below `images/<rootfs-hash>/`, already verified.
#[derive(Clone, Debug)]
pub struct ImageFiles {
    /// Uncompressed kernel (ELF) where it could be had, else the distribution's bzImage / Image.
    pub kernel: PathBuf,
    /// cpio with guest-init and the modules it loads.
    pub initrd: PathBuf,
    /// Read-only root file system (erofs).
    pub rootfs: PathBuf,
}

/// What a snapshot is made from.
#[derive(Clone, Debug)]
pub struct SnapshotInputs {
    /// The image.
    pub image: ImageFiles,
    /// Size of the VM.
    pub shape: Shape,
    /// Empty directory in staging that receives the engine's snapshot files.
    pub dir: PathBuf,
    /// Runs in the guest before saving, on a tmpfs root that is dropped: fills the page cache.
    pub warm_up: Vec<guest_control::ExecSpec>,
    /// Limit for the boot and for each warm-up process.
    pub limit: Duration,
}

/// What an engine says of a snapshot it made; kept in the snapshot's manifest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotOutcome {
    /// File names in the directory that make up the snapshot.
    pub files: Vec<String>,
    /// Measured inputs the snapshot depends on (for QEMU under emulation: `tsc_khz`), compared within a tolerance
    /// when it is opened, and exact ones (`qemu_version`).
    pub facts: BTreeMap<String, String>,
    /// How long the cold boot took.
    pub cold_boot: Duration,
}

/// How a VM's process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// One sentence for the result of a job that ran in it.
    pub reason: String,
    /// The host killed it for want of memory.
    pub oom: bool,
}

/// Memory of the VM's process on the host.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct MemoryStats {
    /// Private dirty bytes (its own, not the template's).
    pub private_dirty: u64,
    /// Resident bytes, shared ones included.
    pub resident: u64,
}

/// A balloon, as its engine tells of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStats {
    /// What it was last told to hold, MiB.
    pub target_mb: u64,
    /// What it holds, MiB: memory of the guest's that the host has back.
    pub held_mb: u64,
    /// What the guest could still use when it last told, MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_available_mb: Option<u64>,
}

/// What a VM's devices did, as its engine counted it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// Bytes the guest read from its disks, the read-only one included.
    pub disk_read_bytes: u64,
    /// Bytes it wrote.
    pub disk_written_bytes: u64,
    /// Times a disk made it wait for [`IoLimits`].
    pub disk_throttled: u64,
    /// Bytes its network card sent.
    pub network_sent_bytes: u64,
    /// Bytes it received.
    pub network_received_bytes: u64,
    /// Times the card made it, or whoever sends to it, wait for [`IoLimits`].
    pub network_throttled: u64,
}

impl std::ops::AddAssign for DeviceStats {
    fn add_assign(&mut self, more: DeviceStats) {
        // By name: a figure that is added to the type is missed here otherwise.
        let DeviceStats {
            disk_read_bytes,
            disk_written_bytes,
            disk_throttled,
            network_sent_bytes,
            network_received_bytes,
            network_throttled,
        } = more;
        for (sum, more) in [
            (&mut self.disk_read_bytes, disk_read_bytes),
            (&mut self.disk_written_bytes, disk_written_bytes),
            (&mut self.disk_throttled, disk_throttled),
            (&mut self.network_sent_bytes, network_sent_bytes),
            (&mut self.network_received_bytes, network_received_bytes),
            (&mut self.network_throttled, network_throttled),
        ] {
            *sum = sum.saturating_add(more);
        }
    }
}

/// How much a VM may read, write, send and receive in a second; no limit where there is none. What was not used for a
/// second is what it may take at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IoLimits {
    /// Reads and writes of its private disk together, KiB a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_kib_s: Option<u64>,
    /// Requests to its private disk a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_ops_s: Option<u64>,
    /// What its network card sends, and likewise what it receives, KiB a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_kib_s: Option<u64>,
}

/// Where the time of a preparation went, in order.
#[derive(Clone, Debug, Default)]
pub struct StepTimes(pub Vec<(&'static str, Duration)>);
