//! Making a snapshot: boot, warm up, save.

use std::collections::BTreeMap;
use std::time::Instant;

use guest_control::MountSource;
use host::slot::SlotId;
use sandbox::parts::disk::{create, save_blank, sync};
use sandbox::parts::image::OpenImage;
use sandbox::parts::{blocking, timed, warm_up};
use sandbox::{Place, Progress, SandboxError, SnapshotInputs, SnapshotOutcome};

use crate::disk::Disk;
use crate::engine::QemuEngine;
use crate::machine::Start;
use crate::ram;
use crate::template::{BLANK, RAM, STATE};
use crate::vm::{Plan, Starting};

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
            let blank = save_blank(&dir.join(BLANK), shape.disk_mb)?;
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
