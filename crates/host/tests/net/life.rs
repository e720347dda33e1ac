//! Hubs and networks come and go, whatever happens to their makers.

use std::time::{Duration, Instant};

use host::net::{NetworkId, NetworkPool};
use host::test_support::net::links;

use crate::common::{PATIENCE, Site, config, sleeper, slot, start, world};

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

fn tables() -> String {
    let output = std::process::Command::new("/usr/sbin/nft")
        .args(["list", "tables"])
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Namespaces go a moment after their last descriptor, and what a launcher ends may end after it: waits for what follows from that.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn fifty_networks_are_made_and_destroyed_at_once() {
    let Some(site) = Site::new().await else {
        return;
    };
    for _ in 0..2 {
        let making: Vec<_> = (0..50)
            .map(|_| {
                let launcher = site.launcher.clone();
                tokio::spawn(async move { launcher.make_network().await.unwrap() })
            })
            .collect();
        let mut networks = Vec::new();
        for made in making {
            networks.push(made.await.unwrap());
        }
        networks.sort();
        assert_eq!(networks, (0..50).map(NetworkId).collect::<Vec<_>>());
        assert_eq!(links(&site.hub_namespace).unwrap().len(), 52);
        let ending: Vec<_> = networks
            .into_iter()
            .map(|network| {
                let launcher = site.launcher.clone();
                tokio::spawn(async move { launcher.destroy_network(network).await.unwrap() })
            })
            .collect();
        for ended in ending {
            ended.await.unwrap();
        }
        assert_eq!(links(&site.hub_namespace).unwrap().len(), 2);
    }
    site.launcher.shutdown().await;
}

#[tokio::test]
async fn nothing_is_left_when_the_daemon_is_gone() {
    let Some(site) = Site::new().await else {
        return;
    };
    let vm = site.vm().await;
    let link = site.hub.number.link();
    assert!(site.world.has_link(&link).unwrap());
    assert!(tables().contains(&site.hub.number.table()));
    let Site {
        launcher,
        hub,
        hub_namespace,
        world,
        host,
        ..
    } = site;
    launcher.shutdown().await;
    eventually("the table stays", || tables().is_empty()).await;
    eventually("the link stays", || !world.has_link(&link).unwrap()).await;
    drop((hub, hub_namespace, vm, host));
}

#[tokio::test]
async fn the_next_hub_takes_away_what_a_killed_launcher_left() {
    let Some((host, world)) = world() else { return };
    let mut killed = Vec::new();
    for name in ["a", "b"] {
        let (launcher, pid) = start(&host, name);
        let hub = launcher.make_hub(config()).await.unwrap();
        launcher.make_network().await.unwrap();
        killed.push((launcher, pid, hub));
    }
    let hubs: Vec<_> = killed.iter().map(|(_, _, hub)| hub.number).collect();
    assert_eq!(hubs.iter().map(|hub| hub.0).collect::<Vec<_>>(), [0, 1]);
    for (launcher, pid, hub) in killed {
        kill(pid);
        launcher.gone().await;
        drop(hub);
    }
    for hub in &hubs {
        eventually("the link stays", || !world.has_link(&hub.link()).unwrap()).await;
    }
    assert_eq!(tables(), "table ip vm0_hub0\ntable ip vm0_hub1\n");

    let (next, _) = start(&host, "c");
    let hub = next.make_hub(config()).await.unwrap();
    assert_eq!(hub.number.0, 0);
    assert_eq!(tables(), "table ip vm0_hub0\n");
    assert!(!world.has_link("vm0h1").unwrap());
    next.shutdown().await;
    eventually("the table stays", || tables().is_empty()).await;
}

#[tokio::test]
async fn two_hubs_live_side_by_side() {
    let Some(one) = Site::new().await else { return };
    let (launcher, _) = start(&one.host, "other");
    let other = launcher.make_hub(config()).await.unwrap();
    assert_ne!(one.hub.number, other.number);
    // Numbers of networks are each hub's own.
    assert_eq!(one.launcher.make_network().await.unwrap(), NetworkId(0));
    assert_eq!(launcher.make_network().await.unwrap(), NetworkId(0));
    launcher.shutdown().await;
    assert!(tables().contains(&one.hub.number.table()));
    one.launcher.make_network().await.unwrap();
    one.launcher.shutdown().await;
}

#[tokio::test]
async fn a_network_belongs_to_one_vm_at_a_time() {
    let Some(site) = Site::new().await else {
        return;
    };
    let vm = site.vm().await;
    let second = slot(&site.launcher).await;
    let refused = |error: host::launcher::LauncherError, why: &str| {
        assert!(error.to_string().contains(why), "{error}");
    };
    let spec = sleeper(second, vm.network);
    refused(site.launcher.launch(spec).await.unwrap_err(), "is not free");
    refused(
        site.launcher.flush_network(vm.network).await.unwrap_err(),
        "still runs in it",
    );
    refused(
        site.launcher.destroy_network(vm.network).await.unwrap_err(),
        "still runs in it",
    );
    let spec = sleeper(second, NetworkId(9));
    refused(site.launcher.launch(spec).await.unwrap_err(), "is not free");
    refused(
        site.launcher.flush_network(NetworkId(9)).await.unwrap_err(),
        "does not have it",
    );
    refused(
        site.launcher.make_hub(config()).await.unwrap_err(),
        "has one already",
    );

    site.launcher.kill(vm.slot).await.unwrap();
    site.launcher.flush_network(vm.network).await.unwrap();
    site.launcher
        .launch(sleeper(second, vm.network))
        .await
        .unwrap();
    site.launcher.kill(second).await.unwrap();
    site.launcher.destroy_network(vm.network).await.unwrap();
    site.launcher.shutdown().await;
}

#[tokio::test]
async fn changes_of_a_network_wait_for_one_another() {
    let Some(site) = Site::new().await else {
        return;
    };
    let vm = site.vm().await;
    let network = vm.network;
    site.launcher.kill(vm.slot).await.unwrap();
    // As when a VM ends while its policy changes.
    let (cut, flushed, ended, late) = tokio::join!(
        site.launcher.cut_network(network),
        site.launcher.flush_network(network),
        site.launcher.destroy_network(network),
        site.launcher.flush_network(network),
    );
    cut.unwrap();
    flushed.unwrap();
    ended.unwrap();
    let late = late.unwrap_err().to_string();
    assert!(late.contains("being ended"), "{late}");
    // Its number is free again.
    assert_eq!(site.launcher.make_network().await.unwrap(), network);
    site.launcher.shutdown().await;
}

#[tokio::test]
async fn a_pool_keeps_networks_ready_and_takes_them_back() {
    let Some(site) = Site::new().await else {
        return;
    };
    let pool = NetworkPool::new(site.launcher.clone(), 2);
    eventually("none are made", || pool.ready() == 2).await;
    let first = pool.take().await.unwrap();
    let second = pool.take().await.unwrap();
    assert_ne!(first.id(), second.id());
    assert_eq!(first.address(), first.id().slot_address());
    eventually("it is not refilled", || pool.ready() == 2).await;
    // It is full, so these are destroyed.
    let left = links(&site.hub_namespace).unwrap().len();
    drop((first, second));
    eventually("they are not destroyed", || {
        links(&site.hub_namespace).unwrap().len() == left - 2
    })
    .await;
    assert_eq!(pool.ready(), 2);
    site.launcher.shutdown().await;
}

#[tokio::test]
async fn the_launcher_answers_while_networks_are_made() {
    let Some(site) = Site::new().await else {
        return;
    };
    let making: Vec<_> = (0..20)
        .map(|_| {
            let launcher = site.launcher.clone();
            tokio::spawn(async move { launcher.make_network().await.unwrap() })
        })
        .collect();
    // Whatever comes after them is not behind them.
    let slot = slot(&site.launcher).await;
    site.launcher.release(slot).await.unwrap();
    assert!(making.iter().any(|made| !made.is_finished()));
    for made in making {
        made.await.unwrap();
    }
    site.launcher.shutdown().await;
}
