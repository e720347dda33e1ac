//! Removing whole trees.

use std::io;
use std::path::Path;

use rustix::fs::ResolveFlags;
use rustix::io::Errno;

use super::dir::Dir;
use super::error::FsError;

/// How deep [`Dir::remove_tree`] goes: each level holds one descriptor open.
const MAX_TREE_DEPTH: usize = 200;

impl Dir {
    /// Removes `rel` and everything below it, without following links and without entering another mount; false if
    /// it was not there.
    pub fn remove_tree(&self, rel: impl AsRef<Path>) -> Result<bool, FsError> {
        self.remove_tree_at(rel.as_ref(), 0)
    }

    fn remove_tree_at(&self, rel: &Path, depth: usize) -> Result<bool, FsError> {
        match self.remove_file(rel) {
            Err(e) if e.kind() == Some(io::ErrorKind::IsADirectory) => {}
            other => return other,
        }
        if depth > MAX_TREE_DEPTH {
            return Err(FsError::io(
                &self.display_path(rel),
                "removed",
                Errno::NAMETOOLONG,
            ));
        }
        let dir = match self.open_dir_with(rel, ResolveFlags::NO_XDEV) {
            Ok(dir) => dir,
            Err(e) if e.is_not_found() => return Ok(false),
            Err(FsError::Escapes { path }) => {
                return Err(FsError::Io {
                    path,
                    action: "removed",
                    source: io::Error::other("another file system is mounted there"),
                });
            }
            Err(e) => return Err(e),
        };
        // Somebody may be adding names while we remove: a bounded number of passes, then the error stands.
        for _ in 0..8 {
            for entry in dir.list()? {
                dir.remove_tree_at(Path::new(&entry.name), depth.saturating_add(1))?;
            }
            match self.remove_dir(rel) {
                Err(e) if e.kind() == Some(io::ErrorKind::DirectoryNotEmpty) => {}
                other => return other,
            }
        }
        self.remove_dir(rel)
    }
}
