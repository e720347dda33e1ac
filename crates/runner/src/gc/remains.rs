//! What daemons that are gone left: their directories, and locks of things that are no more.

use std::path::{Path, PathBuf};

use host::fs::{EntryKind, FsError, LockKind};

use super::{Collector, Kind, modified, size};
use crate::home::rel::{self, IMAGES, LOCKS};
use crate::names::{ImageHash, RunId};

/// Directories of instances whose lock is free, but the one whose status people may still want to read.
pub(super) fn instances(collector: &mut Collector<'_>) -> Result<(), FsError> {
    for runner in collector.runners()? {
        let below = rel::instances(&runner);
        let Some(instances) = collector.dir(&below)? else {
            continue;
        };
        let shown = collector.home.shown_instance(&runner);
        for entry in instances.list()? {
            let is_instance = entry
                .name
                .to_str()
                .is_some_and(|name| name.parse::<RunId>().is_ok());
            if !is_instance || entry.kind != EntryKind::Dir || shown.as_ref() == Some(&entry.name) {
                continue;
            }
            let name = PathBuf::from(&entry.name);
            let made = modified(&instances, &name).unwrap_or(collector.now);
            // One that is being made has no lock yet.
            if collector.is_young(made) || instances.is_locked(name.join("lock"))? {
                continue;
            }
            let bytes = size(&instances, &name);
            collector.remove(Kind::Instance, &below.join(&name), bytes, made, || {
                instances.remove_tree(&name).map(drop)
            });
        }
    }
    Ok(())
}

/// Locks on images and snapshots that are not there any more.
pub(super) fn locks(collector: &mut Collector<'_>) -> Result<(), FsError> {
    let Some(locks) = collector.dir(LOCKS)? else {
        return Ok(());
    };
    for entry in locks.list()? {
        let Some((kind, hash)) = entry.name.to_str().and_then(locked) else {
            continue;
        };
        let name = Path::new(&entry.name);
        let used = modified(&locks, name).unwrap_or(collector.now);
        if collector.is_young(used) || exists(collector, kind, &hash)? {
            continue;
        }
        // Whoever waits for this lock notices that its file has gone, and makes another.
        let held = match collector.rules.dry_run {
            true if locks.is_held(name)? => continue,
            true => None,
            false => match locks.try_lock(name, LockKind::Exclusive, 0o644)? {
                Some(held) => Some(held),
                None => continue,
            },
        };
        let bytes = size(&locks, name);
        collector.remove(
            Kind::Lock,
            &Path::new(LOCKS).join(name),
            bytes,
            used,
            || locks.remove_file(name).map(drop),
        );
        drop(held);
    }
    Ok(())
}

/// Of what a file's name is the lock.
fn locked(name: &str) -> Option<(Kind, ImageHash)> {
    let stem = name.strip_suffix(".lock")?;
    let (kind, hash) = stem.split_once('-')?;
    let kind = match kind {
        "image" => Kind::Image,
        "snapshot" => Kind::Snapshot,
        _ => return None,
    };
    Some((kind, hash.parse().ok()?))
}

fn exists(collector: &Collector<'_>, kind: Kind, hash: &ImageHash) -> Result<bool, FsError> {
    let Some(images) = collector.dir(IMAGES)? else {
        return Ok(false);
    };
    if kind == Kind::Image {
        return Ok(images.metadata(hash.as_str())?.is_some());
    }
    for entry in images.list()? {
        let snapshot = Path::new(&entry.name).join("snapshots").join(hash.as_str());
        // Not every entry is an image.
        if images.metadata(snapshot).is_ok_and(|meta| meta.is_some()) {
            return Ok(true);
        }
    }
    Ok(false)
}
