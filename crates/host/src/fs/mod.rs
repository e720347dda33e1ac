//! Files below one directory, and nothing outside it.
//!
//! [`Dir`] holds a directory open; every path given to it is relative and resolved by `openat2` with
//! `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`, so neither `..`, nor an absolute path, nor a symbolic link that somebody
//! planted leads out. [`Lock`] is a `flock`, and sockets are bound and reached below a directory whatever the length
//! of its path. Everything here is synchronous: these are small local operations.

mod dir;
mod error;
mod lock;
mod socket;
mod space;
mod tree;

pub use dir::{Access, Dir, Entry, EntryKind};
pub use error::FsError;
pub use lock::{Lock, LockKind, lock_holder};
pub use space::Space;
