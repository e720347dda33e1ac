//! Hearing of changes in directories without asking again and again: inotify.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use host::fs::Dir;
use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};

/// One thing that happened in a watched directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Something appeared under this name.
    Appeared {
        /// Which watched directory, in the order they were added.
        dir: usize,
        /// The name.
        name: OsString,
        /// Whether its writer says it is whole: renamed into place, or closed after writing. Otherwise it has just
        /// been made (or linked).
        finished: bool,
    },
    /// Too much happened at once and some of it was not told: look everywhere.
    Overflow,
}

/// Watches directories for files that appear. Add a directory before looking into it, so that nothing falls between.
#[derive(Debug)]
pub(crate) struct Watch {
    inotify: Inotify,
    dirs: Vec<WatchDescriptor>,
}

impl Watch {
    /// Watches nothing yet.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            inotify: Inotify::init()?,
            dirs: Vec::new(),
        })
    }

    /// Watches one more directory; its number counts up from 0.
    pub(crate) fn add(&mut self, dir: &Dir) -> io::Result<usize> {
        // The descriptor names the directory we hold, whatever stands under its path by now.
        let path = format!("/proc/self/fd/{}", dir.as_fd().as_raw_fd());
        let mask = WatchMask::MOVED_TO | WatchMask::CLOSE_WRITE | WatchMask::CREATE;
        let descriptor = self.inotify.watches().add(path, mask)?;
        self.dirs.push(descriptor);
        Ok(self.dirs.len().saturating_sub(1))
    }

    /// What has happened since the last call; never blocks.
    pub(crate) fn changes(&mut self) -> io::Result<Vec<Change>> {
        let mut changes = Vec::new();
        let mut buffer = [0_u8; 16 << 10];
        loop {
            let events = match self.inotify.read_events(&mut buffer) {
                Ok(events) => events,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(changes),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for event in events {
                if event.mask.contains(EventMask::Q_OVERFLOW) {
                    changes.push(Change::Overflow);
                } else if let Some(name) = event.name
                    && let Some(dir) = self.dirs.iter().position(|wd| *wd == event.wd)
                {
                    changes.push(Change::Appeared {
                        dir,
                        name: name.to_owned(),
                        finished: !event.mask.contains(EventMask::CREATE),
                    });
                }
            }
        }
    }

    #[cfg(test)]
    /// Blocks until something happened or `milliseconds` have passed; says whether something did.
    pub(crate) fn wait(&self, milliseconds: u32) -> io::Result<bool> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let limit = Timespec {
            tv_sec: i64::from(milliseconds / 1000),
            tv_nsec: i64::from(milliseconds % 1000) * 1_000_000,
        };
        match poll(
            &mut [PollFd::new(&self.inotify, PollFlags::IN)],
            Some(&limit),
        ) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.inotify.as_raw_fd()
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}
