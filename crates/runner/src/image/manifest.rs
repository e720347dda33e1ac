//! `manifest.json`: what an image or a snapshot consists of, byte for byte, and how it came to be.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::apt::Package;

/// Raised whenever an older runner could misread what a newer one built; part of every hash.
pub(crate) const FORMAT: u32 = 1;

/// A file that belongs to an image or snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileEntry {
    /// Bytes.
    pub(crate) size: u64,
    /// SHA-256, hex.
    pub(crate) sha256: String,
}

/// Of an image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ImageManifest {
    /// [`FORMAT`].
    pub(crate) format: u32,
    /// The directory's name.
    pub(crate) rootfs_hash: String,
    /// What was hashed into it, in order.
    pub(crate) inputs: Vec<(String, String)>,
    /// Every file beside the manifest itself.
    pub(crate) files: BTreeMap<String, FileEntry>,
    /// The kernel.
    pub(crate) kernel: KernelFacts,
    /// Name and version of every installed package.
    pub(crate) packages: BTreeMap<String, String>,
    /// Size of the root tree before it was packed, bytes.
    pub(crate) tree_bytes: u64,
    /// RFC 3339.
    pub(crate) built_at: String,
    /// The runner that built it.
    pub(crate) runner: String,
    /// Seconds each step took.
    pub(crate) steps: Vec<(String, f64)>,
}

/// Where the kernel came from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct KernelFacts {
    /// `uname -r`.
    pub(crate) release: String,
    /// The packages it was taken from, each pinned by the hash of its .deb.
    pub(crate) packages: Vec<Package>,
    /// `vmlinux` (uncompressed) or `as packaged`.
    pub(crate) form: String,
    /// Modules of the initramfs, in load order.
    pub(crate) modules: Vec<String>,
}

/// Of a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SnapshotManifest {
    /// [`FORMAT`].
    pub(crate) format: u32,
    /// The image it belongs to.
    pub(crate) rootfs_hash: String,
    /// The directory's name.
    pub(crate) snapshot_hash: String,
    /// What was hashed into it, in order.
    pub(crate) inputs: Vec<(String, String)>,
    /// Every file beside the manifest itself.
    pub(crate) files: BTreeMap<String, FileEntry>,
    /// Size of its VMs.
    pub(crate) shape: sandbox::Shape,
    /// Which engine made it.
    pub(crate) engine: sandbox::EngineKind,
    /// What the engine says of it.
    pub(crate) outcome: sandbox::SnapshotOutcome,
    /// RFC 3339.
    pub(crate) built_at: String,
    /// The runner that built it.
    pub(crate) runner: String,
    /// Seconds each step took.
    pub(crate) steps: Vec<(String, f64)>,
}

/// Size and hash of an open file.
pub(crate) fn measure(mut file: &File) -> io::Result<FileEntry> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size: u64 = 0;
    loop {
        let read = file.read(&mut buffer)?;
        let Some(chunk) = buffer.get(..read).filter(|chunk| !chunk.is_empty()) else {
            break;
        };
        hasher.update(chunk);
        size = size.saturating_add(u64::try_from(read).unwrap_or(u64::MAX));
    }
    Ok(FileEntry {
        size,
        sha256: hex::encode(hasher.finalize()),
    })
}

/// SHA-256 of bytes, hex.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// The content address of a list of named inputs. Lengths are hashed too, so no two lists run into each other.
pub(crate) fn address(inputs: &[(String, String)]) -> String {
    let mut hasher = Sha256::new();
    for (name, value) in inputs {
        for text in [name, value] {
            hasher.update(u64::try_from(text.len()).unwrap_or(u64::MAX).to_le_bytes());
            hasher.update(text.as_bytes());
        }
    }
    hex::encode(hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, Write};

    #[test]
    fn addresses_tell_neighbouring_inputs_apart() {
        let list = |items: &[(&str, &str)]| -> Vec<(String, String)> {
            items
                .iter()
                .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
                .collect()
        };
        let base = address(&list(&[("a", "bc"), ("d", "e")]));
        for other in [
            [("ab", "c"), ("d", "e")],
            [("a", "bcd"), ("", "e")],
            [("d", "e"), ("a", "bc")],
        ] {
            assert_ne!(base, address(&list(&other)));
        }
        assert_eq!(base.len(), 64);
    }

    #[test]
    fn a_file_is_measured_whole() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"abc").unwrap();
        file.rewind().unwrap();
        let entry = measure(&file).unwrap();
        assert_eq!(entry.size, 3);
        assert_eq!(
            entry.sha256,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(entry.sha256, sha256(b"abc"));
    }
}
