//! Making a snapshot: boot, warm up, save.

use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;

use guest_control::MountSource;
use host::launcher::JailName;
use host::slot::SlotId;
use sandbox::parts::disk::{copy_without_zeros, create, save_blank, sync};
use sandbox::parts::image::OpenImage;
use sandbox::parts::{blocking, timed, warm_up};
use sandbox::{Place, Progress, SandboxError, SnapshotInputs, SnapshotOutcome, Vm};

use crate::engine::FirecrackerEngine;
use crate::machine::describe;
use crate::process::{Plan, Process, shown};
use crate::template::{BLANK, MEMORY, STATE, for_boot, private_disk};
use crate::vm::{FirecrackerVm, Start};

/// Facts in a snapshot's manifest.
pub(crate) const FACT_VERSION: &str = "firecracker_version";
pub(crate) const FACT_CPU: &str = "cpu";

/// What Firecracker writes the memory to, zeros and all, before it is copied without them.
const DENSE: &str = "memory.dense";

impl FirecrackerEngine {
    pub(crate) async fn make_snapshot(
        &self,
        slot: SlotId,
        inputs: SnapshotInputs,
        progress: &dyn Progress,
    ) -> Result<SnapshotOutcome, SandboxError> {
        let since = Instant::now();
        let image = OpenImage::open(&inputs.image)?;
        let shape = inputs.shape;
        let dir = inputs.dir.clone();
        let disk_dir = image.disk_dir.clone();
        let (disk, dense, state) = blocking(move || {
            let blank = save_blank(&dir.join(BLANK), shape.disk_mb)?;
            readable(&blank).map_err(in_dir(&dir))?;
            let disk = private_disk(&blank, &disk_dir)?;
            let dense = to_be_written(&dir.join(DENSE))?;
            let state = to_be_written(&dir.join(STATE))?;
            Ok((disk, dense, state))
        })
        .await?;

        progress.step("boot the image");
        let mut files = for_boot(&image)?;
        files.push(shown(disk.as_file(), JailName::Disk, true)?);
        files.push(shown(&dense, JailName::Memory, true)?);
        files.push(shown(&state, JailName::State, true)?);
        let plan = Plan {
            launcher: &self.launcher,
            programs: &self.programs,
            place: Place::unplugged(slot),
            shape,
            files,
        };
        let start = Start::Boot(describe(shape, &self.options.kernel_args));
        let limits = self.limits(inputs.limit);
        let (vm, cold_boot) = timed(async {
            let process = Process::start(plan, since).await?;
            drop(disk);
            FirecrackerVm::bring_up(process, start, MountSource::Tmpfs, limits).await
        })
        .await;
        let vm = vm?;

        progress.step("warm the guest up");
        if let Err(error) = warm_up(&vm.control(), inputs.warm_up, inputs.limit).await {
            return Err(vm.give_up(error).await);
        }

        progress.step("save the snapshot");
        vm.save(inputs.limit).await?;
        let dir = inputs.dir;
        blocking(move || {
            let memory = create(&dir.join(MEMORY))?;
            copy_without_zeros(&dense, &memory)
                .and_then(|()| memory.sync_all())
                .and_then(|()| readable(&memory))
                .and_then(|()| readable(&state))
                .and_then(|()| std::fs::remove_file(dir.join(DENSE)))
                .map_err(in_dir(&dir))?;
            sync(&dir.join(STATE))?;
            sync(&dir)
        })
        .await?;
        let facts = [
            (FACT_VERSION, self.programs.version.to_string()),
            (FACT_CPU, cpu_model()),
        ];
        Ok(SnapshotOutcome {
            files: [MEMORY, STATE, BLANK].map(str::to_owned).to_vec(),
            facts: BTreeMap::from(facts.map(|(name, value)| (name.to_owned(), value))),
            cold_boot,
        })
    }
}

/// What a saved CPU can be loaded on: the very same model.
pub(crate) fn cpu_model() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let of = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'))
            .map_or_else(String::new, |value| value.trim().to_owned())
    };
    // x86_64 and aarch64 tell different things of themselves; what one does not know is empty.
    [
        "model name",
        "cpu family",
        "model\t",
        "stepping",
        "CPU implementer",
        "CPU part",
        "CPU variant",
    ]
    .map(of)
    .join("/")
}

/// A file that the process, of another user, may write as long as it has it.
fn to_be_written(path: &Path) -> Result<File, SandboxError> {
    let file = create(path)?;
    file.set_permissions(Permissions::from_mode(0o666))
        .map_err(|source| SandboxError::Io {
            action: format!("let the VM write {}", path.display()),
            source,
        })?;
    Ok(file)
}

/// From now on every VM's process may read it and nobody writes it.
fn readable(file: &File) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode(0o444))
}

fn in_dir(dir: &Path) -> impl Fn(io::Error) -> SandboxError + '_ {
    move |source| SandboxError::Io {
        action: format!("save the snapshot in {}", dir.display()),
        source,
    }
}
