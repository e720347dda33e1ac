//! Making a snapshot: boot, warm up, save.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use guest_control::{Client, ExecSpec, ExitStatus, MountSource};
use host::slot::SlotId;
use sandbox::{Place, Progress, SandboxError, SnapshotInputs, SnapshotOutcome};

use crate::disk::{Disk, copy_without_zeros, make_blank};
use crate::engine::QemuEngine;
use crate::machine::Start;
use crate::ram;
use crate::template::{BLANK, RAM, STATE, blocking};
use crate::vm::{OpenImage, Plan, Starting, timed};

/// Facts in a snapshot's manifest.
pub(crate) const FACT_TSC: &str = "tsc_khz";
pub(crate) const FACT_QEMU: &str = "qemu_version";

impl QemuEngine {
    pub(crate) async fn make_snapshot(
        &self,
        slot: SlotId,
        inputs: SnapshotInputs,
        progress: &dyn Progress,
    ) -> Result<SnapshotOutcome, SandboxError> {
        let since = Instant::now();
        let machine = self.machine(inputs.shape);
        let image = OpenImage::open(&inputs.image)?;
        let dir = inputs.dir.clone();
        let shape = inputs.shape;
        let (memory, state, disk) = blocking(move || {
            let blank = save_blank(&dir, shape.disk_mb)?;
            let disk = Disk::copy_of(&blank, &dir)?;
            Ok((
                ram::fresh(shape.memory_mb)?,
                create(&dir.join(STATE))?,
                disk,
            ))
        })
        .await?;

        progress.step("boot the image");
        let plan = Plan {
            launcher: &self.launcher,
            program: self.qemu.path.clone(),
            place: Place::unplugged(slot),
            machine,
            start: Start::Boot,
            image: &image,
            ram: &memory,
            disk,
            state: None,
        };
        let (vm, cold_boot) = timed(async {
            Starting::launch(plan, since)
                .await?
                .bring_up(Start::Boot, MountSource::Tmpfs, inputs.limit)
                .await
        })
        .await;
        let vm = vm?;

        progress.step("warm the guest up");
        let client = sandbox::Vm::control(&vm);
        if let Err(error) = warm_up(&client, inputs.warm_up, inputs.limit).await {
            return Err(vm.give_up(error).await);
        }

        progress.step("save the snapshot");
        vm.save(&state, inputs.limit).await?;
        let dir = inputs.dir;
        blocking(move || {
            ram::save(&memory, &dir.join(RAM))?;
            sync(&dir.join(STATE))?;
            sync(&dir)
        })
        .await?;

        let mut facts = BTreeMap::from([(FACT_QEMU.to_owned(), self.qemu.version.clone())]);
        if let Some(khz) = machine.tsc_khz {
            facts.insert(FACT_TSC.to_owned(), khz.to_string());
        }
        Ok(SnapshotOutcome {
            files: [RAM, STATE, BLANK].map(str::to_owned).to_vec(),
            facts,
            cold_boot,
        })
    }
}

/// Runs the warm-up processes one after another and drops the root they ran on.
async fn warm_up(
    client: &Client,
    specs: Vec<ExecSpec>,
    limit: Duration,
) -> Result<(), SandboxError> {
    for spec in specs {
        let program = spec
            .argv
            .first()
            .map(|program| String::from_utf8_lossy(program).into_owned())
            .unwrap_or_default();
        let session = client
            .exec(ExecSpec {
                timeout: Some(limit),
                kill_group_on_exit: true,
                ..spec
            })
            .await?;
        let report = session.wait().await?;
        if report.status != ExitStatus::Exited(0) {
            let mut output = session.attach(0, false);
            let mut said = Vec::new();
            while let Some(chunk) = output.next().await {
                said.extend_from_slice(&chunk.data);
            }
            return Err(SandboxError::Engine {
                step: "warm up",
                message: format!(
                    "{program} ended with {:?}: {}",
                    report.status,
                    String::from_utf8_lossy(&said).escape_debug()
                ),
            });
        }
    }
    client.unmount().await?;
    Ok(())
}

fn save_blank(dir: &Path, megabytes: u64) -> Result<File, SandboxError> {
    let made = make_blank(dir, megabytes)?;
    let path = dir.join(BLANK);
    let blank = create(&path)?;
    let write = || {
        copy_without_zeros(&made, &blank)?;
        blank.sync_all()
    };
    write().map_err(|source| SandboxError::Io {
        action: format!("write {}", path.display()),
        source,
    })?;
    Ok(blank)
}

fn create(path: &Path) -> Result<File, SandboxError> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|source| SandboxError::Io {
            action: format!("create {}", path.display()),
            source,
        })
}

fn sync(path: &Path) -> Result<(), SandboxError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(|source| SandboxError::Io {
            action: format!("write {} to disk", path.display()),
            source,
        })
}
