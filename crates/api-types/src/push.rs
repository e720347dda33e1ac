//! What goes over the WebSocket between server and runner: JSON, one message a text frame. Everything here is a hint
//! that saves waiting: whoever misses one finds out by poll and heartbeat.

use serde::{Deserialize, Serialize};

use crate::runner::{LeaseRef, Offer};
use crate::{Epoch, ProfileName, RunId, SessionId};

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
    /// A run of yours has another policy, or more inputs, or is to be ended: renew its lease and see.
    Look(LeaseRef),
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
        /// Id of the operator's API key.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
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
    /// It could start a run of these profiles now: one [`ToRunner::Job`] follows when there is one.
    Ready {
        /// Profiles that it could start now.
        profiles: Vec<ProfileName>,
        /// Sessions whose VM it keeps.
        #[serde(default)]
        held_sessions: Vec<SessionId>,
    },
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
