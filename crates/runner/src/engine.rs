//! Which engine runs the VMs of this host.
//!
//! The choice is made when a snapshot is built, by proof: `/dev/kvm` being openable says nothing, so KVM is used only where
//! the very image boots with it within a limit. Whoever restores a snapshot later uses the engine that made it.

use std::time::Duration;

use host::launcher::Launcher;
use host::slot::{HostLimits, LeaseKind, Resources, SlotRecord};
use sandbox::{EngineKind, ImageFiles, SandboxError};
use sandbox_qemu::{Accel, Findings, Kvm, Proof, Qemu, QemuEngine};

/// Limit for the boot that proves KVM: with real KVM it takes well under a second.
const PROOF_LIMIT: Duration = Duration::from_secs(20);

/// What this host could use, before anything was proved.
#[derive(Clone, Debug)]
pub(crate) struct Candidates {
    findings: Findings,
    qemu: Qemu,
}

impl Candidates {
    /// Looks; starts QEMU to ask for its version.
    pub(crate) fn probe() -> Result<Self, SandboxError> {
        let findings = QemuEngine::probe();
        let qemu = findings
            .qemu
            .clone()
            .map_err(|reason| SandboxError::Unavailable {
                engine: "QEMU",
                reason,
            })?;
        Ok(Self { findings, qemu })
    }

    /// The fastest that may work.
    pub(crate) fn best(&self) -> Accel {
        match self.findings.kvm {
            Kvm::Hardware => Accel::Kvm,
            Kvm::Missing | Kvm::Denied(_) | Kvm::NotHardware => Accel::Tcg,
        }
    }

    /// What a snapshot made with `accel` depends on.
    pub(crate) fn snapshot_key(&self, accel: Accel) -> Vec<(String, String)> {
        sandbox_qemu::snapshot_key(&self.qemu, accel)
    }

    /// Which QEMU and host a proof of KVM holds for.
    pub(crate) fn proof_key(&self) -> String {
        let uname = rustix::system::uname();
        format!(
            "{} on Linux {}",
            self.qemu.version,
            uname.release().to_string_lossy()
        )
    }

    /// The engine with `accel`; blocks for 100 ms under emulation, which measures a clock.
    pub(crate) fn open(
        &self,
        accel: Accel,
        launcher: Launcher,
    ) -> Result<QemuEngine, SandboxError> {
        QemuEngine::new(launcher, &self.findings, accel)
    }

    /// Why VMs are slow here, where they are: one sentence for a person.
    pub(crate) fn slow_because(&self, accel: Accel) -> Option<String> {
        match (accel, &self.findings.kvm) {
            (Accel::Kvm, _) => None,
            (Accel::Tcg, Kvm::Hardware) => {
                Some("the image does not boot with this host's KVM: VMs are emulated in software, 10 to 30 times slower".to_owned())
            }
            (Accel::Tcg, kvm) => Some(format!("{kvm}: VMs are emulated in software, 10 to 30 times slower")),
        }
    }
}

/// The engine that made a snapshot, for restoring it.
pub(crate) fn of_snapshot(
    kind: EngineKind,
    launcher: Launcher,
) -> Result<QemuEngine, SandboxError> {
    let candidates = Candidates::probe()?;
    let accel = match kind {
        EngineKind::QemuTcg => Accel::Tcg,
        EngineKind::QemuKvm => Accel::Kvm,
        EngineKind::Firecracker | EngineKind::Fake => {
            return Err(SandboxError::Unavailable {
                engine: "Firecracker",
                reason: "this runner has no such engine; build the profile again".to_owned(),
            });
        }
    };
    candidates.open(accel, launcher)
}

/// Boots the image with KVM; the VM is gone when this returns.
pub(crate) async fn prove_kvm(
    candidates: &Candidates,
    image: ImageFiles,
    launcher: &Launcher,
) -> Result<Proof, SandboxError> {
    let engine = candidates.open(Accel::Kvm, launcher.clone())?;
    let record = SlotRecord {
        instance: format!("proof-{}", std::process::id()),
        kind: LeaseKind::Firm,
        resources: Resources {
            vcpu: 1,
            memory_mb: 512,
            disk_mb: 64,
        },
        run_id: None,
    };
    let slot = launcher.reserve(record, UNLIMITED).await?;
    let proof = engine.prove(slot, image, PROOF_LIMIT).await;
    launcher.release(slot).await?;
    Ok(proof)
}

/// For what a person has just asked for: it runs now, and is counted so that runners see it.
pub(crate) const UNLIMITED: HostLimits = HostLimits {
    total: Resources {
        vcpu: u32::MAX,
        memory_mb: u64::MAX,
        disk_mb: u64::MAX,
    },
};
