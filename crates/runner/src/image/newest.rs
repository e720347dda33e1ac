//! Which build of a profile is the newest, for a configuration that does not name one.

use std::path::Path;
use std::time::SystemTime;

use host::fs::{Dir, FsError};
use sandbox::EngineKind;
use serde::de::DeserializeOwned;

use super::manifest::{FORMAT, ImageManifest, SnapshotManifest};
use super::proof::{Record, file_name};
use super::store::MANIFEST;
use crate::config::EngineChoice;
use crate::engine::is_chosen;
use crate::home::{Home, HomeError, rel};
use crate::names::ImageHash;
use crate::profile::{Flavour, Profile};

/// Largest manifest, bytes.
const MAX_MANIFEST: u64 = 16 << 20;

/// The newest complete image and snapshot that were built for a profile of this size and flavour, by an engine that was
/// chosen. Nothing but the manifests is looked at; who uses a build verifies it.
pub(crate) fn newest_build(
    home: &Home,
    profile: &Profile,
    engine: EngineChoice,
) -> Result<Option<(ImageHash, ImageHash)>, HomeError> {
    let images = match home.dir().open_dir(rel::IMAGES) {
        Err(error) if error.is_not_found() => return Ok(None),
        other => other?,
    };
    let mut newest: Option<(SystemTime, ImageHash, ImageHash)> = None;
    for rootfs in hashes(&images)? {
        let image = images.open_dir(rootfs.as_str())?;
        if !is_of(&image, profile.flavour) {
            continue;
        }
        let snapshots = match image.open_dir("snapshots") {
            Err(error) if error.is_not_found() => continue,
            other => other?,
        };
        for snapshot in hashes(&snapshots)? {
            let Some((manifest, built)) =
                read::<SnapshotManifest>(&snapshots.open_dir(snapshot.as_str())?, MANIFEST)
            else {
                continue;
            };
            let shape = manifest.shape;
            let fits = manifest.format == FORMAT
                && shape.vcpu == profile.vcpu
                && shape.memory_mb == profile.memory_mb
                && shape.disk_mb == profile.disk_mb
                && is_chosen(engine, manifest.engine);
            if fits && newest.as_ref().is_none_or(|(at, ..)| built > *at) {
                newest = Some((built, rootfs.clone(), snapshot));
            }
        }
    }
    Ok(newest.map(|(_, rootfs, snapshot)| (rootfs, snapshot)))
}

/// The newest statement about an engine that goes with an image of this flavour, whatever came of the boot.
pub(crate) fn newest_proof(
    home: &Home,
    flavour: Flavour,
    kind: EngineKind,
) -> Result<Option<Record>, HomeError> {
    let images = match home.dir().open_dir(rel::IMAGES) {
        Err(error) if error.is_not_found() => return Ok(None),
        other => other?,
    };
    let mut newest: Option<(Record, SystemTime)> = None;
    for rootfs in hashes(&images)? {
        let image = images.open_dir(rootfs.as_str())?;
        if !is_of(&image, flavour) {
            continue;
        }
        let Some((record, at)) = read(&image, &file_name(kind)) else {
            continue;
        };
        if newest.as_ref().is_none_or(|(_, before)| at > *before) {
            newest = Some((record, at));
        }
    }
    Ok(newest.map(|(record, _)| record))
}

/// Whether an image can be used by this runner and is of a flavour.
fn is_of(image: &Dir, flavour: Flavour) -> bool {
    read::<ImageManifest>(image, MANIFEST).is_some_and(|(manifest, _)| {
        manifest.format == FORMAT
            && manifest
                .inputs
                .iter()
                .any(|(name, value)| name == "flavour" && value == flavour.name())
    })
}

/// The directories that are named like a content address; a build in the making is not.
fn hashes(dir: &Dir) -> Result<Vec<ImageHash>, FsError> {
    Ok(dir
        .list()?
        .into_iter()
        .filter_map(|entry| entry.name.to_str()?.parse().ok())
        .collect())
}

/// A file of JSON and when it was written; nothing if it is not there or not readable as one.
fn read<T: DeserializeOwned>(dir: &Dir, name: &str) -> Option<(T, SystemTime)> {
    let name = Path::new(name);
    let bytes = dir.read_bounded(name, MAX_MANIFEST).ok()?;
    let written = dir.metadata(name).ok()??.modified().ok()?;
    Some((serde_json::from_slice(&bytes).ok()?, written))
}
