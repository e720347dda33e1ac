//! A directory held open, and what can be done below it.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;

use super::error::FsError;

/// A directory held open by descriptor. Paths given to its methods are relative to it and cannot leave it.
///
/// Created files and directories get exactly the mode asked for, whatever the umask.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
    /// For messages only; never used to reach anything.
    path: PathBuf,
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing.
    ReadWrite,
    /// Made if missing, every write goes to its end.
    Append {
        /// Mode of a new file.
        mode: u32,
    },
    /// Made; an error if something stands there already. For reading and writing.
    CreateNew {
        /// Mode of the new file.
        mode: u32,
    },
    /// Made if missing, otherwise opened as it is, for reading and writing.
    OpenOrCreate {
        /// Mode of a new file.
        mode: u32,
    },
}

/// What stands under a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// Anything else: symbolic link, socket, FIFO, device.
    Other,
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The name, without a path.
    pub name: OsString,
    /// What it is. A hint only: it may have changed since.
    pub kind: EntryKind,
}

impl Dir {
    /// Opens a directory by an ordinary path, following symbolic links: for the one place where the path comes from
    /// the operator (the home, the run directory). Everything below is confined.
    pub fn open(path: impl AsRef<Path>) -> Result<Dir, FsError> {
        let path = path.as_ref();
        let fd = rustix::fs::open(
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|e| FsError::io(path, "opened", e))?;
        Ok(Dir {
            fd,
            path: path.to_owned(),
        })
    }

    /// The path it was opened by, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The full path of something in it, for messages.
    pub fn display_path(&self, rel: impl AsRef<Path>) -> PathBuf {
        self.path.join(rel)
    }

    /// A second descriptor on the same directory.
    pub fn try_clone(&self) -> Result<Dir, FsError> {
        let fd = self
            .fd
            .try_clone()
            .map_err(|e| FsError::io(&self.path, "opened again", e))?;
        Ok(Dir {
            fd,
            path: self.path.clone(),
        })
    }

    /// Metadata of the directory itself.
    pub fn own_metadata(&self) -> Result<Metadata, FsError> {
        self.fd
            .try_clone()
            .and_then(|fd| File::from(fd).metadata())
            .map_err(|e| FsError::io(&self.path, "examined", e))
    }

    /// Refuses a directory that anybody but `owner` and root could change: foreign owner, or writable by group or
    /// others. For the home, whose owner is root-equivalent because root starts binaries from it.
    pub fn require_private(&self, owner: u32) -> Result<(), FsError> {
        let meta = self.own_metadata()?;
        let reason = if meta.uid() != owner && meta.uid() != 0 {
            format!("it belongs to uid {}, not to uid {owner}", meta.uid())
        } else if meta.mode() & 0o022 != 0 {
            format!("others may write in it (mode {:04o})", meta.mode() & 0o7777)
        } else {
            return Ok(());
        };
        Err(FsError::Unsafe {
            path: self.path.clone(),
            reason,
        })
    }

    fn openat2(
        &self,
        rel: &Path,
        flags: OFlags,
        mode: u32,
        extra: ResolveFlags,
        action: &'static str,
    ) -> Result<OwnedFd, FsError> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | extra;
        // Nothing opened here may become our terminal; with O_PATH nothing is opened, and openat2 refuses the flag.
        let flags = match flags.contains(OFlags::PATH) {
            true => flags | OFlags::CLOEXEC,
            false => flags | OFlags::CLOEXEC | OFlags::NOCTTY,
        };
        // The kernel answers EAGAIN when a rename anywhere raced with `..`; asking again is what the manual says.
        for _ in 0..16 {
            match rustix::fs::openat2(&self.fd, rel, flags, Mode::from_raw_mode(mode), resolve) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => {
                    return result.map_err(|e| FsError::io(&self.display_path(rel), action, e));
                }
            }
        }
        Err(FsError::io(&self.display_path(rel), action, Errno::AGAIN))
    }

    /// Opens a directory below this one.
    pub fn open_dir(&self, rel: impl AsRef<Path>) -> Result<Dir, FsError> {
        self.open_dir_with(rel.as_ref(), ResolveFlags::empty())
    }

    pub(super) fn open_dir_with(&self, rel: &Path, extra: ResolveFlags) -> Result<Dir, FsError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let fd = self.openat2(rel, flags, 0, extra, "opened")?;
        Ok(Dir {
            fd,
            path: self.display_path(rel),
        })
    }

    /// The directory that holds `rel`, and the last component of `rel`.
    pub(super) fn parent(&self, rel: &Path) -> Result<(Dir, OsString), FsError> {
        let escapes = || FsError::Escapes {
            path: self.display_path(rel),
        };
        // `a/b/.` and `a/b/` name the same last component as `a/b`; only a normal one may be made or removed.
        let name = match rel.components().next_back() {
            Some(Component::Normal(name)) => name.to_owned(),
            _ => return Err(escapes()),
        };
        let parent = match rel.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => self.open_dir(parent)?,
            _ => self.try_clone()?,
        };
        Ok((parent, name))
    }

    /// Opens a directory, making it (not its parents) with `mode` if it is missing.
    pub fn create_dir(&self, rel: impl AsRef<Path>, mode: u32) -> Result<Dir, FsError> {
        match self.create_new_dir(rel.as_ref(), mode) {
            Err(e) if e.is_already_exists() => self.open_dir(rel),
            other => other,
        }
    }

    /// Makes a directory with `mode`; an error if something stands there already.
    pub fn create_new_dir(&self, rel: impl AsRef<Path>, mode: u32) -> Result<Dir, FsError> {
        let rel = rel.as_ref();
        let (parent, name) = self.parent(rel)?;
        rustix::fs::mkdirat(&parent.fd, &name, Mode::from_raw_mode(mode & 0o700))
            .map_err(|e| FsError::io(&self.display_path(rel), "made", e))?;
        let dir = parent.open_dir(&name)?;
        dir.set_mode(mode)?;
        Ok(dir)
    }

    /// Opens a directory, making it and its missing parents with `mode`.
    pub fn create_dir_all(&self, rel: impl AsRef<Path>, mode: u32) -> Result<Dir, FsError> {
        let mut dir = self.try_clone()?;
        for component in rel.as_ref().components() {
            match component {
                Component::Normal(name) => dir = dir.create_dir(name, mode)?,
                Component::CurDir => {}
                _ => {
                    return Err(FsError::Escapes {
                        path: self.display_path(rel),
                    });
                }
            }
        }
        Ok(dir)
    }

    /// Sets the mode of the directory itself.
    pub fn set_mode(&self, mode: u32) -> Result<(), FsError> {
        rustix::fs::fchmod(&self.fd, Mode::from_raw_mode(mode))
            .map_err(|e| FsError::io(&self.path, "given its mode", e))
    }

    /// Sets owner and group of the directory itself.
    pub fn set_owner(&self, uid: u32, gid: u32) -> Result<(), FsError> {
        rustix::fs::fchown(&self.fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .map_err(|e| FsError::io(&self.path, "given to its owner", e))
    }

    /// Opens a regular file; anything else (FIFO, device, directory, symbolic link) is refused without blocking.
    pub fn open_file(&self, rel: impl AsRef<Path>, access: Access) -> Result<File, FsError> {
        let rel = rel.as_ref();
        let base = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let (flags, mode) = match access {
            Access::Read => (OFlags::RDONLY, None),
            Access::ReadWrite => (OFlags::RDWR, None),
            Access::Append { mode } => {
                (OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE, Some(mode))
            }
            Access::CreateNew { mode } => {
                (OFlags::RDWR | OFlags::CREATE | OFlags::EXCL, Some(mode))
            }
            Access::OpenOrCreate { mode } => (OFlags::RDWR | OFlags::CREATE, Some(mode)),
        };
        // A FIFO opened for writing without a reader answers ENXIO, a directory EISDIR: neither is a regular file.
        let file = match self.openat2(
            rel,
            base | flags,
            mode.unwrap_or(0),
            ResolveFlags::empty(),
            "opened",
        ) {
            Ok(fd) => File::from(fd),
            Err(FsError::Io { source, path, .. })
                if matches!(
                    source.raw_os_error(),
                    Some(libc::ENXIO | libc::EISDIR | libc::ENODEV)
                ) =>
            {
                return Err(FsError::NotRegular { path });
            }
            Err(e) => return Err(e),
        };
        let meta = file
            .metadata()
            .map_err(|e| FsError::io(&self.display_path(rel), "examined", e))?;
        if !meta.is_file() {
            return Err(FsError::NotRegular {
                path: self.display_path(rel),
            });
        }
        // The umask took bits from a new file's mode: give them back, but only where we may.
        if let Some(mode) = mode
            && meta.len() == 0
            && meta.uid() == rustix::process::geteuid().as_raw()
            && meta.mode() & 0o7777 != mode
        {
            rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))
                .map_err(|e| FsError::io(&self.display_path(rel), "given its mode", e))?;
        }
        Ok(file)
    }

    /// Reads a whole regular file of at most `max` bytes.
    pub fn read_bounded(&self, rel: impl AsRef<Path>, max: u64) -> Result<Vec<u8>, FsError> {
        let rel = rel.as_ref();
        let file = self.open_file(rel, Access::Read)?;
        read_file_bounded(&file, max, &self.display_path(rel))
    }

    /// Replaces a file as a whole: written to a temporary in the same directory, fsynced, renamed over `rel`,
    /// directory fsynced. Whoever reads sees the old contents or the new, never less, even after a power cut.
    pub fn write_atomic(
        &self,
        rel: impl AsRef<Path>,
        mode: u32,
        contents: &[u8],
    ) -> Result<(), FsError> {
        let (parent, name) = self.parent(rel.as_ref())?;
        let temporary = parent.write_temporary(mode, contents)?;
        parent.take_place(&temporary, &name)?;
        parent.sync()
    }

    /// Replaces a file as a whole like [`Dir::write_atomic`], but without fsync: for state of running processes,
    /// which a power cut ends anyway.
    pub fn replace(
        &self,
        rel: impl AsRef<Path>,
        mode: u32,
        contents: &[u8],
    ) -> Result<(), FsError> {
        let (parent, name) = self.parent(rel.as_ref())?;
        let (temporary, _) = parent.new_temporary(mode, contents)?;
        parent.take_place(&temporary, &name)
    }

    fn take_place(&self, temporary: &OsStr, name: &OsStr) -> Result<(), FsError> {
        let result = self.rename(temporary, self, name);
        if result.is_err() {
            let _ = self.remove_file(temporary);
        }
        result
    }

    /// Writes and fsyncs a file under a fresh name that begins with `.tmp-`; the caller links or renames it.
    pub fn write_temporary(&self, mode: u32, contents: &[u8]) -> Result<OsString, FsError> {
        let (name, file) = self.new_temporary(mode, contents)?;
        if let Err(e) = file.sync_all() {
            let _ = self.remove_file(&name);
            return Err(FsError::io(&self.display_path(&name), "written", e));
        }
        Ok(name)
    }

    fn new_temporary(&self, mode: u32, contents: &[u8]) -> Result<(OsString, File), FsError> {
        let name = temporary_name().map_err(|e| FsError::io(&self.path, "given a file", e))?;
        let mut file = self.open_file(&name, Access::CreateNew { mode })?;
        if let Err(e) = file.write_all(contents) {
            let _ = self.remove_file(&name);
            return Err(FsError::io(&self.display_path(&name), "written", e));
        }
        Ok((name, file))
    }

    /// Makes what happened to names in this directory durable.
    pub fn sync(&self) -> Result<(), FsError> {
        rustix::fs::fsync(&self.fd).map_err(|e| FsError::io(&self.path, "synced", e))
    }

    /// Gives the file `from` a second name `to_name` below `to`; an error if that name is taken.
    pub fn link(
        &self,
        from: impl AsRef<Path>,
        to: &Dir,
        to_name: impl AsRef<Path>,
    ) -> Result<(), FsError> {
        let (from_dir, from_name) = self.parent(from.as_ref())?;
        let (to_dir, to_last) = to.parent(to_name.as_ref())?;
        // No AT_SYMLINK_FOLLOW: a symbolic link gets a second name itself and leads nowhere.
        rustix::fs::linkat(
            &from_dir.fd,
            &from_name,
            &to_dir.fd,
            &to_last,
            AtFlags::empty(),
        )
        .map_err(|e| io_plain(&to.display_path(to_name), "linked", e))
    }

    /// Moves `from` to `to_name` below `to`, replacing what stood there.
    pub fn rename(
        &self,
        from: impl AsRef<Path>,
        to: &Dir,
        to_name: impl AsRef<Path>,
    ) -> Result<(), FsError> {
        let (from_dir, from_name) = self.parent(from.as_ref())?;
        let (to_dir, to_last) = to.parent(to_name.as_ref())?;
        rustix::fs::renameat(&from_dir.fd, &from_name, &to_dir.fd, &to_last)
            .map_err(|e| io_plain(&to.display_path(to_name), "renamed", e))
    }

    /// Makes `rel` a symbolic link to `target`, replacing what stood there at once. Nothing here follows it; it is
    /// for people and tools outside.
    pub fn symlink_atomic(
        &self,
        target: impl AsRef<Path>,
        rel: impl AsRef<Path>,
    ) -> Result<(), FsError> {
        let rel = rel.as_ref();
        let (parent, name) = self.parent(rel)?;
        let temporary = temporary_name().map_err(|e| FsError::io(&self.path, "given a link", e))?;
        rustix::fs::symlinkat(target.as_ref(), &parent.fd, &temporary)
            .map_err(|e| FsError::io(&self.display_path(rel), "linked", e))?;
        let result = parent.rename(&temporary, &parent, &name);
        if result.is_err() {
            let _ = parent.remove_file(&temporary);
        }
        result
    }

    /// Removes a name that is not a directory; false if it was not there.
    pub fn remove_file(&self, rel: impl AsRef<Path>) -> Result<bool, FsError> {
        self.unlink(rel.as_ref(), AtFlags::empty())
    }

    /// Removes an empty directory; false if it was not there.
    pub fn remove_dir(&self, rel: impl AsRef<Path>) -> Result<bool, FsError> {
        self.unlink(rel.as_ref(), AtFlags::REMOVEDIR)
    }

    fn unlink(&self, rel: &Path, flags: AtFlags) -> Result<bool, FsError> {
        let (parent, name) = match self.parent(rel) {
            Err(e) if e.is_not_found() => return Ok(false),
            other => other?,
        };
        match rustix::fs::unlinkat(&parent.fd, &name, flags) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(io_plain(&self.display_path(rel), "removed", e)),
        }
    }

    /// Metadata of whatever stands there (a symbolic link's own), or nothing.
    pub fn metadata(&self, rel: impl AsRef<Path>) -> Result<Option<Metadata>, FsError> {
        let rel = rel.as_ref();
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        match self.openat2(rel, flags, 0, ResolveFlags::empty(), "examined") {
            Ok(fd) => File::from(fd)
                .metadata()
                .map(Some)
                .map_err(|e| FsError::io(&self.display_path(rel), "examined", e)),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// An `O_PATH` descriptor on whatever stands there.
    pub(super) fn open_path(&self, rel: &Path) -> Result<OwnedFd, FsError> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        self.openat2(rel, flags, 0, ResolveFlags::empty(), "opened")
    }

    /// The names in it, in no order, without `.` and `..`.
    pub fn list(&self) -> Result<Vec<Entry>, FsError> {
        let listing = |e: Errno| FsError::io(&self.path, "listed", e);
        let mut entries = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd).map_err(listing)? {
            let entry = entry.map_err(listing)?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let name = OsString::from_vec(name.to_vec());
            let kind = match entry.file_type() {
                FileType::RegularFile => EntryKind::File,
                FileType::Directory => EntryKind::Dir,
                // Some file systems do not say in the listing.
                FileType::Unknown => match self.metadata(&name)? {
                    Some(meta) if meta.is_file() => EntryKind::File,
                    Some(meta) if meta.is_dir() => EntryKind::Dir,
                    _ => EntryKind::Other,
                },
                _ => EntryKind::Other,
            };
            entries.push(Entry { name, kind });
        }
        Ok(entries)
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// ELOOP and EXDEV of calls that resolve one name only have their plain meaning.
fn io_plain(path: &Path, action: &'static str, errno: Errno) -> FsError {
    FsError::Io {
        path: path.to_owned(),
        action,
        source: errno.into(),
    }
}

pub(super) fn read_file_bounded(file: &File, max: u64, path: &Path) -> Result<Vec<u8>, FsError> {
    let mut contents = Vec::new();
    file.take(max.saturating_add(1))
        .read_to_end(&mut contents)
        .map_err(|e| FsError::io(path, "read", e))?;
    if u64::try_from(contents.len()).unwrap_or(u64::MAX) > max {
        return Err(FsError::TooLarge {
            path: path.to_owned(),
            max,
        });
    }
    Ok(contents)
}

/// `.tmp-` and 16 random hexadecimal digits.
pub(super) fn temporary_name() -> Result<OsString, Errno> {
    let mut random = [0_u8; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let name = format!(".tmp-{:016x}", u64::from_ne_bytes(random));
    Ok(OsStr::from_bytes(name.as_bytes()).to_owned())
}
