//! What the log says of packets that nobody may send: a real hub, whose kernel tells.

use std::io::Write;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::Duration;

use host::launcher::{CgroupLimits, ForkedLauncher, LaunchSpec, NetworkUse};
use host::net::{HubConfig, NetworkLimits, standard_refused};
use host::slot::{HostLimits, LeaseKind, Resources, SlotRecord};
use host::test_support::net::{TestWorld, add_address, within};
use host::test_support::{TestHost, skip};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::*;

/// Longer than the kernel takes to tell, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// The number under which the process gets its network's device.
const TAP: i32 = 13;

/// A log whose lines the test hears.
#[derive(Clone)]
struct Heard(UnboundedSender<String>);

impl Write for Heard {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // The test may have heard enough.
        let _ = self.0.send(String::from_utf8_lossy(line).into_owned());
        Ok(line.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The namespace that a network's device is in.
fn namespace_of_device(device: &OwnedFd) -> OwnedFd {
    const TUNGETDEVNETNS: libc::c_ulong = 0x54e3;
    // SAFETY: the descriptor is open, the call takes no further argument and makes a descriptor for us alone.
    unsafe {
        let fd = libc::ioctl(device.as_raw_fd(), TUNGETDEVNETNS as _);
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}

#[tokio::test]
async fn a_spoofed_source_is_told_in_the_daemon_s_log_and_counted_and_is_no_run_s() {
    let Some(host) = TestHost::new() else {
        return;
    };
    if !std::path::Path::new("/usr/sbin/nft").exists() {
        return skip("needs nft (apt-get install nftables)");
    }
    if !std::path::Path::new("/dev/net/tun").exists() {
        return skip("needs /dev/net/tun");
    }
    let _world = TestWorld::enter().unwrap();
    let forked = ForkedLauncher::fork_in_tests(host.config("spoof")).unwrap();
    let launcher = forked.attach().unwrap();
    let hub = launcher
        .make_hub(HubConfig {
            networks: 4,
            workers: vec![8080],
            refused: standard_refused(),
            internal: Vec::new(),
            limits: NetworkLimits::default(),
        })
        .await
        .unwrap();
    let (sender, mut lines) = unbounded_channel();
    let log = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || Heard(sender.clone()))
        .finish();
    let _log = tracing::subscriber::set_default(log);
    let registrations = Arc::new(Registrations::new(None));
    let _events = KernelEvents::start(hub.refusals, hub.flows, Arc::clone(&registrations)).unwrap();

    let (network, other) = (
        launcher.make_network().await.unwrap(),
        launcher.make_network().await.unwrap(),
    );
    let record = SlotRecord {
        instance: "spoof".to_owned(),
        kind: LeaseKind::Revocable,
        resources: Resources::default(),
        run_id: None,
        shared_mb: 0,
    };
    let limits = HostLimits {
        total: Resources::default(),
    };
    let process = launcher
        .launch(LaunchSpec {
            slot: launcher.reserve(record, limits).await.unwrap(),
            program: "/bin/sleep".into(),
            args: vec!["1000".into()],
            fds: Vec::new(),
            devices: Vec::new(),
            network: Some(NetworkUse { network, tap: TAP }),
            limits: CgroupLimits {
                memory_max: 128 << 20,
                pids_max: 32,
                cpu_weight: 100,
            },
        })
        .await
        .unwrap();
    let flags = rustix::process::PidfdGetfdFlags::empty();
    let device = rustix::process::pidfd_getfd(&process.pidfd, TAP, flags).unwrap();

    // Somebody who got out of the VM and lifted its namespace's rules speaks for another VM.
    within(namespace_of_device(&device), || {
        let nft = std::process::Command::new("/usr/sbin/nft")
            .args(["flush", "ruleset"])
            .status();
        assert!(nft.unwrap().success());
        // Sent first so that the hub's link address is known: without it the spoofed packet was not seen in the hub.
        let socket = UdpSocket::bind((network.slot_address(), 0)).unwrap();
        socket.send_to(b"honest", (network.hub_end(), 53)).unwrap();
        add_address("up0", other.slot_address()).unwrap();
        let socket = UdpSocket::bind((other.slot_address(), 0)).unwrap();
        socket.send_to(b"spoofed", (network.hub_end(), 53)).unwrap();
    })
    .unwrap();

    let look = async {
        loop {
            let line = lines.recv().await.unwrap();
            if line.contains("a packet was dropped that nobody may send") {
                return line;
            }
        }
    };
    let line = tokio::time::timeout(PATIENCE, look).await.unwrap();
    assert!(line.contains("WARN"), "{line}");
    // Why, from where it claimed to be, where it was to go and what it was.
    for part in [
        "Spoofed".to_owned(),
        other.slot_address().to_string(),
        network.hub_end().to_string(),
        "Udp(Some(53))".to_owned(),
    ] {
        assert!(line.contains(&part), "{part}: {line}");
    }
    let labels = |action: &str| vec![("type", "packet".to_owned()), ("action", action.to_owned())];
    let traffic = registrations.traffic();
    assert_eq!(traffic.get_or_create(&labels("stray")).get(), 1);
    assert_eq!(traffic.get_or_create(&labels("deny")).get(), 0);
    launcher.shutdown().await;
}
