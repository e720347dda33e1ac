//! Figures of single VMs, ours and one driven by hand.

use std::sync::Arc;
use std::time::{Duration, Instant};

use host::launcher::Launcher;
use host::slot::{LeaseKind, Resources, SlotId, SlotRecord};
use sandbox::{Engine, Place, Sandbox, Shape, StepTimes, Template};
use sandbox_qemu::QemuEngine;

use super::Stored;
use super::samples::Samples;
use crate::context::CliError;
use crate::engine::{self, UNLIMITED};
use crate::executor::{self, wake_now};
use crate::home::Home;
use crate::image::warm_up;

/// Limit of a cold boot: far above what the slowest emulated host needs.
const BOOT_LIMIT: Duration = Duration::from_secs(600);

/// Pings measured on one VM.
const PINGS: usize = 1000;

/// The engine, a template and a launcher.
pub(super) struct Bench<'a> {
    pub(super) engine: Arc<dyn Engine>,
    raw: Option<QemuEngine>,
    pub(super) stored: &'a Stored,
    template: Arc<dyn Template>,
    launcher: Launcher,
    instance: String,
}

/// What was measured.
#[derive(Debug, Default)]
pub(super) struct Measured {
    pub(super) cold_boot: Samples,
    pub(super) raw_restore: Samples,
    pub(super) restore: Samples,
    /// By step, in order.
    pub(super) steps: Vec<(&'static str, Samples)>,
    pub(super) raw_claim: Samples,
    pub(super) warm_claim: Samples,
    pub(super) ping: Samples,
}

impl Measured {
    /// Adds the steps from a restore to a VM that can have a job, and `ready`: their sum.
    fn split(&mut self, steps: &StepTimes) {
        let sum = steps.0.iter().map(|(_, took)| *took).sum();
        for (step, took) in steps.0.iter().copied().chain([("ready", sum)]) {
            match self.steps.iter_mut().find(|(known, _)| *known == step) {
                Some((_, samples)) => samples.push(took),
                None => {
                    let mut samples = Samples::default();
                    samples.push(took);
                    self.steps.push((step, samples));
                }
            }
        }
    }
}

impl<'a> Bench<'a> {
    pub(super) async fn open(
        launcher: Launcher,
        instance: String,
        stored: &'a Stored,
        home: &Home,
    ) -> Result<Self, CliError> {
        let kind = stored.manifest.engine;
        let engine = engine::of_snapshot(kind, launcher.clone(), home)?;
        let raw = engine::driven_by_hand(kind, launcher.clone())?;
        let template = engine
            .open(
                stored.image.clone(),
                stored.shape,
                &stored.directory,
                &stored.outcome,
            )
            .await?;
        Ok(Self {
            engine,
            raw,
            stored,
            template,
            launcher,
            instance,
        })
    }

    /// A slot for a VM of this shape.
    pub(super) async fn take(&self, shape: Shape) -> Result<SlotId, CliError> {
        let record = SlotRecord {
            instance: self.instance.clone(),
            kind: LeaseKind::Firm,
            resources: Resources {
                vcpu: shape.vcpu,
                memory_mb: shape.memory_mb,
                disk_mb: shape.disk_mb,
            },
            run_id: None,
            shared_mb: 0,
        };
        Ok(self.launcher.reserve(record, UNLIMITED).await?)
    }

    /// Ends a VM and gives its slot back.
    pub(super) async fn end(&self, sandbox: Sandbox) -> Result<(), CliError> {
        let slot = sandbox.slot();
        sandbox.destroy().await;
        Ok(self.launcher.release(slot).await?)
    }

    /// Gives a slot back, whose VM is gone or goes with it.
    pub(super) async fn release(&self, slot: SlotId) -> Result<(), CliError> {
        Ok(self.launcher.release(slot).await?)
    }

    pub(super) async fn measure(&self, rounds: u32, boots: u32) -> Result<Measured, CliError> {
        let mut measured = Measured::default();
        for _ in 0..boots {
            self.cold_boot(&mut measured).await?;
        }
        for round in 0..rounds {
            self.by_hand(&mut measured).await?;
            self.restore(&mut measured).await?;
            self.claim(&mut measured, round == 0).await?;
        }
        Ok(measured)
    }

    async fn cold_boot(&self, measured: &mut Measured) -> Result<(), CliError> {
        let shape = self.stored.shape;
        let slot = self.take(shape).await?;
        let start = Instant::now();
        let image = self.stored.image.clone();
        let vm = self
            .engine
            .cold_boot(slot, image, shape, BOOT_LIMIT)
            .await?;
        measured.cold_boot.push(start.elapsed());
        self.end(Sandbox::adopt(vm, slot)).await
    }

    async fn by_hand(&self, measured: &mut Measured) -> Result<(), CliError> {
        let Stored {
            image,
            shape,
            directory,
            outcome,
            ..
        } = self.stored;
        let Some(raw) = &self.raw else {
            return Ok(());
        };
        let raw = raw
            .raw_restore(image.clone(), *shape, directory, outcome)
            .await?;
        measured.raw_restore.push(raw.restore);
        measured.raw_claim.push(raw.claim);
        Ok(())
    }

    /// From the call until the guest has answered; mounting the disk comes after that and has no counterpart in the
    /// process driven by hand.
    async fn restore(&self, measured: &mut Measured) -> Result<(), CliError> {
        let slot = self.take(self.stored.shape).await?;
        let start = Instant::now();
        let vm = self.template.restore(Place::unplugged(slot)).await?;
        let whole = start.elapsed();
        let mount: Duration = vm
            .steps()
            .0
            .iter()
            .filter(|(step, _)| *step == "mount")
            .map(|(_, took)| *took)
            .sum();
        measured.restore.push(whole.saturating_sub(mount));
        let mut steps = vm.steps();
        let start = Instant::now();
        // One message, in a job's life the one that also starts its agent.
        vm.control().wake(wake_now()?).await?;
        steps.0.push(("clock and reseed", start.elapsed()));
        measured.split(&steps);
        self.end(Sandbox::adopt(vm, slot)).await
    }

    /// From the claim of a warm VM until the agent's process runs: what the executor does, in its one message.
    async fn claim(&self, measured: &mut Measured, pings: bool) -> Result<(), CliError> {
        let slot = self.take(self.stored.shape).await?;
        let sandbox = executor::warm_up(&self.template, Place::unplugged(slot)).await?;
        let start = Instant::now();
        sandbox.resume().await?;
        let spec = guest_control::ExecSpec {
            wake: Some(wake_now()?),
            ..warm_up::job()
        };
        let session = sandbox.client().exec(spec).await?;
        measured.warm_claim.push(start.elapsed());
        session.wait().await?;
        if pings {
            for _ in 0..PINGS {
                measured.ping.push(sandbox.client().ping().await?);
            }
        }
        self.end(sandbox).await
    }
}
