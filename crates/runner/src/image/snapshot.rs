//! Takes the snapshot of an image for one size of VM: boot, warm-up, save; under a lock, named when complete.

use std::time::Duration;

use host::launcher::Launcher;
use host::slot::{LeaseKind, Resources, SlotRecord};
use sandbox::{Engine, SandboxError, Shape, SnapshotInputs};

use super::ImageError;
use super::manifest::{FORMAT, SnapshotManifest, sha256};
use super::plan::{Plan, content_address};
use super::progress::Steps;
use super::store::{Store, StoredSnapshot, snapshot_rel};
use super::warm_up;
use crate::engine::UNLIMITED;
use crate::names::ImageHash;
use crate::profile::Flavour;

/// Limit for the boot and for each warm-up process. A boot takes 2 s under emulation and 6 s on a busy host; the real
/// CLI's start-up takes longer.
const LIMIT: Duration = Duration::from_secs(300);

/// Everything that decides what a snapshot will be.
#[derive(Debug)]
pub(crate) struct SnapshotPlan {
    rootfs: ImageHash,
    hash: ImageHash,
    shape: Shape,
    flavour: Flavour,
    inputs: Vec<(String, String)>,
}

impl SnapshotPlan {
    /// `engine_key` is what the engine says a snapshot of it depends on.
    pub(crate) fn make(plan: &Plan, engine_key: Vec<(String, String)>) -> Result<Self, ImageError> {
        let profile = plan.request.profile;
        let shape = Shape {
            vcpu: profile.vcpu,
            memory_mb: profile.memory_mb,
            disk_mb: profile.disk_mb,
        };
        let warm_up = format!("{:?}", warm_up::all(profile.flavour));
        let mut inputs = vec![
            ("format".to_owned(), FORMAT.to_string()),
            ("rootfs".to_owned(), plan.rootfs_hash().to_string()),
            ("vcpu".to_owned(), shape.vcpu.to_string()),
            ("memory_mb".to_owned(), shape.memory_mb.to_string()),
            ("disk_mb".to_owned(), shape.disk_mb.to_string()),
            ("warm_up".to_owned(), sha256(warm_up.as_bytes())),
        ];
        inputs.extend(engine_key);
        let hash = content_address(&inputs)?;
        Ok(Self {
            rootfs: plan.rootfs_hash().clone(),
            hash,
            shape,
            flavour: profile.flavour,
            inputs,
        })
    }

    /// The address of its image.
    pub(crate) fn rootfs_hash(&self) -> &ImageHash {
        &self.rootfs
    }

    /// The snapshot's address.
    pub(crate) fn snapshot_hash(&self) -> &ImageHash {
        &self.hash
    }

    /// What its VM takes of the host.
    fn resources(&self) -> Resources {
        Resources {
            vcpu: self.shape.vcpu,
            memory_mb: self.shape.memory_mb,
            disk_mb: self.shape.disk_mb,
        }
    }

    /// Disk space it needs at most, MiB: the whole memory, the blank disk's tables, some room.
    fn space_mb(&self) -> u64 {
        self.shape.memory_mb.saturating_add(64)
    }
}

/// The verified snapshot of a plan, if it is there. A damaged one is told and counts as missing.
pub(crate) fn existing(
    store: &Store,
    plan: &SnapshotPlan,
    steps: &Steps,
) -> Result<Option<StoredSnapshot>, ImageError> {
    match store.snapshot(&plan.rootfs, &plan.hash) {
        Ok(snapshot) => {
            store.touch(&plan.rootfs, &plan.hash);
            Ok(Some(snapshot))
        }
        Err(ImageError::Missing { .. }) => Ok(None),
        Err(error @ (ImageError::Damaged { .. } | ImageError::Json { .. })) => {
            steps.note(&format!("{error}; making it anew"));
            Ok(None)
        }
        Err(other) => Err(other),
    }
}

/// Makes the snapshot, unless somebody else has in the meantime. Its image must have been verified.
pub(crate) async fn make(
    store: &Store,
    plan: &SnapshotPlan,
    engine: &dyn Engine,
    launcher: &Launcher,
    boot_limit: Duration,
    steps: &Steps,
) -> Result<StoredSnapshot, ImageError> {
    let _image = store.hold_image(&plan.rootfs)?;
    let _lock = store.lock("snapshot", &plan.hash, steps).await?;
    if let Some(snapshot) = existing(store, plan, steps)? {
        return Ok(snapshot);
    }
    let result = build(store, plan, engine, launcher, boot_limit, steps).await;
    result.map_err(|error| store.explain(error, plan.space_mb()))?;
    store.snapshot(&plan.rootfs, &plan.hash)
}

async fn build(
    store: &Store,
    plan: &SnapshotPlan,
    engine: &dyn Engine,
    launcher: &Launcher,
    boot_limit: Duration,
    steps: &Steps,
) -> Result<(), ImageError> {
    store.require_space(plan.space_mb())?;
    let image = store.image(&plan.rootfs)?.files(engine.kind())?;
    let staging = store.stage(&snapshot_rel(&plan.rootfs, &plan.hash), "snapshot")?;
    let inputs = SnapshotInputs {
        image,
        shape: plan.shape,
        dir: staging.path().to_owned(),
        warm_up: warm_up::all(plan.flavour),
        limit: LIMIT.max(boot_limit),
    };
    let record = SlotRecord {
        instance: format!("build-{}", std::process::id()),
        kind: LeaseKind::Firm,
        resources: plan.resources(),
        run_id: None,
        shared_mb: 0,
    };
    let slot = launcher.reserve(record, UNLIMITED).await?;
    let outcome = tokio::select! {
        outcome = engine.create_snapshot(slot, inputs, steps) => outcome.map_err(ImageError::from),
        () = steps.interrupted() => Err(ImageError::Interrupted),
    };
    // Kills and reaps the VM whatever happened.
    let released = launcher.release(slot).await;
    let outcome = outcome?;
    released?;

    steps.begin("sealing the snapshot");
    let files = staging.seal()?;
    if let Some(missing) = outcome.files.iter().find(|name| !files.contains_key(*name)) {
        return Err(SandboxError::BadImage {
            path: staging.path().join(missing),
            reason: "the engine did not write it".to_owned(),
        }
        .into());
    }
    steps.end();
    staging.publish(
        &SnapshotManifest {
            format: FORMAT,
            rootfs_hash: plan.rootfs.to_string(),
            snapshot_hash: plan.hash.to_string(),
            inputs: plan.inputs.clone(),
            files: files.clone(),
            shape: plan.shape,
            engine: engine.kind(),
            outcome,
            built_at: jiff::Timestamp::now().to_string(),
            runner: crate::cli::VERSION.to_owned(),
            steps: steps.seconds(),
        },
        &files,
    )
}
