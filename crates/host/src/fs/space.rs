//! How much room a file system has.

use std::io;
use std::path::Path;

/// The room of a file system, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// What may still be written by those who are not root.
    pub free: u64,
    /// All of it.
    pub total: u64,
}

impl Space {
    /// Of the file system that holds `path`.
    pub fn of(path: &Path) -> io::Result<Self> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(Self {
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
            total: stat.f_blocks.saturating_mul(stat.f_frsize),
        })
    }

    /// What is free, MiB.
    pub fn free_mb(&self) -> u64 {
        self.free >> 20
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_has_no_more_free_than_there_is_and_one_that_is_not_there_is_an_error() {
        let space = Space::of(Path::new("/")).unwrap();
        assert!(space.free <= space.total && space.total > 0, "{space:?}");
        let missing = Space::of(Path::new("/nowhere/at/all")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
