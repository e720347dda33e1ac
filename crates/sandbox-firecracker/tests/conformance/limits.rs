//! A clone whose disk is limited takes as long for its writes as the limit says, however fast host and guest are.

use std::time::{Duration, Instant};

use guest_control::{ExecSpec, ExitStatus, UserSpec};
use sandbox::{IoLimits, Place};

use super::{Failure, Suite};

/// KiB a second.
const RATE: u64 = 64;
/// KiB that are written: eight times the rate, of which the bucket holds one at first.
const WRITTEN: u64 = 512;

pub(crate) async fn held(suite: &Suite) -> Result<(), Failure> {
    let limits = IoLimits {
        disk_kib_s: Some(RATE),
        disk_ops_s: Some(1000),
        network_kib_s: Some(1024),
    };
    let template = suite.template.limited(limits)?;
    let slot = suite.slots.take().await?;
    let vm = template.restore(Place::unplugged(slot)).await?;
    let write = format!(
        "dd if=/dev/zero of=/written bs=64k count={} conv=fsync status=none",
        WRITTEN / 64
    );
    let spec = ExecSpec {
        argv: ["bash", "-c", &write]
            .map(|word| word.as_bytes().to_vec())
            .to_vec(),
        user: UserSpec::Root,
        timeout: Some(suite.patience),
        ..ExecSpec::default()
    };
    let start = Instant::now();
    let report = vm.control().exec(spec).await?.wait().await?;
    let took = start.elapsed();
    vm.destroy().await?;
    suite.slots.give_back(slot).await?;
    if report.status != ExitStatus::Exited(0) {
        return Err(format!("the write ended with {report:?}").into());
    }
    let least = Duration::from_secs((WRITTEN - RATE) / RATE - 1);
    if took < least {
        return Err(format!(
            "{WRITTEN} KiB were written in {took:.1?}, which takes {least:?} and more"
        )
        .into());
    }
    Ok(())
}
