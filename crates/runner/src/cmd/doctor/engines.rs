//! The checks of the engines: for each what was found, what a boot of the image has proved, what is missing, and the fix.

use std::time::Duration;

use sandbox::EngineKind;
use sandbox_qemu::{Kvm, QemuEngine};

use super::{Outcome, Subject};
use crate::cmd::setup;
use crate::config::EngineChoice;
use crate::engine::{self, BOOT_LIMIT_SECS, Candidates};
use crate::firecracker::{self, FirecrackerError};
use crate::home::Home;
use crate::image;

/// QEMU, and whether KVM runs the image with it.
pub(super) fn qemu(subject: &Subject<'_>) -> Outcome {
    let found = QemuEngine::probe();
    match found.qemu {
        Ok(qemu) => {
            let path = qemu.path.display();
            let proof = match found.kvm {
                Kvm::Hardware => proved(subject, EngineKind::QemuKvm),
                _ => "emulation needs no proof".to_owned(),
            };
            Outcome::pass(format_args!("{path} {}; {proof}", qemu.version))
        }
        Err(why) if subject.engine == EngineChoice::Firecracker => {
            Outcome::pass(format_args!("{why}; not needed with Firecracker"))
        }
        Err(why) => Outcome::fail(why, "sudo runner setup"),
    }
}

/// Whether `/dev/kvm` is worth a boot.
pub(super) fn kvm(subject: &Subject<'_>) -> Outcome {
    let kvm = Kvm::of_host();
    let found = match subject.engine {
        EngineChoice::Firecracker if kvm == Kvm::NotHardware => {
            format!("{kvm}; Firecracker can be forced to try with a kernel that is made for this")
        }
        EngineChoice::Firecracker => format!("{kvm}; Firecracker cannot run"),
        _ => format!("{kvm}; VMs are emulated in software, 10 to 30 times slower"),
    };
    let root = rustix::process::geteuid().is_root();
    let fix = match &kvm {
        Kvm::Hardware => {
            return Outcome::pass(format_args!("{kvm}; `build` proves it with a boot"));
        }
        Kvm::Denied(_) if !root => {
            return Outcome::warn(
                format_args!("{kvm} (as this user; the runner opens it as root)"),
                "look as root: sudo runner doctor",
            );
        }
        Kvm::Denied(_) => "let this machine use /dev/kvm (its container or sandbox forbids it)",
        Kvm::Missing | Kvm::NotHardware => {
            "use a machine with hardware virtualization, or turn nested virtualization on"
        }
    };
    match subject.engine == EngineChoice::Firecracker && kvm != Kvm::NotHardware {
        true => Outcome::fail(found, fix),
        false => Outcome::warn(found, fix),
    }
}

/// Firecracker's files, and whether the image boots with it.
pub(super) fn firecracker(subject: &Subject<'_>) -> Outcome {
    let fix = match subject.engine {
        EngineChoice::Firecracker => "sudo runner setup --engine firecracker",
        _ => "sudo runner setup",
    };
    let not_wanted = setup::not_wanted(subject.engine, &Kvm::of_host());
    let found = match open(subject) {
        Ok(Some(home)) => firecracker::find(&home),
        Ok(None) => Err(FirecrackerError::NotInstalled),
        Err(outcome) => return outcome,
    };
    match (found, not_wanted) {
        (Ok(found), _) => {
            let proof = proved(subject, EngineKind::Firecracker);
            let (version, kernel) = (found.version(), &found.pins().kernel);
            let text = format!("Firecracker {version}, jailer and {kernel}; {proof}");
            match found.is_own_build() {
                true => Outcome::warn(
                    format_args!("{text}; of a build of your own, not what this runner pins"),
                    format_args!("{fix}, without --firecracker-pins"),
                ),
                false => Outcome::pass(text),
            }
        }
        (Err(FirecrackerError::NotInstalled), Some(reason)) => {
            Outcome::pass(format_args!("not installed and not needed: {reason}"))
        }
        (Err(error), _) if subject.engine == EngineChoice::Firecracker => {
            Outcome::fail(&error, fix)
        }
        (Err(error), _) => Outcome::warn(
            format_args!(
                "{error}; QEMU is used instead, which takes longer to start and more memory"
            ),
            fix,
        ),
    }
}

/// Which engine `build` would take now.
pub(super) fn choice(subject: &Subject<'_>) -> Outcome {
    let home = match open(subject) {
        Ok(Some(home)) => home,
        Ok(None) => return Outcome::pass("`build` chooses it"),
        Err(outcome) => return outcome,
    };
    let limit = Duration::from_secs(BOOT_LIMIT_SECS);
    let candidates = Candidates::probe(subject.engine, limit, &home);
    let order = match candidates.order() {
        Ok(order) => order,
        Err(error) => return Outcome::fail(&error, "sudo runner setup"),
    };
    let mut words = Vec::new();
    for kind in order {
        let record = record(subject, &home, kind);
        let name = engine::describe(kind);
        match (kind, record) {
            (EngineKind::QemuTcg, _) => {
                words.push(name.to_owned());
                break;
            }
            (_, Some(record)) if record.boots => {
                words.push(format!("{name} (proved)"));
                break;
            }
            (_, Some(_)) => words.push(format!("not {name} (the image does not boot)")),
            (_, None) => words.push(format!("{name} if a boot proves it")),
        }
    }
    let text = words.join(", then ");
    match candidates.slow_because(EngineKind::QemuTcg) {
        Some(why)
            if words
                .last()
                .is_some_and(|last| last == engine::describe(EngineKind::QemuTcg)) =>
        {
            Outcome::warn(
                format_args!("{text}: {why}"),
                "use a machine whose KVM boots the image; `runner build` tries it",
            )
        }
        _ => Outcome::pass(text),
    }
}

/// What a boot of the profile's image said of an engine, for a person.
fn proved(subject: &Subject<'_>, kind: EngineKind) -> String {
    let record = match open(subject) {
        Ok(Some(home)) => record(subject, &home, kind),
        _ => None,
    };
    match record {
        Some(record) if record.boots => {
            format!("proved: the image booted in {} ms", record.outcome)
        }
        // The end of the VM's console may follow.
        Some(record) => {
            let why = record.outcome.lines().next().unwrap_or_default();
            format!("tried, and {why}")
        }
        None => "not proved yet (`runner build` does it)".to_owned(),
    }
}

fn record(subject: &Subject<'_>, home: &Home, kind: EngineKind) -> Option<image::proof::Record> {
    let flavour = subject.profile.profile.flavour;
    image::newest_proof(home, flavour, kind).ok().flatten()
}

/// The home, which a look must not make.
fn open(subject: &Subject<'_>) -> Result<Option<Home>, Outcome> {
    if !subject.home.exists() {
        return Ok(None);
    }
    let home = subject.context.home();
    home.map(Some)
        .map_err(|error| Outcome::fail(&error, "use another home with --home DIR"))
}
