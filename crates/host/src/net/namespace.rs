//! Network namespaces without names: a descriptor is all that keeps one.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::thread::LinkNameSpaceType;

/// The calling process's namespace.
pub(crate) fn current() -> io::Result<OwnedFd> {
    // The thread's: a process's other threads may be elsewhere, as they are in tests.
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}

/// Moves the calling thread into a new namespace and returns it.
pub(crate) fn enter_new() -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers, and changes nothing that memory safety depends on.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(io::Error::last_os_error());
    }
    current()
}

/// Moves the calling thread into a namespace.
pub(crate) fn enter(namespace: impl AsFd) -> io::Result<()> {
    let kind = Some(LinkNameSpaceType::Network);
    rustix::thread::move_into_link_name_space(namespace.as_fd(), kind)?;
    Ok(())
}
