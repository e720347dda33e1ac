//! The conformance suite on real QEMU VMs.
//!
//! Needs root, QEMU and an image: `VM0_TEST_IMAGE_DIR=<home>/images/<hash> cargo test -p sandbox-qemu --test
//! conformance [-- FILTER]`. Says what is missing and passes where something is.
#![cfg(test)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use guest_control::{ExecSpec, UserSpec};
use host::launcher::{ForkedLauncher, Launcher};
use host::slot::{HostLimits, LeaseKind, Resources, SlotId, SlotRecord};
use host::test_support::TestHost;
use sandbox::conformance::{Slots, Subject, cases};
use sandbox::{Engine, ImageFiles, Progress, SandboxError, Shape, SnapshotInputs};
use sandbox_qemu::{Accel, QemuEngine};

const SHAPE: Shape = Shape {
    vcpu: 1,
    memory_mb: 512,
    disk_mb: 1024,
};

const INSTANCE: &str = "conformance";

struct Printed;

impl Progress for Printed {
    fn step(&self, what: &str) {
        println!("     {what}");
    }
}

struct LauncherSlots(Launcher);

#[async_trait]
impl Slots for LauncherSlots {
    async fn take(&self) -> Result<SlotId, SandboxError> {
        let record = SlotRecord {
            instance: INSTANCE.to_owned(),
            kind: LeaseKind::Firm,
            resources: Resources {
                vcpu: SHAPE.vcpu,
                memory_mb: SHAPE.memory_mb,
                disk_mb: SHAPE.disk_mb,
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
        Ok(self.0.reserve(record, plenty).await?)
    }

    async fn give_back(&self, slot: SlotId) -> Result<(), SandboxError> {
        Ok(self.0.release(slot).await?)
    }
}

fn main() -> ExitCode {
    let Some(image) = std::env::var_os("VM0_TEST_IMAGE_DIR").map(PathBuf::from) else {
        println!("SKIPPED: VM0_TEST_IMAGE_DIR names no image (build one with `runner build`)");
        return ExitCode::SUCCESS;
    };
    let findings = QemuEngine::probe();
    if let Err(why) = &findings.qemu {
        println!("SKIPPED: {why}");
        return ExitCode::SUCCESS;
    }
    let Some(host) = TestHost::new() else {
        return ExitCode::SUCCESS;
    };
    let forked = ForkedLauncher::fork(host.config(INSTANCE)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let failed = runtime.block_on(async {
        let launcher = forked.attach().unwrap();
        let engine = QemuEngine::new(launcher.clone(), &findings, Accel::Tcg).unwrap();
        suite(&engine, launcher, &image).await
    });
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        println!("{failed} failed");
        ExitCode::FAILURE
    }
}

fn files(image: &Path) -> ImageFiles {
    ImageFiles {
        kernel: image.join("vmlinux"),
        initrd: image.join("initrd.cpio"),
        rootfs: image.join("rootfs.erofs"),
    }
}

async fn suite(engine: &QemuEngine, launcher: Launcher, image: &Path) -> usize {
    let slots = Arc::new(LauncherSlots(launcher.clone()));
    let dir = tempfile::tempdir_in(image).unwrap();
    let inputs = SnapshotInputs {
        image: files(image),
        shape: SHAPE,
        dir: dir.path().to_owned(),
        warm_up: vec![ExecSpec {
            argv: vec![b"bash".to_vec(), b"-c".to_vec(), b"ls / | wc -l".to_vec()],
            user: UserSpec::User,
            kill_group_on_exit: true,
            ..ExecSpec::default()
        }],
        limit: Duration::from_secs(120),
    };
    let slot = slots.take().await.unwrap();
    let outcome = engine
        .create_snapshot(slot, inputs, &Printed)
        .await
        .unwrap();
    slots.give_back(slot).await.unwrap();
    println!(
        "     cold boot took {:?}; facts {:?}",
        outcome.cold_boot, outcome.facts
    );
    let before = fingerprint(dir.path(), &outcome.files);
    let template = engine
        .open(files(image), SHAPE, dir.path(), &outcome)
        .await
        .unwrap();
    let subject = Subject {
        template,
        slots,
        real_guest: true,
    };
    let filter = std::env::args().nth(1).unwrap_or_default();
    let mut failed = 0;
    let descriptors = open_descriptors();
    for case in cases(&subject) {
        if !case.name.contains(&filter) {
            continue;
        }
        let start = Instant::now();
        match case.run(&subject).await {
            Ok(()) => println!("test {} ... ok ({:?})", case.name, start.elapsed()),
            Err(error) => {
                failed += 1;
                println!("test {} ... FAILED: {error}", case.name);
            }
        }
    }
    let mut check = |name: &str, good: bool| {
        println!("test {name} ... {}", if good { "ok" } else { "FAILED" });
        failed += usize::from(!good);
    };
    check(
        "the snapshot's files are unchanged",
        before == fingerprint(dir.path(), &outcome.files),
    );
    let usage = launcher.usage().await.unwrap();
    check(
        "no slot is left",
        usage.firm_count + usage.revocable_count == 0,
    );
    check("no descriptor is left", open_descriptors() <= descriptors);
    failed
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn fingerprint(dir: &Path, files: &[String]) -> Vec<Vec<u8>> {
    use sha2::Digest;
    files
        .iter()
        .map(|name| sha2::Sha256::digest(std::fs::read(dir.join(name)).unwrap()).to_vec())
        .collect()
}
