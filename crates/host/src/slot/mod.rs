//! Slots: one number from which a VM's uid, cgroup and runtime directory follow.
//!
//! Slot *n* is a flock on `<run-dir>/slots/<n>`; the locked file's JSON is its [`SlotRecord`]. The host's budget is
//! the sum over held locks, so several runners share one host honestly and dead owners vanish. The locks are closed
//! to everybody but root (whoever can open a file can lock it); what they say is published for all in
//! `<run-dir>/slots.json`, replaced on every change: see [`held_slots`].

mod admission;
mod store;

pub use admission::admit;
pub use store::{CHANGES_FILE, HeldSlot, held_slots, orphaned_slots};
pub(crate) use store::{Holding, SlotStore, StoreError};

use serde::{Deserialize, Serialize};

/// Number of slots of a host.
pub const SLOTS: u16 = 4096;

/// Slot *n* runs as uid and gid `DEFAULT_UID_BASE + n`.
///
/// 2147000000 to 2147004111 (services of a runner follow its slots) lie in a span that systemd's UIDS-GIDS documents as unused (1879048192 to 2147352575):
/// above Debian's accounts and `subuid` ranges, systemd's dynamic users (61184 to 65519) and container ranges (524288
/// to 1879048191), SSSD's default mapping of domain accounts (up to 2000200000), and below systemd's foreign range
/// (from 2147352576) and 2^31, where signed tools break.
pub const DEFAULT_UID_BASE: u32 = 2_147_000_000;

/// A slot's number, 0 to 4095.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SlotId(pub u16);

/// What a reservation takes of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Virtual CPUs.
    pub vcpu: u32,
    /// Memory, MiB.
    pub memory_mb: u64,
    /// Disk, MiB.
    pub disk_mb: u64,
}

/// Whether a reservation may be taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeaseKind {
    /// A job's: counted by admission, released only by its owner.
    Firm,
    /// A warm or idle VM's: not counted by admission, destroyed when the room is wanted.
    Revocable,
}

/// What the locked slot file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRecord {
    /// Instance id of the owning runner process.
    pub instance: String,
    /// Firm or revocable.
    pub kind: LeaseKind,
    /// What it takes.
    pub resources: Resources,
    /// The run it serves, when it serves one.
    pub run_id: Option<String>,
    /// Memory that the owner has taken once for all of its slots, MiB: templates, proxies.
    #[serde(default)]
    pub shared_mb: u64,
}

/// Limits that a firm reservation must fit in, computed by the runner's `resource_budget`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLimits {
    /// Sum of firm reservations may not exceed this, unless nothing firm is held on the host.
    pub total: Resources,
}

/// What all held slots take, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostUsage {
    /// Jobs, and what runners other than the one that asks have taken once for all of theirs.
    pub firm: Resources,
    /// Number of firm slots.
    pub firm_count: u32,
    /// Warm and idle VMs.
    pub revocable: Resources,
    /// Number of revocable slots.
    pub revocable_count: u32,
}
