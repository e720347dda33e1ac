//! What is sent to the owner.

use host::slot::{HostUsage, SlotId};
use sandbox::{BalloonStats, Sandbox};

use super::event::Event;
use crate::names::{ProfileName, RunId};
use crate::resource_budget::Lease;

/// What the owner hears: events, some of them with a thing that changes hands.
#[derive(Debug)]
pub(super) enum Message {
    /// Nothing changes hands.
    Event(Event),
    /// A job's lease is firm.
    Admitted {
        /// Whose.
        run: RunId,
        /// The lease.
        lease: Lease,
        /// What the host's slots take, if the slot is new.
        usage: Option<HostUsage>,
    },
    /// A job got no lease; that of the VM it was to have comes back.
    Refused {
        /// Whose.
        run: RunId,
        /// The VM's.
        lease: Option<Lease>,
        /// `None`: it failed for another reason than room.
        usage: Option<HostUsage>,
    },
    /// A run's VM is up.
    VmUp {
        /// Whose.
        run: RunId,
        /// The VM.
        sandbox: Sandbox,
    },
    /// A warm VM is ready.
    Warm {
        /// Of which profile.
        profile: ProfileName,
        /// Its lease.
        lease: Lease,
        /// The VM.
        sandbox: Sandbox,
    },
    /// A VM is parked, or was not.
    Parked {
        /// Its lease.
        lease: Lease,
        /// Whether it is.
        parked: bool,
    },
    /// A parked VM has given memory back. The process id tells it from others in the same slot.
    Reclaimed {
        /// Its slot.
        slot: SlotId,
        /// Its process.
        pid: u32,
        /// What its balloon holds.
        balloon: BalloonStats,
    },
    /// A VM's lease is revocable again.
    Demoted {
        /// Its lease.
        lease: Lease,
    },
    /// A VM died. The process id tells it from others in the same slot.
    Died {
        /// Its slot.
        slot: SlotId,
        /// Its process.
        pid: u32,
        /// Why.
        reason: String,
    },
}
