//! An emulated aarch64 guest on whatever host this is: boot, snapshot, clone, exec; and tests of ours that want its kernel.
//!
//! Needs root, `qemu-system-aarch64` and an image in `VM0_TEST_AARCH64_INTO`, which `scripts/aarch64.sh` makes. Says what is
//! missing and passes where something is.
#![cfg(test)]

#[expect(dead_code, reason = "the conformance suite uses more of it")]
mod common;

use std::process::ExitCode;

use common::{Failure, Fixture, with};
use guest_control::{ExecSpec, ExitStatus, UserSpec};
use sandbox::{Place, Shape, Vm};
use sandbox_qemu::{Arch, QemuEngine};

const SHAPE: Shape = Shape {
    vcpu: 2,
    memory_mb: 1024,
    disk_mb: 1024,
};
/// What else is to succeed in the guest: command lines, one a line.
const COMMANDS: &str = "VM0_TEST_AARCH64_COMMANDS";

fn main() -> ExitCode {
    let new = |launcher| QemuEngine::foreign(launcher, Arch::Aarch64);
    match with("VM0_TEST_AARCH64_INTO", new, SHAPE, answers) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("test result: FAILED before the first case: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn answers(fixture: Fixture) -> Result<bool, Failure> {
    let slot = fixture.slots.take().await?;
    let vm = fixture.template.restore(Place::unplugged(slot)).await?;
    let (mut passed, mut failed) = (0, 0);
    let mut report = |line: &str, printed: &str, good: bool| {
        let word = if good { "ok" } else { "FAILED" };
        println!("$ {line}\n{printed}test aarch64 guest: {line} ... {word}");
        if good {
            passed += 1
        } else {
            failed += 1
        };
    };
    let (status, printed) = run(vm.as_ref(), "uname -m").await?;
    let good = status == ExitStatus::Exited(0) && printed == "aarch64\n";
    report("uname -m", &printed, good);
    let commands = std::env::var(COMMANDS).unwrap_or_default();
    for line in commands.lines().filter(|line| !line.trim().is_empty()) {
        let (status, printed) = run(vm.as_ref(), line).await?;
        let printed = format!("{printed}({status:?})\n");
        report(line, &printed, status == ExitStatus::Exited(0));
    }
    vm.destroy().await?;
    fixture.slots.give_back(slot).await?;
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("test result: {word}. {passed} passed; {failed} failed");
    Ok(failed == 0)
}

async fn run(vm: &dyn Vm, line: &str) -> Result<(ExitStatus, String), Failure> {
    let spec = ExecSpec {
        argv: ["sh", "-c", line]
            .map(|word| word.as_bytes().to_vec())
            .to_vec(),
        user: UserSpec::Root,
        kill_group_on_exit: true,
        ..ExecSpec::default()
    };
    let session = vm.control().exec(spec).await?;
    let mut output = session.attach(0, true);
    let mut printed = Vec::new();
    while let Some(chunk) = output.next().await {
        printed.extend_from_slice(&chunk.data);
    }
    let report = session.wait().await?;
    Ok((
        report.status,
        String::from_utf8_lossy(&printed).into_owned(),
    ))
}
