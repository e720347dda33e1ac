//! The conformance suite on real QEMU VMs.
//!
//! Needs root, QEMU and an image: `VM0_TEST_IMAGE_DIR=<home>/images/<hash> cargo test -p sandbox-qemu --test
//! conformance [-- FILTER]`. Says what is missing and passes where something is.
#![cfg(test)]

mod common;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use common::{Fixture, with_engine};
use sandbox::conformance::harness::{self, Report};
use sandbox::conformance::{PATIENCE, Subject};
use sandbox::{Engine, Proof, Shape, prove};
use sandbox_qemu::{Accel, Kvm, QemuEngine};

const SHAPE: Shape = Shape {
    vcpu: 1,
    memory_mb: 512,
    disk_mb: 1024,
};

fn main() -> ExitCode {
    match with_engine(SHAPE, suite) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("test result: FAILED before the first case: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn suite(fixture: Fixture) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
    let image = fixture.image;
    let template = harness::Template::new(fixture.snapshot.path(), &fixture.outcome.files)?;
    let subject = Subject {
        template: fixture.template,
        slots: fixture.slots,
        real_guest: true,
        patience: PATIENCE,
        balloon: false,
        device_stats: false,
    };
    let mut report = Report::default();
    let descriptors = harness::open_descriptors()?;
    harness::run(
        &subject,
        &template,
        &harness::filters(),
        |_| None,
        &mut report,
    )
    .await;

    let start = Instant::now();
    let slot = subject.slots.take().await?;
    let limit = Duration::from_secs(120);
    let booted = fixture
        .engine
        .cold_boot(slot, image.clone(), fixture.shape, limit)
        .await;
    let error = match booted {
        Ok(vm) => {
            let answer = vm.control().ping().await.err().map(|e| e.to_string());
            vm.destroy().await?;
            answer
        }
        Err(error) => Some(error.to_string()),
    };
    subject.slots.give_back(slot).await?;
    report.note("an image boots without a snapshot", error, start);

    let findings = QemuEngine::probe();
    if findings.kvm == Kvm::Missing {
        println!(
            "test a boot proves KVM or says why not ... SKIPPED: {}",
            Kvm::Missing
        );
    } else {
        let start = Instant::now();
        let kvm = QemuEngine::new(fixture.launcher.clone(), &findings, Accel::Kvm)?;
        let slot = subject.slots.take().await?;
        let proof = prove(&kvm, slot, image, Duration::from_secs(20)).await;
        subject.slots.give_back(slot).await?;
        println!("     {proof:?}");
        let kvm = &findings.kvm;
        let explained = kvm.suspect().is_some_and(|why| why.contains("/dev/kvm"));
        let error = match proof? {
            Proof::Boots(_) => None,
            Proof::Fails(why) if *kvm == Kvm::Hardware || !explained => Some(why),
            Proof::Fails(_) => None,
        };
        report.note("a boot proves KVM or says why not", error, start);
    }

    let start = Instant::now();
    report.note(
        "the snapshot's files are as they were",
        template.change(),
        start,
    );
    harness::leftovers(&fixture.launcher, descriptors, &mut report).await?;
    Ok(report.finish())
}
