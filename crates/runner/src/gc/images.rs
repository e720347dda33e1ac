//! Images, their snapshots, and what builds that died left of either.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use host::fs::{Dir, EntryKind, FsError, LockKind};

use super::{Collector, Kind, modified, size};
use crate::home::rel::{self, IMAGES, LOCKS};
use crate::image::{MANIFEST, lock_name, staged, staging_name};
use crate::names::ImageHash;

/// Something with a lock of its own.
struct Found {
    rootfs: ImageHash,
    /// `None`: the image itself.
    snapshot: Option<ImageHash>,
    used: SystemTime,
    bytes: u64,
}

impl Found {
    fn kind(&self) -> Kind {
        match self.snapshot {
            Some(_) => Kind::Snapshot,
            None => Kind::Image,
        }
    }

    fn hash(&self) -> &ImageHash {
        self.snapshot.as_ref().unwrap_or(&self.rootfs)
    }

    fn path(&self) -> PathBuf {
        match &self.snapshot {
            Some(snapshot) => rel::snapshot(&self.rootfs, snapshot),
            None => rel::image(&self.rootfs),
        }
    }
}

pub(super) fn collect(collector: &mut Collector<'_>) -> Result<(), FsError> {
    let Some(images) = collector.dir(IMAGES)? else {
        return Ok(());
    };
    let Some(locks) = collector.dir(LOCKS)? else {
        // Without it nobody could have built anything here.
        return Ok(());
    };
    leftovers(collector, &images, &locks, Path::new(""), "image")?;
    let mut left: BTreeMap<ImageHash, BTreeSet<ImageHash>> = BTreeMap::new();
    let mut snapshots = Vec::new();
    for rootfs in hashes(&images)? {
        let mine = left.entry(rootfs.clone()).or_default();
        let below = Path::new(rootfs.as_str()).join("snapshots");
        let (dir, hashes) = match listed(&images, &below) {
            Err(error) if error.is_not_found() => continue,
            Ok(listed) => listed,
            Err(error) => {
                // What cannot be looked at is not removed either.
                collector.failed(Kind::Image, &error);
                left.remove(&rootfs);
                continue;
            }
        };
        leftovers(collector, &dir, &locks, &below, "snapshot")?;
        for snapshot in hashes {
            mine.insert(snapshot.clone());
            snapshots.push(Found {
                used: used(&dir, &locks, "snapshot", &snapshot),
                bytes: size(&dir, Path::new(snapshot.as_str())),
                rootfs: rootfs.clone(),
                snapshot: Some(snapshot),
            });
        }
    }
    let configured = match collector.configured() {
        Ok(configured) => configured,
        Err(error) => {
            collector.failed(Kind::Image, &error);
            return Ok(());
        }
    };
    let total = left.keys().fold(0_u64, |sum, rootfs| {
        sum.saturating_add(size(&images, Path::new(rootfs.as_str())))
    });
    let mut over = collector
        .rules
        .images_max
        .map_or(0, |max| total.saturating_sub(max));
    // Used last first; a tie is broken by the name, so that two runs decide alike.
    snapshots.sort_by(|a, b| b.used.cmp(&a.used).then_with(|| a.hash().cmp(b.hash())));
    let latest = collector.rules.keep_latest;
    for (index, found) in snapshots.iter().enumerate().rev() {
        let Some(snapshot) = &found.snapshot else {
            continue;
        };
        let why = if configured.contains(&(found.rootfs.clone(), snapshot.clone())) {
            Some("a runner.yaml names it")
        } else if index < latest {
            Some("it is among the latest")
        } else {
            reason(collector, found.used, over)
        };
        if let Some(why) = why {
            collector.kept(Kind::Snapshot, &found.path(), why);
        } else if remove(collector, &images, &locks, found)? {
            over = over.saturating_sub(found.bytes);
            if let Some(mine) = left.get_mut(&found.rootfs) {
                mine.remove(snapshot);
            }
        }
    }
    for (rootfs, snapshots) in left {
        if !snapshots.is_empty() {
            continue;
        }
        let found = Found {
            used: used(&images, &locks, "image", &rootfs),
            bytes: size(&images, Path::new(rootfs.as_str())),
            rootfs,
            snapshot: None,
        };
        let why = if configured.iter().any(|(named, _)| *named == found.rootfs) {
            Some("a runner.yaml names it")
        } else {
            reason(collector, found.used, over)
        };
        if let Some(why) = why {
            collector.kept(Kind::Image, &found.path(), why);
        } else if remove(collector, &images, &locks, &found)? {
            over = over.saturating_sub(found.bytes);
        }
    }
    Ok(())
}

/// Why something that nobody names stays; `over` is by how much all images are too large.
fn reason(collector: &Collector<'_>, used: SystemTime, over: u64) -> Option<&'static str> {
    if collector.is_young(used) {
        Some("it is younger than the age guard")
    } else if over == 0 && collector.age(used) < collector.rules.images_unused {
        Some("it was used not long ago")
    } else {
        None
    }
}

/// Takes its lock, gives it the name of something unfinished, which nobody reads, and removes that.
fn remove(
    collector: &mut Collector<'_>,
    images: &Dir,
    locks: &Dir,
    found: &Found,
) -> Result<bool, FsError> {
    let lock = lock_name(found.kind().name(), found.hash());
    let held = if collector.rules.dry_run {
        // Not even a lock file is made.
        match locks.is_held(&lock)? {
            true => None,
            false => Some(None),
        }
    } else {
        locks.try_lock(&lock, LockKind::Exclusive, 0o644)?.map(Some)
    };
    let Some(held) = held else {
        collector.kept(found.kind(), &found.path(), "it is in use");
        return Ok(false);
    };
    let parent = match &found.snapshot {
        Some(_) => images.open_dir(Path::new(found.rootfs.as_str()).join("snapshots"))?,
        None => images.try_clone()?,
    };
    let name = found.hash();
    let gone = collector.remove(found.kind(), &found.path(), found.bytes, found.used, || {
        let unfinished = staging_name(name);
        parent.remove_tree(&unfinished)?;
        parent.rename(name.as_str(), &parent, &unfinished)?;
        parent.remove_tree(&unfinished)?;
        locks.remove_file(&lock).map(drop)
    });
    drop(held);
    Ok(gone)
}

/// What builds that no longer run left in one directory: the lock on what they built is free.
fn leftovers(
    collector: &mut Collector<'_>,
    parent: &Dir,
    locks: &Dir,
    below: &Path,
    kind: &str,
) -> Result<(), FsError> {
    for entry in parent.list()? {
        let Some(hash) = staged(&entry.name) else {
            continue;
        };
        let lock = lock_name(kind, &hash);
        let held = match collector.rules.dry_run {
            true if locks.is_held(&lock)? => continue,
            true => None,
            false => match locks.try_lock(&lock, LockKind::Exclusive, 0o644)? {
                Some(held) => Some(held),
                None => continue,
            },
        };
        let name = Path::new(&entry.name);
        let path = Path::new(IMAGES).join(below).join(name);
        let used = modified(parent, name).unwrap_or(collector.now);
        let bytes = size(parent, name);
        collector.remove(Kind::Staging, &path, bytes, used, || {
            parent.remove_tree(name).map(drop)
        });
        drop(held);
    }
    Ok(())
}

/// When it was built or, by its lock, last used by a daemon.
fn used(parent: &Dir, locks: &Dir, kind: &str, hash: &ImageHash) -> SystemTime {
    let built = modified(parent, Path::new(hash.as_str()).join(MANIFEST))
        .or_else(|| modified(parent, hash.as_str()));
    let locked = modified(locks, lock_name(kind, hash));
    built.max(locked).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn listed(images: &Dir, below: &Path) -> Result<(Dir, Vec<ImageHash>), FsError> {
    let dir = images.open_dir(below)?;
    let hashes = hashes(&dir)?;
    Ok((dir, hashes))
}

/// The directories in it whose names are content addresses.
fn hashes(dir: &Dir) -> Result<Vec<ImageHash>, FsError> {
    let names = dir.list()?.into_iter();
    Ok(names
        .filter(|entry| entry.kind == EntryKind::Dir)
        .filter_map(|entry| entry.name.to_str()?.parse().ok())
        .collect())
}
