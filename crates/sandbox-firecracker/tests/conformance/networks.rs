//! Two clones of one snapshot, each in a network of its own: both have the same address and are told apart outside.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, TcpListener};
use std::path::Path;

use host::launcher::Hub;
use host::net::{HubConfig, NetworkLimits, NetworkPool, standard_refused};
use sandbox::conformance::harness::output;
use sandbox::{Place, Vm};

use super::{Failure, Suite};

/// Asks the hub's resolver over TCP, and something that no VM may reach.
const SCRIPT: &str = "exec 3<>/dev/tcp/192.168.241.1/53 && echo from the guest >&3 && head -n1 <&3
(echo > /dev/tcp/169.254.169.254/80) 2>&1 | grep -om1 'Connection refused'";

/// Why there can be no networks here, if there can be none.
pub(crate) fn missing() -> Option<&'static str> {
    if !Path::new("/usr/sbin/nft").exists() {
        Some("needs nft (apt-get install nftables)")
    } else if !Path::new("/dev/net/tun").exists() {
        Some("needs /dev/net/tun")
    } else {
        None
    }
}

/// A hub, and where its guests' DNS over TCP arrives.
pub(crate) async fn hub(suite: &Suite) -> Result<(Hub, TcpListener), Failure> {
    let config = HubConfig {
        networks: 8,
        workers: vec![8080],
        refused: standard_refused(),
        internal: Vec::new(),
        limits: NetworkLimits::default(),
    };
    let hub = suite.launcher.make_hub(config).await?;
    let resolver = TcpListener::from(hub.dns_tcp.try_clone()?);
    resolver.set_nonblocking(false)?;
    Ok((hub, resolver))
}

pub(crate) async fn apart(suite: &Suite) -> Result<(), Failure> {
    let (_hub, resolver) = hub(suite).await?;
    let listening = std::thread::spawn(move || -> std::io::Result<BTreeSet<IpAddr>> {
        let mut peers = BTreeSet::new();
        // Two clones, two rounds.
        for _ in 0..4 {
            let (mut stream, peer) = resolver.accept()?;
            let mut line = String::new();
            BufReader::new(stream.try_clone()?).read_line(&mut line)?;
            if line == "from the guest\n" {
                peers.insert(peer.ip());
            }
            stream.write_all(b"from the hub\n")?;
        }
        Ok(peers)
    });
    let pool = NetworkPool::new(suite.launcher.clone(), 2);
    let (one, two) = (pool.take().await?, pool.take().await?);
    for _ in 0..2 {
        let mut places = Vec::new();
        for network in [&one, &two] {
            places.push(Place {
                slot: suite.slots.take().await?,
                network: Some(network.id()),
            });
        }
        let (first, second) = tokio::try_join!(
            suite.template.restore(places[0]),
            suite.template.restore(places[1])
        )?;
        let (of_first, of_second) = (first.control(), second.control());
        let said = tokio::try_join!(
            output(&of_first, SCRIPT, suite.patience),
            output(&of_second, SCRIPT, suite.patience)
        )?;
        for said in [said.0, said.1] {
            if said != "from the hub\nConnection refused\n" {
                return Err(format!("a guest said {said:?}").into());
            }
        }
        end(suite, vec![first, second], &places).await?;
        suite.launcher.flush_network(one.id()).await?;
        suite.launcher.flush_network(two.id()).await?;
    }
    let peers = listening.join().map_err(|_| "the listener fell")??;
    let expected = BTreeSet::from([IpAddr::V4(one.address()), IpAddr::V4(two.address())]);
    if peers != expected {
        return Err(format!("the hub saw {peers:?}").into());
    }
    Ok(())
}

async fn end(suite: &Suite, vms: Vec<Box<dyn Vm>>, places: &[Place]) -> Result<(), Failure> {
    for vm in vms {
        vm.destroy().await?;
    }
    for place in places {
        suite.slots.give_back(place.slot).await?;
    }
    Ok(())
}
