//! Files written inside the agent's root.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use guest_control::FileSpec;
use guest_control::server::OsError;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::root::Root;

/// A file that is being written under a temporary name beside its place.
#[derive(Debug)]
pub(crate) struct NewFile {
    file: File,
    dir: OwnedFd,
    temporary: String,
    name: String,
    path: String,
    placed: bool,
}

impl NewFile {
    /// Begins a file; `number` makes the temporary name unique.
    pub(crate) fn create(root: &Root, spec: &FileSpec, number: u64) -> Result<Self, OsError> {
        let path = &spec.path;
        let failed = |error: Errno| OsError::new(format_args!("creating {path:?}"), error);
        let (parent, name) = split(path).ok_or_else(|| failed(Errno::INVAL))?;
        let etc = root.etc();
        let account = etc.account(&spec.user)?;
        let dir = root
            .open(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
            .map_err(failed)?;
        refuse_special(&dir, name, path)?;
        let temporary = format!(".{}.{number}.part", name.get(..32).unwrap_or("file"));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(
            &dir,
            &temporary,
            flags | OFlags::NOFOLLOW,
            Mode::from_raw_mode(0o600),
        )
        .map_err(failed)?;
        let new = Self {
            file: file.into(),
            dir,
            temporary,
            name: name.to_owned(),
            path: path.clone(),
            placed: false,
        };
        // The owner first: changing it clears set-user-id bits.
        let owner = Some(rustix::fs::Uid::from_raw(account.uid));
        let group = Some(rustix::fs::Gid::from_raw(account.gid));
        rustix::fs::fchown(&new.file, owner, group).map_err(failed)?;
        let mode = Mode::from_raw_mode(spec.mode & 0o7777);
        rustix::fs::fchmod(&new.file, mode).map_err(failed)?;
        Ok(new)
    }

    /// Puts it into its place.
    pub(crate) fn place(mut self) -> Result<(), OsError> {
        rustix::fs::renameat(&self.dir, &self.temporary, &self.dir, &self.name)
            .map_err(|error| OsError::new(format_args!("creating {:?}", self.path), error))?;
        self.placed = true;
        Ok(())
    }
}

impl Write for NewFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.file.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.placed {
            // Somebody inside may have been faster.
            let _ = rustix::fs::unlinkat(&self.dir, &self.temporary, AtFlags::empty());
        }
    }
}

/// Replacing a FIFO, socket or device by a file is nobody's intention.
fn refuse_special(dir: &OwnedFd, name: &str, path: &str) -> Result<(), OsError> {
    let Ok(stat) = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) else {
        return Ok(());
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile | FileType::Symlink => Ok(()),
        FileType::Directory => Err(OsError::new(
            format_args!("creating {path:?}"),
            Errno::ISDIR,
        )),
        _ => Err(OsError::new(
            format_args!("{path:?} exists and is not a regular file"),
            Errno::INVAL,
        )),
    }
}

/// Directory and name of an absolute path.
fn split(path: &str) -> Option<(&str, &str)> {
    let (parent, name) = path.strip_prefix('/').map(|_| path)?.rsplit_once('/')?;
    let parent = if parent.is_empty() { "/" } else { parent };
    (!matches!(name, "" | "." | "..")).then_some((parent, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_absolute_paths_only() {
        assert_eq!(split("/a/b"), Some(("/a", "b")));
        assert_eq!(split("/a"), Some(("/", "a")));
        for path in ["", "a", "a/b", "/", "/a/", "/a/..", "/."] {
            assert_eq!(split(path), None, "{path}");
        }
    }
}
