//! What the guest agent says: it holds its claim's sandbox token. The guest is untrusted, so nothing here decides
//! anything about a run.

use serde::{Deserialize, Serialize};

use crate::RunId;

/// `VM0_API_URL` + this + `/heartbeat`, `/events`, `/telemetry`, `/checkpoints`, `/complete`.
pub const WEBHOOKS: &str = "/api/webhooks/agent";
/// Most events of one [`Events`].
pub const MAX_EVENTS: usize = 1000;

/// The agent is alive. The first one proves that the API can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AgentHeartbeat {
    /// The run.
    pub run_id: RunId,
}

/// The answer to a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Alive {
    /// Somebody wants the run ended.
    pub cancel_requested: bool,
}

/// Events of the agent CLI, in order. Each is an object with the member `sequenceNumber`, from 0 and without gaps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Events {
    /// The run.
    pub run_id: RunId,
    /// At most [`MAX_EVENTS`], 512 KiB in all.
    #[cfg_attr(feature = "openapi", schema(value_type = Vec<AgentEvent>, max_items = 1000))]
    pub events: Vec<serde_json::Map<String, serde_json::Value>>,
}

/// An event of the agent CLI, for the description of the API: whatever the CLI says, and its number.
#[cfg(feature = "openapi")]
#[derive(Debug, utoipa::ToSchema)]
#[schema(rename_all = "camelCase")]
pub struct AgentEvent {
    /// One more than that of the event before it.
    pub sequence_number: u64,
}

/// Where the next has to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Accepted {
    /// Position after everything that is there now.
    pub next: u64,
}

/// What the agent measured and logged since the last time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Telemetry {
    /// The run.
    pub run_id: RunId,
    /// Position of the first byte of `systemLog`.
    #[serde(default)]
    pub system_log_start: u64,
    /// A piece of the system log, masked; at most 256 KiB.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(max_length = 262144))]
    pub system_log: String,
    /// Number of the first of `metrics`.
    #[serde(default)]
    pub metrics_start: u64,
    /// Samples, each an object.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(value_type = Vec<Object>, max_items = 1000))]
    pub metrics: Vec<serde_json::Map<String, serde_json::Value>>,
}

/// Where each part of the telemetry has to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TelemetryAccepted {
    /// Of the system log.
    pub system_log_next: u64,
    /// Of the metrics.
    pub metrics_next: u64,
}

/// The CLI's session, for a later run to go on from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Checkpoint {
    /// The run.
    pub run_id: RunId,
    /// The CLI's own id of the session: letters, digits, dots, underscores and hyphens, at most 128.
    #[cfg_attr(
        feature = "openapi",
        schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    )]
    pub cli_agent_session_id: crate::SessionId,
    /// Its history, JSON lines; at most 32 MiB.
    pub cli_agent_session_history: String,
}

/// The answer to a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CheckpointAccepted {
    /// Its id.
    pub checkpoint_id: String,
}

/// The agent believes to be done. Advisory: only the runner completes a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AgentComplete {
    /// The run.
    pub run_id: RunId,
    /// The CLI's exit code.
    pub exit_code: i32,
    /// What happened, when something did.
    #[serde(default)]
    pub error: Option<String>,
}
