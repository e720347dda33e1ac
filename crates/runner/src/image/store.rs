//! The content-addressed store: `images/<rootfs-hash>/` and, in each, `snapshots/<snapshot-hash>/`.
//!
//! A directory under its final name is complete: it was built beside, every file fsynced, its manifest written last, and
//! renamed. Whatever an interrupted build leaves is called `.staging-…` and is never read; the next build removes it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use host::fs::{Access, Dir, Lock, LockKind};
use sandbox::{EngineKind, ImageFiles, SandboxError, Shape, SnapshotOutcome};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::ImageError;
use super::manifest::{self, FORMAT, ImageManifest, SnapshotManifest};
use super::plan::AUTHORITY_INPUT;
use super::progress::Steps;
use super::sets::{BootSet, Family};
use super::staging::{self, Staging, lock_name};
use super::verify::{damaged, verify};
use crate::home::Home;
use crate::home::rel::{self, IMAGES};
use crate::names::ImageHash;
use crate::proxy::Authority;

/// What describes an image or a snapshot, in its directory.
pub(crate) const MANIFEST: &str = "manifest.json";
/// Longest manifest that is read; the full image's package list takes about 30 KiB.
const MAX_MANIFEST: u64 = 4 << 20;
/// Whoever may look into the home's directory of locks may take one: its owner and root.
const LOCK_MODE: u32 = 0o644;
/// How often a build that waits for another looks again.
const LOCK_POLL: Duration = Duration::from_millis(200);

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

/// An image and a snapshot that nobody may remove, or build anew, while this lives.
#[derive(Debug)]
pub(crate) struct InUse {
    locks: [Lock; 2],
}

impl InUse {
    /// Notes that they are used now: what was used last is removed last.
    pub(crate) fn touch(&self) {
        for lock in &self.locks {
            // Somebody else's lock file: then its age is that of the build.
            let _ = rustix::fs::futimens(lock.file(), &NOW);
        }
    }
}

/// Sets the time of modification only.
const NOW: rustix::fs::Timestamps = rustix::fs::Timestamps {
    last_access: rustix::fs::Timespec {
        tv_sec: 0,
        tv_nsec: rustix::fs::UTIME_OMIT,
    },
    last_modification: rustix::fs::Timespec {
        tv_sec: 0,
        tv_nsec: rustix::fs::UTIME_NOW,
    },
};

/// How long somebody who wants to use an image waits for one who looks whether it is used.
const HOLD_LIMIT: Duration = Duration::from_secs(2);
/// How often a build that waits for another makes sure that it is another build.
const USERS_SEEN: u32 = 10;

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
            let _ = rustix::fs::futimens(file, &NOW);
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

    /// A build that failed on a full disk says so, whatever the program's own words were.
    pub(super) fn explain(&self, error: ImageError, need_mb: u64) -> ImageError {
        let full = match &error {
            ImageError::Tool { last, .. } => last
                .iter()
                .any(|line| line.contains("No space left on device")),
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
        rustix::fs::statvfs(self.home.at(Path::new(IMAGES)))
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

    /// Keeps others from removing, or building anew, a snapshot and its image.
    pub(crate) fn hold(
        &self,
        rootfs: &ImageHash,
        snapshot: &ImageHash,
    ) -> Result<InUse, ImageError> {
        let in_use = InUse {
            locks: [
                self.hold_one("image", rootfs)?,
                self.hold_one("snapshot", snapshot)?,
            ],
        };
        in_use.touch();
        Ok(in_use)
    }

    /// Keeps others from removing an image.
    pub(super) fn hold_image(&self, rootfs: &ImageHash) -> Result<Lock, ImageError> {
        self.hold_one("image", rootfs)
    }

    fn hold_one(&self, kind: &'static str, hash: &ImageHash) -> Result<Lock, ImageError> {
        let name = lock_name(kind, hash);
        let begin = std::time::Instant::now();
        loop {
            if let Some(lock) = self.locks.try_lock(&name, LockKind::Shared, LOCK_MODE)? {
                self.give(&lock);
                return Ok(lock);
            }
            if begin.elapsed() > HOLD_LIMIT {
                return Err(ImageError::Busy {
                    what: kind,
                    hash: hash.to_string(),
                    holder: self.holder(&name),
                });
            }
            std::thread::sleep(LOCK_POLL / 10);
        }
    }

    /// A lock that root made is the home owner's too, whose daemon takes it later.
    fn give(&self, lock: &Lock) {
        if rustix::process::geteuid().is_root() {
            let owner = self.home.owner();
            let _ = std::os::unix::fs::fchown(lock.file(), Some(owner.uid), Some(owner.gid));
        }
    }

    fn holder(&self, name: &str) -> Option<u32> {
        let file = self.locks.open_file(name, Access::Read).ok()?;
        host::fs::lock_holder(&file)
    }

    /// Keeps others from building or removing `image-<hash>` or `snapshot-<hash>`; waits for another build, and says
    /// for whom. A running daemon is not waited for.
    pub(super) async fn lock(
        &self,
        kind: &'static str,
        hash: &ImageHash,
        steps: &Steps,
    ) -> Result<Lock, ImageError> {
        let name = lock_name(kind, hash);
        let mut told = false;
        let mut users_seen = 0;
        loop {
            if let Some(lock) = self.locks.try_lock(&name, LockKind::Exclusive, LOCK_MODE)? {
                self.give(&lock);
                return Ok(lock);
            }
            // Who only looks holds a lock for a moment; a daemon is there at every look.
            users_seen = match self.locks.is_locked(&name)? {
                true => 0,
                false => users_seen + 1,
            };
            if users_seen > USERS_SEEN {
                return Err(ImageError::Busy {
                    what: kind,
                    hash: hash.to_string(),
                    holder: self.holder(&name),
                });
            }
            if !told && users_seen == 0 {
                let by = self
                    .holder(&name)
                    .map(|pid| format!(" (process {pid})"))
                    .unwrap_or_default();
                steps.note(&format!(
                    "another build{by} is at work on the same {kind}; waiting for it"
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
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use super::*;

    const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----";

    fn store(path: &Path) -> Store {
        fs::create_dir_all(path.join(rel::CA)).unwrap();
        fs::write(path.join(rel::CA).join("ca.pem"), CERTIFICATE).unwrap();
        Store::open(Arc::new(Home::open_or_create(path).unwrap())).unwrap()
    }

    fn inputs() -> Vec<(String, String)> {
        let authority = manifest::sha256(CERTIFICATE.as_bytes());
        vec![
            ("flavour".to_owned(), "small".to_owned()),
            (AUTHORITY_INPUT.to_owned(), authority),
        ]
    }

    fn hash() -> ImageHash {
        manifest::address(&inputs()).parse().unwrap()
    }

    /// Writes a small image's files and publishes them.
    fn publish(store: &Store) {
        let rel = Path::new(hash().as_str()).to_owned();
        let staging = store.stage(&rel, "image").unwrap();
        let facts = manifest::KernelFacts {
            release: "6.1".to_owned(),
            packages: Vec::new(),
            form: "vmlinux".to_owned(),
            modules: Vec::new(),
        };
        let set = BootSet::new(Family::Qemu, facts);
        for name in set.names() {
            fs::write(staging.path().join(name), name).unwrap();
        }
        let files = staging.seal().unwrap();
        let manifest = ImageManifest {
            format: FORMAT,
            rootfs_hash: hash().to_string(),
            inputs: inputs(),
            files: files.clone(),
            sets: BTreeMap::from([(Family::Qemu, set)]),
            packages: BTreeMap::new(),
            tree_bytes: 0,
            built_at: String::new(),
            runner: String::new(),
            steps: Vec::new(),
        };
        staging.publish(&manifest, &files).unwrap();
    }

    #[test]
    fn what_was_published_is_found_and_what_was_not_is_removed() {
        let temp = tempfile::tempdir().unwrap();
        let store = store(temp.path());
        assert!(matches!(
            store.image(&hash()),
            Err(ImageError::Missing { .. })
        ));
        let rel = Path::new(hash().as_str()).to_owned();
        let staging = store.stage(&rel, "image").unwrap();
        fs::create_dir_all(staging.path().join("work/root/etc")).unwrap();
        drop(staging);
        assert_eq!(fs::read_dir(temp.path().join(IMAGES)).unwrap().count(), 0);
        publish(&store);
        let image = store.image(&hash()).unwrap();
        assert!(image.files(EngineKind::QemuTcg).unwrap().kernel.is_file());
        let error = image.files(EngineKind::Firecracker).unwrap_err();
        assert!(matches!(error, ImageError::NoSet { .. }), "{error}");
        assert_eq!(abandoned_in(temp.path()), 0);
    }

    #[test]
    fn an_image_that_trusts_another_authority_or_none_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let store = store(temp.path());
        publish(&store);
        store.image(&hash()).unwrap();
        let certificate = temp.path().join(rel::CA).join("ca.pem");
        fs::write(&certificate, format!("{CERTIFICATE} of another")).unwrap();
        let refused = store.image(&hash());
        assert!(matches!(refused, Err(ImageError::OtherAuthority)));
        fs::remove_file(&certificate).unwrap();
        let refused = store.image(&hash());
        assert!(matches!(refused, Err(ImageError::NoAuthority)));
    }

    #[test]
    fn what_a_killed_build_left_is_never_used_and_goes_with_the_next_one() {
        let temp = tempfile::tempdir().unwrap();
        let store = store(temp.path());
        let rel = Path::new(hash().as_str()).to_owned();
        // As after kill -9: no destructor runs.
        let staging = store.stage(&rel, "image").unwrap();
        for name in ["vmlinux", "rootfs.erofs", MANIFEST] {
            fs::write(staging.path().join(name), "half").unwrap();
        }
        std::mem::forget(staging);
        let other = manifest::address(&[]);
        fs::create_dir(temp.path().join(IMAGES).join(format!(".staging-{other}"))).unwrap();
        assert!(matches!(
            store.image(&hash()),
            Err(ImageError::Missing { .. })
        ));
        assert_eq!(abandoned_in(temp.path()), 2);
        publish(&store);
        assert_eq!(abandoned_in(temp.path()), 0);
        store.image(&hash()).unwrap();
    }

    #[test]
    fn the_staging_of_a_build_that_runs_is_left_alone() {
        let temp = tempfile::tempdir().unwrap();
        let store = store(temp.path());
        let other: ImageHash = manifest::address(&[]).parse().unwrap();
        let lock = store
            .locks
            .try_lock(lock_name("image", &other), LockKind::Exclusive, 0o600)
            .unwrap();
        let running = temp.path().join(IMAGES).join(format!(".staging-{other}"));
        fs::create_dir(&running).unwrap();
        publish(&store);
        assert!(running.exists());
        assert_eq!(abandoned_in(temp.path()), 0);
        drop(lock);
        assert_eq!(abandoned_in(temp.path()), 1);
    }

    #[test]
    fn an_image_that_was_changed_or_put_under_another_name_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let store = store(temp.path());
        publish(&store);
        let directory = temp.path().join(IMAGES).join(hash().as_str());
        let other: ImageHash = manifest::address(&[]).parse().unwrap();
        let moved = temp.path().join(IMAGES).join(other.as_str());
        fs::rename(&directory, &moved).unwrap();
        assert!(matches!(
            store.image(&other),
            Err(ImageError::Damaged { .. })
        ));
        fs::rename(&moved, &directory).unwrap();
        store.image(&hash()).unwrap();
        fs::remove_file(directory.join("rootfs.erofs")).unwrap();
        fs::write(directory.join("rootfs.erofs"), "ROOTFS.erofs").unwrap();
        assert!(matches!(
            store.image(&hash()),
            Err(ImageError::Damaged { .. })
        ));
        // Building it anew replaces it.
        publish(&store);
        store.image(&hash()).unwrap();
    }

    #[tokio::test]
    async fn a_second_build_waits_for_the_first() {
        let temp = tempfile::tempdir().unwrap();
        let store = store(temp.path());
        let steps = Steps::new();
        let first = store.lock("image", &hash(), &steps).await.unwrap();
        let hash = hash();
        let second = store.lock("image", &hash, &steps);
        tokio::pin!(second);
        // Bounded by the poll interval, whatever the machine's speed: while the lock is held it cannot resolve.
        let early = tokio::time::timeout(LOCK_POLL * 2, &mut second).await;
        assert!(early.is_err());
        drop(first);
        second.await.unwrap();
    }

    #[test]
    fn a_full_disk_is_told_as_such() {
        let temp = tempfile::tempdir().unwrap();
        let store = store(temp.path());
        assert!(matches!(
            store.require_space(u64::MAX),
            Err(ImageError::DiskFull { .. })
        ));
        let tool = ImageError::Tool {
            what: "packing".to_owned(),
            status: "exit status: 1".to_owned(),
            last: vec!["write error: No space left on device".to_owned()],
        };
        let engine = ImageError::Sandbox(SandboxError::Io {
            action: "save the guest's memory".to_owned(),
            source: std::io::ErrorKind::StorageFull.into(),
        });
        for error in [tool, engine] {
            assert!(matches!(
                store.explain(error, 1),
                ImageError::DiskFull { .. }
            ));
        }
    }

    fn abandoned_in(home: &Path) -> usize {
        staging::abandoned(&Dir::open(home).unwrap()).unwrap().len()
    }
}
