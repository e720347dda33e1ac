//! The content-addressed store: `images/<rootfs-hash>/` and, in each, `snapshots/<snapshot-hash>/`.
//!
//! A directory under its final name is complete: it was built beside, every file fsynced, its manifest written last, and
//! renamed. Whatever an interrupted build leaves is called `.staging-…` and is never read; the next build removes it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use host::fs::{Access, Dir, FsError, Lock, LockKind};
use sandbox::{ImageFiles, Shape, SnapshotOutcome};
use sandbox_qemu::Accel;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::ImageError;
use super::manifest::{self, FORMAT, FileEntry, ImageManifest, SnapshotManifest};
use super::progress::Steps;
use crate::engine::Candidates;
use crate::home::Home;
use crate::home::rel::{self, IMAGES};
use crate::names::ImageHash;

const MANIFEST: &str = "manifest.json";
const STAGING: &str = ".staging-";
/// Longest manifest that is read; the full image's package list takes about 30 KiB.
const MAX_MANIFEST: u64 = 4 << 20;
/// How often a build that waits for another looks again.
const LOCK_POLL: Duration = Duration::from_millis(200);

/// Names of an image's files.
pub(super) const KERNEL: &str = "vmlinux";
/// The initramfs.
pub(super) const INITRD: &str = "initrd.cpio";
/// The root file system.
pub(super) const ROOTFS: &str = "rootfs.erofs";

/// Beside an image's manifest: whether it boots with this host's KVM. Not part of the image.
const PROOF: &str = "kvm-proof.json";

#[derive(Serialize, Deserialize)]
struct KvmProof {
    /// QEMU and host it was made with.
    holds_for: String,
    boots: bool,
}

/// The images of one home.
#[derive(Debug)]
pub(crate) struct Store {
    home: Arc<Home>,
    images: Dir,
    locks: Dir,
}

/// An image that was verified.
#[derive(Debug)]
pub(crate) struct StoredImage {
    /// Paths for an engine.
    pub(crate) files: ImageFiles,
    /// What it consists of.
    pub(crate) manifest: ImageManifest,
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

    /// Whether an image of this address is there (its name says it is complete; nothing is verified).
    pub(crate) fn has_image(&self, hash: &ImageHash) -> bool {
        self.images
            .metadata(Path::new(hash.as_str()).join(MANIFEST))
            .is_ok_and(|meta| meta.is_some())
    }

    /// Verifies an image, every byte of it.
    pub(crate) fn image(&self, hash: &ImageHash) -> Result<StoredImage, ImageError> {
        let directory = self.directory(Path::new(hash.as_str()), "image", hash)?;
        let manifest: ImageManifest = read_manifest(&directory)?;
        let wrong = |reason: &str| damaged(&directory, MANIFEST, reason.to_owned());
        if manifest.format != FORMAT {
            return Err(wrong("it was built by a runner of another version"));
        }
        if manifest.rootfs_hash != hash.as_str()
            || manifest::address(&manifest.inputs) != hash.as_str()
        {
            return Err(wrong("it describes another image"));
        }
        verify(&directory, &manifest.files, &[KERNEL, INITRD, ROOTFS])?;
        let path = self.path(Path::new(hash.as_str()));
        let files = ImageFiles {
            kernel: path.join(KERNEL),
            initrd: path.join(INITRD),
            rootfs: path.join(ROOTFS),
        };
        Ok(StoredImage { files, manifest })
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
        let wrong = |reason: &str| damaged(&directory, MANIFEST, reason.to_owned());
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
            image: image.files,
            shape: manifest.shape,
            directory: self.path(&rel),
            outcome: manifest.outcome.clone(),
            manifest,
        })
    }

    /// How this host runs an image, where that needs no proof or has one: emulation where there is no KVM.
    pub(crate) fn proved(&self, rootfs: &ImageHash, candidates: &Candidates) -> Option<Accel> {
        if candidates.best() == Accel::Tcg {
            return Some(Accel::Tcg);
        }
        let bytes = self
            .images
            .read_bounded(Path::new(rootfs.as_str()).join(PROOF), 4096)
            .ok()?;
        let proof: KvmProof = serde_json::from_slice(&bytes).ok()?;
        let accel = if proof.boots { Accel::Kvm } else { Accel::Tcg };
        (proof.holds_for == candidates.proof_key()).then_some(accel)
    }

    /// Keeps the outcome of a proof with the image.
    pub(super) fn record_proof(
        &self,
        rootfs: &ImageHash,
        candidates: &Candidates,
        accel: Accel,
    ) -> Result<(), ImageError> {
        let path = Path::new(rootfs.as_str()).join(PROOF);
        let proof = KvmProof {
            holds_for: candidates.proof_key(),
            boots: accel == Accel::Kvm,
        };
        let text = serde_json::to_vec(&proof).map_err(|source| ImageError::Json {
            path: path.clone(),
            source,
        })?;
        self.images.write_atomic(path, 0o644, &text)?;
        Ok(())
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
            path: self.path(Path::new("")),
            free_mb,
            need_mb,
        })
    }

    /// A build that failed on a full disk says so, whatever the program's own words were.
    pub(super) fn explain(&self, error: ImageError, need_mb: u64) -> ImageError {
        let full = match &error {
            ImageError::Tool { last, .. } => last
                .iter()
                .any(|line| line.contains("No space left on device")),
            ImageError::Io { source, .. } => source.kind() == std::io::ErrorKind::StorageFull,
            ImageError::Fs(error) => error.kind() == Some(std::io::ErrorKind::StorageFull),
            _ => false,
        };
        if !full {
            return error;
        }
        ImageError::DiskFull {
            path: self.path(Path::new("")),
            free_mb: self.free_mb(),
            need_mb,
        }
    }

    /// Free space of the file system that holds the images, MiB.
    fn free_mb(&self) -> u64 {
        rustix::fs::statvfs(self.path(Path::new("")))
            .map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) >> 20)
            .unwrap_or(u64::MAX)
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

    /// Keeps others from building or removing `image-<hash>` or `snapshot-<hash>`; waits, and says for whom.
    pub(super) async fn lock(
        &self,
        kind: &str,
        hash: &ImageHash,
        steps: &Steps,
    ) -> Result<Lock, ImageError> {
        let name = lock_name(kind, hash);
        let mut told = false;
        loop {
            if let Some(lock) = self.locks.try_lock(&name, LockKind::Exclusive, 0o600)? {
                return Ok(lock);
            }
            if !told {
                let holder = self
                    .locks
                    .open_file(&name, Access::Read)
                    .ok()
                    .and_then(|file| host::fs::lock_holder(&file));
                let by = holder
                    .map(|pid| format!(" (process {pid})"))
                    .unwrap_or_default();
                steps.note(&format!(
                    "another runner{by} is building the same {kind}; waiting for it"
                ));
                told = true;
            }
            tokio::select! {
                () = tokio::time::sleep(LOCK_POLL) => {}
                () = steps.interrupted() => return Err(ImageError::Interrupted),
            }
        }
    }

    /// An empty staging directory for `rel` (whose lock is held), after the removal of what dead builds left.
    pub(super) fn stage(&self, rel: &Path, kind: &str) -> Result<Staging<'_>, ImageError> {
        let (Some(parent), Some(name)) = (rel.parent(), rel.file_name()) else {
            return Err(ImageError::Missing {
                what: "image",
                hash: rel.display().to_string(),
            });
        };
        let parent_dir = if parent.as_os_str().is_empty() {
            self.images.try_clone()?
        } else {
            self.home.ensure_dir(Path::new(IMAGES).join(parent))?
        };
        self.sweep(&parent_dir, kind, name)?;
        let mut staging_name = std::ffi::OsString::from(STAGING);
        staging_name.push(name);
        // Closed to everybody while the tree holds a setuid sudo of unknown completeness.
        let directory = parent_dir.create_new_dir(&staging_name, 0o700)?;
        let path = self.path(parent).join(&staging_name);
        Ok(Staging {
            store: self,
            parent: parent_dir,
            directory,
            path,
            name: staging_name.into(),
            target: name.into(),
        })
    }

    /// Removes what builds that no longer run have left beside `ours`.
    fn sweep(&self, parent: &Dir, kind: &str, ours: &OsStr) -> Result<(), ImageError> {
        for entry in parent.list()? {
            let Some(hash) = entry
                .name
                .to_str()
                .and_then(|name| name.strip_prefix(STAGING))
            else {
                continue;
            };
            // Its builder holds the lock of its name; of ours the holder is us.
            let _dead = match hash.parse::<ImageHash>() {
                Ok(_) if OsStr::new(hash) == ours => None,
                Ok(hash) => {
                    match self
                        .locks
                        .try_lock(lock_name(kind, &hash), LockKind::Exclusive, 0o600)?
                    {
                        Some(lock) => Some(lock),
                        None => continue,
                    }
                }
                Err(_) => continue,
            };
            parent.remove_tree(&entry.name)?;
        }
        Ok(())
    }
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
            let hash = entry
                .name
                .to_str()
                .and_then(|name| name.strip_prefix(STAGING)?.parse::<ImageHash>().ok());
            if let Some(hash) = hash
                && !home.is_locked(Path::new(rel::LOCKS).join(lock_name(kind, &hash)))?
            {
                found.push(Path::new(IMAGES).join(&place).join(&entry.name));
            }
        }
    }
    Ok(found)
}

fn lock_name(kind: &str, hash: &ImageHash) -> String {
    format!("{kind}-{hash}.lock")
}

/// `<rootfs-hash>/snapshots/<snapshot-hash>`.
pub(super) fn snapshot_rel(rootfs: &ImageHash, snapshot: &ImageHash) -> PathBuf {
    Path::new(rootfs.as_str())
        .join("snapshots")
        .join(snapshot.as_str())
}

/// A directory being built. Dropped before it is published, it is removed.
#[derive(Debug)]
pub(super) struct Staging<'a> {
    store: &'a Store,
    parent: Dir,
    directory: Dir,
    path: PathBuf,
    name: PathBuf,
    target: PathBuf,
}

impl Staging<'_> {
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
        let owner = self.store.home.owner();
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
            give(&file, owner, &path)?;
            file.sync_all().map_err(io("flush", &path))?;
            files.insert(name, manifest::measure(&file).map_err(io("read", &path))?);
        }
        Ok(files)
    }

    /// Writes the manifest and gives the directory its name, replacing what was damaged there.
    pub(super) fn publish(self, manifest: &impl Serialize) -> Result<(), ImageError> {
        let path = self.path.join(MANIFEST);
        let mut text = serde_json::to_vec_pretty(manifest).map_err(|source| ImageError::Json {
            path: path.clone(),
            source,
        })?;
        text.push(b'\n');
        self.directory.write_atomic(MANIFEST, 0o444, &text)?;
        let owner = self.store.home.owner();
        let file = self.directory.open_file(MANIFEST, Access::Read)?;
        give(&file, owner, &path)?;
        if rustix::process::geteuid().is_root() {
            self.directory.set_owner(owner.uid, owner.gid)?;
        }
        self.directory.set_mode(0o755)?;
        self.directory.sync()?;
        self.parent.remove_tree(&self.target)?;
        self.parent.rename(&self.name, &self.parent, &self.target)?;
        self.parent.sync()?;
        Ok(())
    }
}

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        // Published, it has no such name any more. What cannot be removed now is removed by the next build.
        let _ = self.parent.remove_tree(&self.name);
    }
}

fn give(file: &std::fs::File, owner: crate::home::Account, path: &Path) -> Result<(), ImageError> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    std::os::unix::fs::fchown(file, Some(owner.uid), Some(owner.gid))
        .map_err(ImageError::io("change the owner of", path))
}

fn read_manifest<T: DeserializeOwned>(directory: &Dir) -> Result<T, ImageError> {
    let bytes = directory.read_bounded(MANIFEST, MAX_MANIFEST)?;
    serde_json::from_slice(&bytes).map_err(|source| ImageError::Json {
        path: directory.display_path(MANIFEST),
        source,
    })
}

fn damaged(directory: &Dir, name: &str, reason: String) -> ImageError {
    ImageError::Damaged {
        path: directory.display_path(name),
        reason,
    }
}

/// Compares every file with the manifest, and sees that the manifest names what is needed.
fn verify(
    directory: &Dir,
    files: &BTreeMap<String, FileEntry>,
    needed: &[&str],
) -> Result<(), ImageError> {
    if let Some(missing) = needed.iter().find(|name| !files.contains_key(**name)) {
        return Err(damaged(
            directory,
            missing,
            "the manifest does not name it".to_owned(),
        ));
    }
    for (name, expected) in files {
        let file = directory
            .open_file(name, Access::Read)
            .map_err(|error: FsError| match error.is_not_found() {
                true => damaged(directory, name, "it is missing".to_owned()),
                false => error.into(),
            })?;
        let path = directory.display_path(name);
        let size = file
            .metadata()
            .map_err(ImageError::io("examine", &path))?
            .len();
        if size != expected.size {
            return Err(damaged(
                directory,
                name,
                format!("it has {size} bytes, its manifest says {}", expected.size),
            ));
        }
        let found = manifest::measure(&file).map_err(ImageError::io("read", &path))?;
        if found != *expected {
            return Err(damaged(
                directory,
                name,
                "its content is not what its manifest says".to_owned(),
            ));
        }
    }
    Ok(())
}
