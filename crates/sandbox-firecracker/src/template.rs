//! An opened snapshot and its clones.

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use guest_control::MountSource;
use host::launcher::{JailFile, JailName, Launcher};
use sandbox::parts::blocking;
use sandbox::parts::disk::copy_sparse;
use sandbox::parts::image::{OpenImage, open};
use sandbox::{ImageFiles, IoLimits, Place, SandboxError, Shape, Template, Vm};
use tempfile::NamedTempFile;

use crate::process::{OVERHEAD_MB, Plan, Process, shown};
use crate::programs::Programs;
use crate::vm::{FirecrackerVm, Limits, Start};

/// Names in the snapshot's directory.
pub(crate) const MEMORY: &str = "memory";
pub(crate) const STATE: &str = "state";
pub(crate) const BLANK: &str = "blank.ext4";

/// What private disks are called for the moment between their making and their VM's start.
const DISK_PREFIX: &str = ".disk-";
/// A disk that is older than this has lost its maker.
const ABANDONED: Duration = Duration::from_secs(3600);

/// What a machine that boots is shown.
pub(crate) fn for_boot(image: &OpenImage) -> Result<Vec<JailFile>, SandboxError> {
    Ok(vec![
        shown(&image.kernel, JailName::Kernel, false)?,
        shown(&image.initrd, JailName::Initrd, false)?,
        shown(&image.rootfs, JailName::Rootfs, false)?,
    ])
}

/// A private disk. It needs a name until its VM's process is started, because only what has one can be shown in a jail.
/// Whoever is killed in between leaves it to [`sweep`].
pub(crate) fn private_disk(blank: &File, dir: &Path) -> Result<NamedTempFile, SandboxError> {
    let make = || {
        let disk = tempfile::Builder::new()
            .prefix(DISK_PREFIX)
            .tempfile_in(dir)?;
        copy_sparse(blank, disk.as_file())?;
        // Nobody else can come by it: its directory is its owner's, and soon it has no name.
        disk.as_file()
            .set_permissions(Permissions::from_mode(0o666))?;
        Ok(disk)
    };
    make().map_err(|source| SandboxError::Io {
        action: format!("make the VM's disk in {}", dir.display()),
        source,
    })
}

/// Removes private disks whose makers were killed before they could take the name away.
fn sweep(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let ours = entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with(DISK_PREFIX));
        let made = entry.metadata().and_then(|meta| meta.modified());
        let old = made.is_ok_and(|made| {
            SystemTime::now()
                .duration_since(made)
                .is_ok_and(|age| age > ABANDONED)
        });
        if ours && old {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// One snapshot, open. Its files and the image's are held by descriptor, and must keep their names as long as clones are
/// made: a jail shows nothing that has none.
pub(crate) struct FirecrackerTemplate {
    shared: Arc<Shared>,
}

#[derive(Clone)]
struct Shared {
    launcher: Launcher,
    programs: Arc<Programs>,
    shape: Shape,
    image: Arc<OpenImage>,
    memory: Arc<File>,
    state: Arc<File>,
    blank: Arc<File>,
    limits: Limits,
    io: IoLimits,
}

impl FirecrackerTemplate {
    /// Opens the files.
    pub(crate) fn open(
        launcher: Launcher,
        programs: Arc<Programs>,
        shape: Shape,
        image: &ImageFiles,
        dir: &Path,
        limits: Limits,
    ) -> Result<FirecrackerTemplate, SandboxError> {
        let image = OpenImage::open(image)?;
        sweep(&image.disk_dir);
        let memory = open(&dir.join(MEMORY))?;
        let length = memory.metadata().map_or(0, |meta| meta.len());
        let expected = shape.memory_mb.saturating_mul(1024 * 1024);
        if length != expected {
            return Err(SandboxError::BadImage {
                path: dir.join(MEMORY),
                reason: format!("it holds {length} bytes of memory, the VM has {expected}"),
            });
        }
        Ok(FirecrackerTemplate {
            shared: Arc::new(Shared {
                launcher,
                programs,
                shape,
                image: Arc::new(image),
                memory: Arc::new(memory),
                state: Arc::new(open(&dir.join(STATE))?),
                blank: Arc::new(open(&dir.join(BLANK))?),
                limits,
                io: IoLimits::default(),
            }),
        })
    }
}

impl Shared {
    fn files(&self, disk: &NamedTempFile) -> Result<Vec<JailFile>, SandboxError> {
        Ok(vec![
            shown(&self.image.rootfs, JailName::Rootfs, false)?,
            shown(disk.as_file(), JailName::Disk, true)?,
            shown(&self.memory, JailName::Memory, false)?,
            shown(&self.state, JailName::State, false)?,
        ])
    }
}

#[async_trait]
impl Template for FirecrackerTemplate {
    fn shape(&self) -> Shape {
        self.shared.shape
    }

    fn overhead_mb(&self) -> u64 {
        OVERHEAD_MB
    }

    /// The memory file's pages stay in the host's cache as long as there is room, and can be dropped: they count once.
    fn resident_mb(&self) -> u64 {
        self.shared.shape.memory_mb
    }

    fn limited(&self, limits: IoLimits) -> Result<Arc<dyn Template>, SandboxError> {
        let shared = Shared {
            io: limits,
            ..Shared::clone(&self.shared)
        };
        Ok(Arc::new(FirecrackerTemplate {
            shared: Arc::new(shared),
        }))
    }

    async fn restore(&self, place: Place) -> Result<Box<dyn Vm>, SandboxError> {
        let since = Instant::now();
        let shared = Arc::clone(&self.shared);
        let disk = blocking(move || private_disk(&shared.blank, &shared.image.disk_dir)).await?;
        let plan = Plan {
            launcher: &self.shared.launcher,
            programs: &self.shared.programs,
            place,
            shape: self.shared.shape,
            files: self.shared.files(&disk)?,
        };
        let process = Process::start(plan, since).await?;
        drop(disk);
        let limits = self.shared.limits;
        let start = Start::Clone(self.shared.io);
        let vm = FirecrackerVm::bring_up(process, start, MountSource::Disk, limits).await?;
        Ok(Box::new(vm))
    }
}
