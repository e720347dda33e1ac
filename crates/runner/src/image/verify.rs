//! Whether files are what their manifest says, every byte, before anybody uses them.
//!
//! Hashing two gigabytes takes a second and a half, so an outcome is remembered, for as long as the host runs: until then a
//! file of the same inode, size and change times is the same file. (Nobody but root can set a change time back, and whoever
//! may write the memory may write the manifest as well.) After a reboot, which may have cost unwritten data, all is read again.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;

use host::fs::{Access, Dir, FsError};
use serde::{Deserialize, Serialize};

use super::ImageError;
use super::manifest::{self, FileEntry};

/// Name of the memory, beside the manifest; it is not part of what it speaks of.
const MEMORY: &str = ".verified.json";
/// Largest memory that is read.
const MAX_MEMORY: u64 = 1 << 20;

/// What was found to be right.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Memory {
    /// The kernel's id of the boot it holds for.
    boot: String,
    files: BTreeMap<String, Known>,
}

/// A file as it was when its content was hashed.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Known {
    sha256: String,
    dev: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Known {
    fn of(metadata: &Metadata, entry: &FileEntry) -> Self {
        Self {
            sha256: entry.sha256.clone(),
            dev: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// Compares every file with the manifest, and sees that the manifest names what is needed.
pub(super) fn verify(
    directory: &Dir,
    files: &BTreeMap<String, FileEntry>,
    needed: &[&str],
) -> Result<(), ImageError> {
    if let Some(missing) = needed.iter().find(|name| !files.contains_key(**name)) {
        return Err(damaged(directory, missing, "the manifest does not name it"));
    }
    let memory = recall(directory);
    let mut hashed = false;
    for (name, expected) in files {
        let (file, metadata) = open(directory, name)?;
        if metadata.len() != expected.size {
            let reason = format!(
                "it has {} bytes, its manifest says {}",
                metadata.len(),
                expected.size
            );
            return Err(damaged(directory, name, &reason));
        }
        if memory.files.get(name) == Some(&Known::of(&metadata, expected)) {
            continue;
        }
        let found = manifest::measure(&file, expected.coverage)
            .map_err(ImageError::io("read", directory.display_path(name)))?;
        if found != *expected {
            return Err(damaged(
                directory,
                name,
                "its content is not what its manifest says",
            ));
        }
        hashed = true;
    }
    if hashed {
        remember(directory, files);
    }
    Ok(())
}

/// Remembers that the files are what `files` says, as of now.
pub(super) fn remember(directory: &Dir, files: &BTreeMap<String, FileEntry>) {
    let known = files.iter().map(|(name, entry)| {
        let (_, metadata) = open(directory, name)?;
        Ok((name.clone(), Known::of(&metadata, entry)))
    });
    let known: Result<_, ImageError> = known.collect();
    // Whoever may not write here hashes again the next time.
    if let (Ok(files), Some(boot)) = (known, boot())
        && let Ok(text) = serde_json::to_vec(&Memory { boot, files })
    {
        let _ = directory.write_atomic(MEMORY, 0o644, &text);
    }
}

/// What was remembered in this boot; nothing where that cannot be read or was written by somebody else.
fn recall(directory: &Dir) -> Memory {
    let read = || -> Option<Memory> {
        let owner = directory.own_metadata().ok()?.uid();
        let writer = directory.metadata(MEMORY).ok()??.uid();
        if writer != owner && writer != 0 {
            return None;
        }
        let bytes = directory.read_bounded(MEMORY, MAX_MEMORY).ok()?;
        let memory: Memory = serde_json::from_slice(&bytes).ok()?;
        (Some(&memory.boot) == boot().as_ref()).then_some(memory)
    };
    read().unwrap_or_default()
}

/// The kernel's id of this boot of the host.
pub(super) fn boot() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

fn open(directory: &Dir, name: &str) -> Result<(File, Metadata), ImageError> {
    let file = directory
        .open_file(name, Access::Read)
        .map_err(|error: FsError| match error.is_not_found() {
            true => damaged(directory, name, "it is missing"),
            false => error.into(),
        })?;
    let metadata = file
        .metadata()
        .map_err(ImageError::io("examine", directory.display_path(name)))?;
    Ok((file, metadata))
}

/// The error for something that cannot be used as it is.
pub(super) fn damaged(directory: &Dir, name: &str, reason: &str) -> ImageError {
    ImageError::Damaged {
        path: directory.display_path(name),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn setup() -> (tempfile::TempDir, Dir, BTreeMap<String, FileEntry>) {
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join("a"), "content").unwrap();
        let directory = Dir::open(temp.path()).unwrap();
        let entry = manifest::describe(&File::open(temp.path().join("a")).unwrap()).unwrap();
        (temp, directory, BTreeMap::from([("a".to_owned(), entry)]))
    }

    #[test]
    fn a_changed_a_shortened_and_a_missing_file_are_told_apart() {
        let (temp, directory, files) = setup();
        verify(&directory, &files, &["a"]).unwrap();
        let path = temp.path().join("a");
        for (content, reason) in [
            (Some("CONTENT"), "content is not"),
            (Some("cont"), "4 bytes"),
            (None, "is missing"),
        ] {
            match content {
                Some(content) => fs::write(&path, content).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            let error = verify(&directory, &files, &["a"]).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        let error = verify(&directory, &files, &["b"]).unwrap_err().to_string();
        assert!(error.contains("does not name it"), "{error}");
    }

    #[test]
    fn what_was_verified_is_remembered_until_the_file_or_the_boot_changes() {
        let (temp, directory, files) = setup();
        verify(&directory, &files, &["a"]).unwrap();
        assert_eq!(recall(&directory).files.len(), 1);

        // The memory alone is believed as long as nothing of the file has changed: a wrong hash in the manifest shows it.
        let mut other = files.clone();
        other.get_mut("a").unwrap().sha256 = "0".repeat(64);
        assert!(verify(&directory, &other, &["a"]).is_err());

        // The same content written again is another state of the file, read again and remembered anew.
        let before = recall(&directory);
        let path = temp.path().join("a");
        fs::remove_file(&path).unwrap();
        fs::write(&path, "content").unwrap();
        verify(&directory, &files, &["a"]).unwrap();
        assert_ne!(recall(&directory), before);

        let stale = Memory {
            boot: "another boot".to_owned(),
            ..recall(&directory)
        };
        fs::write(
            temp.path().join(MEMORY),
            serde_json::to_vec(&stale).unwrap(),
        )
        .unwrap();
        assert_eq!(recall(&directory), Memory::default());
        fs::write(temp.path().join(MEMORY), "garbage").unwrap();
        assert_eq!(recall(&directory), Memory::default());
        verify(&directory, &files, &["a"]).unwrap();
    }
}
