//! Hearing of an answer the moment it appears, without a price at the end.
//!
//! inotify would do, but the kernel takes 10 to 20 ms to close an inotify descriptor (it waits for an SRCU grace
//! period), and the process's exit waits for that: half of the time a whole job may take. The older dnotify tells of
//! changes in a directory by a signal and costs nothing to end (8 µs measured where inotify took 18 ms). Where a
//! kernel has no dnotify, inotify it is.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use host::fs::Dir;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::queue::Watch;

/// `fcntl(2)`: a file was created in, or moved into, the directory. (linux/fcntl.h; the libc crate lacks them.)
const DN_CREATE: libc::c_int = 0x0000_0004;
/// A file was renamed within the directory.
const DN_RENAME: libc::c_int = 0x0000_0010;
/// Tell more than once.
const DN_MULTISHOT: libc::c_int = libc::c_int::MIN;

/// Wakes when a name appears in a directory. What woke it is not said: look, then wait again.
#[derive(Debug)]
pub(super) struct Notice(How);

#[derive(Debug)]
enum How {
    /// dnotify: SIGIO as long as the directory is held open.
    Signal {
        arrived: Signal,
        _dir: Dir,
    },
    Inotify(AsyncFd<Inotify>),
}

/// inotify, as tokio wants it.
#[derive(Debug)]
struct Inotify(Watch);

impl AsRawFd for Inotify {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Notice {
    /// Begins to listen: whatever appears after this is told. Needs a runtime. `dir` must not share its open file with
    /// another descriptor: closing that would end dnotify.
    pub(super) fn new(dir: Dir) -> io::Result<Self> {
        // The handler first: SIGIO without one ends the process.
        let arrived = signal(SignalKind::io())?;
        let events = DN_CREATE | DN_RENAME | DN_MULTISHOT;
        // SAFETY: F_NOTIFY takes an integer and touches no memory of ours.
        let listening = unsafe { libc::fcntl(dir.as_fd().as_raw_fd(), libc::F_NOTIFY, events) };
        if listening == 0 {
            return Ok(Self(How::Signal { arrived, _dir: dir }));
        }
        let mut watch = Watch::new()?;
        watch.add(&dir)?;
        // SAFETY: the inotify descriptor is open, and the `AsyncFd` owns it, until both are dropped together.
        let watch = unsafe { AsyncFd::register_with_interest(Inotify(watch), Interest::READABLE) }?;
        Ok(Self(How::Inotify(watch)))
    }

    /// Waits until something has appeared since the last call.
    pub(super) async fn arrived(&mut self) -> io::Result<()> {
        match &mut self.0 {
            How::Signal { arrived, .. } => {
                arrived.recv().await;
            }
            How::Inotify(watch) => {
                let mut guard = watch.readable_mut().await?;
                guard.get_inner_mut().0.changes()?;
                guard.clear_ready();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_file_renamed_within_or_into_the_directory_is_heard_of() {
        let temp = tempfile::tempdir().unwrap();
        let inner = temp.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let mut notice = Notice::new(Dir::open(&inner).unwrap()).unwrap();
        let mut heard = async || {
            let arrived = tokio::time::timeout(Duration::from_secs(10), notice.arrived());
            arrived.await.expect("to hear of it").unwrap();
        };
        std::fs::write(inner.join("a"), "").unwrap();
        heard().await;
        std::fs::rename(inner.join("a"), inner.join("b")).unwrap();
        heard().await;
        std::fs::write(temp.path().join("c"), "").unwrap();
        std::fs::rename(temp.path().join("c"), inner.join("c")).unwrap();
        heard().await;
    }
}
