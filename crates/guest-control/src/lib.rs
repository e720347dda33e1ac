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

/// Port on which the guest's end listens where the machine has a vsock device instead of a virtio-serial port.
pub const VSOCK_PORT: u32 = 1024;

/// Word of the kernel's command line that tells the guest's end to listen there.
pub const VSOCK_WORD: &str = "vm0.control=vsock";
