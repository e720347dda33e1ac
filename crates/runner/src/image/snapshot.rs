//! Takes the snapshot of an image for one size of VM: boot, warm-up, save; under a lock, named when complete.

use std::time::Duration;

use host::launcher::Launcher;
use host::slot::{LeaseKind, Resources, SlotRecord};
use sandbox::{Engine, SandboxError, Shape, SnapshotInputs};
use sandbox_qemu::{Accel, Proof};

use super::ImageError;
use super::manifest::{FORMAT, SnapshotManifest, sha256};
use super::plan::{Plan, content_address};
use super::progress::Steps;
use super::store::{Store, StoredSnapshot, snapshot_rel};
use super::warm_up;
use crate::engine::{self, Candidates, UNLIMITED};
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

/// Decides how the image's VMs run here: with KVM if that was proved or now proves itself, otherwise by emulation.
pub(crate) async fn choose(
    store: &Store,
    plan: &Plan,
    candidates: &Candidates,
    launcher: &Launcher,
    steps: &Steps,
) -> Result<Accel, ImageError> {
    if let Some(known) = store.proved(plan.rootfs_hash(), candidates) {
        return Ok(known);
    }
    steps.begin("proving this host's KVM with a boot of the image");
    let image = store.image(plan.rootfs_hash())?;
    let proof = engine::prove_kvm(candidates, image, launcher).await?;
    steps.end();
    let accel = match &proof {
        Proof::Boots(_) => Accel::Kvm,
        Proof::Fails(why) => {
            steps.note(why);
            Accel::Tcg
        }
    };
    store.record_proof(plan.rootfs_hash(), candidates, accel)?;
    Ok(accel)
}

/// Makes the snapshot, unless somebody else has in the meantime. Its image must have been verified.
pub(crate) async fn make(
    store: &Store,
    plan: &SnapshotPlan,
    engine: &dyn Engine,
    launcher: &Launcher,
    steps: &Steps,
) -> Result<StoredSnapshot, ImageError> {
    let _image = store.hold_image(&plan.rootfs)?;
    let _lock = store.lock("snapshot", &plan.hash, steps).await?;
    if let Some(snapshot) = existing(store, plan, steps)? {
        return Ok(snapshot);
    }
    let result = build(store, plan, engine, launcher, steps).await;
    result.map_err(|error| store.explain(error, plan.space_mb()))?;
    store.snapshot(&plan.rootfs, &plan.hash)
}

async fn build(
    store: &Store,
    plan: &SnapshotPlan,
    engine: &dyn Engine,
    launcher: &Launcher,
    steps: &Steps,
) -> Result<(), ImageError> {
    store.require_space(plan.space_mb())?;
    let image = store.image(&plan.rootfs)?;
    let staging = store.stage(&snapshot_rel(&plan.rootfs, &plan.hash), "snapshot")?;
    let inputs = SnapshotInputs {
        image,
        shape: plan.shape,
        dir: staging.path().to_owned(),
        warm_up: warm_up::all(plan.flavour),
        limit: LIMIT,
    };
    let record = SlotRecord {
        instance: format!("build-{}", std::process::id()),
        kind: LeaseKind::Firm,
        resources: plan.resources(),
        run_id: None,
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
