//! What clients say: they hold an API key.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    AgentType, Epoch, GroupName, ProfileName, RunId, RunnerId, RunnerName, SecretName, SessionId,
    UnixMillis,
};

/// What becomes of a run whose runner stops renewing its lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum OnRunnerLost {
    /// It is answered with "runner lost": it may have had effects that must not happen twice.
    #[default]
    Answer,
    /// It is queued again, until it has been claimed this many times.
    #[serde(rename_all = "camelCase")]
    Retry {
        /// Most claims in all, 2 to 10.
        #[cfg_attr(feature = "openapi", schema(minimum = 2, maximum = 10))]
        max_attempts: u8,
    },
}

/// A secret on its way in. The server keeps it encrypted; no guest ever sees it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Secret {
    /// Its name.
    pub name: SecretName,
    /// Its value: 4 to 16384 bytes without line breaks or NUL.
    #[cfg_attr(feature = "openapi", schema(min_length = 4, max_length = 16384))]
    pub value: String,
    /// Hosts it may go to; none: wherever an allowing rule names it.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(max_items = 100))]
    pub hosts: Vec<String>,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secret({})", self.name)
    }
}

fn default_agent_type() -> AgentType {
    #[expect(clippy::expect_used, reason = "a constant, parsed by a test")]
    "claude-code".parse().expect("a valid agent type")
}

fn default_working_dir() -> String {
    "/home/user/workspace".to_owned()
}

/// A run to make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CreateRun {
    /// Whose runners take it.
    pub group: GroupName,
    /// What VM it runs in.
    pub profile: ProfileName,
    /// What the agent is to do: 1 byte to 4 MiB, no NUL.
    #[cfg_attr(feature = "openapi", schema(min_length = 1, max_length = 4194304))]
    pub prompt: String,
    /// Absolute path in the guest without `..` and control characters; made if missing.
    #[serde(default = "default_working_dir")]
    #[cfg_attr(
        feature = "openapi",
        schema(
            max_length = 1000,
            pattern = r"^(/(?!\.\.(/|$))[^/\x00-\x1f\x7f-\x9f]*)+$"
        )
    )]
    pub working_dir: String,
    /// Which agent CLI.
    #[serde(default = "default_agent_type")]
    pub cli_agent_type: AgentType,
    /// The agent's environment beside what the runner sets.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Runs of one session may meet the same VM again.
    #[serde(default)]
    pub session_id: Option<SessionId>,
    /// Killed after this many seconds; the runner's own limit stands above it.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 604800))]
    pub timeout_secs: Option<u64>,
    /// What it may reach (`docs/network.md`).
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<crate::policy::Policy>))]
    pub policy: Option<serde_json::Value>,
    /// Its secrets, at most 64.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(max_items = 64))]
    pub secrets: Vec<Secret>,
    /// What if its runner is lost.
    #[serde(default)]
    pub on_runner_lost: OnRunnerLost,
    /// Whether the agent can be told more while it works (`POST /api/runs/{run}/input`).
    // Left out where it is not so: the same request made by an older client has the same fingerprint.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accepts_input: bool,
}

/// Where a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum RunState {
    /// It waits for a runner.
    Queued,
    /// A runner has it.
    Running,
    /// It has been answered, for good.
    Done,
}

/// Who or what ended a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum EndReason {
    /// Its runner completed it.
    Completed,
    /// Somebody cancelled it before a runner had it, or its runner was lost while it was to be cancelled.
    Cancelled,
    /// Its runner stopped renewing the lease.
    RunnerLost,
}

/// A run's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct RunResult {
    /// The agent's exit code; 137 when cancelled, 124 when timed out, 1 when the runner failed.
    pub exit_code: i32,
    /// What happened, when something did.
    pub error: Option<String>,
    /// What ended it.
    pub reason: EndReason,
    /// When.
    pub at: UnixMillis,
}

/// Who has a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Holder {
    /// The runner's life.
    pub runner_id: RunnerId,
    /// Its name, if it said one.
    pub runner_name: Option<RunnerName>,
    /// When it claimed the run.
    pub claimed_at: UnixMillis,
}

/// A run, as clients see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Run {
    /// Its id.
    pub run_id: RunId,
    /// Its group.
    pub group: GroupName,
    /// Its profile.
    pub profile: ProfileName,
    /// Where it is.
    pub state: RunState,
    /// Its session.
    pub session_id: Option<SessionId>,
    /// The beginning of its prompt.
    pub title: String,
    /// When it was accepted.
    pub created_at: UnixMillis,
    /// How often it has been claimed.
    pub epoch: Epoch,
    /// Who has it, or had it last.
    pub holder: Option<Holder>,
    /// Somebody wants it ended.
    pub cancel_requested: bool,
    /// Whether it can be given input.
    #[serde(default)]
    pub accepts_input: bool,
    /// How many inputs it was given.
    #[serde(default)]
    pub inputs: u64,
    /// Its answer, when it is done.
    pub result: Option<RunResult>,
}

/// Some of the runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct RunPage {
    /// Newest first.
    pub runs: Vec<Run>,
    /// What to send as `cursor` for the ones after these; none when these were the last.
    pub next: Option<String>,
}

/// Something for the agent to read while it works.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Input {
    /// The text: 1 byte to 64 KiB.
    #[cfg_attr(feature = "openapi", schema(min_length = 1, max_length = 65536))]
    pub text: String,
    /// Which of the run's inputs it is to be, from 1: sent again under its number it is not taken again, whatever the text.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 1000))]
    pub sequence: Option<u64>,
}

/// Where an input stands among a run's inputs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct InputAccepted {
    /// Its number; later ones have larger numbers.
    pub sequence: u64,
}

/// A group's policy: what none of its runs may lift.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct GroupPolicy {
    /// The group.
    pub group: GroupName,
    /// As in `docs/network.md`, in its canonical form.
    #[cfg_attr(feature = "openapi", schema(value_type = crate::policy::Policy))]
    pub policy: serde_json::Value,
    /// Changes with every change.
    pub revision: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_needs_three_fields_and_takes_no_unknown_one() {
        let text = r#"{"group":"vm0/demo","profile":"vm0/small","prompt":"true"}"#;
        let run: CreateRun = serde_json::from_str(text).unwrap();
        assert_eq!(run.cli_agent_type.as_str(), "claude-code");
        assert_eq!(run.on_runner_lost, OnRunnerLost::Answer);
        let unknown = text.replacen('{', r#"{"surprise":1,"#, 1);
        assert!(serde_json::from_str::<CreateRun>(&unknown).is_err());
    }

    #[test]
    fn no_debug_text_holds_a_value() {
        let secret = Secret {
            name: "A".parse().unwrap(),
            value: "hunter22".to_owned(),
            hosts: Vec::new(),
        };
        assert!(!format!("{secret:?}").contains("hunter22"));
    }
}
