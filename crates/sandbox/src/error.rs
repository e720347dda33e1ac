//! What can go wrong with a sandbox.

use std::path::PathBuf;
use std::time::Duration;

/// Errors of engines, for the person who reads them.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A file of the image or snapshot is missing or not what its manifest says.
    #[error("{path} cannot be used: {reason}; build the profile again with `runner build`")]
    BadImage {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The engine cannot run here.
    #[error("the {engine} engine cannot run on this host: {reason}")]
    Unavailable {
        /// Which engine.
        engine: &'static str,
        /// Why.
        reason: String,
    },
    /// A step did not finish in time.
    #[error("the VM did not get to `{step}` within {limit:?}{detail}")]
    Timeout {
        /// Which step.
        step: &'static str,
        /// The limit.
        limit: Duration,
        /// Tail of the console or empty.
        detail: String,
    },
    /// The VM's process ended.
    #[error("the VM ended: {0}")]
    Died(String),
    /// The engine's own control interface refused or broke.
    #[error("the VM engine failed at `{step}`: {message}")]
    Engine {
        /// What was asked.
        step: &'static str,
        /// Its answer.
        message: String,
    },
    /// The guest.
    #[error(transparent)]
    Control(#[from] guest_control::ControlError),
    /// The launcher.
    #[error(transparent)]
    Launcher(#[from] host::launcher::LauncherError),
    /// Input or output on the host.
    #[error("cannot {action}: {source}")]
    Io {
        /// What we were doing, with the path.
        action: String,
        /// The system's error.
        source: std::io::Error,
    },
}
