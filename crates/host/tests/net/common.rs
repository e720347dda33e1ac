//! What the tests of networks share.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use host::launcher::{
    CgroupLimits, ForkedLauncher, Hub, LaunchSpec, Launcher, NetworkUse, Process,
};
use host::net::{HubConfig, NetworkId, NetworkLimits, RefusalEvents, standard_refused};
use host::slot::{HostLimits, LeaseKind, Resources, SlotId, SlotRecord};
use host::test_support::net::{TestGuest, TestWorld, namespace_of};
use host::test_support::{TestHost, skip};

/// Longer than anything here takes on a busy machine; what is waited for comes sooner.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// The number under which processes get their device.
const TAP: i32 = 13;

/// A host with a world behind it, a launcher and its hub.
pub(crate) struct Site {
    pub(crate) launcher: Launcher,
    pub(crate) hub: Hub,
    pub(crate) hub_namespace: OwnedFd,
    pub(crate) world: TestWorld,
    pub(crate) host: TestHost,
}

pub(crate) fn config() -> HubConfig {
    HubConfig {
        networks: 64,
        workers: vec![8080, 8081],
        refused: standard_refused(),
        internal: Vec::new(),
        limits: NetworkLimits::default(),
    }
}

/// Says what is missing where something is.
pub(crate) fn world() -> Option<(TestHost, TestWorld)> {
    let host = TestHost::new()?;
    if !std::path::Path::new("/usr/sbin/nft").exists() {
        skip("needs nft (apt-get install nftables)");
        return None;
    }
    if !std::path::Path::new("/dev/net/tun").exists() {
        skip("needs /dev/net/tun");
        return None;
    }
    Some((host, TestWorld::enter().unwrap()))
}

pub(crate) fn start(host: &TestHost, instance: &str) -> (Launcher, u32) {
    let forked = ForkedLauncher::fork_in_tests(host.config(instance)).unwrap();
    let pid = forked.pid();
    (forked.attach().unwrap(), pid)
}

impl Site {
    pub(crate) async fn new() -> Option<Site> {
        Site::with(config()).await
    }

    pub(crate) async fn with(config: HubConfig) -> Option<Site> {
        let (host, world) = world()?;
        let (launcher, _) = start(&host, "net");
        let hub = launcher.make_hub(config).await.unwrap();
        let hub_namespace = namespace_of(&hub.dns_udp).unwrap();
        Some(Site {
            launcher,
            hub,
            hub_namespace,
            world,
            host,
        })
    }

    /// A VM: a network, a process that holds its device, and a kernel behind it.
    pub(crate) async fn vm(&self) -> Vm {
        let network = self.launcher.make_network().await.unwrap();
        let slot = slot(&self.launcher).await;
        let process = self.launcher.launch(sleeper(slot, network)).await.unwrap();
        let flags = rustix::process::PidfdGetfdFlags::empty();
        let device = rustix::process::pidfd_getfd(&process.pidfd, TAP, flags).unwrap();
        Vm {
            network,
            slot,
            process,
            guest: TestGuest::new(device).unwrap(),
        }
    }

    pub(crate) fn refusals(&self) -> RefusalEvents {
        RefusalEvents::new(self.hub.refusals.try_clone().unwrap()).unwrap()
    }

    /// A listener in the hub, as the proxy's workers have.
    pub(crate) fn worker(&self, port: u16) -> TcpListener {
        self.in_hub(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
            .unwrap()
    }

    pub(crate) fn in_hub<T>(&self, work: impl FnOnce() -> T) -> T {
        host::test_support::net::within(&self.hub_namespace, work).unwrap()
    }

    pub(crate) fn world_listener(&self, address: Ipv4Addr, port: u16) -> TcpListener {
        self.world
            .there(|| TcpListener::bind((address, port)))
            .unwrap()
            .unwrap()
    }
}

pub(crate) struct Vm {
    pub(crate) network: NetworkId,
    pub(crate) slot: SlotId,
    pub(crate) process: Process,
    pub(crate) guest: TestGuest,
}

impl Vm {
    /// The device of its network.
    pub(crate) fn device(&self) -> OwnedFd {
        let flags = rustix::process::PidfdGetfdFlags::empty();
        rustix::process::pidfd_getfd(&self.process.pidfd, TAP, flags).unwrap()
    }

    pub(crate) fn connect(&self, address: impl Into<Ipv4Addr>, port: u16) -> io::Result<TcpStream> {
        let to = SocketAddr::V4(SocketAddrV4::new(address.into(), port));
        let stream = self
            .guest
            .run(|| TcpStream::connect_timeout(&to, PATIENCE))??;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    pub(crate) fn udp(&self) -> UdpSocket {
        let socket = self
            .guest
            .run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))
            .unwrap()
            .unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    /// The connection must be refused, and in words: not by the end of our patience.
    pub(crate) fn is_refused(&self, address: impl Into<Ipv4Addr>, port: u16) {
        let address = address.into();
        let error = self.connect(address, port).unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::ConnectionRefused,
            "{address}:{port}"
        );
    }
}

pub(crate) async fn slot(launcher: &Launcher) -> SlotId {
    let record = SlotRecord {
        instance: "net".to_owned(),
        kind: LeaseKind::Revocable,
        resources: Resources::default(),
        run_id: None,
        shared_mb: 0,
    };
    let limits = HostLimits {
        total: Resources::default(),
    };
    launcher.reserve(record, limits).await.unwrap()
}

pub(crate) fn sleeper(slot: SlotId, network: NetworkId) -> LaunchSpec {
    LaunchSpec {
        slot,
        program: "/bin/sleep".into(),
        args: vec!["1000".into()],
        fds: Vec::new(),
        devices: Vec::new(),
        network: Some(NetworkUse { network, tap: TAP }),
        limits: limits(),
    }
}

pub(crate) fn limits() -> CgroupLimits {
    CgroupLimits {
        memory_max: 128 << 20,
        pids_max: 32,
        cpu_weight: 100,
    }
}

/// Accepts one connection, or fails after a while.
pub(crate) fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    let mut fds = [rustix::event::PollFd::new(
        listener,
        rustix::event::PollFlags::IN,
    )];
    let patience = rustix::event::Timespec::try_from(PATIENCE).unwrap();
    assert_eq!(
        rustix::event::poll(&mut fds, Some(&patience)),
        Ok(1),
        "nobody came"
    );
    let (stream, peer) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    (stream, peer)
}

/// Nobody has come so far.
pub(crate) fn is_lonely(listener: &TcpListener) {
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}

/// Where the client of a redirected connection wanted to go.
pub(crate) fn original_destination(stream: &TcpStream) -> SocketAddrV4 {
    // SAFETY: an all-zero sockaddr_in is valid, and the kernel writes at most its size into it.
    let address = unsafe {
        let mut address: libc::sockaddr_in = std::mem::zeroed();
        let mut size = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
        let result = libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_IP,
            libc::SO_ORIGINAL_DST,
            (&raw mut address).cast(),
            &raw mut size,
        );
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        address
    };
    let ip = Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
    SocketAddrV4::new(ip, u16::from_be(address.sin_port))
}
