//! What gets out of a VM and what does not, told by the kernels on both sides.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use host::net::{
    FlowEvent, FlowEvents, GATEWAY_ADDRESS, NetworkLimits, Protocol, Refusal, RefusalEvents,
    RefusalReason,
};
use host::test_support::net::{TestWorld, links, namespace_of};

use crate::common::{PATIENCE, Site, Vm, accept, config, is_lonely, original_destination, sleeper};

const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
const HOUR: Duration = Duration::from_secs(3600);

/// Waits for a refusal that is like this.
async fn told(events: &mut RefusalEvents, wanted: impl Fn(&Refusal) -> bool) -> Refusal {
    let look = async {
        loop {
            let refusal = events.next().await.unwrap();
            if wanted(&refusal) {
                return refusal;
            }
        }
    };
    tokio::time::timeout(PATIENCE, look)
        .await
        .expect("it was not told")
}

/// Both ends can talk.
fn talk(one: &mut TcpStream, other: &mut TcpStream) {
    one.write_all(b"ping").unwrap();
    let mut heard = [0; 4];
    other.read_exact(&mut heard).unwrap();
    other.write_all(b"pong").unwrap();
    one.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"pong");
}

#[tokio::test]
async fn the_web_is_redirected_to_the_worker_of_the_vm() {
    let Some(site) = Site::new().await else {
        return;
    };
    let workers = [site.worker(8080), site.worker(8081)];
    let outside = site.world_listener(TestWorld::ADDRESS, 80);
    let vms = [site.vm().await, site.vm().await, site.vm().await];
    for (number, vm) in vms.iter().enumerate() {
        for port in [80, 443] {
            let mut guest = vm.connect(TestWorld::ADDRESS, port).unwrap();
            let (mut worker, peer) = accept(&workers[number % 2]);
            assert_eq!(peer.ip(), vm.network.slot_address());
            let wanted = SocketAddrV4::new(TestWorld::ADDRESS, port);
            assert_eq!(original_destination(&worker), wanted);
            talk(&mut guest, &mut worker);
        }
    }
    workers.iter().for_each(is_lonely);
    is_lonely(&outside);
    site.launcher.shutdown().await;
}

#[tokio::test]
async fn everything_else_is_refused_at_once_and_told() {
    let Some(site) = Site::new().await else {
        return;
    };
    for address in [METADATA, PRIVATE] {
        site.world.add_address(address).unwrap();
    }
    let outside = [METADATA, PRIVATE].map(|address| site.world_listener(address, 80));
    let workers = [site.worker(8080), site.worker(8081)];
    let (vm, other) = (site.vm().await, site.vm().await);
    let mut events = site.refusals();
    let hub_end = vm.network.hub_end();
    let cases = [
        (METADATA, 80),
        (PRIVATE, 80),
        (TestWorld::ADDRESS, 22),
        (TestWorld::ADDRESS, 8080),
        // The proxy's own port, directly, by every name it has.
        (hub_end, 8080),
        (hub_end, 80),
        (site.hub.number.hub_end(), 8080),
        (other.network.hub_end(), 8080),
        // The host, by both its addresses.
        (site.hub.number.host_end(), 22),
        (other.network.slot_address(), 80),
        (Ipv4Addr::new(224, 0, 0, 1), 80),
    ];
    for (address, port) in cases {
        let error = vm.connect(address, port).unwrap_err();
        if address.is_multicast() {
            // The guest's own kernel says so.
            assert_eq!(error.kind(), ErrorKind::NetworkUnreachable);
            continue;
        }
        assert_eq!(
            error.kind(),
            ErrorKind::ConnectionRefused,
            "{address}:{port}"
        );
        let refusal = told(&mut events, |refusal| refusal.destination == address).await;
        assert_eq!(refusal.reason, RefusalReason::Refused);
        assert_eq!(refusal.network(), Some(vm.network));
        assert_eq!(refusal.protocol, Protocol::Tcp(Some(port)));
    }
    // What the guest sends to its gateway goes to the hub's end.
    vm.is_refused(GATEWAY_ADDRESS, 22);
    let refusal = told(&mut events, |refusal| {
        refusal.protocol == Protocol::Tcp(Some(22))
    })
    .await;
    assert_eq!(refusal.destination, hub_end);
    // Its own slot address is no way to anything either.
    vm.is_refused(vm.network.slot_address(), 8080);

    // QUIC, another name server: an answer of ICMP, which the guest's kernel turns into an error.
    let socket = other.udp();
    for port in [443, 53] {
        socket.connect((TestWorld::ADDRESS, port)).unwrap();
        socket.send(b"hello").unwrap();
        let error = socket.recv(&mut [0; 9]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HostUnreachable);
        let refusal = told(&mut events, |refusal| {
            refusal.network() == Some(other.network)
        })
        .await;
        assert_eq!(refusal.protocol, Protocol::Udp(Some(port)));
    }
    workers.iter().chain(&outside).for_each(is_lonely);
    site.launcher.shutdown().await;
}

#[tokio::test]
async fn names_are_asked_of_the_gateway_and_of_nobody_else() {
    let Some(site) = Site::new().await else {
        return;
    };
    let vm = site.vm().await;
    let resolver = UdpSocket::from(site.hub.dns_udp.try_clone().unwrap());
    resolver.set_nonblocking(false).unwrap();
    resolver.set_read_timeout(Some(PATIENCE)).unwrap();
    let socket = vm.udp();
    socket.connect((GATEWAY_ADDRESS, 53)).unwrap();
    socket.send(b"who is it?").unwrap();
    let mut question = [0; 64];
    let (length, peer) = resolver.recv_from(&mut question).unwrap();
    assert_eq!(&question[..length], b"who is it?");
    assert_eq!(peer.ip(), vm.network.slot_address());
    resolver.send_to(b"me", peer).unwrap();
    let length = socket.recv(&mut question).unwrap();
    assert_eq!(&question[..length], b"me");

    let listener = std::net::TcpListener::from(site.hub.dns_tcp.try_clone().unwrap());
    let mut guest = vm.connect(GATEWAY_ADDRESS, 53).unwrap();
    let (mut answerer, peer) = accept(&listener);
    assert_eq!(peer.ip(), vm.network.slot_address());
    talk(&mut guest, &mut answerer);

    // The proxy asks the same sockets.
    let proxy = site
        .in_hub(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))
        .unwrap();
    proxy
        .send_to(b"proxy", (host::net::RESOLVER_FOR_PROXY, 53))
        .unwrap();
    let (length, peer) = resolver.recv_from(&mut question).unwrap();
    assert_eq!(
        (&question[..length], peer.ip()),
        (&b"proxy"[..], Ipv4Addr::LOCALHOST.into())
    );
    site.launcher.shutdown().await;
}

/// The namespace a VM's guest is wired into, found through its device.
fn namespace_of_vm(vm: &Vm) -> std::os::fd::OwnedFd {
    use std::os::fd::FromRawFd;
    const TUNGETDEVNETNS: libc::c_ulong = 0x54e3;
    let device = vm.device();
    // SAFETY: the descriptor is open, the call takes no further argument and makes a descriptor for us alone.
    unsafe {
        let fd = libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(&device),
            TUNGETDEVNETNS as _,
        );
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        std::os::fd::OwnedFd::from_raw_fd(fd)
    }
}

#[tokio::test]
async fn spoofed_sources_get_nowhere() {
    let Some(site) = Site::new().await else {
        return;
    };
    let resolver = UdpSocket::from(site.hub.dns_udp.try_clone().unwrap());
    resolver.set_nonblocking(false).unwrap();
    resolver.set_read_timeout(Some(PATIENCE)).unwrap();
    let (vm, other) = (site.vm().await, site.vm().await);
    // A guest that takes addresses which are not its own: its namespace drops what it sends.
    for address in [PRIVATE, other.network.slot_address(), TestWorld::HOST] {
        vm.guest.add_address(address).unwrap();
        let socket = vm
            .guest
            .run(|| UdpSocket::bind((address, 0)))
            .unwrap()
            .unwrap();
        socket.send_to(b"spoofed", (GATEWAY_ADDRESS, 53)).unwrap();
    }
    let honest = vm.udp();
    honest.send_to(b"honest", (GATEWAY_ADDRESS, 53)).unwrap();
    let mut heard = [0; 64];
    let (length, peer) = resolver.recv_from(&mut heard).unwrap();
    assert_eq!(
        (&heard[..length], peer.ip()),
        (&b"honest"[..], vm.network.slot_address().into())
    );

    // Somebody who got out of the VM and lifted that: the hub drops it, and tells.
    let namespace = namespace_of_vm(&vm);
    let mut events = site.refusals();
    host::test_support::net::within(&namespace, || {
        let status = std::process::Command::new("/usr/sbin/nft")
            .args(["flush", "ruleset"])
            .status();
        assert!(status.unwrap().success());
        host::test_support::net::add_address("up0", other.network.slot_address()).unwrap();
        let socket = UdpSocket::bind((other.network.slot_address(), 0)).unwrap();
        socket
            .send_to(b"spoofed", (vm.network.hub_end(), 53))
            .unwrap();
        let socket = UdpSocket::bind((vm.network.slot_address(), 0)).unwrap();
        socket
            .send_to(b"honest", (vm.network.hub_end(), 53))
            .unwrap();
    })
    .unwrap();
    let (length, _) = resolver.recv_from(&mut heard).unwrap();
    assert_eq!(&heard[..length], b"honest");
    let refusal = told(&mut events, |refusal| {
        refusal.reason == RefusalReason::Spoofed
    })
    .await;
    assert_eq!(refusal.source, other.network.slot_address());
    assert_eq!(refusal.network(), None);
    site.launcher.shutdown().await;
}

#[tokio::test]
async fn opened_destinations_are_reached_past_the_proxy_and_counted() {
    let Some(site) = Site::new().await else {
        return;
    };
    let outside = site.world_listener(TestWorld::ADDRESS, 5432);
    let elsewhere = site.world_listener(TestWorld::ADDRESS, 5433);
    let mut flows = FlowEvents::new(site.hub.flows.try_clone().unwrap()).unwrap();
    let (vm, other) = (site.vm().await, site.vm().await);
    vm.is_refused(TestWorld::ADDRESS, 5432);
    let destination = SocketAddrV4::new(TestWorld::ADDRESS, 5432);
    let open = |ttl| {
        site.launcher
            .open_destinations(vm.network, vec![destination], ttl)
    };
    open(HOUR).await.unwrap();
    // Again, as a name whose time is renewed.
    open(HOUR).await.unwrap();

    let mut guest = vm.connect(TestWorld::ADDRESS, 5432).unwrap();
    let (mut server, peer) = accept(&outside);
    // The world sees the host.
    assert_eq!(peer.ip(), TestWorld::HOST);
    talk(&mut guest, &mut server);
    let next = async |flows: &mut FlowEvents| {
        tokio::time::timeout(PATIENCE, flows.next())
            .await
            .unwrap()
            .unwrap()
    };
    let FlowEvent::New(begun) = next(&mut flows).await else {
        panic!("it ended before it began");
    };
    assert_eq!(
        (begun.network, begun.destination),
        (vm.network, destination)
    );
    assert_eq!(begun.source.ip(), &vm.network.slot_address());

    // One destination of one VM.
    vm.is_refused(TestWorld::ADDRESS, 5433);
    other.is_refused(TestWorld::ADDRESS, 5432);

    // What is not renewed closes; what runs goes on.
    open(Duration::from_millis(1)).await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    while let Ok(early) = vm.connect(TestWorld::ADDRESS, 5432) {
        drop((early, accept(&outside)));
        assert!(Instant::now() < deadline, "it stays open");
    }
    talk(&mut guest, &mut server);

    // A network that is cleaned has forgotten all of it.
    open(HOUR).await.unwrap();
    site.launcher.kill(vm.slot).await.unwrap();
    site.launcher.flush_network(vm.network).await.unwrap();
    let ended = loop {
        match next(&mut flows).await {
            FlowEvent::End(key, end) if key == begun => break end,
            _ => {}
        }
    };
    assert!(
        ended.sent > 8 && ended.received > 8 && ended.lasted.is_some(),
        "{ended:?}"
    );
    guest.write_all(b"anybody?").unwrap();
    vm.is_refused(TestWorld::ADDRESS, 5432);
    server
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    assert_eq!(
        server.read(&mut [0; 9]).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    is_lonely(&elsewhere);
    site.launcher.shutdown().await;
}

#[tokio::test]
async fn redirected_connections_end_with_their_vm() {
    let Some(site) = Site::new().await else {
        return;
    };
    let worker = site.worker(8080);
    let vm = site.vm().await;
    let mut guest = vm.connect(TestWorld::ADDRESS, 443).unwrap();
    let (mut proxied, _) = accept(&worker);
    talk(&mut guest, &mut proxied);
    site.launcher.kill(vm.slot).await.unwrap();
    site.launcher.flush_network(vm.network).await.unwrap();
    // The next VM has the same addresses. What the last one's ends still send is nobody's.
    site.launcher
        .launch(sleeper(vm.slot, vm.network))
        .await
        .unwrap();
    proxied.write_all(b"for the last one").unwrap();
    guest.write_all(b"from the last one").unwrap();
    let mut fresh = vm.connect(TestWorld::ADDRESS, 443).unwrap();
    let (mut accepted, _) = accept(&worker);
    talk(&mut fresh, &mut accepted);
    for mut end in [guest, proxied] {
        end.set_read_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        assert!(!end.read(&mut [0; 9]).is_ok_and(|heard| heard > 0));
    }
    site.launcher.shutdown().await;
}

#[tokio::test]
async fn a_vm_has_so_many_connections_and_the_others_keep_theirs() {
    let mut few = config();
    few.limits = NetworkLimits {
        connections: 8,
        new_per_second: 1000,
        burst: 1000,
    };
    let Some(site) = Site::with(few).await else {
        return;
    };
    let workers = [site.worker(8080), site.worker(8081)];
    let (vm, other) = (site.vm().await, site.vm().await);
    let mut held: Vec<_> = (0..8)
        .map(|_| vm.connect(TestWorld::ADDRESS, 80).unwrap())
        .collect();
    let mut events = site.refusals();
    vm.is_refused(TestWorld::ADDRESS, 80);
    let refusal = told(&mut events, |_| true).await;
    assert_eq!(
        (refusal.reason, refusal.network()),
        (RefusalReason::Limit, Some(vm.network))
    );
    other.connect(TestWorld::ADDRESS, 80).unwrap();
    // One that is over makes room for one.
    let accepted = accept(&workers[0]);
    drop((held.pop(), held.remove(0), accepted));
    let deadline = Instant::now() + PATIENCE;
    while vm.connect(TestWorld::ADDRESS, 80).is_err() {
        assert!(Instant::now() < deadline, "there is room for none");
    }
    site.launcher.shutdown().await;
}

#[tokio::test]
async fn a_vm_may_begin_so_many_connections_in_a_second() {
    let mut slow = config();
    slow.limits = NetworkLimits {
        connections: 1000,
        new_per_second: 1,
        burst: 5,
    };
    let Some(site) = Site::with(slow).await else {
        return;
    };
    let _worker = site.worker(8080);
    let vm = site.vm().await;
    let began = Instant::now();
    let begun = (0..20)
        .filter(|_| vm.connect(TestWorld::ADDRESS, 80).is_ok())
        .count();
    // One more for each second that it took, and for the one that was begun.
    let allowed = 5 + 1 + usize::try_from(began.elapsed().as_secs()).unwrap();
    assert!((5..=allowed).contains(&begun), "{begun} of {allowed}");
    site.launcher.shutdown().await;
}

#[tokio::test]
async fn the_proxy_itself_reaches_the_world_and_nothing_private() {
    let Some(site) = Site::new().await else {
        return;
    };
    for address in [METADATA, PRIVATE] {
        site.world.add_address(address).unwrap();
    }
    let outside = site.world_listener(Ipv4Addr::UNSPECIFIED, 443);
    let on_host = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 443)).unwrap();
    let vm = site.vm().await;
    let mut events = site.refusals();
    let dial = |address: Ipv4Addr| {
        site.in_hub(|| TcpStream::connect_timeout(&(address, 443).into(), PATIENCE))
    };
    dial(TestWorld::ADDRESS).unwrap();
    drop(accept(&outside));
    let own = [
        METADATA,
        PRIVATE,
        Ipv4Addr::LOCALHOST,
        site.hub.number.host_end(),
        // The host's address on the internet is none of the refused ranges, and the host refuses it all the same.
        TestWorld::HOST,
        vm.network.slot_address(),
        vm.network.hub_end(),
    ];
    for address in own {
        let error = dial(address).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
    }
    told(&mut events, |refusal| {
        refusal.reason == RefusalReason::Proxy && refusal.destination == METADATA
    })
    .await;

    // The operator's exceptions, for a while: an address out there, and one of the host's own.
    let exceptions = vec![PRIVATE, TestWorld::HOST];
    site.launcher
        .allow_internal(exceptions.clone(), HOUR)
        .await
        .unwrap();
    site.launcher
        .allow_internal(exceptions, HOUR)
        .await
        .unwrap();
    dial(PRIVATE).unwrap();
    drop(accept(&outside));
    dial(TestWorld::HOST).unwrap();
    drop(accept(&on_host));
    // And a VM's, through the proxy.
    let worker = site.worker(8080);
    vm.connect(PRIVATE, 443).unwrap();
    assert_eq!(original_destination(&accept(&worker).0).ip(), &PRIVATE);
    is_lonely(&outside);
    is_lonely(&on_host);
    site.launcher.shutdown().await;
}

#[tokio::test]
async fn exceptions_stand_from_the_start() {
    let mut open = config();
    open.internal = vec![
        "10.0.0.0/24".parse().unwrap(),
        "10.0.0.5/32".parse().unwrap(),
    ];
    let Some(site) = Site::with(open).await else {
        return;
    };
    let worker = site.worker(8080);
    let vm = site.vm().await;
    vm.connect(PRIVATE, 80).unwrap();
    assert_eq!(original_destination(&accept(&worker).0).ip(), &PRIVATE);
    vm.is_refused(Ipv4Addr::new(10, 0, 1, 5), 80);
    vm.is_refused(PRIVATE, 22);
    site.launcher.shutdown().await;
}

#[tokio::test]
async fn nothing_speaks_ipv6() {
    let Some(site) = Site::new().await else {
        return;
    };
    let vm = site.vm().await;
    for namespace in [&site.hub_namespace, &namespace_of_vm(&vm)] {
        let text = host::test_support::net::within(namespace, || {
            std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default()
        });
        assert_eq!(text.unwrap(), "");
    }
    let names = links(namespace_of(vm.udp()).unwrap()).unwrap();
    assert!(names.contains(&"tap0".to_owned()));
    site.launcher.shutdown().await;
}
