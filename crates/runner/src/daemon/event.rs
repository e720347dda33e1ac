//! What the owner task hears, and what it has done.

use host::slot::{HostUsage, SlotId};

use crate::names::{ProfileName, RunId};
use crate::queue::{ClaimedJob, JobHead, JobResult};
use crate::status::Phase;

/// Something happened.
#[derive(Debug)]
pub(super) enum Event {
    /// The provider found a job that we serve.
    Found(JobHead),
    /// A found job is no longer to be had.
    Gone(RunId),
    /// The job has its firm lease. `usage` is what the host's slots then took, where the slot is a new one.
    Admitted {
        run: RunId,
        slot: SlotId,
        usage: Option<HostUsage>,
    },
    /// The job got no lease.
    Refused {
        run: RunId,
        usage: Option<HostUsage>,
    },
    /// The job is ours.
    Claimed(Box<ClaimedJob>),
    /// The job is somebody else's.
    Lost(RunId),
    /// The executor got further.
    Progress { run: RunId, phase: Phase },
    /// The executor is done, or failed, or fell. `reusable`: the VM is fit for the session's next job.
    Ended { result: JobResult, reusable: bool },
    /// The answer is durable.
    Completed(RunId),
    /// Somebody who may wants the run cancelled.
    Cancel(RunId),
    /// A warm VM is ready, or could not be made.
    Warmed {
        profile: ProfileName,
        outcome: Warmed,
    },
    /// A VM was parked, or could not be.
    Parked { slot: SlotId, parked: bool },
    /// A VM whose job was lost has its revocable lease again.
    Demoted { slot: SlotId },
    /// A slot is free: its VM is reaped.
    Released(SlotId),
    /// A VM that nobody uses died.
    VmDied { slot: SlotId, reason: String },
    /// The host's slots changed.
    Usage(HostUsage),
    /// The launcher is dead, and every VM with it.
    LauncherGone,
    /// The provider is dead: nothing can be claimed or answered any more.
    ProviderBroken(String),
    /// SIGUSR1.
    Drain,
    /// SIGUSR2.
    Resume,
    /// Another instance takes jobs from now on: finish what is running, then leave.
    Retire,
    /// SIGTERM or SIGINT.
    Stop,
    /// A deadline passed.
    Time,
}

/// What came of preparing a warm VM.
#[derive(Debug)]
pub(super) enum Warmed {
    /// It is paused in this slot.
    Ready(SlotId),
    /// The host has no room for it.
    NoRoom,
    /// It failed.
    Failed(String),
}

/// Something to do. None of it is waited for; what comes of it is an [`Event`].
#[derive(Debug)]
pub(super) enum Action {
    /// Get the job a firm lease: that of a VM that is there, or a new slot. → `Admitted`, `Refused`
    Admit {
        run: RunId,
        profile: ProfileName,
        slot: Option<SlotId>,
    },
    /// → `Claimed`, `Lost`
    Claim(RunId),
    /// Execute the job in the VM of this slot, which is restored first if there is none. → `Progress`, `Ended`
    Start {
        slot: SlotId,
        profile: ProfileName,
        job: Box<ClaimedJob>,
    },
    /// Cancel the executor. → `Ended`
    Cancel { run: RunId, why: CancelReason },
    /// → `Completed`
    Complete(JobResult),
    /// → `Warmed`
    Warm(ProfileName),
    /// Kill what the job left, pause, make the lease revocable. → `Parked`
    Park(SlotId),
    /// Make the lease revocable. → `Demoted`
    Demote(SlotId),
    /// Kill the VM, if there is one, and release the slot. → `Released`
    Destroy(SlotId),
}

/// Why a run is cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CancelReason {
    /// Its submitter, or an operator, wants it.
    User,
    /// The runner stops.
    Stopping,
}

impl CancelReason {
    /// The answer of a run that was cancelled for it.
    pub(crate) fn result(self, run: RunId) -> JobResult {
        match self {
            Self::User => JobResult::cancelled(run),
            Self::Stopping => JobResult::failed(
                run,
                JobResult::CANCELLED,
                "cancelled because the runner was stopped",
            ),
        }
    }
}
