//! What runners say: they hold a runner token of their groups.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::client::{Run, Secret};
use crate::{
    AgentType, ClaimId, Epoch, GroupName, ProfileName, RunId, RunnerId, RunnerName, SecretName,
    SessionId, UnixMillis,
};

/// Longest long-poll, seconds.
pub const MAX_WAIT_SECS: u64 = 60;

/// Asks for a run to claim. Has no effect on any run, so it may be dropped at any time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Poll {
    /// Who asks.
    pub runner_id: RunnerId,
    /// Of which group.
    pub group: GroupName,
    /// Profiles that it could start now.
    #[cfg_attr(feature = "openapi", schema(max_items = 64))]
    pub profiles: Vec<ProfileName>,
    /// Sessions whose VM it keeps: runs of these are offered to it first.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(max_items = 1024))]
    pub held_sessions: Vec<SessionId>,
    /// How long to wait for a run, seconds; at most [`MAX_WAIT_SECS`]. The server may answer sooner.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(maximum = 60))]
    pub wait_secs: u64,
}

/// A run that could be claimed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Offer {
    /// The run.
    pub run_id: RunId,
    /// Its profile.
    pub profile: ProfileName,
    /// Its session.
    pub session_id: Option<SessionId>,
}

/// The answer to a [`Poll`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Polled {
    /// A run, if one came in time.
    pub job: Option<Offer>,
}

/// Takes a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Claim {
    /// Who takes it.
    pub runner_id: RunnerId,
    /// Its name.
    #[serde(default)]
    pub runner_name: Option<RunnerName>,
    /// This attempt; the same when it is sent again because no answer came.
    pub claim_id: ClaimId,
}

/// A CLI's session, as it was when an earlier run of the session ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ResumeSession {
    /// The CLI's own id of it.
    pub session_id: String,
    /// Its history, JSON lines.
    pub session_history: String,
}

/// Everything that a runner needs for a run: the answer to a [`Claim`].
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ExecutionContext {
    /// The run.
    pub run_id: RunId,
    /// Which claim this is; to be said with everything about the run.
    pub epoch: Epoch,
    /// How long the lease lasts unless it is renewed, seconds. Renew after a third of it.
    pub lease_secs: u64,
    /// The guest's token, `VM0_API_TOKEN` in it: opens the webhooks of this run and claim, nothing else.
    pub sandbox_token: String,
    /// The profile.
    pub profile: ProfileName,
    /// The prompt.
    pub prompt: String,
    /// Where the agent starts.
    pub working_dir: String,
    /// Which agent CLI.
    pub cli_agent_type: AgentType,
    /// Its environment.
    pub environment: BTreeMap<String, String>,
    /// Its session.
    pub session_id: Option<SessionId>,
    /// What the session's last checkpoint holds, if there is one.
    pub resume_session: Option<ResumeSession>,
    /// Its time limit, seconds.
    pub timeout_secs: Option<u64>,
    /// The run's own policy.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<crate::policy::Policy>))]
    pub policy: Option<serde_json::Value>,
    /// The group's policy, which the run's cannot lift.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<crate::policy::Policy>))]
    pub group_policy: Option<serde_json::Value>,
    /// Names of its secrets. Their values are had from `firewall/auth`.
    pub secrets: Vec<SecretName>,
    /// When the run was accepted.
    pub api_start_time: UnixMillis,
    /// Which policy `policy` is; a lease's answer says when there is a newer one.
    pub policy_revision: u64,
    /// Whether the agent is to be started so that it can be told more while it works.
    #[serde(default)]
    pub accepts_input: bool,
    /// How many inputs wait for the agent.
    pub inputs: u64,
}

impl std::fmt::Debug for ExecutionContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Neither token nor prompt nor environment belongs into a log.
        f.debug_struct("ExecutionContext")
            .field("run_id", &self.run_id)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

/// A claim that a runner believes to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct LeaseRef {
    /// The run.
    pub run_id: RunId,
    /// Which claim.
    pub epoch: Epoch,
}

/// What a runner is up to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum RunnerMode {
    /// It takes runs.
    Running,
    /// It finishes what it has.
    Draining,
    /// It is about to be gone; said once.
    Stopped,
}

/// A runner's report, every 10 seconds. It renews the leases that it names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Heartbeat {
    /// Who.
    pub runner_id: RunnerId,
    /// Its name.
    pub runner_name: RunnerName,
    /// Its group.
    pub group: GroupName,
    /// What it serves.
    #[cfg_attr(feature = "openapi", schema(max_items = 64))]
    pub profiles: Vec<ProfileName>,
    /// CPUs that it may give away.
    #[serde(default)]
    pub total_vcpu: u32,
    /// Memory that it may give away, MiB.
    #[serde(default)]
    pub total_memory_mb: u64,
    /// Most runs at once; 0: as many as fit.
    #[serde(default)]
    pub max_concurrent: u32,
    /// CPUs given away.
    #[serde(default)]
    pub allocated_vcpu: u32,
    /// Memory given away, MiB.
    #[serde(default)]
    pub allocated_memory_mb: u64,
    /// Runs under way; idle VMs do not count.
    #[serde(default)]
    pub running_count: u32,
    /// Sessions whose VM it keeps.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(max_items = 1024))]
    pub held_sessions: Vec<SessionId>,
    /// What it is up to.
    pub mode: RunnerMode,
    /// Its version.
    #[serde(default)]
    pub version: Option<String>,
    /// Its claims.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(max_items = 1024))]
    pub leases: Vec<LeaseRef>,
}

/// What became of a lease that was to be renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum LeaseVerdict {
    /// It lasts another `leaseSecs`.
    Renewed,
    /// The run is somebody else's, finished or unknown: stop it and drop its result.
    Lost,
    /// The server could not find out; ask again.
    Unknown,
}

/// A lease after a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct LeaseAnswer {
    /// The run.
    pub run_id: RunId,
    /// Which claim.
    pub epoch: Epoch,
    /// What became of it.
    pub verdict: LeaseVerdict,
    /// Somebody wants the run ended.
    pub cancel_requested: bool,
    /// Larger than the one that you know: fetch the policy.
    pub policy_revision: u64,
    /// How many inputs there are: fetch those that you do not know.
    pub inputs: u64,
}

/// A run's own policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct RunPolicy {
    /// As in `docs/network.md`, in its canonical form; none: the run says nothing of its own.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<crate::policy::Policy>))]
    pub policy: Option<serde_json::Value>,
    /// Which one.
    pub policy_revision: u64,
}

/// Inputs for the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Inputs {
    /// In their order.
    pub inputs: Vec<NumberedInput>,
    /// What to send as `cursor` for the ones after these.
    #[serde(default)]
    pub cursor: u64,
}

/// One input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NumberedInput {
    /// Its number, from 1.
    pub sequence: u64,
    /// The text.
    pub text: String,
}

/// The answer to a [`Heartbeat`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct HeartbeatAnswer {
    /// Of each lease in the heartbeat, in its order.
    pub leases: Vec<LeaseAnswer>,
    /// How long a renewed lease lasts, seconds.
    pub lease_secs: u64,
}

/// Says who speaks of which claim: renews a lease, or gives a run back that has not been started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct LeaseOf {
    /// Who.
    pub runner_id: RunnerId,
    /// Which claim.
    pub epoch: Epoch,
}

/// Answers a run. Sent again it gets the same answer, also when the run is long done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Complete {
    /// Who.
    pub runner_id: RunnerId,
    /// Which claim.
    pub epoch: Epoch,
    /// The agent's exit code.
    pub exit_code: i32,
    /// What happened, when something did. More than 4 KiB is cut off.
    #[serde(default)]
    pub error: Option<String>,
}

/// What a runner uploads for a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum UploadKind {
    /// The output of the guest agent: the run's system log. Positions are bytes.
    Output,
    /// The run's network log, JSON lines. Positions are bytes.
    Network,
}

/// A piece of a log. It is taken once, whatever is sent twice: a piece that is there already is left out, one that
/// does not begin where the last ended is refused with the position that is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Upload {
    /// Who.
    pub runner_id: RunnerId,
    /// Which claim.
    pub epoch: Epoch,
    /// Of which log.
    pub kind: UploadKind,
    /// Position of the text's first byte in the log of this claim.
    pub start: u64,
    /// At most 256 KiB.
    #[cfg_attr(feature = "openapi", schema(max_length = 262144))]
    pub text: String,
}

/// Where the next piece has to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Uploaded {
    /// The position.
    pub next: u64,
}

/// The runner's proxy asks for a run's secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct FirewallAuth {
    /// The run.
    pub run_id: RunId,
    /// Who asks.
    pub runner_id: RunnerId,
    /// Which claim.
    pub epoch: Epoch,
}

/// The run's secrets. Keep them in memory only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct FirewallSecrets {
    /// With their values.
    pub secrets: Vec<Secret>,
}

/// A runner, as clients see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct RunnerInfo {
    /// What it last said of itself; of its leases and sessions only the numbers below.
    pub heartbeat: Heartbeat,
    /// When that was.
    pub seen_at: UnixMillis,
}

/// The fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Fleet {
    /// Runners that have been heard of lately.
    pub runners: Vec<RunnerInfo>,
    /// Runs that wait, by group and profile.
    pub queued: Vec<QueueDepth>,
}

/// How many runs wait.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct QueueDepth {
    /// Of this group.
    pub group: GroupName,
    /// For this profile.
    pub profile: ProfileName,
    /// So many.
    pub runs: u64,
}

/// The answer to a completion: the run as it is now.
pub type Completed = Run;
