//! The host's end.

use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::types::{
    CloseReason, ControlError, ExecSpec, ExitReport, FileSpec, GuestStats, MountSource, PtySize,
    Stream, Wake,
};

/// A handle on one VM's control channel. Clones share the channel.
#[derive(Clone, Debug)]
pub struct Client {}

/// A running (or ended) process in the guest, kept with a 1 MiB ring of its output. Clones share it.
#[derive(Clone, Debug)]
pub struct Session {}

/// One reader attached to a session's output.
#[derive(Debug)]
pub struct Output {}

/// A piece of output.
#[derive(Clone, Debug)]
pub struct OutputChunk {
    /// Where it came from.
    pub stream: Stream,
    /// Byte offset of `data` in the session's combined output; a jump means the ring overwrote what was between.
    pub offset: u64,
    /// The bytes.
    pub data: Bytes,
}

impl Client {
    /// Shakes hands over `stream` (random nonce) and starts the channel's task on the current runtime.
    pub async fn connect<S>(stream: S, limit: Duration) -> Result<Client, ControlError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let _ = (stream, limit);
        Err(ControlError::Closed)
    }
    /// Round trip.
    pub async fn ping(&self) -> Result<Duration, ControlError> {
        Err(ControlError::Closed)
    }
    /// Starts a process.
    pub async fn exec(&self, spec: ExecSpec) -> Result<Session, ControlError> {
        let _ = spec;
        Err(ControlError::Closed)
    }
    /// Sets clock and entropy without starting anything.
    pub async fn wake(&self, wake: Wake) -> Result<(), ControlError> {
        let _ = wake;
        Err(ControlError::Closed)
    }
    /// Builds the agent's root on `source`.
    pub async fn mount(&self, source: MountSource) -> Result<(), ControlError> {
        let _ = source;
        Err(ControlError::Closed)
    }
    /// Kills every agent process and drops the agent's root.
    pub async fn unmount(&self) -> Result<(), ControlError> {
        Err(ControlError::Closed)
    }
    /// Kills every process but the control server's own; the root stays (parking).
    pub async fn kill_all(&self) -> Result<(), ControlError> {
        Err(ControlError::Closed)
    }
    /// After it returned both decoders are empty and stay so until the next `connect`: the moment to snapshot.
    pub async fn quiesce(self) -> Result<(), ControlError> {
        Err(ControlError::Closed)
    }
    /// Asks the guest to sync and power off.
    pub async fn shutdown(&self) -> Result<(), ControlError> {
        Err(ControlError::Closed)
    }
    /// Figures about the guest.
    pub async fn stats(&self) -> Result<GuestStats, ControlError> {
        Err(ControlError::Closed)
    }
    /// Streams a regular guest file to `sink`; returns its length.
    pub async fn read_file<W: AsyncWrite + Unpin>(
        &self,
        path: &str,
        sink: W,
    ) -> Result<u64, ControlError> {
        let _ = (path, sink);
        Err(ControlError::Closed)
    }
    /// Streams `source` to a guest file, which appears whole by rename.
    pub async fn write_file<R: AsyncRead + Unpin>(
        &self,
        spec: FileSpec,
        source: R,
    ) -> Result<u64, ControlError> {
        let _ = (spec, source);
        Err(ControlError::Closed)
    }
    /// Waits until the channel has ended and says why.
    pub async fn closed(&self) -> CloseReason {
        CloseReason::Local
    }
}

impl Session {
    /// Process id in the guest.
    pub fn pid(&self) -> u32 {
        0
    }
    /// Attaches a reader at `offset` (0: from the oldest byte kept). A lossless reader holds the guest back
    /// (credit) instead of losing bytes; at most one reader of a session is lossless.
    pub fn attach(&self, offset: u64, lossless: bool) -> Output {
        let _ = (offset, lossless);
        Output {}
    }
    /// Sends stdin; waits for credit.
    pub async fn write_stdin(&self, data: Bytes) -> Result<(), ControlError> {
        let _ = data;
        Err(ControlError::Closed)
    }
    /// End of stdin.
    pub async fn close_stdin(&self) -> Result<(), ControlError> {
        Err(ControlError::Closed)
    }
    /// Signals the process's group.
    pub async fn signal(&self, signal: i32) -> Result<(), ControlError> {
        let _ = signal;
        Err(ControlError::Closed)
    }
    /// Kills the session's whole cgroup.
    pub async fn kill(&self) -> Result<(), ControlError> {
        Err(ControlError::Closed)
    }
    /// New terminal size.
    pub async fn resize(&self, size: PtySize) -> Result<(), ControlError> {
        let _ = size;
        Err(ControlError::Closed)
    }
    /// Waits for the end, without consuming output. All output is in the ring before this returns.
    pub async fn wait(&self) -> Result<ExitReport, ControlError> {
        Err(ControlError::Closed)
    }
}

impl Output {
    /// Next piece; `None` at the end of the session's output.
    pub async fn next(&mut self) -> Option<OutputChunk> {
        None
    }
}
