//! The content-addressed store: `images/<rootfs-hash>/` and, in each, `snapshots/<snapshot-hash>/`.
//!
//! A directory under its final name is complete: it was built beside, every file fsynced, its manifest written last, and
//! renamed. Whatever an interrupted build leaves is called `.staging-…` and is never read; the next build removes it.

mod locks;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use host::fs::{Access, Dir, Space};
use sandbox::{EngineKind, ImageFiles, SandboxError, Shape, SnapshotOutcome};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::ImageError;
use super::manifest::{self, FORMAT, ImageManifest, SnapshotManifest};
use super::plan::AUTHORITY_INPUT;
use super::sets::{BootSet, Family};
use super::staging::{self, Staging};
use super::verify::{damaged, verify};
use crate::home::Home;
use crate::home::rel::{self, IMAGES};
use crate::names::ImageHash;
use crate::proxy::Authority;

pub(crate) use locks::InUse;

/// What describes an image or a snapshot, in its directory.
pub(crate) const MANIFEST: &str = "manifest.json";
/// Longest manifest that is read; the full image's package list takes about 30 KiB.
const MAX_MANIFEST: u64 = 4 << 20;

/// An image that was verified.
#[derive(Debug)]
pub(crate) struct Image {
    hash: ImageHash,
    path: PathBuf,
    sets: BTreeMap<Family, BootSet>,
}

impl Image {
    /// What an engine boots of it.
    pub(crate) fn files(&self, kind: EngineKind) -> Result<ImageFiles, ImageError> {
        let family = Family::of(kind);
        let set = self.sets.get(&family).ok_or_else(|| ImageError::NoSet {
            hash: self.hash.to_string(),
            engine: family.name(),
        })?;
        Ok(set.at(&self.path))
    }
}

/// The images of one home.
#[derive(Debug)]
pub(crate) struct Store {
    home: Arc<Home>,
    images: Dir,
    locks: Dir,
}

/// A snapshot that was verified, with its image.
#[derive(Debug)]
pub(crate) struct StoredSnapshot {
    /// Paths for an engine.
    pub(crate) image: ImageFiles,
    /// Size of its VMs.
    pub(crate) shape: Shape,
    /// Its directory.
    pub(crate) directory: PathBuf,
    /// What the engine said of it.
    pub(crate) outcome: SnapshotOutcome,
    /// The whole manifest.
    pub(crate) manifest: SnapshotManifest,
}

impl Store {
    /// Opens the store of a home, making its directories.
    pub(crate) fn open(home: Arc<Home>) -> Result<Self, crate::home::HomeError> {
        let images = home.ensure_dir(IMAGES)?;
        let locks = home.ensure_dir(rel::LOCKS)?;
        Ok(Self {
            home,
            images,
            locks,
        })
    }

    /// Whose images they are.
    pub(super) fn home(&self) -> &Home {
        &self.home
    }

    /// Whether an image of this address is there (its name says it is complete; nothing is verified).
    pub(crate) fn has_image(&self, hash: &ImageHash) -> bool {
        self.images
            .metadata(Path::new(hash.as_str()).join(MANIFEST))
            .is_ok_and(|meta| meta.is_some())
    }

    /// Verifies an image, every byte of it.
    pub(crate) fn image(&self, hash: &ImageHash) -> Result<Image, ImageError> {
        let directory = self.directory(Path::new(hash.as_str()), "image", hash)?;
        let manifest: ImageManifest = read_manifest(&directory)?;
        let wrong = |reason: &str| damaged(&directory, MANIFEST, reason);
        if manifest.format != FORMAT {
            return Err(wrong("it was built by a runner of another version"));
        }
        if manifest.rootfs_hash != hash.as_str()
            || manifest::address(&manifest.inputs) != hash.as_str()
        {
            return Err(wrong("it describes another image"));
        }
        self.check_authority(&manifest.inputs)?;
        let needed: Vec<_> = manifest.sets.values().flat_map(BootSet::names).collect();
        verify(&directory, &manifest.files, &needed)?;
        Ok(Image {
            hash: hash.clone(),
            path: self.path(Path::new(hash.as_str())),
            sets: manifest.sets,
        })
    }

    /// An image that trusts another authority than this home's proxy has would refuse every answer.
    fn check_authority(&self, inputs: &[(String, String)]) -> Result<(), ImageError> {
        let ours = Authority::load(&self.home)?.map(|authority| authority.fingerprint());
        let trusted = inputs.iter().find(|(name, _)| name == AUTHORITY_INPUT);
        match (ours, trusted) {
            (Some(ours), Some((_, trusted))) if ours == *trusted => Ok(()),
            (None, _) => Err(ImageError::NoAuthority),
            _ => Err(ImageError::OtherAuthority),
        }
    }

    /// Verifies a snapshot and its image, every byte of them.
    pub(crate) fn snapshot(
        &self,
        rootfs: &ImageHash,
        snapshot: &ImageHash,
    ) -> Result<StoredSnapshot, ImageError> {
        let image = self.image(rootfs)?;
        let rel = snapshot_rel(rootfs, snapshot);
        let directory = self.directory(&rel, "snapshot", snapshot)?;
        let manifest: SnapshotManifest = read_manifest(&directory)?;
        let wrong = |reason: &str| damaged(&directory, MANIFEST, reason);
        if manifest.format != FORMAT {
            return Err(wrong("it was built by a runner of another version"));
        }
        if manifest.snapshot_hash != snapshot.as_str()
            || manifest.rootfs_hash != rootfs.as_str()
            || manifest::address(&manifest.inputs) != snapshot.as_str()
        {
            return Err(wrong("it describes another snapshot"));
        }
        let needed: Vec<&str> = manifest.outcome.files.iter().map(String::as_str).collect();
        verify(&directory, &manifest.files, &needed)?;
        Ok(StoredSnapshot {
            image: image.files(manifest.engine)?,
            shape: manifest.shape,
            directory: self.path(&rel),
            outcome: manifest.outcome.clone(),
            manifest,
        })
    }

    /// Files beside an image's manifest that are no part of it.
    pub(super) fn read_beside(&self, rootfs: &ImageHash, name: &str) -> Option<Vec<u8>> {
        let path = Path::new(rootfs.as_str()).join(name);
        self.images.read_bounded(path, 4096).ok()
    }

    /// Writes one, as a whole.
    pub(super) fn write_beside(
        &self,
        rootfs: &ImageHash,
        name: &str,
        value: &impl Serialize,
    ) -> Result<(), ImageError> {
        let path = Path::new(rootfs.as_str()).join(name);
        let text = serde_json::to_vec(value).map_err(|source| ImageError::Json {
            path: path.clone(),
            source,
        })?;
        self.images.write_atomic(path, 0o644, &text)?;
        Ok(())
    }

    /// Notes that a snapshot was asked for just now: the newest of a profile is the one a configuration takes.
    pub(super) fn touch(&self, rootfs: &ImageHash, snapshot: &ImageHash) {
        let manifest = snapshot_rel(rootfs, snapshot).join(MANIFEST);
        // Somebody else's home: then the owner's last build stays the newest.
        if let Ok(file) = self.images.open_file(manifest, Access::Read) {
            let _ = rustix::fs::futimens(file, &locks::NOW);
        }
    }

    /// Absolute path of something below `images/`.
    pub(super) fn path(&self, rel: &Path) -> PathBuf {
        self.home.at(Path::new(IMAGES).join(rel))
    }

    /// Where a private apt for these sources keeps its lists.
    pub(super) fn apt_directory(&self, key: &str) -> PathBuf {
        self.path(&Path::new(".apt").join(key.get(..16).unwrap_or(key)))
    }

    /// Refuses to begin what cannot end.
    pub(super) fn require_space(&self, need_mb: u64) -> Result<(), ImageError> {
        let free_mb = self.free_mb();
        if free_mb >= need_mb {
            return Ok(());
        }
        Err(ImageError::DiskFull {
            path: self.home.at(Path::new(IMAGES)),
            free_mb,
            need_mb,
        })
    }

    /// A build that failed on a full disk says where, and how much it takes.
    pub(super) fn explain(&self, error: ImageError, need_mb: u64) -> ImageError {
        let full = match &error {
            // Which disk, it knows best, unless it is this one.
            ImageError::Tool { full, .. } => *full && self.free_mb() < need_mb,
            ImageError::Io { source, .. } => source.kind() == std::io::ErrorKind::StorageFull,
            ImageError::Fs(error) => error.kind() == Some(std::io::ErrorKind::StorageFull),
            ImageError::Sandbox(SandboxError::Io { source, .. }) => {
                source.kind() == std::io::ErrorKind::StorageFull
            }
            _ => false,
        };
        if !full {
            return error;
        }
        ImageError::DiskFull {
            path: self.home.at(Path::new(IMAGES)),
            free_mb: self.free_mb(),
            need_mb,
        }
    }

    /// Free space of the file system that holds the images, MiB.
    fn free_mb(&self) -> u64 {
        Space::of(&self.home.at(Path::new(IMAGES))).map_or(u64::MAX, |space| space.free_mb())
    }

    fn directory(
        &self,
        rel: &Path,
        what: &'static str,
        hash: &ImageHash,
    ) -> Result<Dir, ImageError> {
        self.images
            .open_dir(rel)
            .map_err(|error| match error.is_not_found() {
                true => ImageError::Missing {
                    what,
                    hash: hash.to_string(),
                },
                false => error.into(),
            })
    }

    /// An empty staging directory for `rel` (whose lock is held), after the removal of what dead builds left.
    pub(super) fn stage(&self, rel: &Path, kind: &str) -> Result<Staging, ImageError> {
        let (Some(parent), Some(name)) = (rel.parent(), rel.file_name()) else {
            return Err(ImageError::Missing {
                what: "image",
                hash: rel.display().to_string(),
            });
        };
        let parent_dir = self.home.ensure_dir(Path::new(IMAGES).join(parent))?;
        staging::sweep(&parent_dir, &self.locks, kind, name)?;
        Staging::begin(parent_dir, &self.path(parent), name, self.home.owner())
    }
}

/// `<rootfs-hash>/snapshots/<snapshot-hash>`.
pub(super) fn snapshot_rel(rootfs: &ImageHash, snapshot: &ImageHash) -> PathBuf {
    Path::new(rootfs.as_str())
        .join("snapshots")
        .join(snapshot.as_str())
}

fn read_manifest<T: DeserializeOwned>(directory: &Dir) -> Result<T, ImageError> {
    let bytes = directory.read_bounded(MANIFEST, MAX_MANIFEST)?;
    serde_json::from_slice(&bytes).map_err(|source| ImageError::Json {
        path: directory.display_path(MANIFEST),
        source,
    })
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
