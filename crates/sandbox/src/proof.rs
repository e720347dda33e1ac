//! Whether an engine is worth the name on this host: a boot of the very image.

use std::time::{Duration, Instant};

use host::slot::SlotId;

use crate::engine::Engine;
use crate::error::SandboxError;
use crate::types::{ImageFiles, Shape};

/// Whether an image really boots under an engine, within a limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    /// It did, in this time.
    Boots(Duration),
    /// It did not; one sentence why.
    Fails(String),
}

/// Size of the VM that is booted.
pub const PROOF_SHAPE: Shape = Shape {
    vcpu: 1,
    memory_mb: 512,
    disk_mb: 64,
};

/// Boots `image` in `slot` within `limit` and ends the VM. That a device can be opened or a VM be created proves nothing.
/// Costs a boot, so callers keep the answer with the image. An engine that is not there at all is an error, not a proof.
pub async fn prove(
    engine: &dyn Engine,
    slot: SlotId,
    image: ImageFiles,
    limit: Duration,
) -> Result<Proof, SandboxError> {
    let start = Instant::now();
    let failure = match engine.cold_boot(slot, image, PROOF_SHAPE, limit).await {
        Ok(vm) => match vm.destroy().await {
            Ok(()) => return Ok(Proof::Boots(start.elapsed())),
            Err(error) => error,
        },
        Err(error @ SandboxError::Unavailable { .. }) => return Err(error),
        Err(error) => error,
    };
    Ok(Proof::Fails(format!("the image does not boot: {failure}")))
}
