//! Host-to-guest control protocol: messages, framing, host client, guest server.
//!
//! One byte stream per VM life carries many operations at once. This crate knows nothing of VMs or engines:
//! it speaks over any `AsyncRead + AsyncWrite`, and the guest's end leaves all work on the operating system to an
//! implementation of [`server::Os`].

mod client;
mod link;
mod outbox;
pub mod server;
mod types;
mod watched;
mod wire;

pub use client::{Client, Output, OutputChunk, Session};
pub use types::{
    CloseReason, ControlError, ExecSpec, ExitReport, ExitStatus, FileSpec, GuestStats, MountSource,
    PtySize, Stream, UserSpec, Wake,
};
pub use wire::VERSION as PROTOCOL_VERSION;
