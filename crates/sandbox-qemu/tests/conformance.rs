//! The conformance suite on real QEMU VMs.
//!
//! Needs root, QEMU and an image: `VM0_TEST_IMAGE_DIR=<home>/images/<hash> cargo test -p sandbox-qemu --test
//! conformance [-- FILTER]`. Says what is missing and passes where something is.
#![cfg(test)]

mod common;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use common::{Fixture, with_engine};
use sandbox::conformance::{Subject, cases};
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
    let dir = fixture.snapshot.path();
    let image = fixture.image;
    let before = fingerprint(dir, &fixture.outcome.files)?;
    let subject = Subject {
        template: fixture.template,
        slots: fixture.slots,
        real_guest: true,
    };
    let filter = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'))
        .unwrap_or_default();
    let (mut passed, mut failed) = (0, 0);
    let mut report = |name: &str, error: Option<String>, start: Instant| {
        let took = start.elapsed();
        match error {
            None => {
                passed += 1;
                println!("test {name} ... ok ({took:.1?})");
            }
            Some(error) => {
                failed += 1;
                println!("{name}: after {took:.1?}: {error}\ntest {name} ... FAILED");
            }
        }
    };
    let descriptors = open_descriptors()?;
    let chosen: Vec<_> = cases(&subject)
        .into_iter()
        .filter(|case| case.name.contains(&filter))
        .collect();
    for case in &chosen {
        let start = Instant::now();
        let outcome = case.run(&subject).await;
        report(case.name, outcome.err().map(|e| e.to_string()), start);
    }

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
    report("an image boots without a snapshot", error, start);

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
        report("a boot proves KVM or says why not", error, start);
    }

    let start = Instant::now();
    let same = before == fingerprint(dir, &fixture.outcome.files)?;
    let changed = (!same).then(|| "they changed".to_owned());
    report("the snapshot's files are as they were", changed, start);
    let usage = fixture.launcher.usage().await?;
    let slots = usage.firm_count + usage.revocable_count;
    let left = (slots > 0).then(|| format!("{slots} slots"));
    report("no slot is left", left, start);
    let now = open_descriptors()?;
    let left = (now > descriptors).then(|| format!("{descriptors} before, {now} after"));
    report("no descriptor is left", left, start);
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("test result: {word}. {passed} passed; {failed} failed");
    Ok(failed == 0)
}

fn open_descriptors() -> std::io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/fd")?.count())
}

fn fingerprint(dir: &Path, files: &[String]) -> std::io::Result<Vec<Vec<u8>>> {
    use sha2::Digest;
    files
        .iter()
        .map(|name| Ok(sha2::Sha256::digest(std::fs::read(dir.join(name))?).to_vec()))
        .collect()
}
