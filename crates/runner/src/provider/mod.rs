//! Where jobs come from and answers go: what the daemon asks of a queue, whatever it is made of.
//!
//! Requests return at once; what comes of them arrives as [`ProviderEvent`]s, in order. For one run:
//!
//! ```text
//!             ┌──────────────── Gone ◀── taken by somebody else, taken back, cancelled (and answered)
//! Found ──────┤
//!             └─ claim() ─▶ Lost
//!                      └──▶ Claimed ─▶ (Cancelled) ─▶ complete() ─▶ Completed
//! ```
//!
//! Every `Claimed` is followed by exactly one `complete()`, or by the end of the process: then the next runner
//! answers in its place.

pub(crate) mod api;
pub(crate) mod local;

use host::fs::Dir;

use crate::names::RunId;
use crate::queue::{ClaimedJob, JobHead, JobResult, QueueError};
use crate::status::{Clock, Status};

/// What a provider tells the daemon.
#[derive(Debug)]
pub(crate) enum ProviderEvent {
    /// A job that we serve waits.
    Found(JobHead),
    /// A job that was found is no longer to be had.
    Gone(RunId),
    /// The claim succeeded: the job is ours until it is completed.
    Claimed(Box<ClaimedJob>),
    /// The claim failed.
    Lost(RunId),
    /// Somebody who may wants this claimed run cancelled.
    Cancelled(RunId),
    /// Somebody's marker cancelled a run, claimed or not: for the audit log only.
    Marked {
        /// Which.
        run: RunId,
        /// The marker's owner.
        by: u32,
    },
    /// The result is durable, and its submitter has been told.
    Completed(RunId),
    /// What the provider tells of itself is not what it was.
    Changed,
    /// The provider has stopped working; the reason is for people.
    Broken(String),
}

/// A queue, as the daemon uses it.
pub(crate) trait Provider: Send + Sync {
    /// Tries to claim a found job; `Claimed` or `Lost` follows.
    fn claim(&self, id: RunId);
    /// Answers a claimed job; `Completed` follows, later if the answer cannot be written at once.
    fn complete(&self, result: JobResult);
    /// Makes the directory in which the submitter finds the files copied out of the guest. Call before `complete`.
    fn collect_dir(&self, id: RunId) -> Result<Dir, QueueError>;
    /// What the daemon is up to has changed.
    fn observe(&self, _: &Status) {}
    /// How it stands with the Web API, where jobs come from there.
    fn api(&self, _: &Clock) -> Option<api::ApiStatus> {
        None
    }
}
