//! Files of VMs: sparse copies, and the blank file system that a private disk begins as.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::SeekFrom;

use crate::error::SandboxError;

/// Makes an unnamed, sparse file in `dir` with an empty ext4 of `megabytes`. Blocks for some milliseconds.
///
/// No journal: the disk dies with its VM, so nothing is ever recovered. The inode tables are written here (and are
/// holes in a copy), so the guest's kernel need not zero them in the background.
pub fn make_blank(dir: &Path, megabytes: u64) -> Result<File, SandboxError> {
    let io_error = |source| SandboxError::Io {
        action: format!("make a blank disk in {}", dir.display()),
        source,
    };
    let file = tempfile::tempfile_in(dir).map_err(io_error)?;
    file.set_len(megabytes.saturating_mul(1024 * 1024))
        .map_err(io_error)?;
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode"])
        .args(["-E", "lazy_itable_init=0,nodiscard,root_owner=0:0"])
        .arg(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            file.as_raw_fd()
        ))
        // Not in everybody's PATH, but in one of these on every distribution.
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .output()
        .map_err(|source| SandboxError::Io {
            action: "run mkfs.ext4 (package e2fsprogs)".to_owned(),
            source,
        })?;
    if !output.status.success() {
        return Err(SandboxError::Engine {
            step: "mkfs.ext4",
            message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    Ok(file)
}

/// Copies the data of `from` to the empty file `to`, keeping its holes. Offsets of both are left anywhere.
pub fn copy_sparse(from: &File, to: &File) -> io::Result<()> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    for_each_extent(from, length, |start, end| {
        let mut source = start;
        let mut target = start;
        while source < end {
            let wanted = usize::try_from(end - source).unwrap_or(usize::MAX);
            let copied = match rustix::fs::copy_file_range(
                from,
                Some(&mut source),
                to,
                Some(&mut target),
                wanted,
            ) {
                Ok(copied) => copied,
                // Two file systems, or one that cannot: plain reads and writes.
                Err(
                    rustix::io::Errno::XDEV
                    | rustix::io::Errno::INVAL
                    | rustix::io::Errno::OPNOTSUPP,
                ) => {
                    return copy_range(from, to, source, end);
                }
                Err(error) => return Err(error.into()),
            };
            if copied == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    })
}

/// Copies `from` to the empty file `to`, turning blocks of zeros into holes.
pub fn copy_without_zeros(from: &File, to: &File) -> io::Result<()> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    for_each_extent(from, length, |start, end| copy_range(from, to, start, end))
}

/// Calls `each` for every extent of `file` that holds data.
pub fn for_each_extent(
    file: &File,
    length: u64,
    mut each: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut offset = 0;
    while offset < length {
        let start = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            // No data after this offset.
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(length);
        each(start, end)?;
        offset = end;
    }
    Ok(())
}

/// Bytes that are zero together or copied together: the page size of every supported guest.
const BLOCK: usize = 4096;

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; 256 * BLOCK];
    let mut offset = start;
    while offset < end {
        let wanted = usize::try_from(end - offset)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let Some(chunk) = buffer.get_mut(..wanted) else {
            break;
        };
        from.read_exact_at(chunk, offset)?;
        let mut at = offset;
        for block in chunk.chunks(BLOCK) {
            if block.iter().any(|byte| *byte != 0) {
                to.write_all_at(block, at)?;
            }
            at += u64::try_from(block.len()).unwrap_or(0);
        }
        offset = at;
    }
    Ok(())
}

/// Makes `path`, a blank disk of `megabytes` as private disks are copied from; down to the disk.
pub fn save_blank(path: &Path, megabytes: u64) -> Result<File, SandboxError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let made = make_blank(dir, megabytes)?;
    let blank = create(path)?;
    let write = || {
        copy_without_zeros(&made, &blank)?;
        blank.sync_all()
    };
    write().map_err(|source| SandboxError::Io {
        action: format!("write {}", path.display()),
        source,
    })?;
    Ok(blank)
}

/// Makes a file that must not exist.
pub fn create(path: &Path) -> Result<File, SandboxError> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|source| SandboxError::Io {
            action: format!("create {}", path.display()),
            source,
        })
}

/// Brings a file or directory down to the disk.
pub fn sync(path: &Path) -> Result<(), SandboxError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(|source| SandboxError::Io {
            action: format!("write {} to disk", path.display()),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_blank_disk_is_a_small_ext4() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blank.ext4");
        save_blank(&path, 1024).unwrap();
        let blank = File::open(&path).unwrap();
        let meta = blank.metadata().unwrap();
        assert_eq!(meta.len(), 1024 * 1024 * 1024);
        assert!(meta.blocks() * 512 < 8 * 1024 * 1024, "{}", meta.blocks());
        // The ext4 magic number, at 0x38 of the superblock at 1024.
        let mut magic = [0; 2];
        blank.read_exact_at(&mut magic, 1024 + 0x38).unwrap();
        assert_eq!(magic, [0x53, 0xef]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn zeros_become_holes_and_data_stays() {
        let dir = tempfile::tempdir().unwrap();
        let from = tempfile::tempfile_in(dir.path()).unwrap();
        let mut data = vec![0; 3 * BLOCK + 7];
        data[BLOCK + 1] = 1;
        data[3 * BLOCK + 6] = 2;
        from.write_all_at(&data, 0).unwrap();
        for copy in [copy_sparse, copy_without_zeros] {
            let to = tempfile::tempfile_in(dir.path()).unwrap();
            copy(&from, &to).unwrap();
            let mut read = vec![9; data.len()];
            to.read_exact_at(&mut read, 0).unwrap();
            assert_eq!(read, data);
            assert_eq!(to.metadata().unwrap().len(), data.len() as u64);
        }
    }
}
