//! A jailed process opens the device of its network by name, as the unprivileged user it is.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use host::launcher::{CgroupLimits, JailSpec, Jailed};
use host::net::NetworkId;
use host::slot::SlotId;
use host::test_support::program;

use crate::common::{PATIENCE, Site, sleeper, slot};

async fn launch(site: &Site, slot: SlotId, network: NetworkId) -> Option<(Jailed, UnixStream)> {
    let (console, theirs) = UnixStream::pair().unwrap();
    let spec = JailSpec {
        slot,
        jailer: program("jailer")?,
        program: program("firecracker")?,
        args: vec!["--api-sock".into(), "/control/api.sock".into()],
        files: Vec::new(),
        console: theirs.into(),
        network: Some(network),
        limits: CgroupLimits::default(),
    };
    let jailed = site.launcher.launch_jailed(spec).await.unwrap();
    Some((jailed, console))
}

/// Lets Firecracker open a device: its answer.
async fn open_device(jailed: &Jailed, name: &str) -> String {
    let socket = format!("/proc/self/fd/{}/api.sock", jailed.control.as_raw_fd());
    let deadline = Instant::now() + PATIENCE;
    let mut stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let body = format!("{{\"iface_id\": \"eth0\", \"host_dev_name\": \"{name}\"}}");
    let length = body.len();
    let request = format!(
        "PUT /network-interfaces/eth0 HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = vec![0; 4096];
    let read = stream.read(&mut answer).unwrap();
    String::from_utf8_lossy(&answer[..read]).into_owned()
}

#[tokio::test]
async fn a_network_is_lent_to_jailed_processes_and_comes_back() {
    let Some(site) = Site::new().await else {
        return;
    };
    let network = site.launcher.make_network().await.unwrap();
    let slot = slot(&site.launcher).await;
    for _ in 0..2 {
        let Some((jailed, _console)) = launch(&site, slot, network).await else {
            return;
        };
        let answer = open_device(&jailed, "tap0").await;
        assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
        // It may use that device and make none.
        let answer = open_device(&jailed, "tap1").await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
        // A process is in it: nobody else may be, and it is not cleaned.
        assert!(site.launcher.flush_network(network).await.is_err());
        site.launcher.kill(slot).await.unwrap();
        site.launcher.flush_network(network).await.unwrap();
    }
    // A process that gets the device by descriptor may have the same network next.
    site.launcher.launch(sleeper(slot, network)).await.unwrap();
    site.launcher.kill(slot).await.unwrap();
    site.launcher.flush_network(network).await.unwrap();
    site.launcher.destroy_network(network).await.unwrap();
    site.launcher.release(slot).await.unwrap();
}
