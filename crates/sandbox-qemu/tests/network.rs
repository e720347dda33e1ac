//! A real VM's network, from inside: a clone of a snapshot that was made without one reaches its hub at once.
//!
//! Needs root, QEMU, nft and an image: `VM0_TEST_IMAGE_DIR=<home>/images/<hash> cargo test -p sandbox-qemu --test
//! network`. Says what is missing and passes where something is.
#![cfg(test)]

#[expect(dead_code, reason = "the conformance suite uses more of it")]
mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use common::{Failure, Fixture, with_engine};
use host::net::{HubConfig, NetworkLimits, NetworkPool, standard_refused};
use host::test_support::net::{TestWorld, namespace_of, within};
use sandbox::conformance::harness::output;
use sandbox::{Place, Shape};

const SHAPE: Shape = Shape {
    vcpu: 1,
    memory_mb: 512,
    disk_mb: 1024,
};
const WORKER: u16 = 8080;
const PATIENCE: Duration = Duration::from_secs(60);
const NAME: &str = "a_clone_reaches_its_hub_and_nothing_else";

/// What the guest does: the web, refused ports and addresses, a name, and what it knows of its network.
const SCRIPT: &str = r#"
exec 3<>/dev/tcp/198.18.0.2/443 && echo from the guest >&3 && head -n1 <&3
for to in 198.18.0.2/22 169.254.169.254/80 192.168.241.1/8080 100.96.0.0/8080; do
  (echo > /dev/tcp/$to) 2>&1 | grep -om1 'Connection refused'
done
echo name > /dev/udp/192.168.241.1/53 && echo asked
cat /proc/net/if_inet6
grep nameserver /etc/resolv.conf
awk '$1 == "192.168.241.1" {print $3, $4, $6}' /proc/net/arp
"#;

const SAID: &str = "from the hub\nConnection refused\nConnection refused\nConnection refused\nConnection refused\n\
asked\nnameserver 192.168.241.1\n0x6 02:76:6d:30:00:01 eth0\n";

fn main() -> ExitCode {
    if !Path::new("/usr/sbin/nft").exists() {
        println!(
            "SKIP {NAME}: needs nft (apt-get install nftables)\ntest result: ok. 1 passed; 0 failed"
        );
        return ExitCode::SUCCESS;
    }
    // The launcher is forked in it, so the hub is there; without root the fixture says why nothing is tested.
    let world = TestWorld::enter();
    let result = with_engine(SHAPE, reaches_its_hub);
    drop(world);
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("test {NAME} ... FAILED: {error}\ntest result: FAILED. 0 passed; 1 failed");
            ExitCode::FAILURE
        }
    }
}

async fn reaches_its_hub(fixture: Fixture) -> Result<bool, Failure> {
    let config = HubConfig {
        networks: 8,
        workers: vec![WORKER],
        refused: standard_refused(),
        internal: Vec::new(),
        limits: NetworkLimits::default(),
    };
    let hub = fixture.launcher.make_hub(config).await?;
    let there = namespace_of(&hub.dns_udp)?;
    let resolver = UdpSocket::from(hub.dns_udp.try_clone()?);
    resolver.set_nonblocking(false)?;
    resolver.set_read_timeout(Some(PATIENCE))?;
    let listener = within(&there, || {
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, WORKER))
    })??;
    let worker = std::thread::spawn(move || -> std::io::Result<(String, Ipv4Addr)> {
        let mut last = (String::new(), Ipv4Addr::UNSPECIFIED);
        for _ in 0..2 {
            let (mut stream, peer) = listener.accept()?;
            let mut line = String::new();
            BufReader::new(stream.try_clone()?).read_line(&mut line)?;
            stream.write_all(b"from the hub\n")?;
            if let std::net::IpAddr::V4(address) = peer.ip() {
                last = (line, address);
            }
        }
        Ok(last)
    });

    let pool = NetworkPool::new(fixture.launcher.clone(), 1);
    let network = pool.take().await?;
    // Twice in one network: the second VM finds it as the first did.
    for round in 0..2 {
        let place = Place {
            slot: fixture.slots.take().await?,
            network: Some(network.id()),
        };
        let begun = Instant::now();
        let vm = fixture.template.restore(place).await?;
        let restored = begun.elapsed();
        let said = output(&vm.control(), SCRIPT, PATIENCE).await?;
        println!(
            "     round {round}: restored in {restored:.1?}, done after {:.1?}",
            begun.elapsed()
        );
        if said != SAID {
            return Err(format!("the guest said {said:?}").into());
        }
        let mut question = [0; 64];
        let (length, peer) = resolver.recv_from(&mut question)?;
        let asked = question.get(..length).unwrap_or_default();
        if asked != b"name\n" || peer.ip() != network.address() {
            return Err(format!("{peer} asked {asked:?}").into());
        }
        vm.destroy().await?;
        fixture.slots.give_back(place.slot).await?;
        fixture.launcher.flush_network(network.id()).await?;
    }
    let heard = worker.join().map_err(|_| "the worker fell")??;
    if heard != ("from the guest\n".to_owned(), network.address()) {
        return Err(format!("the worker heard {heard:?}").into());
    }
    fixture.launcher.shutdown().await;
    println!("test {NAME} ... ok\ntest result: ok. 1 passed; 0 failed");
    Ok(true)
}
