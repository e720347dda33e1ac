//! Host-to-guest control protocol: messages, framing, host client, guest server.
//!
//! One byte stream per VM life carries many operations at once. This crate knows nothing of VMs or engines:
//! it speaks over any `AsyncRead + AsyncWrite`.

mod client;
mod types;

pub use client::{Client, Output, OutputChunk, Session};
pub use types::{
    CloseReason, ControlError, ExecSpec, ExitReport, ExitStatus, FileSpec, GuestStats, MountSource,
    PtySize, Stream, UserSpec, Wake,
};
