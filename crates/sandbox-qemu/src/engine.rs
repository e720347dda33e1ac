//! The engine.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use guest_control::MountSource;
use host::launcher::Launcher;
use host::slot::SlotId;
use sandbox::parts::image::OpenImage;
use sandbox::parts::{blocking, disk::make_blank};
use sandbox::{
    Capabilities, Engine, EngineKind, ImageFiles, Place, Progress, SandboxError, Shape,
    SnapshotInputs, SnapshotOutcome, Template, Vm,
};

use crate::disk::{Disk, reopen_read_only};
use crate::machine::{Accel, Arch, Machine, Start};
use crate::probe::{Findings, Qemu, find_qemu};
use crate::snapshot::{FACT_QEMU, FACT_TSC};
use crate::template::QemuTemplate;
use crate::vm::{Plan, Starting};
use crate::{ram, tsc};

/// QEMU on this host, with one way of running CPUs.
pub struct QemuEngine {
    pub(crate) launcher: Launcher,
    pub(crate) qemu: Qemu,
    arch: Arch,
    accel: Accel,
    tsc_khz: Option<u32>,
}

impl QemuEngine {
    /// What this host has; starts QEMU to ask for its version, so it blocks for some tens of milliseconds.
    pub fn probe() -> Findings {
        Findings::probe()
    }

    /// The engine with `accel`, which should have been chosen by a proof ([`sandbox::prove`]). Measures the time
    /// stamp counter where the guest depends on it, so it blocks for 100 ms.
    pub fn new(
        launcher: Launcher,
        findings: &Findings,
        accel: Accel,
    ) -> Result<QemuEngine, SandboxError> {
        let unavailable = |reason: String| SandboxError::Unavailable {
            engine: "QEMU",
            reason,
        };
        let arch = Arch::of_host().ok_or_else(|| {
            unavailable(format!(
                "{} is not a supported architecture",
                std::env::consts::ARCH
            ))
        })?;
        let qemu = findings.qemu.clone().map_err(unavailable)?;
        let tsc_khz = match (arch, accel) {
            (Arch::X86_64, Accel::Tcg) => Some(tsc::measure_khz().ok_or_else(|| {
                unavailable("the CPU's time stamp counter cannot be measured".to_owned())
            })?),
            _ => None,
        };
        Ok(QemuEngine {
            launcher,
            qemu,
            arch,
            accel,
            tsc_khz,
        })
    }

    /// An engine for guests of `arch`, whatever this host is: emulated, and without the clock that x86_64 guests are told.
    pub fn foreign(launcher: Launcher, arch: Arch) -> Result<QemuEngine, SandboxError> {
        let qemu = find_qemu(arch).map_err(|reason| SandboxError::Unavailable {
            engine: "QEMU",
            reason,
        })?;
        Ok(QemuEngine {
            launcher,
            qemu,
            arch,
            accel: Accel::Tcg,
            tsc_khz: None,
        })
    }

    pub(crate) fn machine(&self, shape: Shape) -> Machine {
        Machine {
            arch: self.arch,
            accel: self.accel,
            shape,
            tsc_khz: self.tsc_khz,
        }
    }

    /// The machine of a snapshot, if it can be restored here.
    pub(crate) fn machine_of(
        &self,
        shape: Shape,
        dir: &Path,
        outcome: &SnapshotOutcome,
    ) -> Result<Machine, SandboxError> {
        let bad = |reason: String| SandboxError::BadImage {
            path: dir.to_owned(),
            reason,
        };
        let fact = |name: &str| outcome.facts.get(name).map(String::as_str);
        let made_by = fact(FACT_QEMU).unwrap_or("an unknown version");
        if made_by != self.qemu.version {
            return Err(bad(format!(
                "it was made by QEMU {made_by}, this host has {}",
                self.qemu.version
            )));
        }
        let mut machine = self.machine(shape);
        if let Some(measured) = self.tsc_khz {
            let recorded: u32 = fact(FACT_TSC)
                .and_then(|khz| khz.parse().ok())
                .ok_or_else(|| bad(format!("its manifest has no {FACT_TSC}")))?;
            if !tsc::within_tolerance(recorded, measured) {
                return Err(bad(format!(
                    "it was made where the CPU's counter runs at {recorded} kHz, here it runs at {measured} kHz, so \
                     clocks of its VMs would be wrong"
                )));
            }
            machine.tsc_khz = Some(recorded);
        }
        Ok(machine)
    }
}

/// [`Engine::snapshot_key`] of an engine that is not running: for naming a snapshot without making it.
pub fn snapshot_key(qemu: &Qemu, accel: Accel) -> Vec<(String, String)> {
    let kind = kind(accel);
    let arguments = Arch::of_host().map_or_else(String::new, |arch| {
        let machine = Machine {
            arch,
            accel,
            shape: Shape {
                vcpu: 0,
                memory_mb: 0,
                disk_mb: 0,
            },
            // The counter's frequency is measured, so it is compared when the snapshot is opened and not hashed.
            tsc_khz: matches!((arch, accel), (Arch::X86_64, Accel::Tcg)).then_some(0),
        };
        let words = machine.args(Start::Clone);
        let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        words.join(" ")
    });
    [
        ("engine", format!("{kind:?}")),
        ("qemu_version", qemu.version.clone()),
        ("arguments", arguments),
        ("protocol", guest_control::PROTOCOL_VERSION.to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}

fn kind(accel: Accel) -> EngineKind {
    match accel {
        Accel::Tcg => EngineKind::QemuTcg,
        Accel::Kvm => EngineKind::QemuKvm,
    }
}

#[async_trait]
impl Engine for QemuEngine {
    fn kind(&self) -> EngineKind {
        kind(self.accel)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            balloon: false,
            device_stats: false,
            pause: true,
        }
    }

    fn snapshot_key(&self) -> Vec<(String, String)> {
        snapshot_key(&self.qemu, self.accel)
    }

    async fn create_snapshot(
        &self,
        slot: SlotId,
        inputs: SnapshotInputs,
        progress: &dyn Progress,
    ) -> Result<SnapshotOutcome, SandboxError> {
        self.make_snapshot(slot, inputs, progress).await
    }

    async fn open(
        &self,
        image: ImageFiles,
        shape: Shape,
        snapshot_dir: &Path,
        outcome: &SnapshotOutcome,
    ) -> Result<Arc<dyn Template>, SandboxError> {
        let machine = self.machine_of(shape, snapshot_dir, outcome)?;
        let launcher = self.launcher.clone();
        let program = self.qemu.path.clone();
        let dir = snapshot_dir.to_owned();
        let template =
            blocking(move || QemuTemplate::open(launcher, program, machine, &image, &dir)).await?;
        Ok(Arc::new(template))
    }

    async fn cold_boot(
        &self,
        slot: SlotId,
        image: ImageFiles,
        shape: Shape,
        limit: Duration,
    ) -> Result<Box<dyn Vm>, SandboxError> {
        let since = Instant::now();
        let image = OpenImage::open(&image)?;
        let dir = image.disk_dir.clone();
        let (memory, disk) = blocking(move || {
            let read_write = make_blank(&dir, shape.disk_mb)?;
            let read_only = reopen_read_only(&read_write).map_err(|source| SandboxError::Io {
                action: "open the VM's disk again".to_owned(),
                source,
            })?;
            let disk = Disk {
                read_write,
                read_only,
            };
            Ok((ram::fresh(shape.memory_mb)?, disk))
        })
        .await?;
        let plan = Plan {
            launcher: &self.launcher,
            program: self.qemu.path.clone(),
            place: Place::unplugged(slot),
            machine: self.machine(shape),
            start: Start::Boot,
            image: &image,
            ram: &memory,
            disk,
            state: None,
        };
        let vm = Starting::launch(plan, since)
            .await?
            .bring_up(Start::Boot, MountSource::Disk, limit)
            .await?;
        Ok(Box::new(vm))
    }
}
