//! What the launcher's steps cost on this host: `cargo run --release -p host --features test-support --example
//! launch_cost`. Needs root. Prints medians and the slowest, in microseconds.
#![expect(
    clippy::unwrap_used,
    reason = "a measurement that fails has nothing to say"
)]

use std::time::{Duration, Instant};

use host::launcher::{CgroupLimits, ForkedLauncher, LaunchSpec};
use host::slot::{HostLimits, LeaseKind, Resources, SlotRecord};
use host::test_support::TestHost;

const ROUNDS: usize = 200;

fn main() {
    let Some(host) = TestHost::new() else { return };
    let forked = ForkedLauncher::fork(host.config("measure")).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(measure(forked));
}

async fn measure(forked: ForkedLauncher) {
    let launcher = forked.attach().unwrap();
    let record = SlotRecord {
        instance: "measure".to_owned(),
        kind: LeaseKind::Revocable,
        resources: Resources::default(),
        run_id: None,
        shared_mb: 0,
    };
    let limits = HostLimits {
        total: Resources::default(),
    };
    let mut steps: [(&str, Vec<Duration>); 5] = ["reserve", "launch", "update", "kill", "release"]
        .map(|name| (name, Vec::with_capacity(ROUNDS)));
    for _ in 0..ROUNDS {
        let mut last = Instant::now();
        let mut times = Vec::new();
        let mut lap = || {
            let now = Instant::now();
            times.push(now - last);
            last = now;
        };
        let slot = launcher.reserve(record.clone(), limits).await.unwrap();
        lap();
        let spec = LaunchSpec {
            slot,
            program: "/bin/sleep".into(),
            args: vec!["1000".into()],
            fds: Vec::new(),
            devices: Vec::new(),
            network: None,
            limits: CgroupLimits {
                memory_max: 1 << 30,
                pids_max: 100,
                cpu_weight: 100,
            },
        };
        launcher.launch(spec).await.unwrap();
        lap();
        launcher.update(slot, record.clone(), limits).await.unwrap();
        lap();
        launcher.kill(slot).await.unwrap();
        lap();
        launcher.release(slot).await.unwrap();
        lap();
        for ((_, all), time) in steps.iter_mut().zip(times) {
            all.push(time);
        }
    }
    for (name, mut times) in steps {
        times.sort();
        println!(
            "{name:8} p50 {:6} max {:6}",
            times.get(ROUNDS / 2).unwrap().as_micros(),
            times.last().unwrap().as_micros()
        );
    }
    launcher.shutdown().await;
}
