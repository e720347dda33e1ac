//! What the guest server asks of the operating system.

use std::fs::File;
use std::future::Future;
use std::os::fd::OwnedFd;

use crate::types::{ExecSpec, ExitReport, ExitStatus, FileSpec, GuestStats, MountSource, Wake};

/// A refused or failed operation, as the host will read it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct OsError {
    /// errno where there was one.
    pub errno: Option<i32>,
    /// What was attempted and why it failed.
    pub message: String,
}

impl OsError {
    /// The failure of `what`.
    pub fn new(what: impl std::fmt::Display, error: impl Into<std::io::Error>) -> Self {
        let error = error.into();
        Self {
            errno: error.raw_os_error(),
            message: format!("{what}: {error}"),
        }
    }
}

/// Where a process's input and output go. All descriptors are non-blocking.
#[derive(Debug)]
pub enum Stdio {
    /// Pipes; no `stdin` means `/dev/null`.
    Pipes {
        /// Write end.
        stdin: Option<OwnedFd>,
        /// Read end.
        stdout: OwnedFd,
        /// Read end.
        stderr: OwnedFd,
    },
    /// The master of its terminal.
    Terminal(OwnedFd),
}

/// A process that was just started.
#[derive(Debug)]
pub struct Spawned<P> {
    /// Process id.
    pub pid: u32,
    /// Its input and output.
    pub stdio: Stdio,
    /// The handle on it.
    pub process: P,
}

/// A started process and everything it starts.
pub trait Process: Send + Sync + 'static {
    /// Signals the process group.
    fn signal(&self, signal: i32) -> Result<(), OsError>;
    /// Kills the process and everything it has started.
    fn kill(&self);
    /// Waits until the process itself has ended.
    fn wait(&self) -> impl Future<Output = ExitStatus> + Send;
    /// What is known at its end. Called once, after `wait`.
    fn report(&self, status: ExitStatus) -> ExitReport;
    /// Kills what the process has left running and waits until it is gone.
    fn kill_rest(&self) -> impl Future<Output = ()> + Send;
}

/// The guest's operating system.
pub trait Os: Send + Sync + 'static {
    /// A process.
    type Process: Process;
    /// A file being written that is not in its place yet; dropping it removes it.
    type NewFile: std::io::Write + Send + 'static;

    /// Sets clock and entropy; an error means that the guest must not run anything.
    fn wake(&self, wake: &Wake) -> Result<(), OsError>;
    /// Builds the agent's root.
    fn mount(&self, source: MountSource) -> Result<(), OsError>;
    /// Kills every agent process and drops the agent's root.
    fn unmount(&self) -> impl Future<Output = Result<(), OsError>> + Send;
    /// Kills every process but the server's own and waits until they are gone.
    fn kill_all(&self) -> impl Future<Output = Result<(), OsError>> + Send;
    /// Starts a process. `spec.wake` and `spec.timeout` are the server's business.
    fn spawn(&self, spec: &ExecSpec) -> Result<Spawned<Self::Process>, OsError>;
    /// Figures.
    fn stats(&self) -> Result<GuestStats, OsError>;
    /// Opens a regular file for reading.
    fn open(&self, path: &str) -> Result<File, OsError>;
    /// Begins a file.
    fn create(&self, spec: &FileSpec) -> Result<Self::NewFile, OsError>;
    /// Puts a written file into its place.
    fn commit(&self, file: Self::NewFile) -> Result<(), OsError>;
    /// Syncs and powers off; called when the host has been told.
    fn shutdown(&self);
}
