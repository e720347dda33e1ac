//! Reading a job's log while it grows.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use host::fs::{Access, Dir};
use inotify::{EventMask, Inotify, WatchMask};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Most bytes read at once: what a person is shown stays responsive.
const PIECE: usize = 64 << 10;

/// A log file, there already or not yet, read from its beginning.
#[derive(Debug)]
pub(crate) struct Tail {
    logs: Dir,
    name: OsString,
    file: Option<File>,
    changes: AsyncFd<Changes>,
    /// Its writer has closed it: the job has ended, or its runner has.
    closed: bool,
}

/// inotify, as tokio wants it.
#[derive(Debug)]
struct Changes(Inotify);

impl AsRawFd for Changes {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Tail {
    /// Watches for a log; of its path only the name counts. Needs a runtime.
    pub(crate) fn open(logs: Dir, log: &Path) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let path = format!(
            "/proc/self/fd/{}",
            std::os::fd::AsFd::as_fd(&logs).as_raw_fd()
        );
        inotify
            .watches()
            .add(path, WatchMask::CREATE | WatchMask::MOVED_TO)?;
        let mut tail = Self {
            logs,
            name: log.file_name().unwrap_or_default().to_owned(),
            file: None,
            // SAFETY: the inotify descriptor is open, and the `AsyncFd` owns it, until both are dropped together.
            changes: unsafe {
                AsyncFd::register_with_interest(Changes(inotify), Interest::READABLE)
            }?,
            closed: false,
        };
        tail.open_file()?;
        Ok(tail)
    }

    /// Opens the log if it is there by now; the watch comes first, so that nothing falls between.
    fn open_file(&mut self) -> io::Result<()> {
        if self.file.is_some() {
            return Ok(());
        }
        match self.logs.open_file(&self.name, Access::Read) {
            Ok(file) => {
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                self.changes
                    .get_ref()
                    .0
                    .watches()
                    .add(path, WatchMask::MODIFY | WatchMask::CLOSE_WRITE)?;
                self.file = Some(file);
                Ok(())
            }
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Looks whether the log has come to be, for who wants to know its end only.
    pub(crate) fn look(&mut self) -> io::Result<()> {
        self.open_file()
    }

    /// Whether the log is there.
    pub(crate) fn exists(&self) -> bool {
        self.file.is_some()
    }

    /// Whether its writer has closed it. Nothing follows then what [`Tail::read`] gives.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// What has been written since the last call, at most 64 KiB; empty when there is nothing yet.
    pub(crate) fn read(&mut self) -> io::Result<Vec<u8>> {
        self.open_file()?;
        let Some(file) = &mut self.file else {
            return Ok(Vec::new());
        };
        let mut piece = vec![0; PIECE];
        let length = file.read(&mut piece)?;
        piece.truncate(length);
        Ok(piece)
    }

    /// Waits until there may be more to read. Nothing is lost if it is dropped.
    pub(crate) async fn changed(&mut self) -> io::Result<()> {
        let mut guard = self.changes.readable_mut().await?;
        let mut buffer = [0_u8; 4096];
        loop {
            let events = match guard.get_inner_mut().0.read_events(&mut buffer) {
                Ok(events) => events,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    guard.clear_ready();
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for event in events {
                if event.mask.contains(EventMask::CLOSE_WRITE) {
                    self.closed = true;
                }
            }
        }
    }
}
