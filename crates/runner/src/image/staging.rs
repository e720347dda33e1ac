//! A directory that is being built, beside the place it gets when it is complete.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};

use host::fs::{Access, Dir, FsError, LockKind};
use serde::Serialize;

use super::ImageError;
use super::manifest::{self, FileEntry};
use super::store::MANIFEST;
use super::verify;
use crate::home::Account;
use crate::home::rel::{self, IMAGES};
use crate::names::ImageHash;

/// What names of unfinished directories begin with.
const STAGING: &str = ".staging-";

/// A directory being built. Dropped before it is published, it is removed.
#[derive(Debug)]
pub(super) struct Staging {
    parent: Dir,
    directory: Dir,
    path: PathBuf,
    name: OsString,
    target: OsString,
    owner: Account,
}

impl Staging {
    /// Makes it below `parent`, whose absolute path is `parent_path`, to become `target`.
    pub(super) fn begin(
        parent: Dir,
        parent_path: &Path,
        target: &OsStr,
        owner: Account,
    ) -> Result<Self, ImageError> {
        let name = unfinished(target);
        // Closed to everybody: it holds setuid programs that nobody has checked yet.
        let directory = parent.create_new_dir(&name, 0o700)?;
        let path = parent_path.join(&name);
        Ok(Self {
            parent,
            directory,
            path,
            name,
            target: target.to_owned(),
            owner,
        })
    }
    /// Its absolute path, for the programs that build in it.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes a working directory inside it.
    pub(super) fn remove(&self, rel: &str) -> Result<(), ImageError> {
        self.directory.remove_tree(rel)?;
        Ok(())
    }

    /// Makes every file durable and measures it.
    pub(super) fn seal(&self) -> Result<BTreeMap<String, FileEntry>, ImageError> {
        let mut files = BTreeMap::new();
        for entry in self.directory.list()? {
            let path = self.path.join(&entry.name);
            let Some(name) = entry.name.to_str().map(str::to_owned) else {
                return Err(ImageError::Damaged {
                    path,
                    reason: "its name is not text".to_owned(),
                });
            };
            let file = self.directory.open_file(&name, Access::Read)?;
            let io = ImageError::io;
            // Nobody has a reason to write to it again.
            rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o444))
                .map_err(|e| io("change the mode of", &path)(e.into()))?;
            give(&file, self.owner, &path)?;
            file.sync_all().map_err(io("flush", &path))?;
            files.insert(name, manifest::describe(&file).map_err(io("read", &path))?);
        }
        Ok(files)
    }

    /// Writes the manifest and gives the directory its name, replacing what was damaged there.
    pub(super) fn publish(
        self,
        manifest: &impl Serialize,
        files: &BTreeMap<String, FileEntry>,
    ) -> Result<(), ImageError> {
        let path = self.path.join(MANIFEST);
        let mut text = serde_json::to_vec_pretty(manifest).map_err(|source| ImageError::Json {
            path: path.clone(),
            source,
        })?;
        text.push(b'\n');
        self.directory.write_atomic(MANIFEST, 0o444, &text)?;
        let file = self.directory.open_file(MANIFEST, Access::Read)?;
        give(&file, self.owner, &path)?;
        if rustix::process::geteuid().is_root() {
            self.directory.set_owner(self.owner.uid, self.owner.gid)?;
        }
        self.directory.set_mode(0o755)?;
        self.directory.sync()?;
        self.parent.remove_tree(&self.target)?;
        self.parent.rename(&self.name, &self.parent, &self.target)?;
        self.parent.sync()?;
        // They were hashed as they were written: the first use need not do it again.
        verify::remember(&self.parent.open_dir(&self.target)?, files);
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Published, it has no such name any more. What cannot be removed now is removed by the next build.
        let _ = self.parent.remove_tree(&self.name);
    }
}

fn give(file: &File, owner: Account, path: &Path) -> Result<(), ImageError> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    std::os::unix::fs::fchown(file, Some(owner.uid), Some(owner.gid))
        .map_err(ImageError::io("change the owner of", path))
}

/// Removes what builds that no longer run have left in `parent`, `ours` (whose lock is ours) included.
pub(super) fn sweep(parent: &Dir, locks: &Dir, kind: &str, ours: &OsStr) -> Result<(), ImageError> {
    for entry in parent.list()? {
        let Some(hash) = staged(&entry.name) else {
            continue;
        };
        if OsStr::new(hash.as_str()) == ours {
            parent.remove_tree(&entry.name)?;
        } else if let Some(_builder_is_dead) =
            locks.try_lock(lock_name(kind, &hash), LockKind::Exclusive, 0o600)?
        {
            parent.remove_tree(&entry.name)?;
        }
    }
    Ok(())
}

fn unfinished(target: &OsStr) -> OsString {
    let mut name = OsString::from(STAGING);
    name.push(target);
    name
}

/// The name of the staging directory of an image or snapshot.
pub(crate) fn staging_name(hash: &ImageHash) -> OsString {
    unfinished(OsStr::new(hash.as_str()))
}

/// Of what a name is the staging directory.
pub(crate) fn staged(name: &OsStr) -> Option<ImageHash> {
    name.to_str()?.strip_prefix(STAGING)?.parse().ok()
}

/// Paths, relative to the home, of what builds that no longer run have left.
pub(crate) fn abandoned(home: &Dir) -> Result<Vec<PathBuf>, FsError> {
    let images = match home.open_dir(IMAGES) {
        Err(error) if error.is_not_found() => return Ok(Vec::new()),
        other => other?,
    };
    let mut places = vec![("image", PathBuf::new())];
    for entry in images.list()? {
        let snapshots = Path::new(&entry.name).join("snapshots");
        if images
            .metadata(&snapshots)
            .is_ok_and(|meta| meta.is_some_and(|meta| meta.is_dir()))
        {
            places.push(("snapshot", snapshots));
        }
    }
    let mut found = Vec::new();
    for (kind, place) in places {
        let directory = if place.as_os_str().is_empty() {
            images.try_clone()?
        } else {
            images.open_dir(&place)?
        };
        for entry in directory.list()? {
            if let Some(hash) = staged(&entry.name)
                && !home.is_locked(Path::new(rel::LOCKS).join(lock_name(kind, &hash)))?
            {
                found.push(Path::new(IMAGES).join(&place).join(&entry.name));
            }
        }
    }
    Ok(found)
}

/// The lock whose holder builds (or removes) something.
pub(crate) fn lock_name(kind: &str, hash: &ImageHash) -> String {
    format!("{}-{hash}.lock", kind.replace(' ', "-"))
}
