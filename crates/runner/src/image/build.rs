//! Builds an image: everything in a staging directory, under a lock, named when complete.

use std::collections::BTreeMap;

use super::ImageError;
use super::manifest::{FORMAT, ImageManifest};
use super::plan::{Plan, Request};
use super::progress::Steps;
use super::sets::{BootSet, Family};
use super::store::{Image, Store};
use super::{kernel, rootfs};

/// Programs an image build runs, and the package of each.
pub(crate) const TOOLS: &[(&str, &str)] = &[
    ("mmdebstrap", "mmdebstrap"),
    ("mkfs.erofs", "erofs-utils"),
    ("mkfs.ext4", "e2fsprogs"),
    ("dpkg-deb", "dpkg"),
    ("unshare", "util-linux"),
    ("setpriv", "util-linux"),
    ("lz4", "lz4"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("gzip", "gzip"),
    ("openssl", "openssl"),
];

/// What an image for Firecracker needs beside.
pub(crate) const FIRECRACKER_TOOLS: &[(&str, &str)] = &[("mksquashfs", "squashfs-tools")];

/// Disk space a build needs at its peak, MiB.
pub(super) fn space_mb(request: &Request) -> u64 {
    let flavour = request.profile.flavour;
    let more = request.engines.families().len().saturating_sub(1);
    let more = u64::try_from(more).unwrap_or(0);
    flavour
        .build_space_mb()
        .saturating_add(more.saturating_mul(flavour.packed_mb()))
}

/// Gives the image of a plan, building it if it is not there or damaged.
pub(crate) async fn image(store: &Store, plan: &Plan, steps: &Steps) -> Result<Image, ImageError> {
    if let Some(image) = existing(store, plan, steps)? {
        return Ok(image);
    }
    if !rustix::process::geteuid().is_root() {
        return Err(ImageError::NotRoot);
    }
    if let Some((program, _)) = TOOLS
        .iter()
        .chain(plan.request.profile.flavour.tools())
        .chain(match plan.request.engines.firecracker {
            Some(_) => FIRECRACKER_TOOLS,
            None => &[],
        })
        .find(|(program, _)| !super::tools::Tool::exists(program))
    {
        return Err(ImageError::NoTool {
            program: (*program).to_owned(),
        });
    }
    let _lock = store.lock("image", plan.rootfs_hash(), steps).await?;
    // Whoever held the lock may just have built it.
    if let Some(image) = existing(store, plan, steps)? {
        return Ok(image);
    }
    let result = build(store, plan, steps).await;
    result.map_err(|error| store.explain(error, space_mb(&plan.request)))?;
    store.image(plan.rootfs_hash())
}

/// A damaged image is told and built anew, never used.
fn existing(store: &Store, plan: &Plan, steps: &Steps) -> Result<Option<Image>, ImageError> {
    match store.image(plan.rootfs_hash()) {
        Ok(image) => Ok(Some(image)),
        Err(ImageError::Missing { .. }) => Ok(None),
        Err(error @ (ImageError::Damaged { .. } | ImageError::Json { .. })) => {
            steps.note(&format!("{error}; building it anew"));
            Ok(None)
        }
        Err(other) => Err(other),
    }
}

async fn build(store: &Store, plan: &Plan, steps: &Steps) -> Result<(), ImageError> {
    let rel = std::path::Path::new(plan.rootfs_hash().as_str());
    let flavour = plan.request.profile.flavour;
    store.require_space(space_mb(&plan.request))?;
    let staging = store.stage(rel, "image")?;
    let work = staging.path().join("work");
    std::fs::create_dir(&work).map_err(ImageError::io("create", &work))?;

    let families = plan.request.engines.families();
    let mut sets = BTreeMap::new();
    if families.contains(&Family::Qemu) {
        steps.begin("fetching the kernel");
        let init = &plan.guest.init;
        let facts =
            kernel::build(&plan.apt, &plan.kernel, init, &work, staging.path(), steps).await?;
        sets.insert(Family::Qemu, BootSet::new(Family::Qemu, facts));
    }
    if let Some(firecracker) = &plan.request.engines.firecracker {
        let facts = kernel::pinned(firecracker, &plan.guest.init, staging.path())?;
        sets.insert(
            Family::Firecracker,
            BootSet::new(Family::Firecracker, facts),
        );
    }
    let tree = rootfs::Tree {
        flavour,
        suite: &plan.suite,
        arch: plan.arch,
        guest: &plan.guest,
        authority: &plan.authority,
        work: &work,
    };
    let rootfs = tree
        .build(&plan.apt, &families, staging.path(), steps)
        .await?;

    steps.begin("sealing the image");
    staging.remove("work")?;
    let files = staging.seal()?;
    steps.end();
    staging.publish(
        &ImageManifest {
            format: FORMAT,
            rootfs_hash: plan.rootfs_hash().to_string(),
            inputs: plan.inputs.clone(),
            files: files.clone(),
            sets,
            packages: rootfs.packages,
            tree_bytes: rootfs.tree_bytes,
            built_at: jiff::Timestamp::now().to_string(),
            runner: crate::cli::VERSION.to_owned(),
            steps: steps.seconds(),
        },
        &files,
    )
}
