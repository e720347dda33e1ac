//! An opened snapshot and its clones.

use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use guest_control::MountSource;
use host::launcher::Launcher;
use sandbox::parts::blocking;
use sandbox::parts::image::OpenImage;
use sandbox::{ImageFiles, IoLimits, Place, SandboxError, Shape, Template, Vm};

use crate::disk::Disk;
use crate::machine::{Machine, Start, fd};
use crate::ram;
use crate::vm::{Plan, Starting, lend, lend_image, overhead_mb};

/// Names in the snapshot's directory.
pub(crate) const RAM: &str = "ram";
pub(crate) const STATE: &str = "state";
pub(crate) const BLANK: &str = "blank.ext4";

/// A restore takes 50 ms on an idle host; on one that is far too busy it still gets there.
const RESTORE_LIMIT: Duration = Duration::from_secs(60);

/// One snapshot, open: its memory sealed, its files held by descriptor, so that `runner gc` may unlink it meanwhile.
pub(crate) struct QemuTemplate {
    shared: Arc<Shared>,
}

struct Shared {
    launcher: Launcher,
    program: PathBuf,
    machine: Machine,
    image: OpenImage,
    ram: File,
    state: File,
    blank: File,
}

impl QemuTemplate {
    /// Opens the files; reading the memory blocks for some tens of milliseconds.
    pub(crate) fn open(
        launcher: Launcher,
        program: PathBuf,
        machine: Machine,
        image: &ImageFiles,
        dir: &Path,
    ) -> Result<QemuTemplate, SandboxError> {
        let open = |name: &str| {
            let path = dir.join(name);
            File::open(&path).map_err(|source| SandboxError::Io {
                action: format!("open {}", path.display()),
                source,
            })
        };
        let ram = ram::load_sealed(&dir.join(RAM), machine.shape.memory_mb)?;
        Ok(QemuTemplate {
            shared: Arc::new(Shared {
                launcher,
                program,
                machine,
                image: OpenImage::open(image)?,
                ram,
                state: open(STATE)?,
                blank: open(BLANK)?,
            }),
        })
    }

    /// What one clone gets for itself.
    pub(crate) fn private_files(&self) -> Result<(Disk, File), SandboxError> {
        self.shared.private_files()
    }

    /// What all clones are lent, under the numbers they know.
    pub(crate) fn shared_files(&self) -> Result<Vec<(OwnedFd, RawFd)>, SandboxError> {
        let mut files = lend_image(&self.shared.image)?;
        files.push((lend(&self.shared.ram)?, fd::RAM));
        Ok(files)
    }
}

impl Shared {
    /// The clone's own disk and its own view of the state file, each with its own offset.
    fn private_files(&self) -> Result<(Disk, File), SandboxError> {
        let disk = Disk::copy_of(&self.blank, &self.image.disk_dir)?;
        let state =
            crate::disk::reopen_read_only(&self.state).map_err(|source| SandboxError::Io {
                action: "open the snapshot's state".to_owned(),
                source,
            })?;
        Ok((disk, state))
    }
}

#[async_trait]
impl Template for QemuTemplate {
    fn shape(&self) -> Shape {
        self.shared.machine.shape
    }

    fn overhead_mb(&self) -> u64 {
        overhead_mb(self.shared.machine.accel)
    }

    /// All of it, although it starts with little: clones fill its holes, and nothing empties them again (see
    /// `guest_charge_mb`).
    fn resident_mb(&self) -> u64 {
        self.shared.machine.shape.memory_mb
    }

    fn limited(&self, _: IoLimits) -> Result<Arc<dyn Template>, SandboxError> {
        Err(SandboxError::Unavailable {
            engine: "QEMU",
            reason: "it has no limits on disk and network; take `limits` out of the profile, or build it for Firecracker"
                .to_owned(),
        })
    }

    async fn restore(&self, place: Place) -> Result<Box<dyn Vm>, SandboxError> {
        let since = Instant::now();
        let shared = Arc::clone(&self.shared);
        let (disk, state) = blocking(move || shared.private_files()).await?;
        let plan = Plan {
            launcher: &self.shared.launcher,
            program: self.shared.program.clone(),
            place,
            machine: self.shared.machine,
            start: Start::Clone,
            image: &self.shared.image,
            ram: &self.shared.ram,
            disk,
            state: Some(state),
        };
        let vm = Starting::launch(plan, since)
            .await?
            .bring_up(Start::Clone, MountSource::Disk, RESTORE_LIMIT)
            .await?;
        Ok(Box::new(vm))
    }
}
