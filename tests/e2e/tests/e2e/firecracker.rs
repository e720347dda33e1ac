//! `runner setup` fetches Firecracker, and what comes of it: from nothing to a job on a host that is like one in production.
//!
//! Its publishers cannot be reached from everywhere, so the files come from a server of the test's own, with their hashes in
//! a file of pins. Where the real programs are not named by the environment, stand-ins take their place up to the verified
//! installation; no job runs with those.

mod engines;
mod release;
mod servers;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use e2e::{Host, LONG, Proc, Text, eventually, skip};
use rustix::process::Signal;

use release::{Release, check, installations, installed, said};
use servers::{Reaped, Stalling, TlsMirror};

#[test]
fn a_mirror_with_tls_is_believed_like_the_host_does_and_what_was_tampered_is_repaired() {
    let Some(host) = Host::new().prepare() else {
        return;
    };
    let release = Release::stand_in(1 << 20);
    let mirror = TlsMirror::of(&release);
    let stranger = release
        .setup(&host, &mirror.url)
        .output()
        .expect("it starts");
    assert!(!stranger.status.success());
    assert!(
        said(&stranger).contains("certificate"),
        "{}",
        said(&stranger)
    );
    assert!(installations(&host).is_empty());
    assert!(!check(&host).status.success());

    let set_up = || {
        let mut command = release.setup(&host, &mirror.url);
        command.env("SSL_CERT_FILE", &mirror.certificate);
        command.output().expect("it starts")
    };
    let first = set_up();
    assert_eq!(installed(&first)["version"], Release::VERSION);
    assert!(
        said(&first).contains("the pins you gave"),
        "{}",
        said(&first)
    );
    assert!(check(&host).status.success());
    let doctor = host.runner(&["doctor", "--engine", "firecracker"]).output();
    let doctor = String::from_utf8(doctor.expect("it starts").stdout).expect("text");
    assert!(doctor.contains("build of your own"), "{doctor}");

    let directory = installations(&host)
        .into_iter()
        .find(|name| name != "current")
        .expect("it is installed");
    let jailer = host
        .home()
        .join("firecracker")
        .join(directory)
        .join("jailer");
    fs::write(&jailer, "#!/bin/sh\nexit 0\n").expect("our home");
    let refused = check(&host);
    assert!(!refused.status.success());
    let text = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert!(text.contains("not what was pinned"), "{text}");
    // A build does not take it either.
    let build = host
        .runner(&[
            "build",
            "--dry-run",
            "--profile",
            "vm0/small",
            "--engine",
            "firecracker",
        ])
        .output()
        .expect("it starts");
    assert!(!build.status.success());
    assert!(
        said(&build).contains("not what was pinned"),
        "{}",
        said(&build)
    );
    installed(&set_up());
    assert!(check(&host).status.success());

    // Another archive on the mirror, behind the back of the pins.
    fs::remove_dir_all(host.home().join("firecracker")).expect("our home");
    let archive = release.files().join(&release.archive);
    let mut bytes = fs::read(&archive).expect("our file");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&archive, bytes).expect("our file");
    let tampered = set_up();
    assert!(!tampered.status.success());
    assert!(
        said(&tampered).contains("thrown away"),
        "{}",
        said(&tampered)
    );
    assert!(installations(&host).is_empty());
    host.finish();
}

/// A set-up that runs until it is told to end.
struct Running {
    child: Reaped,
    stderr: Text,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let stderr = Text::collect(child.stderr.take().expect("a pipe"));
        Self {
            child: Reaped(child),
            stderr,
        }
    }

    fn process(&self) -> Proc {
        Proc::open(self.child.0.id()).expect("it runs")
    }

    /// Whether it ended well, and what it said.
    fn ends(mut self) -> (bool, String) {
        let said = self.stderr.all(LONG);
        (self.child.0.wait().expect("our child").success(), said)
    }
}

/// Bytes of the unfinished kernel.
fn fetched(host: &Host) -> u64 {
    let parts = host.home().join("firecracker/.download");
    let Ok(entries) = fs::read_dir(parts) else {
        return 0;
    };
    let sizes = entries.flatten().filter_map(|entry| entry.metadata().ok());
    sizes.map(|meta| meta.len()).max().unwrap_or(0)
}

#[test]
fn a_set_up_that_is_killed_or_interrupted_is_never_used_and_the_next_goes_on() {
    for how in [Signal::KILL, Signal::INT] {
        let Some(host) = Host::new().prepare() else {
            return;
        };
        let size = 4 << 20;
        let release = Release::stand_in(size);
        let server = Stalling::of(&release);
        let half = (size / 2) as u64;
        let first = Running::start(release.setup(&host, &server.url()));
        eventually("half of the kernel is there", LONG, || {
            fetched(&host) >= half
        });
        // Who comes second waits, and then has nothing left to do.
        let second = Running::start(release.setup(&host, &server.url()));
        second.stderr.wait_for("another `runner setup`", LONG);
        assert!(installations(&host).is_empty());
        assert!(!check(&host).status.success());
        first.process().signal(how);
        let (well, text) = first.ends();
        assert!(!well, "{text}");
        if how == Signal::INT {
            assert!(
                text.contains("the next `runner setup` goes on from there"),
                "{text}"
            );
        }
        let (well, text) = second.ends();
        assert!(well, "{text}");
        assert!(check(&host).status.success());
        let ranges: Vec<_> = server
            .requests
            .try_iter()
            .filter(|(path, _)| *path == release.kernel)
            .map(|(_, range)| range)
            .collect();
        assert_eq!(ranges, [None, Some(format!("bytes={half}-"))]);
        host.finish();
    }
}

#[test]
fn a_full_disk_is_told_and_gets_its_room_back() {
    if e2e::in_own_mounts("firecracker").is_none() {
        return;
    }
    let room_mb = 100;
    let Some(host) = Host::new().own_file_system(room_mb).prepare() else {
        return;
    };
    let release = Release::stand_in(20 << 20);
    let filler = host.fill_disk(8);
    let full = release
        .setup(&host, release.files().to_str().expect("text"))
        .output()
        .expect("it starts");
    assert!(!full.status.success());
    assert!(said(&full).contains("is full"), "{}", said(&full));
    assert!(installations(&host).is_empty());
    assert!(fetched(&host) < 1 << 20, "the half kernel is gone");
    fs::remove_file(filler).expect("our file");
    let files = release.files();
    let output = release.setup(&host, files.to_str().expect("text")).output();
    installed(&output.expect("it starts"));
    host.finish();
}

#[test]
fn without_hardware_kvm_a_set_up_needs_no_network_and_says_why() {
    let Some(host) = Host::new().prepare() else {
        return;
    };
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").expect("/proc is mounted");
    let hardware = cpuinfo
        .split_whitespace()
        .any(|word| word == "vmx" || word == "svm");
    if hardware && Path::new("/dev/kvm").exists() {
        skip("this machine's KVM has hardware support: Firecracker would be fetched");
        return;
    }
    // Whatever asked for the network would end here.
    let output = host
        .runner(&["setup", "--json"])
        .env("https_proxy", "http://127.0.0.1:1")
        .output()
        .expect("it starts");
    let firecracker = installed(&output);
    assert_eq!(firecracker["status"], "skipped");
    assert!(
        firecracker["reason"]
            .as_str()
            .is_some_and(|why| why.contains("/dev/kvm"))
    );
    assert!(installations(&host).is_empty());
    host.finish();
}
