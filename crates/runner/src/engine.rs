//! Which engine runs the VMs of this host.
//!
//! The choice is made when a snapshot is built, by proof: that a program is installed or `/dev/kvm` can be opened says
//! nothing, so an engine that depends on KVM is used only where the very image boots with it within a limit. Whoever
//! restores a snapshot later uses the engine that made it.

use std::sync::Arc;
use std::time::Duration;

use host::launcher::Launcher;
use host::slot::{HostLimits, LeaseKind, Resources, SlotRecord};
use sandbox::{Engine, EngineKind, ImageFiles, PROOF_SHAPE, Proof, SandboxError};
use sandbox_firecracker::{FirecrackerEngine, Options, Programs};
use sandbox_qemu::{Accel, Findings, Kvm, QemuEngine};

use crate::config::EngineChoice;
use crate::context::CliError;
use crate::firecracker::{self, Installed};
use crate::home::Home;
use crate::image::{Family, Wanted};
use crate::profile::ProfileSpec;

/// Default of the limit for the boot that proves KVM: with real KVM it takes well under a second.
pub(crate) const BOOT_LIMIT_SECS: u64 = 20;

/// Name of an engine in messages.
const FIRECRACKER: &str = "Firecracker";
const QEMU: &str = "QEMU";

/// What this host could use, before anything was proved.
#[derive(Clone, Debug)]
pub(crate) struct Candidates {
    choice: EngineChoice,
    boot_limit: Duration,
    qemu: Findings,
    /// One sentence where it is not there.
    firecracker: Result<Installed, String>,
}

impl Candidates {
    /// Looks; starts QEMU to ask for its version.
    pub(crate) fn probe(choice: EngineChoice, boot_limit: Duration, home: &Home) -> Self {
        Self {
            choice,
            boot_limit,
            qemu: QemuEngine::probe(),
            firecracker: firecracker::find(home).map_err(|error| error.to_string()),
        }
    }

    /// What may be used, best first; an error where there is nothing, or not what was asked for.
    pub(crate) fn order(&self) -> Result<Vec<EngineKind>, SandboxError> {
        let hardware = self.qemu.kvm == Kvm::Hardware;
        if self.choice == EngineChoice::Firecracker {
            self.firecracker()?;
            // One that has no hardware support may still be made for Firecracker: a forced engine has to prove itself.
            return match &self.qemu.kvm {
                kvm @ (Kvm::Missing | Kvm::Denied(_)) => {
                    Err(unavailable(FIRECRACKER, kvm.to_string()))
                }
                Kvm::Hardware | Kvm::NotHardware => Ok(vec![EngineKind::Firecracker]),
            };
        }
        let mut order = Vec::new();
        if self.choice == EngineChoice::Auto && hardware && self.firecracker.is_ok() {
            order.push(EngineKind::Firecracker);
        }
        match &self.qemu.qemu {
            Ok(_) if hardware => order.extend([EngineKind::QemuKvm, EngineKind::QemuTcg]),
            Ok(_) => order.push(EngineKind::QemuTcg),
            Err(reason) if order.is_empty() => return Err(unavailable(QEMU, reason.clone())),
            Err(_) => {}
        }
        Ok(order)
    }

    /// What an image needs for these engines.
    pub(crate) fn wanted(&self) -> Result<Wanted, SandboxError> {
        let order = self.order()?;
        let has = |family| order.iter().any(|kind| Family::of(*kind) == family);
        Ok(Wanted {
            qemu: has(Family::Qemu),
            firecracker: match has(Family::Firecracker) {
                true => Some(self.firecracker()?.clone()),
                false => None,
            },
        })
    }

    /// Longest time the boot of a proof may take.
    pub(crate) fn boot_limit(&self) -> Duration {
        self.boot_limit
    }

    /// Nothing else is to be used if what was asked for does not work.
    pub(crate) fn is_forced(&self) -> bool {
        self.choice == EngineChoice::Firecracker
    }

    /// What a snapshot made with an engine depends on.
    pub(crate) fn snapshot_key(
        &self,
        kind: EngineKind,
    ) -> Result<Vec<(String, String)>, SandboxError> {
        match accel(kind) {
            Some(accel) => Ok(sandbox_qemu::snapshot_key(self.found_qemu()?, accel)),
            None => firecracker_key(self.firecracker()?),
        }
    }

    /// Which engine and host a proof holds for.
    pub(crate) fn proof_key(&self, kind: EngineKind) -> Result<String, SandboxError> {
        let engine = match accel(kind) {
            Some(_) => self.found_qemu()?.version.clone(),
            None => {
                let pins = self.firecracker()?.pins();
                format!(
                    "{FIRECRACKER} {} ({}, {})",
                    pins.version, pins.firecracker_sha256, pins.kernel_args
                )
            }
        };
        let uname = rustix::system::uname();
        Ok(format!(
            "{engine} on Linux {}",
            uname.release().to_string_lossy()
        ))
    }

    /// The engine; blocks for 100 ms under emulation, which measures a clock.
    pub(crate) fn open(
        &self,
        kind: EngineKind,
        launcher: Launcher,
    ) -> Result<Arc<dyn Engine>, SandboxError> {
        match accel(kind) {
            Some(accel) => Ok(Arc::new(QemuEngine::new(launcher, &self.qemu, accel)?)),
            None => open_firecracker(self.firecracker()?, launcher),
        }
    }

    /// Why VMs are slow here, where they are: one sentence for a person.
    pub(crate) fn slow_because(&self, kind: EngineKind) -> Option<String> {
        const SLOW: &str = "VMs are emulated in software, 10 to 30 times slower";
        match (kind, &self.qemu.kvm) {
            (EngineKind::QemuTcg, Kvm::Hardware) => {
                let why = "the image does not boot with this host's KVM";
                Some(format!("{why}: {SLOW}"))
            }
            (EngineKind::QemuTcg, kvm) => Some(format!("{kvm}: {SLOW}")),
            _ => None,
        }
    }

    /// What may be behind a boot that failed.
    pub(crate) fn suspect(&self) -> Option<String> {
        self.qemu.kvm.suspect()
    }

    fn found_qemu(&self) -> Result<&sandbox_qemu::Qemu, SandboxError> {
        let qemu = self.qemu.qemu.as_ref();
        qemu.map_err(|reason| unavailable(QEMU, reason.clone()))
    }

    fn firecracker(&self) -> Result<&Installed, SandboxError> {
        let found = self.firecracker.as_ref();
        found.map_err(|reason| unavailable(FIRECRACKER, reason.clone()))
    }
}

#[cfg(test)]
impl Candidates {
    /// A host of this kind; nothing of it exists.
    pub(crate) fn for_tests(choice: EngineChoice, kvm: Kvm, qemu: bool, firecracker: bool) -> Self {
        let qemu = match qemu {
            true => Ok(sandbox_qemu::Qemu {
                path: "/usr/bin/qemu".into(),
                version: "8.2".to_owned(),
            }),
            false => Err("no QEMU here".to_owned()),
        };
        Self {
            choice,
            boot_limit: Duration::from_secs(20),
            qemu: Findings { qemu, kvm },
            firecracker: match firecracker {
                true => Ok(Installed::for_tests()),
                false => Err("no Firecracker here".to_owned()),
            },
        }
    }
}

/// How QEMU runs CPUs; nothing for other engines.
fn accel(kind: EngineKind) -> Option<Accel> {
    match kind {
        EngineKind::QemuKvm => Some(Accel::Kvm),
        EngineKind::QemuTcg => Some(Accel::Tcg),
        EngineKind::Firecracker | EngineKind::Fake => None,
    }
}

fn unavailable(engine: &'static str, reason: String) -> SandboxError {
    SandboxError::Unavailable { engine, reason }
}

/// What a snapshot made by Firecracker depends on.
fn firecracker_key(installed: &Installed) -> Result<Vec<(String, String)>, SandboxError> {
    let version = installed
        .version()
        .parse()
        .map_err(|reason| unavailable(FIRECRACKER, reason))?;
    let mut key = sandbox_firecracker::snapshot_key(version, &options(installed));
    // Builds of one version can differ.
    let hash = installed.pins().firecracker_sha256.to_string();
    key.push(("firecracker".to_owned(), hash));
    Ok(key)
}

/// Firecracker under its jailer.
fn open_firecracker(
    installed: &Installed,
    launcher: Launcher,
) -> Result<Arc<dyn Engine>, SandboxError> {
    let programs = Programs::open(&installed.firecracker(), &installed.jailer())?;
    let engine = FirecrackerEngine::new(launcher, programs, options(installed));
    Ok(Arc::new(engine))
}

/// What belongs to the guest kernel that was pinned.
fn options(installed: &Installed) -> Options {
    Options {
        kernel_args: installed.pins().kernel_args.clone(),
        ..Options::default()
    }
}

/// The engine that made a snapshot, for restoring it.
pub(crate) fn of_snapshot(
    kind: EngineKind,
    launcher: Launcher,
    home: &Home,
) -> Result<Arc<dyn Engine>, SandboxError> {
    let limit = Duration::from_secs(BOOT_LIMIT_SECS);
    Candidates::probe(EngineChoice::Auto, limit, home).open(kind, launcher)
}

/// QEMU, to be driven by hand in benchmarks; nothing where the snapshot is of another engine.
pub(crate) fn driven_by_hand(
    kind: EngineKind,
    launcher: Launcher,
) -> Result<Option<QemuEngine>, SandboxError> {
    accel(kind)
        .map(|accel| QemuEngine::new(launcher, &QemuEngine::probe(), accel))
        .transpose()
}

/// Names an engine for a person.
pub(crate) fn describe(kind: EngineKind) -> &'static str {
    match kind {
        EngineKind::Firecracker => "Firecracker",
        EngineKind::QemuKvm => "QEMU with KVM",
        EngineKind::QemuTcg => "QEMU with software emulation",
        EngineKind::Fake => "the fake engine",
    }
}

/// There is no build of a profile for the engine that was chosen.
pub(crate) fn not_built(profile: &ProfileSpec, choice: EngineChoice) -> CliError {
    let named = &profile.name;
    match choice {
        EngineChoice::Auto => CliError::failed(format_args!("profile {named} has not been built"))
            .with_hint(format_args!("sudo runner build --profile {profile}")),
        choice => {
            let name = choice.name();
            CliError::failed(format_args!(
                "profile {named} has not been built for the engine {name}"
            ))
            .with_hint(format_args!(
                "sudo runner build --engine {name} --profile {profile}"
            ))
        }
    }
}

/// Whether an engine is one that was chosen.
pub(crate) fn is_chosen(choice: EngineChoice, kind: EngineKind) -> bool {
    match choice {
        EngineChoice::Auto => true,
        EngineChoice::Qemu => Family::of(kind) == Family::Qemu,
        EngineChoice::Firecracker => Family::of(kind) == Family::Firecracker,
    }
}

/// Boots the image; the VM is gone when this returns.
pub(crate) async fn prove(
    candidates: &Candidates,
    kind: EngineKind,
    image: ImageFiles,
    launcher: &Launcher,
) -> Result<Proof, SandboxError> {
    let engine = candidates.open(kind, launcher.clone())?;
    let record = SlotRecord {
        instance: format!("proof-{}", std::process::id()),
        kind: LeaseKind::Firm,
        resources: Resources {
            vcpu: PROOF_SHAPE.vcpu,
            memory_mb: PROOF_SHAPE.memory_mb,
            disk_mb: PROOF_SHAPE.disk_mb,
        },
        run_id: None,
        shared_mb: 0,
    };
    let slot = launcher.reserve(record, UNLIMITED).await?;
    let proof = sandbox::prove(engine.as_ref(), slot, image, candidates.boot_limit).await;
    launcher.release(slot).await?;
    Ok(match (proof?, candidates.suspect()) {
        (Proof::Fails(why), Some(suspect)) => Proof::Fails(format!("{why} ({suspect})")),
        (proof, _) => proof,
    })
}

/// For what a person has just asked for: it runs now, and is counted so that runners see it.
pub(crate) const UNLIMITED: HostLimits = HostLimits {
    total: Resources {
        vcpu: u32::MAX,
        memory_mb: u64::MAX,
        disk_mb: u64::MAX,
    },
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_that_may_work_comes_first() {
        use EngineChoice::{Auto, Firecracker, Qemu};
        use EngineKind::{Firecracker as Fc, QemuKvm, QemuTcg};
        for (choice, kvm, qemu, firecracker, expected) in [
            (Auto, Kvm::Hardware, true, true, vec![Fc, QemuKvm, QemuTcg]),
            (Auto, Kvm::Hardware, true, false, vec![QemuKvm, QemuTcg]),
            (Auto, Kvm::Hardware, false, true, vec![Fc]),
            (Auto, Kvm::NotHardware, true, true, vec![QemuTcg]),
            (Auto, Kvm::Missing, true, true, vec![QemuTcg]),
            (Qemu, Kvm::Hardware, true, true, vec![QemuKvm, QemuTcg]),
            (Firecracker, Kvm::Hardware, true, true, vec![Fc]),
            (Firecracker, Kvm::NotHardware, false, true, vec![Fc]),
        ] {
            let found = Candidates::for_tests(choice, kvm, qemu, firecracker);
            assert_eq!(found.order().unwrap(), expected);
            let wanted = found.wanted().unwrap();
            assert_eq!(wanted.qemu, expected.contains(&QemuTcg));
            assert_eq!(wanted.firecracker.is_some(), expected.contains(&Fc));
        }
    }

    #[test]
    fn what_was_asked_for_and_is_not_there_is_told() {
        use EngineChoice::{Auto, Firecracker, Qemu};
        for (choice, kvm, qemu, firecracker, word) in [
            (Auto, Kvm::Missing, false, true, "no QEMU here"),
            (Qemu, Kvm::Hardware, false, true, "no QEMU here"),
            (
                Firecracker,
                Kvm::Hardware,
                true,
                false,
                "no Firecracker here",
            ),
            (Firecracker, Kvm::Missing, true, true, "no /dev/kvm"),
            (
                Firecracker,
                Kvm::Denied("not you".to_owned()),
                true,
                true,
                "not you",
            ),
        ] {
            let found = Candidates::for_tests(choice, kvm, qemu, firecracker);
            let error = found.order().unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn snapshots_of_another_command_line_have_another_key() {
        let mut found = Candidates::for_tests(EngineChoice::Auto, Kvm::Hardware, true, true);
        let key = found.snapshot_key(EngineKind::Firecracker).unwrap();
        let proof = found.proof_key(EngineKind::Firecracker).unwrap();
        found.firecracker = Ok(Installed::for_tests().with_args("quiet"));
        assert_ne!(found.snapshot_key(EngineKind::Firecracker).unwrap(), key);
        assert_ne!(found.proof_key(EngineKind::Firecracker).unwrap(), proof);
    }
}
