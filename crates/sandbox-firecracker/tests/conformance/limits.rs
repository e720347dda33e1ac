//! A clone whose devices are limited takes as long for its work as the limit says, however fast host and guest are.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use host::net::NetworkPool;
use sandbox::conformance::harness::output;
use sandbox::{DeviceStats, IoLimits, Place};

use super::networks::hub;
use super::{Failure, Suite};

/// KiB a second, of disk and network alike.
const RATE: u64 = 64;
/// KiB that are written or sent: eight times the rate, of which the bucket holds one at first.
const WORK: u64 = 512;

const LIMITS: IoLimits = IoLimits {
    disk_kib_s: Some(RATE),
    disk_ops_s: Some(1000),
    network_kib_s: Some(RATE),
};

pub(crate) async fn disk(suite: &Suite) -> Result<(), Failure> {
    let write = format!(
        "dd if=/dev/zero of=/var/tmp/written bs=64k count={} conv=fsync status=none && echo done",
        WORK / 64
    );
    let slot = suite.slots.take().await?;
    let stats = work(suite, Place::unplugged(slot), &write).await;
    suite.slots.give_back(slot).await?;
    let stats = stats?;
    if stats.disk_throttled == 0 || stats.disk_written_bytes < WORK * 1024 {
        return Err(format!("the engine counted {stats:?}").into());
    }
    Ok(())
}

pub(crate) async fn network(suite: &Suite) -> Result<(), Failure> {
    let (_hub, resolver) = hub(suite).await?;
    let receiving = std::thread::spawn(move || -> std::io::Result<usize> {
        let (mut stream, _) = resolver.accept()?;
        let mut received = Vec::new();
        (&mut stream).take(WORK * 1024).read_to_end(&mut received)?;
        stream.write_all(b"done\n")?;
        Ok(received.len())
    });
    let pool = NetworkPool::new(suite.launcher.clone(), 1);
    let network = pool.take().await?;
    let slot = suite.slots.take().await?;
    let place = Place {
        slot,
        network: Some(network.id()),
    };
    let send = format!(
        "exec 3<>/dev/tcp/192.168.241.1/53 && head -c {} /dev/zero >&3 && head -n1 <&3",
        WORK * 1024
    );
    let stats = work(suite, place, &send).await;
    suite.slots.give_back(slot).await?;
    let stats = stats?;
    if stats.network_throttled == 0 || stats.network_sent_bytes < WORK * 1024 {
        return Err(format!("the engine counted {stats:?}").into());
    }
    let received = receiving.join().map_err(|_| "the receiver fell")??;
    if received as u64 != WORK * 1024 {
        return Err(format!("{received} bytes arrived").into());
    }
    Ok(())
}

/// Has a limited clone do something that takes its time.
async fn work(suite: &Suite, place: Place, script: &str) -> Result<DeviceStats, Failure> {
    let template = suite.template.limited(LIMITS)?;
    let mut vm = template.restore(place).await?;
    vm.take_device_stats().await?;
    let start = Instant::now();
    let worked = output(&vm.control(), script, suite.patience).await;
    let took = start.elapsed();
    let stats = vm.take_device_stats().await?;
    vm.destroy().await?;
    let said = worked?;
    if said != "done\n" {
        return Err(format!("the guest said {said:?}").into());
    }
    let least = Duration::from_secs((WORK - RATE) / RATE - 1);
    if took < least {
        return Err(format!("it was done in {took:.1?}, and takes {least:?} and more").into());
    }
    println!("     {WORK} KiB at {RATE} KiB a second took {took:.1?}; {stats:?}");
    Ok(stats)
}
