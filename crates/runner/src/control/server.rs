//! The daemon's end of the control socket.

use async_trait::async_trait;
use guest_control::Client;

use super::protocol::{Failure, RunInfo};
use crate::names::RunId;

/// What the server asks the daemon. Implementations answer from the daemon's own state and must not block.
#[async_trait]
pub(crate) trait RunLookup: Send + Sync + 'static {
    /// The runs that are active now, oldest first.
    async fn runs(&self) -> Vec<RunInfo>;
    /// The control channel of a run's VM.
    async fn client(&self, run: RunId) -> Result<Client, Failure>;
    /// Cancels a run; returns when that is decided, not when the run has ended.
    async fn cancel(&self, run: RunId) -> Result<(), Failure>;
    /// What `status.json` says now.
    async fn status(&self) -> String;
}
