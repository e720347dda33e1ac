//! What networks of VMs cost on this host: `cargo run --release -p host --features test-support --example network_cost`.
//! Needs root and nft. Prints medians and the slowest, in microseconds.
#![expect(
    clippy::unwrap_used,
    reason = "a measurement that fails has nothing to say"
)]

use std::time::{Duration, Instant};

use host::launcher::{ForkedLauncher, Launcher};
use host::net::{HubConfig, NetworkLimits, NetworkPool, standard_refused};
use host::test_support::TestHost;
use host::test_support::net::TestWorld;

const ROUNDS: usize = 100;
const AT_ONCE: usize = 50;

fn main() {
    let Some(host) = TestHost::new() else { return };
    let world = TestWorld::enter().unwrap();
    let forked = ForkedLauncher::fork(host.config("measure")).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(measure(forked));
    drop(world);
}

async fn measure(forked: ForkedLauncher) {
    let launcher = forked.attach().unwrap();
    let config = HubConfig {
        networks: 256,
        workers: vec![8080, 8081],
        refused: standard_refused(),
        internal: Vec::new(),
        limits: NetworkLimits::default(),
    };
    let begun = Instant::now();
    let _hub = launcher.make_hub(config).await.unwrap();
    print("hub", vec![begun.elapsed()]);

    let (mut make, mut open, mut flush, mut destroy) = (vec![], vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let network = launcher.make_network().await.unwrap();
        make.push(begun.elapsed());
        let begun = Instant::now();
        let to = vec!["198.18.0.2:5432".parse().unwrap()];
        let hour = Duration::from_secs(3600);
        launcher.open_destinations(network, to, hour).await.unwrap();
        open.push(begun.elapsed());
        let begun = Instant::now();
        launcher.flush_network(network).await.unwrap();
        flush.push(begun.elapsed());
        let begun = Instant::now();
        launcher.destroy_network(network).await.unwrap();
        destroy.push(begun.elapsed());
    }
    print("from scratch", make);
    print("open a port", open);
    print("flush", flush);
    print("destroy", destroy);

    pool(&launcher).await;

    let begun = Instant::now();
    let making: Vec<_> = (0..AT_ONCE)
        .map(|_| {
            let launcher = launcher.clone();
            tokio::spawn(async move { launcher.make_network().await.unwrap() })
        })
        .collect();
    let mut made = Vec::new();
    for network in making {
        made.push(network.await.unwrap());
    }
    print("50 at once, all", vec![begun.elapsed()]);
    let begun = Instant::now();
    let ending: Vec<_> = made
        .into_iter()
        .map(|network| {
            let launcher = launcher.clone();
            tokio::spawn(async move { launcher.destroy_network(network).await.unwrap() })
        })
        .collect();
    for ended in ending {
        ended.await.unwrap();
    }
    print("their end, all", vec![begun.elapsed()]);
    launcher.shutdown().await;
}

async fn pool(launcher: &Launcher) {
    let pool = NetworkPool::new(launcher.clone(), 4);
    let mut take = Vec::new();
    for _ in 0..ROUNDS {
        while pool.ready() < 4 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let begun = Instant::now();
        let network = pool.take().await.unwrap();
        take.push(begun.elapsed());
        drop(network);
    }
    print("from the pool", take);
}

fn print(name: &str, mut times: Vec<Duration>) {
    times.sort();
    println!(
        "{name:16} p50 {:6} max {:6}",
        times.get(times.len() / 2).unwrap().as_micros(),
        times.last().unwrap().as_micros()
    );
}
