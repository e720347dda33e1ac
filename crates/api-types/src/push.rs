//! What goes over the WebSocket between server and runner: JSON, one message a text frame. Everything here is a hint
//! that saves waiting: whoever misses one finds out by poll and heartbeat.

use serde::{Deserialize, Serialize};

use crate::runner::Offer;
use crate::{Epoch, RunId};

/// From the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "camelCase",
    rename_all_fields = "camelCase"
)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum ToRunner {
    /// A run waits.
    Job(Offer),
    /// Somebody wants a run of yours ended.
    Cancel {
        /// The run.
        run_id: RunId,
        /// Which claim.
        epoch: Epoch,
    },
    /// Something for the agent of a run of yours to read.
    Input {
        /// The run.
        run_id: RunId,
        /// Which claim.
        epoch: Epoch,
        /// Its number; one that was seen is sent again after a reconnect.
        sequence: u64,
        /// The text.
        text: String,
    },
    /// The policy of a run of yours is now this one.
    Policy {
        /// The run.
        run_id: RunId,
        /// Which claim.
        epoch: Epoch,
        /// The run's own policy.
        #[cfg_attr(feature = "openapi", schema(value_type = Object))]
        policy: serde_json::Value,
    },
    /// An operator wants a command run in the VM of a run.
    ExecStart {
        /// Of this exec, made by the server.
        exec_id: String,
        /// The run.
        run_id: RunId,
        /// Which claim.
        epoch: Epoch,
        /// Program and arguments.
        argv: Vec<String>,
        /// With a terminal of this size, columns and rows.
        pty: Option<(u16, u16)>,
    },
    /// Bytes for its standard input, in base64.
    ExecInput {
        /// Which.
        exec_id: String,
        /// The bytes; none: no more will come.
        data: Option<String>,
    },
    /// Its terminal has another size.
    ExecResize {
        /// Which.
        exec_id: String,
        /// Columns and rows.
        size: (u16, u16),
    },
    /// Whoever wanted it is gone: end it.
    ExecEnd {
        /// Which.
        exec_id: String,
    },
}

/// From the runner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "camelCase",
    rename_all_fields = "camelCase"
)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum FromRunner {
    /// Bytes of an exec, in base64.
    ExecOutput {
        /// Which.
        exec_id: String,
        /// Of standard error rather than standard output.
        #[serde(default)]
        stderr: bool,
        /// The bytes.
        data: String,
    },
    /// It has ended, or could not be started.
    ExecExit {
        /// Which.
        exec_id: String,
        /// Its exit code, if it ran.
        exit_code: Option<i32>,
        /// Why it did not.
        error: Option<String>,
    },
}
