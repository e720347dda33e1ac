//! What API server, runner and guest agent say to one another over HTTP (`docs/api-mode.md`).
//!
//! Bodies are JSON in camelCase. What clients send is refused when it has an unknown field; what runners and guests
//! send is not, so that a newer runner can talk to an older server. Times are milliseconds since the Unix epoch and
//! are for people: no decision rests on comparing clocks.
#![forbid(unsafe_code)]

pub mod client;
pub mod guest;
mod names;
#[cfg(feature = "openapi")]
pub mod policy;
mod problem;
pub mod push;
pub mod runner;

pub use names::{
    AgentType, ClaimId, GroupName, NameError, ProfileName, RunId, RunnerId, RunnerName, SecretName,
    SessionId,
};
pub use problem::{PROBLEM_JSON, Problem, ProblemKind};

/// Milliseconds since the Unix epoch, by the clock of whoever wrote it.
pub type UnixMillis = u64;

/// Which claim of a run: 1 for the first, one more each time that a runner takes it. Whatever is said about a run by
/// its runner or guest says which; an older one than the run's is refused everywhere.
pub type Epoch = u64;
