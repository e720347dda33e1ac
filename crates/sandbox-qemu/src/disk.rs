//! A VM's private disk: a fresh, sparse, unnamed copy of one blank file system.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use sandbox::SandboxError;
use sandbox::parts::disk::copy_sparse;

/// The two descriptors QEMU wants of a disk.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) read_write: File,
    pub(crate) read_only: File,
}

impl Disk {
    /// Copies `blank` into an unnamed file in `dir`, which is on the file system that has room for disks. Nothing is
    /// left when the last descriptor goes, however the VM ends. Milliseconds: a blank file system is almost all hole.
    pub(crate) fn copy_of(blank: &File, dir: &Path) -> Result<Disk, SandboxError> {
        let copy = || -> io::Result<Disk> {
            let read_write = tempfile::tempfile_in(dir)?;
            copy_sparse(blank, &read_write)?;
            let read_only = reopen_read_only(&read_write)?;
            Ok(Disk {
                read_write,
                read_only,
            })
        };
        copy().map_err(|source| SandboxError::Io {
            action: format!("make the VM's disk in {}", dir.display()),
            source,
        })
    }
}

/// Another, read-only, open file description of the same file.
pub(crate) fn reopen_read_only(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use sandbox::parts::disk::save_blank;

    #[test]
    fn a_blank_disk_is_a_small_ext4_and_so_is_its_copy() {
        let dir = tempfile::tempdir().unwrap();
        let blank = save_blank(&dir.path().join("blank.ext4"), 1024).unwrap();
        let disk = Disk::copy_of(&blank, dir.path()).unwrap();
        let copy = disk.read_only.metadata().unwrap();
        assert_eq!(copy.len(), 1024 * 1024 * 1024);
        assert!(
            copy.blocks() * 512 < 8 * 1024 * 1024,
            "{} blocks",
            copy.blocks()
        );
        assert_eq!(copy.nlink(), 0);
        // The ext4 magic number, at 0x38 of the superblock at 1024.
        let mut magic = [0; 2];
        disk.read_only
            .read_exact_at(&mut magic, 1024 + 0x38)
            .unwrap();
        assert_eq!(magic, [0x53, 0xef]);
        disk.read_write.write_all_at(b"x", 5000).unwrap();
        let mut byte = [0; 1];
        blank.read_exact_at(&mut byte, 5000).unwrap();
        assert_ne!(&byte, b"x");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
