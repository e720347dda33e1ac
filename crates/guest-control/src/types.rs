//! What both ends of the control channel talk about.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Time and entropy handed to a guest that has just been restored or resumed.
///
/// A clone's clock lags by its snapshot's age and its random generator repeats its siblings' output until both
/// are set, so every claim carries one of these, in the same message as the process it starts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Wake {
    /// Host's real time, nanoseconds since the Unix epoch.
    pub realtime_ns: u64,
    /// Fresh host entropy, credited and reseeded into the guest's generator. Fails closed.
    pub entropy: [u8; 32],
}

/// Whom a guest process runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum UserSpec {
    /// uid 0.
    Root,
    /// The image's `user` (uid 1000), the agent's own account.
    #[default]
    User,
}

/// Terminal size in character cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PtySize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// A process to start in the guest. Never goes through a shell unless `argv` names one.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ExecSpec {
    /// Program (looked up in the environment's `PATH`) and arguments. Not empty.
    pub argv: Vec<Vec<u8>>,
    /// The whole environment beside HOME, USER, SHELL, PATH, LANG and `/etc/environment`, over which it wins.
    pub env: Vec<(String, String)>,
    /// Working directory, created with the user's ownership when missing. `None`: the user's home.
    pub cwd: Option<String>,
    /// Whom it runs as.
    pub user: UserSpec,
    /// Whether the host will send stdin; otherwise it is /dev/null.
    pub stdin: bool,
    /// Run under a pseudo-terminal of this size; stderr is then part of stdout.
    pub pty: Option<PtySize>,
    /// Killed (whole cgroup) after this long; the exit report says so.
    pub timeout: Option<Duration>,
    /// Applied before the process starts.
    pub wake: Option<Wake>,
    /// Whether everything the process started is killed when it exits (the job itself), or left (an `exec`).
    pub kill_group_on_exit: bool,
}

/// Which output stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Standard output (and everything, under a PTY).
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a guest process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// exit(n).
    Exited(i32),
    /// Killed by this signal.
    Signaled(i32),
    /// Its timeout ran out and its group was killed.
    TimedOut,
}

/// Everything the host learns when a process ended, so that a result can say why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitReport {
    /// How it ended.
    pub status: ExitStatus,
    /// Processes of its cgroup that the kernel killed for want of memory.
    pub oom_kills: u32,
    /// Times a fork was refused because the cgroup's process limit was reached.
    pub pids_limit_hits: u32,
    /// Bytes still free on the VM's writable disk.
    pub disk_free_bytes: u64,
}

/// What the writable layer of the guest's root is kept on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountSource {
    /// A tmpfs: warm-up writes, dropped by `unmount`.
    Tmpfs,
    /// The VM's own fresh ext4 disk.
    Disk,
}

/// Where and how a file is written in the guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileSpec {
    /// Absolute path, resolved inside the agent's root.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub user: UserSpec,
}

/// A few figures about the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStats {
    /// Kilobytes.
    pub mem_total_kb: u64,
    /// Kilobytes.
    pub mem_available_kb: u64,
    /// Bytes.
    pub disk_free_bytes: u64,
    /// Processes in the guest.
    pub processes: u32,
}

/// Why a control channel ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The host dropped it.
    Local,
    /// End of file or reset from the guest's side.
    GuestGone,
    /// The guest sent bytes that are not the protocol.
    Protocol(String),
}

/// What can go wrong on the control channel.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ControlError {
    /// The stream ended.
    #[error("the guest closed its control channel")]
    Closed,
    /// Bytes that are not the protocol.
    #[error("the guest broke the control protocol: {0}")]
    Protocol(String),
    /// No answer in time.
    #[error("the guest did not answer {operation} within {limit:?}")]
    Timeout {
        /// What was asked.
        operation: &'static str,
        /// How long we waited.
        limit: Duration,
    },
    /// The host's own side of a file transfer failed.
    #[error("the host could not {operation}: {message}")]
    Local {
        /// What was attempted.
        operation: &'static str,
        /// errno on the host where there was one.
        errno: Option<i32>,
        /// Its words.
        message: String,
    },
    /// The guest refused or failed the operation.
    #[error("the guest could not {operation}: {message}")]
    Guest {
        /// What was asked.
        operation: &'static str,
        /// errno in the guest where there was one, for exit codes such as 126/127.
        errno: Option<i32>,
        /// The guest's words, control characters escaped.
        message: String,
    },
}
