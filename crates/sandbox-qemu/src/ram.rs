//! Guest memory in a memfd: written by a booting template, sealed before anything clones it.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{MemfdFlags, SealFlags};
use sandbox::SandboxError;
use sandbox::parts::disk::{copy_sparse, copy_without_zeros};

/// New guest memory of `megabytes`, all holes.
pub(crate) fn fresh(megabytes: u64) -> Result<File, SandboxError> {
    allocate(megabytes.saturating_mul(1024 * 1024)).map_err(|source| SandboxError::Io {
        action: "make the guest's memory".to_owned(),
        source,
    })
}

fn allocate(bytes: u64) -> io::Result<File> {
    let memory = rustix::fs::memfd_create(
        c"guest-ram",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    let memory = File::from(memory);
    memory.set_len(bytes)?;
    Ok(memory)
}

/// Writes guest memory to `path`, zero pages as holes, down to the disk.
pub(crate) fn save(memory: &File, path: &Path) -> Result<(), SandboxError> {
    let write = || {
        let file = File::create_new(path)?;
        copy_without_zeros(memory, &file)?;
        file.sync_all()
    };
    write().map_err(|source| SandboxError::Io {
        action: format!("save the guest's memory to {}", path.display()),
        source,
    })
}

/// Reads saved guest memory and seals it: from then on nobody can change it, not even a QEMU process that maps the
/// same memfd and was taken over by its guest.
pub(crate) fn load_sealed(path: &Path, megabytes: u64) -> Result<File, SandboxError> {
    let io_error = |source| SandboxError::Io {
        action: format!("load the guest's memory from {}", path.display()),
        source,
    };
    let file = File::open(path).map_err(io_error)?;
    let expected = megabytes.saturating_mul(1024 * 1024);
    let length = file.metadata().map_err(io_error)?.len();
    if length != expected {
        return Err(SandboxError::BadImage {
            path: path.to_owned(),
            reason: format!("it holds {length} bytes of memory, the VM has {expected}"),
        });
    }
    let memory = allocate(length).map_err(io_error)?;
    copy_sparse(&file, &memory).map_err(io_error)?;
    rustix::fs::fcntl_add_seals(
        &memory,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL,
    )
    .map_err(|error| io_error(error.into()))?;
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn saved_memory_comes_back_sealed_and_sparse() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        let memory = fresh(64).unwrap();
        memory.write_all_at(b"hello", 5 << 20).unwrap();
        memory.write_all_at(&[0; 8192], 9 << 20).unwrap();
        save(&memory, &path).unwrap();
        let loaded = load_sealed(&path, 64).unwrap();
        let mut word = [0; 5];
        loaded.read_exact_at(&mut word, 5 << 20).unwrap();
        assert_eq!(&word, b"hello");
        assert_eq!(loaded.metadata().unwrap().blocks() * 512, 4096);
        assert!(loaded.write_all_at(b"x", 0).is_err());
        assert!(loaded.set_len(1).is_err());
    }

    #[test]
    fn memory_of_another_size_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        save(&fresh(1).unwrap(), &path).unwrap();
        let error = load_sealed(&path, 2).unwrap_err().to_string();
        assert!(error.contains("runner build"), "{error}");
    }
}
