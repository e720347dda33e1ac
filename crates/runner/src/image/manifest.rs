//! `manifest.json`: what an image or a snapshot consists of, byte for byte, and how it came to be.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::SeekFrom;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::apt::Package;
use super::sets::{BootSet, Family};

/// Raised whenever an older runner could misread what a newer one built; part of every hash.
pub(crate) const FORMAT: u32 = 2;

/// A file that belongs to an image or snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileEntry {
    /// Bytes.
    pub(crate) size: u64,
    /// SHA-256, hex: of the whole content, or of a sparse file's [`Coverage::Data`].
    pub(crate) sha256: String,
    /// What of the file the hash covers.
    #[serde(default, skip_serializing_if = "Coverage::is_whole")]
    pub(crate) coverage: Coverage,
}

/// What of a file its hash covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Coverage {
    /// Every byte: the hash is what `sha256sum` prints.
    #[default]
    Whole,
    /// Each block of 64 KiB that is not all zero, with its offset in front (8 bytes, little endian). The blank disk of a
    /// VM has gigabytes and holds megabytes; whether its zeros are holes or written makes no difference.
    Data,
}

impl Coverage {
    fn is_whole(&self) -> bool {
        *self == Self::Whole
    }
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
    /// What each engine boots of them.
    pub(crate) sets: BTreeMap<Family, BootSet>,
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KernelFacts {
    /// `uname -r`; of a pinned kernel the name of its file.
    pub(crate) release: String,
    /// The packages it was taken from, each pinned by the hash of its .deb; none for a pinned kernel.
    pub(crate) packages: Vec<Package>,
    /// `vmlinux` (uncompressed), `as packaged`, or `pinned`.
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

/// Size and hash of a new file; what it covers follows from whether the file has holes.
pub(crate) fn describe(file: &File) -> io::Result<FileEntry> {
    let metadata = file.metadata()?;
    let allocated = metadata.blocks().saturating_mul(512);
    let coverage = if allocated < metadata.len() / 2 {
        Coverage::Data
    } else {
        Coverage::Whole
    };
    measure(file, coverage)
}

/// Size and hash of an open file, from its beginning.
pub(crate) fn measure(file: &File, coverage: Coverage) -> io::Result<FileEntry> {
    let mut hasher = Sha256::new();
    let size = match coverage {
        Coverage::Whole => hash_whole(file, &mut hasher)?,
        Coverage::Data => hash_data(file, &mut hasher)?,
    };
    Ok(FileEntry {
        size,
        sha256: hex::encode(hasher.finalize()),
        coverage,
    })
}

fn hash_whole(mut file: &File, hasher: &mut Sha256) -> io::Result<u64> {
    let mut buffer = vec![0; 1 << 20];
    let mut size: u64 = 0;
    file.rewind()?;
    loop {
        let read = file.read(&mut buffer)?;
        let Some(chunk) = buffer.get(..read).filter(|chunk| !chunk.is_empty()) else {
            return Ok(size);
        };
        hasher.update(chunk);
        size = size.saturating_add(u64::try_from(read).unwrap_or(u64::MAX));
    }
}

/// Blocks of [`Coverage::Data`].
const BLOCK: usize = 64 << 10;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

fn hash_data(file: &File, hasher: &mut Sha256) -> io::Result<u64> {
    let size = file.metadata()?.len();
    let block = u64::try_from(BLOCK).map_err(io::Error::other)?;
    let mut buffer = vec![0; BLOCK];
    let mut at = 0;
    while at < size {
        // Holes are skipped; a file system that knows none calls everything data.
        at = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data - data % block,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let length = usize::try_from(size.saturating_sub(at))
            .unwrap_or(BLOCK)
            .min(BLOCK);
        let chunk = buffer.get_mut(..length).unwrap_or_default();
        file.read_exact_at(chunk, at)?;
        if ZEROS.get(..length) != Some(&*chunk) {
            hasher.update(at.to_le_bytes());
            hasher.update(&*chunk);
        }
        at = at.saturating_add(block);
    }
    Ok(size)
}

/// SHA-256 of bytes, hex.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// SHA-256 of an open file, from its beginning, hex.
pub(crate) fn sha256_of(file: &File) -> io::Result<String> {
    Ok(measure(file, Coverage::Whole)?.sha256)
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
    use std::io::Write;

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
        let entry = describe(&file).unwrap();
        assert_eq!((entry.size, entry.coverage), (3, Coverage::Whole));
        assert_eq!(
            entry.sha256,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(entry.sha256, sha256(b"abc"));
    }

    #[test]
    fn a_sparse_file_is_known_by_its_data_wherever_its_holes_are() {
        let make = |byte: u8, at: u64, written_zeros: bool| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(40 << 20).unwrap();
            if written_zeros {
                file.write_all_at(&[0; 300_000], 5 << 20).unwrap();
            }
            file.write_all_at(&[byte; 70_000], at).unwrap();
            describe(&file).unwrap()
        };
        let base = make(7, 12_345_678, false);
        assert_eq!((base.size, base.coverage), (40 << 20, Coverage::Data));
        assert_eq!(base, make(7, 12_345_678, true));
        assert_ne!(base, make(8, 12_345_678, false));
        assert_ne!(base, make(7, 12_345_678 + 65_536, false));
    }
}
