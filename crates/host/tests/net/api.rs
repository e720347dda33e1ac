//! The runner's own API: through the proxy only, at its very address and port.

use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::time::Duration;

use host::test_support::net::TestWorld;

use crate::common::{Site, accept, is_lonely, original_destination};

const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn an_api_on_a_private_address_and_any_port_is_reached_through_the_proxy_alone() {
    let Some(site) = Site::new().await else {
        return;
    };
    site.world.add_address(PRIVATE).unwrap();
    let api = site.world_listener(PRIVATE, 8443);
    let neighbour = site.world_listener(PRIVATE, 80);
    let public = site.world_listener(TestWorld::ADDRESS, 8443);
    let worker = site.worker(8080);
    let vm = site.vm().await;
    vm.is_refused(PRIVATE, 8443);
    let from_proxy = |address: Ipv4Addr, port: u16| {
        site.in_hub(|| {
            let to = SocketAddrV4::new(address, port).into();
            TcpStream::connect_timeout(&to, Duration::from_secs(5))
        })
    };
    assert!(from_proxy(PRIVATE, 8443).is_err());

    let at = vec![SocketAddrV4::new(PRIVATE, 8443)];
    // Twice: what is admitted already is admitted anew.
    site.launcher.admit_api(at.clone(), HOUR).await.unwrap();
    site.launcher.admit_api(at.clone(), HOUR).await.unwrap();
    let _guest = vm.connect(PRIVATE, 8443).unwrap();
    let (redirected, peer) = accept(&worker);
    assert_eq!(peer.ip(), vm.network.slot_address());
    assert_eq!(original_destination(&redirected), at[0]);
    is_lonely(&api);
    let _proxy = from_proxy(PRIVATE, 8443).unwrap();
    accept(&api);

    // Nothing beside it: no other port of its address, no other address with its port.
    vm.is_refused(PRIVATE, 80);
    vm.is_refused(TestWorld::ADDRESS, 8443);
    assert!(from_proxy(PRIVATE, 80).is_err());
    is_lonely(&neighbour);
    is_lonely(&public);
    is_lonely(&worker);
    site.launcher.shutdown().await;
}
