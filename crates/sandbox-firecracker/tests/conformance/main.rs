//! The conformance suite on real Firecracker VMs under the real jailer.
//!
//! Needs root, `firecracker` and `jailer` in PATH, a KVM that boots the image, and the image: `VM0_TEST_FIRECRACKER_IMAGE`
//! names a directory with `vmlinux`, `initrd.cpio` and `rootfs.squashfs` or `rootfs.erofs`. Says what is missing and
//! passes where something is. Where guests are slow, `VM0_TEST_PATIENCE` gives every case so many seconds, and
//! `VM0_TEST_FIRECRACKER_KERNEL_ARGS` adds to the kernel's command line.
//! `cargo test -p sandbox-firecracker --test conformance [-- FILTER]`
#![cfg(test)]

mod faults;
mod limits;
mod networks;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_control::ExecSpec;
use host::launcher::{ForkedLauncher, Launcher};
use host::test_support::TestHost;
use host::test_support::net::TestWorld;
use sandbox::conformance::harness::{self, LauncherSlots, Quiet, Report};
use sandbox::conformance::{PATIENCE, Slots, Subject};
use sandbox::{Engine, ImageFiles, Place, Shape, SnapshotOutcome, Template};
use sandbox_firecracker::{FirecrackerEngine, Options, Programs};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const INSTANCE: &str = "firecracker-test";
const SHAPE: Shape = Shape {
    vcpu: 1,
    memory_mb: 256,
    disk_mb: 256,
};

/// How many restores are timed.
const RESTORES: usize = 5;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("test result: FAILED before the first case: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Says so in the words that `scripts/test.sh` counts; like libtest it counts what was skipped as passed first.
fn skipped(why: &str) -> Result<bool, Failure> {
    println!("SKIP firecracker_engine: {why}\ntest result: ok. 1 passed; 0 failed");
    Ok(true)
}

fn run() -> Result<bool, Failure> {
    let Some(image) = std::env::var_os("VM0_TEST_FIRECRACKER_IMAGE").map(PathBuf::from) else {
        return skipped("VM0_TEST_FIRECRACKER_IMAGE names no image for Firecracker");
    };
    let programs = match Programs::find(&std::env::var_os("PATH").unwrap_or_default()) {
        Ok(programs) => programs,
        Err(error) => return skipped(&error.to_string()),
    };
    if let Err(error) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        return skipped(&format!("/dev/kvm: {error}"));
    }
    if rustix::process::geteuid().is_root() {
        own_mounts()?;
    }
    let Some(host) = TestHost::new() else {
        return Ok(true);
    };
    let patience = match std::env::var("VM0_TEST_PATIENCE") {
        Ok(seconds) => Duration::from_secs(seconds.parse()?),
        Err(_) => PATIENCE,
    };
    let options = Options {
        kernel_args: std::env::var("VM0_TEST_FIRECRACKER_KERNEL_ARGS").unwrap_or_default(),
        restore_limit: patience,
        // Where guests are slow, long enough to see a part of it.
        balloon_limit: Options::default().balloon_limit.max(patience / 4),
    };
    // The launcher is forked in it, so a hub is there.
    let world = match networks::missing() {
        None => Some(TestWorld::enter()?),
        Some(_) => None,
    };
    let forked = ForkedLauncher::fork(host.config(INSTANCE))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(async {
        let launcher = forked.attach()?;
        let engine = FirecrackerEngine::new(launcher.clone(), programs, options.clone());
        Suite::new(engine, options, launcher, &image, patience, host.uid_base())
            .await?
            .run()
            .await
    });
    drop(world);
    result
}

/// Goes on in a mount namespace of its own: what a case mounts goes with this process, whatever ends it.
fn own_mounts() -> Result<(), Failure> {
    const THERE: &str = "VM0_TEST_OWN_MOUNTS";
    if std::env::var_os(THERE).is_some() {
        return Ok(());
    }
    let error = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--"])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(THERE, "1")
        .exec();
    Err(format!("unshare (package util-linux): {error}").into())
}

/// Why a case is not run where guests are so slow that patience had to be asked for: it needs millions of system calls, or
/// compares clocks while it makes them.
fn too_much(name: &str, patience: Duration) -> Option<String> {
    const WORK: [&str; 6] = [
        "floods its output",
        "eats its memory",
        "forks without end",
        "fills its disk",
        "come out unchanged",
        "has the right time",
    ];
    let needs = patience > PATIENCE && WORK.iter().any(|part| name.contains(part));
    needs.then(|| "guests are too slow here for so much work (VM0_TEST_PATIENCE is set)".to_owned())
}

/// An engine, a snapshot made with it, and slots.
struct Suite {
    engine: FirecrackerEngine,
    options: Options,
    launcher: Launcher,
    slots: Arc<dyn Slots>,
    image: ImageFiles,
    patience: Duration,
    uid_base: u32,
    snapshot: tempfile::TempDir,
    outcome: SnapshotOutcome,
    template: Arc<dyn Template>,
}

impl Suite {
    async fn new(
        engine: FirecrackerEngine,
        options: Options,
        launcher: Launcher,
        dir: &Path,
        patience: Duration,
        uid_base: u32,
    ) -> Result<Suite, Failure> {
        let rootfs = ["rootfs.squashfs", "rootfs.erofs"].map(|name| dir.join(name));
        let rootfs = rootfs.into_iter().find(|path| path.exists());
        let image = ImageFiles {
            kernel: dir.join("vmlinux"),
            initrd: dir.join("initrd.cpio"),
            rootfs: rootfs.ok_or("the image has no root file system")?,
        };
        let slots = Arc::new(LauncherSlots {
            launcher: launcher.clone(),
            shape: SHAPE,
            instance: INSTANCE.to_owned(),
        });
        let snapshot = tempfile::tempdir_in(dir)?;
        let inputs = harness::snapshot_inputs(image.clone(), SHAPE, snapshot.path(), patience);
        let slot = slots.take().await?;
        let outcome = engine.create_snapshot(slot, inputs, &Quiet).await?;
        println!("     cold boot: {:.1?}", outcome.cold_boot);
        slots.give_back(slot).await?;
        let template = engine
            .open(image.clone(), SHAPE, snapshot.path(), &outcome)
            .await?;
        Ok(Suite {
            engine,
            options,
            launcher,
            slots,
            image,
            patience,
            uid_base,
            snapshot,
            outcome,
            template,
        })
    }

    async fn run(self) -> Result<bool, Failure> {
        let template = harness::Template::new(self.snapshot.path(), &self.outcome.files)?;
        let subject = Subject {
            template: Arc::clone(&self.template),
            slots: Arc::clone(&self.slots),
            real_guest: true,
            patience: self.patience,
            balloon: true,
            device_stats: true,
        };
        let mut report = Report::default();
        let filters = harness::filters();
        let descriptors = harness::open_descriptors()?;
        self.times().await?;
        let skip = |name: &str| too_much(name, self.patience);
        harness::run(&subject, &template, &filters, skip, &mut report).await;
        const BOOTS: &str = "an image boots without a snapshot";
        if harness::wanted(BOOTS, &filters) {
            let start = Instant::now();
            let error = self.boots().await.err().map(|error| error.to_string());
            report.note(BOOTS, error, start);
        }
        const APART: &str = "two clones in networks of their own are told apart";
        const NETWORK: &str = "a clone's network is held to the limits of its profile";
        for name in [APART, NETWORK] {
            if !harness::wanted(name, &filters) {
                continue;
            }
            let start = Instant::now();
            if let Some(reason) = networks::missing() {
                harness::skipped(name, reason, &mut report);
                continue;
            }
            let outcome = match name {
                APART => networks::apart(&self).await,
                _ => limits::network(&self).await,
            };
            let error = outcome.err().map(|error| error.to_string());
            report.note(name, error, start);
        }
        const DISK: &str = "a clone's disk is held to the limits of its profile";
        if harness::wanted(DISK, &filters) {
            let start = Instant::now();
            let error = limits::disk(&self).await.err();
            report.note(DISK, error.map(|error| error.to_string()), start);
        }
        for (name, case) in faults::CASES {
            if harness::wanted(name, &filters) {
                let start = Instant::now();
                let error = case(&self).await.err().map(|error| error.to_string());
                report.note(name, error.or_else(|| template.change()), start);
            }
        }
        harness::leftovers(&self.launcher, descriptors, &mut report).await?;
        Ok(report.finish())
    }

    /// Prints where the time of restores goes, in milliseconds, and how long a clone takes to its first process's end.
    async fn times(&self) -> Result<(), Failure> {
        for _ in 0..RESTORES {
            let slot = self.slots.take().await?;
            let start = Instant::now();
            let vm = self.template.restore(Place::unplugged(slot)).await?;
            let mut line = String::new();
            for (step, took) in vm.steps().0 {
                line.push_str(&format!("{step} {:.1}, ", took.as_secs_f64() * 1e3));
            }
            let first = ExecSpec {
                argv: vec![b"true".to_vec()],
                ..ExecSpec::default()
            };
            vm.control().exec(first).await?.wait().await?;
            let all = start.elapsed().as_secs_f64() * 1e3;
            println!("     {line}first exec ended after {all:.0}");
            vm.destroy().await?;
            self.slots.give_back(slot).await?;
        }
        Ok(())
    }

    async fn boots(&self) -> Result<(), Failure> {
        let slot = self.slots.take().await?;
        let vm = self
            .engine
            .cold_boot(slot, self.image.clone(), SHAPE, self.patience)
            .await?;
        vm.control().ping().await?;
        vm.destroy().await?;
        self.slots.give_back(slot).await?;
        Ok(())
    }
}
