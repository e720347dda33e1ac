//! `flock` on files that may be removed while somebody waits for them.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::dir::{Access, Dir};
use super::error::FsError;

/// Who may hold a lock beside us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Nobody.
    Exclusive,
    /// Others who hold it shared.
    Shared,
}

/// A held `flock`. Dropping it unlocks, and so does the death of the process.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Lock {
    /// The locked file, to read or write what it says.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The locked file; the lock lives as long as it.
    pub fn into_file(self) -> File {
        self.file
    }
}

impl Dir {
    /// Locks the file `rel`, made with `mode` if missing, waiting as long as it takes.
    pub fn lock(&self, rel: impl AsRef<Path>, kind: LockKind, mode: u32) -> Result<Lock, FsError> {
        let operation = match kind {
            LockKind::Exclusive => FlockOperation::LockExclusive,
            LockKind::Shared => FlockOperation::LockShared,
        };
        loop {
            if let Attempt::Locked(lock) = self.attempt(rel.as_ref(), operation, mode)? {
                return Ok(lock);
            }
        }
    }

    /// Locks the file `rel`, made with `mode` if missing; nothing if somebody else holds it.
    pub fn try_lock(
        &self,
        rel: impl AsRef<Path>,
        kind: LockKind,
        mode: u32,
    ) -> Result<Option<Lock>, FsError> {
        let operation = match kind {
            LockKind::Exclusive => FlockOperation::NonBlockingLockExclusive,
            LockKind::Shared => FlockOperation::NonBlockingLockShared,
        };
        loop {
            match self.attempt(rel.as_ref(), operation, mode)? {
                Attempt::Locked(lock) => return Ok(Some(lock)),
                Attempt::Held => return Ok(None),
                Attempt::Replaced => {}
            }
        }
    }

    fn attempt(
        &self,
        rel: &Path,
        operation: FlockOperation,
        mode: u32,
    ) -> Result<Attempt, FsError> {
        // A reader without write permission still may lock: flock asks for no more than an open file.
        let file = match self.open_file(rel, Access::OpenOrCreate { mode }) {
            Err(e) if e.kind() == Some(std::io::ErrorKind::PermissionDenied) => {
                self.open_file(rel, Access::Read)?
            }
            other => other?,
        };
        loop {
            match rustix::fs::flock(&file, operation) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) => return Ok(Attempt::Held),
                Err(e) => return Err(FsError::io(&self.display_path(rel), "locked", e)),
            }
        }
        // The previous holder may have removed the file between our open and our lock: then this lock guards a file
        // that nobody else will ever find.
        let ours = file
            .metadata()
            .map_err(|e| FsError::io(&self.display_path(rel), "examined", e))?;
        match self.metadata(rel)? {
            Some(named) if named.ino() == ours.ino() && named.dev() == ours.dev() => {
                Ok(Attempt::Locked(Lock { file }))
            }
            _ => Ok(Attempt::Replaced),
        }
    }

    /// Whether anybody holds the existing file `rel` locked, shared or not, without disturbing others longer than one
    /// system call: an exclusive lock is tried and dropped at once. False if the file is not there.
    pub fn is_held(&self, rel: impl AsRef<Path>) -> Result<bool, FsError> {
        self.probe(rel.as_ref(), FlockOperation::NonBlockingLockExclusive)
    }

    /// Whether anybody holds the existing file `rel` locked exclusively, without disturbing the holder longer than one system
    /// call: a shared lock is tried and dropped at once. False if the file is not there.
    pub fn is_locked(&self, rel: impl AsRef<Path>) -> Result<bool, FsError> {
        self.probe(rel.as_ref(), FlockOperation::NonBlockingLockShared)
    }

    fn probe(&self, rel: &Path, operation: FlockOperation) -> Result<bool, FsError> {
        let file = match self.open_file(rel, Access::Read) {
            Err(e) if e.is_not_found() => return Ok(false),
            other => other?,
        };
        match rustix::fs::flock(&file, operation) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(e) => Err(FsError::io(&self.display_path(rel), "locked", e)),
        }
    }
}

enum Attempt {
    Locked(Lock),
    Held,
    Replaced,
}

/// The process that took the `flock` on this file, as `/proc/locks` tells it: for messages such as "held by pid 42".
/// Nothing if nobody holds it, or if it is held from outside our pid namespace.
pub fn lock_holder(file: &File) -> Option<u32> {
    let meta = file.metadata().ok()?;
    let (major, minor) = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
    // proc_locks(5): `1: FLOCK  ADVISORY  WRITE 1234 08:02:567 0 EOF`, device in hexadecimal, inode in decimal.
    let wanted = format!("{major:02x}:{minor:02x}:{}", meta.ino());
    let table = BufReader::new(File::open("/proc/locks").ok()?);
    table.lines().map_while(Result::ok).find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (class, _, _) = (fields.next()?, fields.next()?, fields.next()?);
        let (pid, place) = (fields.next()?, fields.next()?);
        (class == "FLOCK" && place == wanted)
            .then(|| pid.parse().ok().filter(|pid| *pid != 0))
            .flatten()
    })
}
