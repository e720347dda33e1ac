//! What VMs of 2048 MB that only wait take of the host's memory, with many of them up.

use std::time::Duration;

use sandbox::{PausedAs, Place, Progress, Sandbox, Shape, SnapshotInputs};

use super::vms::Bench;
use crate::context::{CliError, note};
use crate::executor;
use crate::image::warm_up;
use crate::profile::Flavour;

/// The size that the figure is stated for: that of `vm0/default`.
const SHAPE: Shape = Shape {
    vcpu: 2,
    memory_mb: 2048,
    disk_mb: 1024,
};

/// Limit of the boot and of each warm-up process.
const LIMIT: Duration = Duration::from_secs(600);

struct Quiet;

impl Progress for Quiet {
    fn step(&self, _: &str) {}
}

/// Mean private dirty memory of `count` restored and paused VMs that are up together, MiB. They are clones of a
/// snapshot of the measured image that is made for this and thrown away. What the same VMs take once their warm-up
/// job has run is told on stderr.
pub(super) async fn measure(
    bench: &Bench<'_>,
    flavour: Flavour,
    count: u32,
) -> Result<f64, CliError> {
    let snapshot = tempfile::Builder::new()
        .prefix("runner-benchmark-")
        .tempdir()?;
    let inputs = SnapshotInputs {
        image: bench.stored.image.clone(),
        shape: SHAPE,
        dir: snapshot.path().to_owned(),
        warm_up: warm_up::all(flavour),
        limit: LIMIT,
    };
    let slot = bench.take(SHAPE).await?;
    let outcome = bench.engine.create_snapshot(slot, inputs, &Quiet).await;
    bench.release(slot).await?;
    let outcome = outcome?;
    let image = bench.stored.image.clone();
    let template = bench
        .engine
        .open(image, SHAPE, snapshot.path(), &outcome)
        .await?;
    let mut waiting: Vec<Sandbox> = Vec::new();
    for _ in 0..count {
        let slot = bench.take(SHAPE).await?;
        let sandbox = Sandbox::adopt(template.restore(Place::unplugged(slot)).await?, slot);
        sandbox.pause(PausedAs::Warm).await?;
        waiting.push(sandbox);
    }
    let restored = mean(bench, waiting).await?;
    let mut waiting = Vec::new();
    for _ in 0..count {
        let slot = bench.take(SHAPE).await?;
        waiting.push(executor::warm_up(&template, Place::unplugged(slot)).await?);
    }
    let warmed = mean(bench, waiting).await?;
    note(format_args!("  after their warm-up job: {warmed} MiB each"));
    Ok(restored)
}

/// Mean private dirty memory, MiB with two decimals; the VMs are ended.
async fn mean(bench: &Bench<'_>, vms: Vec<Sandbox>) -> Result<f64, CliError> {
    let count = u32::try_from(vms.len()).unwrap_or(u32::MAX).max(1);
    let mut sum = 0.0;
    for sandbox in &vms {
        let bytes = sandbox.memory().await?.private_dirty;
        // Exact up to 8 PiB.
        #[expect(clippy::cast_precision_loss, reason = "a mean for people")]
        let bytes = bytes as f64;
        sum += bytes;
    }
    for sandbox in vms {
        bench.end(sandbox).await?;
    }
    let mean = sum / f64::from(count) / f64::from(1 << 20);
    Ok((mean * 100.0).round() / 100.0)
}
