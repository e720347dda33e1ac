//! Bodies of requests and answers, as Firecracker's API description (swagger, v1.16) defines them. Fields that this engine
//! never sends are left out.

use serde::{Deserialize, Serialize};

/// `PUT /machine-config`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct MachineConfig {
    /// 1, or an even number up to 32.
    pub(crate) vcpu_count: u32,
    /// MiB.
    pub(crate) mem_size_mib: u64,
    /// Whether two virtual CPUs share a core.
    pub(crate) smt: bool,
}

/// `PUT /boot-source`. Paths are the process's.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct BootSource {
    pub(crate) kernel_image_path: &'static str,
    pub(crate) initrd_path: &'static str,
    pub(crate) boot_args: String,
}

/// `PUT /drives/{drive_id}`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Drive {
    pub(crate) drive_id: &'static str,
    pub(crate) path_on_host: &'static str,
    /// Whether Firecracker adds `root=` to the kernel's command line.
    pub(crate) is_root_device: bool,
    pub(crate) is_read_only: bool,
    pub(crate) cache_type: CacheType,
}

/// Whether a guest's flush reaches the host's disk.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) enum CacheType {
    Unsafe,
}

/// `PUT /network-interfaces/{iface_id}`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct NetworkInterface {
    pub(crate) iface_id: &'static str,
    pub(crate) host_dev_name: &'static str,
    pub(crate) guest_mac: String,
}

/// `PATCH /drives/{drive_id}`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct DriveUpdate {
    pub(crate) drive_id: &'static str,
    pub(crate) rate_limiter: RateLimiter,
}

/// `PATCH /network-interfaces/{iface_id}`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct NetworkInterfaceUpdate {
    pub(crate) iface_id: &'static str,
    pub(crate) rx_rate_limiter: RateLimiter,
    pub(crate) tx_rate_limiter: RateLimiter,
}

/// How fast something may be.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct RateLimiter {
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bandwidth: Option<TokenBucket>,
    /// Requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ops: Option<TokenBucket>,
}

/// A bucket that is full at first.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct TokenBucket {
    pub(crate) size: u64,
    /// Milliseconds in which an empty one fills.
    pub(crate) refill_time: u64,
}

/// `PUT /vsock`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Vsock {
    /// From 3 on; the host is 2.
    pub(crate) guest_cid: u32,
    pub(crate) uds_path: &'static str,
}

/// `PUT /balloon`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Balloon {
    /// MiB that the guest is to give away.
    pub(crate) amount_mib: u64,
    /// Whether the guest takes them back when it needs them.
    pub(crate) deflate_on_oom: bool,
    /// Seconds between statistics; 0 is never, and stays so.
    pub(crate) stats_polling_interval_s: u32,
}

/// `PATCH /balloon`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct BalloonUpdate {
    pub(crate) amount_mib: u64,
}

/// `GET /balloon/statistics`. What the guest tells of its memory arrives late: how much it can spare it is asked itself.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct BalloonState {
    /// MiB the guest is to give away.
    pub(crate) target_mib: u64,
    /// MiB the guest has given away.
    pub(crate) actual_mib: u64,
    /// Bytes the guest could still use, if it has told.
    #[serde(default)]
    pub(crate) available_memory: Option<u64>,
}

/// `PUT /entropy`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Entropy {}

/// `PUT /actions`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Action {
    pub(crate) action_type: ActionType,
}

/// What to do.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) enum ActionType {
    InstanceStart,
    FlushMetrics,
}

/// `PATCH /vm`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct VmState {
    pub(crate) state: RunState,
}

/// State to be in.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) enum RunState {
    Paused,
}

/// `PUT /snapshot/create`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct SnapshotCreate {
    pub(crate) mem_file_path: &'static str,
    pub(crate) snapshot_path: &'static str,
    pub(crate) snapshot_type: SnapshotType,
}

/// How much of the memory.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) enum SnapshotType {
    Full,
}

/// `PUT /snapshot/load`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SnapshotLoad {
    pub(crate) snapshot_path: &'static str,
    pub(crate) mem_backend: MemoryBackend,
    /// Whether the virtual CPUs start at once.
    pub(crate) resume_vm: bool,
    pub(crate) network_overrides: Vec<NetworkOverride>,
    /// Unknown to versions before 1.16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) vsock_override: Option<VsockOverride>,
}

/// Where the memory comes from.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct MemoryBackend {
    pub(crate) backend_type: BackendType,
    pub(crate) backend_path: &'static str,
}

/// What answers page faults.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) enum BackendType {
    File,
}

/// The device behind a card of a restored VM.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct NetworkOverride {
    pub(crate) iface_id: &'static str,
    pub(crate) host_dev_name: &'static str,
}

/// The socket of a restored VM's vsock device.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct VsockOverride {
    pub(crate) uds_path: &'static str,
}

/// `GET /version`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct FirecrackerVersion {
    pub(crate) firecracker_version: String,
}

/// Body of every answer that is an error.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Fault {
    pub(crate) fault_message: String,
}
