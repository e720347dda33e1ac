//! The file queue: what the files of a group's directory say, and how they move (docs/architecture.md, "The file
//! queue"). Submitters use [`GroupQueue`], the runner's local provider adds [`RunnerQueue`].
//!
//! ```text
//! submit:  .tmp-… ─rename─▶ <id>.job                                              reads .results/<id>.result
//! runner:                      └─ link ▶ .claims/<id>.claim ─ run ─ rename ▶ .results/<id>.result
//!                                                                            then unlink .job, .cancel, .claim
//! ```
//!
//! Whatever is killed between two steps, the next runner that looks finishes the story: a job without a claim is
//! new, a claim whose owner is dead is answered, a claim whose result is there is only cleaned up.

mod first_seen;
mod group;
mod job;
mod network;
mod registry;
mod result;
mod runner;
mod watch;

pub(crate) use first_seen::FirstSeen;
pub(crate) use group::{GroupQueue, JobState, Listed, QueueError};
pub(crate) use job::{Job, JobFields, MAX_PROMPT_BYTES, MAX_STRING_BYTES, is_reserved};
pub(crate) use network::{
    HandedSecret, JobNetwork, SecretsError, hand_over, handover_name, receive,
};
pub(crate) use registry::LiveRunner;
pub(crate) use result::{JobResult, Verdict};
pub(crate) use runner::{
    ApiSide, Claim, ClaimedJob, JobHead, Look, RunnerQueue, Scan, Unwanted, VariableNames,
};
pub(crate) use watch::{Change, Watch};

#[cfg(test)]
pub(crate) mod test_support {
    pub(crate) use super::job::tests::fields;
}
