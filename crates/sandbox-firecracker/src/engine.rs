//! The engine.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use guest_control::MountSource;
use host::launcher::{JailName, Launcher};
use host::slot::SlotId;
use sandbox::parts::blocking;
use sandbox::parts::disk::make_blank;
use sandbox::parts::image::OpenImage;
use sandbox::{
    Capabilities, Engine, EngineKind, ImageFiles, Place, Progress, SandboxError, Shape,
    SnapshotInputs, SnapshotOutcome, Template, Vm,
};

use crate::machine::{check, command_line, describe};
use crate::process::{Plan, Process, shown};
use crate::programs::{Programs, Version};
use crate::snapshot::{FACT_CPU, FACT_VERSION, cpu_model};
use crate::template::{FirecrackerTemplate, for_boot, private_disk};
use crate::vm::{FirecrackerVm, Limits, Start};

/// What an operator may set.
#[derive(Clone, Debug)]
pub struct Options {
    /// Further words of the guest kernel's command line, for hosts whose CPUs need them. They come last.
    pub kernel_args: String,
    /// How long a restore may take: 50 ms on an idle host, and on one that is far too busy it still gets there.
    pub restore_limit: Duration,
    /// How long a parked VM may run to fill its balloon, and one that is resumed to empty it; what it does not do by
    /// then is left. Must be shorter than [`sandbox::Limits::pause`].
    pub balloon_limit: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            kernel_args: String::new(),
            restore_limit: Duration::from_secs(60),
            balloon_limit: Duration::from_secs(4),
        }
    }
}

/// Firecracker on this host.
pub struct FirecrackerEngine {
    pub(crate) launcher: Launcher,
    pub(crate) programs: Arc<Programs>,
    pub(crate) options: Options,
}

impl FirecrackerEngine {
    /// The engine. That the host's KVM is worth the name only a boot proves.
    pub fn new(launcher: Launcher, programs: Programs, options: Options) -> FirecrackerEngine {
        FirecrackerEngine {
            launcher,
            programs: Arc::new(programs),
            options,
        }
    }

    pub(crate) fn limits(&self, start: Duration) -> Limits {
        Limits {
            start,
            balloon: self.options.balloon_limit,
        }
    }

    /// Whether a snapshot can be restored here.
    fn check_facts(&self, dir: &Path, outcome: &SnapshotOutcome) -> Result<(), SandboxError> {
        let here = [
            (
                FACT_VERSION,
                "Firecracker",
                self.programs.version.to_string(),
            ),
            (FACT_CPU, "the CPU", cpu_model()),
        ];
        for (fact, what, value) in here {
            let made_by = outcome.facts.get(fact).map_or("unknown", String::as_str);
            if made_by != value {
                return Err(SandboxError::BadImage {
                    path: dir.to_owned(),
                    reason: format!("it was made with {what} {made_by}, this host has {value}"),
                });
            }
        }
        Ok(())
    }
}

/// [`Engine::snapshot_key`] of an engine that is not running: for naming a snapshot without making it.
pub fn snapshot_key(version: Version, options: &Options) -> Vec<(String, String)> {
    let shape = Shape {
        vcpu: 1,
        memory_mb: 0,
        disk_mb: 0,
    };
    let machine: Vec<String> = describe(shape, "")
        .iter()
        .map(|request| {
            let body = request.body().ok().flatten().unwrap_or_default();
            format!("{request} {}", String::from_utf8_lossy(&body))
        })
        .collect();
    [
        ("engine", format!("{:?}", EngineKind::Firecracker)),
        ("firecracker_version", version.to_string()),
        ("machine", machine.join("\n")),
        ("command_line", command_line(&options.kernel_args)),
        ("protocol", guest_control::PROTOCOL_VERSION.to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}

fn checked(shape: Shape) -> Result<Shape, SandboxError> {
    check(shape)
        .map(|()| shape)
        .map_err(|reason| SandboxError::Unavailable {
            engine: "Firecracker",
            reason,
        })
}

#[async_trait]
impl Engine for FirecrackerEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Firecracker
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            balloon: true,
            device_stats: true,
            pause: true,
        }
    }

    fn snapshot_key(&self) -> Vec<(String, String)> {
        snapshot_key(self.programs.version, &self.options)
    }

    async fn create_snapshot(
        &self,
        slot: SlotId,
        inputs: SnapshotInputs,
        progress: &dyn Progress,
    ) -> Result<SnapshotOutcome, SandboxError> {
        checked(inputs.shape)?;
        self.make_snapshot(slot, inputs, progress).await
    }

    async fn open(
        &self,
        image: ImageFiles,
        shape: Shape,
        snapshot_dir: &Path,
        outcome: &SnapshotOutcome,
    ) -> Result<Arc<dyn Template>, SandboxError> {
        checked(shape)?;
        self.check_facts(snapshot_dir, outcome)?;
        let launcher = self.launcher.clone();
        let programs = Arc::clone(&self.programs);
        let dir = snapshot_dir.to_owned();
        let limits = self.limits(self.options.restore_limit);
        let template = blocking(move || {
            FirecrackerTemplate::open(launcher, programs, shape, &image, &dir, limits)
        })
        .await?;
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
        checked(shape)?;
        let image = OpenImage::open(&image)?;
        let dir = image.disk_dir.clone();
        let disk = blocking(move || {
            let blank = make_blank(&dir, shape.disk_mb)?;
            private_disk(&blank, &dir)
        })
        .await?;
        let mut files = for_boot(&image)?;
        files.push(shown(disk.as_file(), JailName::Disk, true)?);
        let plan = Plan {
            launcher: &self.launcher,
            programs: &self.programs,
            place: Place::unplugged(slot),
            shape,
            files,
        };
        let process = Process::start(plan, since).await?;
        drop(disk);
        let start = Start::Boot(describe(shape, &self.options.kernel_args));
        let vm =
            FirecrackerVm::bring_up(process, start, MountSource::Disk, self.limits(limit)).await?;
        Ok(Box::new(vm))
    }
}
