//! Firecracker's programs and its guest kernel on this host, as `runner setup` fetches them.
//!
//! `pins`: which files, each by its SHA-256; `source`: where they come from; `download`: one file over HTTP, resumed and
//! never trusted before it is whole; `archive`: the two programs out of the release's archive; `install`: all of it,
//! under a lock, named when complete, and verified again before it is used.

mod archive;
mod download;
mod error;
mod install;
mod pins;
mod source;

pub(crate) use error::FirecrackerError;
pub(crate) use install::{Installed, ensure, find};
pub(crate) use pins::Pins;
pub(crate) use source::Source;
