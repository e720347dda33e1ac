//! Handing over what must never lie on a disk: a file in shared memory that only its writer and root can read, and that is
//! gone once it was taken.
//!
//! `/dev/shm` is writable for all and sticky, so nobody but its owner and root can remove or replace a file there. The
//! name holds a random run id, which nobody knows before the file is there.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

/// Memory that every Linux system mounts.
pub const PLACE: &str = "/dev/shm";
/// How the names of files begin.
const PREFIX: &str = "vm0-handover-";
/// Largest file that is taken, bytes.
pub const MAX_BYTES: u64 = 4 << 20;

/// Why something could not be handed over.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The place is on a disk.
    #[error("{PLACE} is not in memory (tmpfs), and secrets are not written to a disk")]
    NotMemory,
    /// Nothing was left under this name.
    #[error("nothing was handed over, or it was taken already")]
    Missing,
    /// What lies there is not what the owner left.
    #[error("{} was refused: {reason}", path.display())]
    Refused {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A system call failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What we were doing.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// A file that was left for somebody; removed when this is dropped, if nobody took it.
#[derive(Debug)]
pub struct Handover {
    path: PathBuf,
    /// Locked as long as we live: one that nobody holds was left by a process that was killed.
    file: File,
}

impl Handover {
    /// Leaves `bytes` under `name`, readable for the caller and root only. What the caller's user left there before goes: who
    /// is killed leaves it behind, and the next attempt at the same run has the values anew.
    pub fn leave(name: &str, bytes: &[u8]) -> Result<Handover, HandoverError> {
        let path = path(name)?;
        let file = match create(&path) {
            Err(Errno::EXIST) if remove_own(&path) => create(&path),
            other => other,
        };
        let file = file.map_err(|errno| io_error("create", &path)(errno.into()))?;
        // From here on it is removed whatever fails.
        let mut handover = Handover {
            path,
            file: file.into(),
        };
        rustix::fs::flock(&handover.file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| io_error("lock", &handover.path)(errno.into()))?;
        handover
            .file
            .write_all(bytes)
            .map_err(io_error("write", &handover.path))?;
        Ok(handover)
    }
}

fn create(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
}

/// Removes a file of the caller's user; false if it is somebody else's, who put it in the way.
fn remove_own(path: &Path) -> bool {
    let me = rustix::process::geteuid().as_raw();
    let is_own = |meta: std::fs::Metadata| meta.is_file() && meta.uid() == me;
    std::fs::symlink_metadata(path).is_ok_and(is_own) && std::fs::remove_file(path).is_ok()
}

/// The name under which a file of [`PLACE`] was handed over, if it was.
pub fn handed_over(file: &str) -> Option<&str> {
    file.strip_prefix(PREFIX)
}

impl Drop for Handover {
    fn drop(&mut self) {
        // Usually it was taken, or another attempt at the same run has left its own there.
        let number = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
        let there = std::fs::symlink_metadata(&self.path).map(number);
        if let (Ok(there), Ok(ours)) = (there, self.file.metadata().map(number))
            && there == ours
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Takes what `owner` left under `name`: afterwards it has no name, and the returned file is the only way to it.
pub fn take(name: &str, owner: u32) -> Result<File, HandoverError> {
    let path = path(name)?;
    let refuse = |reason| HandoverError::Refused {
        path: path.clone(),
        reason,
    };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(&path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return Err(HandoverError::Missing),
        Err(Errno::LOOP) => return Err(refuse("it is a symbolic link")),
        Err(errno) => return Err(io_error("open", &path)(errno.into())),
    };
    let meta = file.metadata().map_err(io_error("examine", &path))?;
    if meta.uid() != owner {
        return Err(refuse("it is not the submitter's"));
    }
    if !meta.is_file() || meta.nlink() != 1 {
        return Err(refuse("it is not a regular file with one name"));
    }
    if meta.mode() & 0o077 != 0 {
        return Err(refuse("others may read it"));
    }
    if meta.len() > MAX_BYTES {
        return Err(refuse("it is too large"));
    }
    rustix::fs::unlinkat(rustix::fs::CWD, &path, AtFlags::empty())
        .map_err(|errno| io_error("remove", &path)(errno.into()))?;
    Ok(file)
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HandoverError {
    let path = path.to_owned();
    move |source| HandoverError::Io {
        action,
        path,
        source,
    }
}

/// Where a file of this name lies; the name may not lead elsewhere.
fn path(name: &str) -> Result<PathBuf, HandoverError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    let path = Path::new(PLACE).join(format!("{PREFIX}{name}"));
    if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
        return Err(HandoverError::Refused {
            path,
            reason: "its name is not letters, digits and hyphens",
        });
    }
    let place = rustix::fs::statfs(PLACE)
        .map_err(|errno| io_error("examine", Path::new(PLACE))(errno.into()))?;
    if place.f_type != TMPFS && place.f_type != RAMFS {
        return Err(HandoverError::NotMemory);
    }
    Ok(path)
}

/// `TMPFS_MAGIC` and `RAMFS_MAGIC`, linux/magic.h.
const TMPFS: rustix::fs::FsWord = 0x0102_1994;
const RAMFS: rustix::fs::FsWord = 0x8584_58f6;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn me() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    fn name(what: &str) -> String {
        format!("test-{what}-{}", std::process::id())
    }

    #[test]
    fn what_was_left_is_taken_once_and_has_no_name_afterwards() {
        let name = name("once");
        let left = Handover::leave(&name, b"value").unwrap();
        let mut text = String::new();
        take(&name, me())
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "value");
        assert!(!left.path.exists());
        assert!(matches!(take(&name, me()), Err(HandoverError::Missing)));
    }

    #[test]
    fn what_a_killed_process_left_is_replaced_and_nobody_removes_what_is_not_theirs() {
        let name = name("again");
        let first = Handover::leave(&name, b"first").unwrap();
        let left = Handover::leave(&name, b"second").unwrap();
        drop(first);
        let mut text = String::new();
        let mut taken = take(&name, me()).unwrap();
        taken.read_to_string(&mut text).unwrap();
        assert_eq!(text, "second");
        // What is no file of ours stays, and says so.
        std::fs::create_dir(&left.path).unwrap();
        Handover::leave(&name, b"third").unwrap_err();
        std::fs::remove_dir(&left.path).unwrap();
        symlink("/etc/hostname", &left.path).unwrap();
        Handover::leave(&name, b"third").unwrap_err();
        std::fs::remove_file(&left.path).unwrap();
    }

    #[test]
    fn what_nobody_took_goes_with_its_owner() {
        let left = Handover::leave(&name("dropped"), b"value").unwrap();
        let path = left.path.clone();
        assert!(path.exists());
        drop(left);
        assert!(!path.exists());
    }

    #[test]
    fn files_of_others_links_and_open_ones_are_refused() {
        let refused =
            |name: &str, owner| matches!(take(name, owner), Err(HandoverError::Refused { .. }));
        let name = name("refused");
        let left = Handover::leave(&name, b"value").unwrap();
        assert!(refused(&name, me() + 1));
        let open = std::fs::Permissions::from_mode(0o640);
        std::fs::set_permissions(&left.path, open).unwrap();
        assert!(refused(&name, me()));
        std::fs::remove_file(&left.path).unwrap();
        symlink("/etc/hostname", &left.path).unwrap();
        assert!(refused(&name, me()));
        std::fs::remove_file(&left.path).unwrap();
        for bad in ["", "../x", "a/b", "a\nb"] {
            assert!(refused(bad, me()), "{bad:?}");
        }
    }
}
