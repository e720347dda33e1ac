//! Services: processes in the hub, for the proxy.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use host::launcher::{LauncherError, ServiceId, ServiceSpec};
use host::slot::SLOTS;

use crate::common::{PATIENCE, Site, limits};

const PROXY: ServiceId = ServiceId(3);

fn shell(script: &str) -> (ServiceSpec, File) {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let spec = ServiceSpec {
        service: PROXY,
        program: "/bin/bash".into(),
        args: vec!["-c".into(), script.into()],
        environment: vec![
            ("HOME".into(), "/tmp".into()),
            ("GREETING".into(), "good day".into()),
        ],
        fds: vec![(write.try_clone().unwrap(), 1), (write, 2)],
        shown: Vec::new(),
        resolv_conf: "nameserver 127.0.0.1\n".to_owned(),
        limits: limits(),
    };
    (spec, File::from(read))
}

fn opened(path: &std::path::Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

#[tokio::test]
async fn a_service_sees_the_hub_and_what_it_is_shown() {
    let Some(site) = Site::new().await else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("inner")).unwrap();
    std::fs::write(directory.path().join("inner/file"), "shown\n").unwrap();
    let certificates = std::path::Path::new("/etc/ssl/certs").is_dir();
    let (mut spec, mut output) = shell(
        r#"
        echo "id $(id -u) $(id -g) $(id -G)"
        grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status
        echo "net: $(tail -n +3 /proc/self/net/dev | cut -d: -f1 | sort | xargs)"
        cat /etc/resolv.conf /opt/thing/inner/file /one
        echo "$GREETING; $HOME"
        echo x > /tmp/x && echo "tmp is writable"
        touch /opt/thing/x /etc/x /usr/x /x 2>&1 | grep -c 'Read-only'
        ls /etc/ssl/private 2>/dev/null; ls -d /home /root /run /var 2>/dev/null
        ls -d /etc/ssl/certs 2>/dev/null
        echo "oom $(cat /proc/self/oom_score_adj)"
        "#,
    );
    spec.shown = vec![
        (opened(directory.path()), "/opt/thing".into()),
        (opened(&directory.path().join("inner/file")), "/one".into()),
    ];
    site.launcher.launch_service(spec).await.unwrap();
    let reaped = site.launcher.wait_service(PROXY).await.unwrap();
    assert_eq!(reaped.code, Some(0));
    let mut seen = String::new();
    output.read_to_string(&mut seen).unwrap();
    // Alone in its run directory, so it has the lowest number, whichever service it is.
    let uid = site.host.uid_base() + u32::from(SLOTS);
    let trust = if certificates { "/etc/ssl/certs\n" } else { "" };
    let expected = format!(
        "id {uid} {uid} {uid}\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nNoNewPrivs:\t1\n\
         net: lo up\nnameserver 127.0.0.1\nshown\nshown\ngood day; /tmp\ntmp is writable\n4\n{trust}oom 0\n"
    );
    assert_eq!(seen, expected);
    // What it wrote is gone with it.
    let (spec, mut output) = shell("ls /tmp; echo again");
    site.launcher.launch_service(spec).await.unwrap();
    site.launcher.wait_service(PROXY).await.unwrap();
    seen.clear();
    output.read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "again\n");
    site.launcher.shutdown().await;
}

#[tokio::test]
async fn a_service_is_killed_with_what_it_started_and_may_start_again() {
    let Some(site) = Site::new().await else {
        return;
    };
    for _ in 0..2 {
        let (spec, mut output) = shell("setsid sleep 1000 & echo up; wait");
        let process = site.launcher.launch_service(spec).await.unwrap();
        output.read_exact(&mut [0; 3]).unwrap();
        let (twice, _) = shell("true");
        let error = site.launcher.launch_service(twice).await.unwrap_err();
        assert!(
            error.to_string().contains("one runs in it already"),
            "{error}"
        );
        let reaped = site.launcher.kill_service(PROXY).await.unwrap().unwrap();
        assert_eq!(reaped.signal, Some(9));
        // The end of its output: nobody holds the other end any more.
        assert_eq!(output.read(&mut [0; 1]).unwrap(), 0);
        drop(process);
    }
    // And with the launcher.
    let (spec, mut output) = shell("setsid sleep 1000 & echo up; wait");
    site.launcher.launch_service(spec).await.unwrap();
    output.read_exact(&mut [0; 3]).unwrap();
    site.launcher.shutdown().await;
    let end = tokio::task::spawn_blocking(move || output.read(&mut [0; 1]).unwrap());
    assert_eq!(
        tokio::time::timeout(PATIENCE, end).await.unwrap().unwrap(),
        0
    );
}

#[tokio::test]
async fn what_a_service_may_not_be_is_refused_in_words() {
    let Some(site) = Site::new().await else {
        return;
    };
    let refused =
        async |spec: ServiceSpec, why: &str| match site.launcher.launch_service(spec).await {
            Err(LauncherError::Step { message, .. }) => assert!(message.contains(why), "{message}"),
            other => panic!("{other:?}"),
        };
    for path in [
        "/usr/x",
        "/etc/ssl/certs",
        "/tmp/x",
        "/a/../etc",
        "relative",
        "/",
    ] {
        let (mut spec, _) = shell("true");
        spec.shown = vec![(opened("/".as_ref()), path.into())];
        refused(spec, "nothing may be shown").await;
    }
    let (mut spec, _) = shell("true");
    spec.service = ServiceId(16);
    refused(spec, "there are 16 services").await;
    let (mut spec, _) = shell("true");
    spec.environment = vec![("A".into(), "b\0c".into())];
    refused(spec, "NUL").await;
    let (mut spec, _) = shell("true");
    spec.program = "/no/such".into();
    refused(spec, "execute the program").await;
    site.launcher.shutdown().await;
}
