//! The daemon's Unix socket: how `exec`, `cp`, `kill` and friends reach a running job's VM.
//!
//! One connection is one operation. Frames are length-delimited postcard. The socket is
//! `runners/<name>/instances/<instance>/control.sock`, mode 0600, and the peer must be the home's owner or root.

pub(crate) mod client;
pub(crate) mod protocol;
pub(crate) mod server;
mod sessions;
mod source;

/// Its name in the instance's directory.
pub(crate) const SOCKET: &str = "control.sock";

#[cfg(test)]
mod test_guest;
#[cfg(test)]
mod tests;
