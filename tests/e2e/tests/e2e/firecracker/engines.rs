//! Images for both engines, and the way from nothing to a job under Firecracker.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use e2e::{Host, skip};
use serde_json::Value;

use super::release::{Release, installed, run, said, sha256};
use super::servers::TlsMirror;

#[test]
fn an_image_for_both_engines_is_built_and_a_kvm_that_only_opens_is_explained() {
    if e2e::in_own_mounts("firecracker").is_none() {
        return;
    }
    if !Path::new("/dev/kvm").exists() {
        skip("there is no /dev/kvm");
        return;
    }
    let Some(host) = Host::new().prepare() else {
        return;
    };
    // A CPU that claims to have the extensions, in a virtual machine: the boot has to find out what that is worth.
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").expect("/proc is mounted");
    let hardware = cpuinfo
        .split_whitespace()
        .any(|word| word == "vmx" || word == "svm");
    let claims = host.home().join("cpuinfo");
    fs::write(
        &claims,
        format!("flags\t\t: fpu vmx hypervisor\n\n{cpuinfo}"),
    )
    .expect("our home");
    let claims = claims.to_str().expect("text");
    run(
        "mount",
        &["--bind", claims, "/proc/cpuinfo"],
        Path::new("/"),
    );

    let release = Release::stand_in(1 << 20);
    let files = release.files();
    let set_up = release.setup(&host, files.to_str().expect("text")).output();
    installed(&set_up.expect("it starts"));
    let build = host
        .runner(&["build", "--json", "--profile", "vm0/small"])
        .output()
        .expect("it starts");
    let text = said(&build);
    assert!(build.status.success(), "{text}");
    let report: Value = serde_json::from_slice(&build.stdout).expect("JSON");
    let rootfs = report["rootfs_hash"].as_str().expect("a hash");
    let image = host.home().join("images").join(rootfs);
    let json = |path: PathBuf| -> Value {
        let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_slice(&bytes).expect("JSON")
    };
    let manifest = json(image.join("manifest.json"));
    for engine in ["qemu", "firecracker"] {
        for part in ["kernel", "initrd", "rootfs"] {
            let name = manifest["sets"][engine][part]
                .as_str()
                .expect("it is named");
            assert_eq!(manifest["files"][name]["sha256"], sha256(&image.join(name)));
        }
    }
    // Both roots hold the same files.
    let squashfs = image.join("rootfs.squashfs");
    let listed = run(
        "unsquashfs",
        &["-l", squashfs.to_str().expect("text")],
        Path::new("/"),
    );
    assert!(
        listed.contains("squashfs-root/usr/local/bin/guest-agent"),
        "{listed}"
    );

    // Programs that only pretend were not taken for Firecracker.
    assert!(text.contains("Firecracker"), "{text}");
    let snapshot = report["snapshot_hash"].as_str().expect("a hash");
    let snapshot = json(image.join("snapshots").join(snapshot).join("manifest.json"));
    let kvm = json(image.join("proof-qemu-kvm.json"));
    if hardware {
        assert_eq!(snapshot["engine"], "qemu_kvm");
        assert_eq!(kvm["boots"], true);
    } else {
        assert_eq!(snapshot["engine"], "qemu_tcg");
        assert_eq!(kvm["boots"], false);
        for words in [
            "QEMU with KVM is not used",
            "nested KVM opens, but does not run",
            "emulated in software",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }
    let doctor = host.runner(&["doctor"]).output().expect("it starts");
    let doctor = String::from_utf8(doctor.stdout).expect("text");
    assert!(
        doctor.contains("smt"),
        "a host with hardware KVM is checked for production: {doctor}"
    );
    if !hardware {
        assert!(
            doctor.contains("not QEMU with KVM (the image does not boot)"),
            "{doctor}"
        );
    }
    run("umount", &["/proc/cpuinfo"], Path::new("/"));
    host.finish();
}

/// The real programs, as the environment names them.
struct Real {
    firecracker: PathBuf,
    jailer: PathBuf,
    kernel: PathBuf,
    kernel_args: String,
}

impl Real {
    fn of_environment() -> Result<Self, String> {
        let file = |name: &str| {
            let path = std::env::var_os(name).map(PathBuf::from);
            match path {
                Some(path) if path.is_file() => Ok(path),
                Some(path) => Err(format!("{name} names {}, which is no file", path.display())),
                None => Err(format!("{name} names no real program")),
            }
        };
        let real = Self {
            firecracker: file("VM0_TEST_FIRECRACKER")?,
            jailer: file("VM0_TEST_JAILER")?,
            kernel: file("VM0_TEST_FIRECRACKER_KERNEL")?,
            kernel_args: std::env::var("VM0_TEST_FIRECRACKER_KERNEL_ARGS").unwrap_or_default(),
        };
        match Path::new("/dev/kvm").exists() {
            true => Ok(real),
            false => Err("there is no /dev/kvm".to_owned()),
        }
    }

    /// `Firecracker v1.16.1` without its first word.
    fn version(&self) -> String {
        let program = self.firecracker.to_str().expect("text");
        let text = run(program, &["--version"], Path::new("/"));
        let first = text.lines().next().unwrap_or_default();
        let version = first.rsplit('v').next().unwrap_or_default();
        version.to_owned()
    }
}

#[test]
fn a_host_in_production_gets_from_nothing_to_a_job_in_firecracker() {
    let real = match Real::of_environment() {
        Ok(real) => real,
        Err(reason) => {
            skip(&reason);
            return;
        }
    };
    let Some(host) = Host::new().option("engine", "firecracker").prepare() else {
        return;
    };
    // Nothing that was built before.
    fs::remove_dir_all(host.home().join("images")).expect("our home");
    let directory = tempfile::tempdir().expect("a directory");
    let version = real.version();
    let Real {
        firecracker,
        jailer,
        kernel,
        kernel_args,
    } = &real;
    let release = Release::of(
        directory,
        &version,
        firecracker,
        jailer,
        kernel,
        kernel_args,
    );
    let mirror = TlsMirror::of(&release);
    let set_up = release
        .setup(&host, &mirror.url)
        .env("SSL_CERT_FILE", &mirror.certificate)
        .output()
        .expect("it starts");
    assert_eq!(installed(&set_up)["version"], version.as_str());

    // A KVM without hardware support takes half a minute for the boot, and seconds for each process.
    let limit = "600";
    let small = ["--profile", "vm0/small", "--engine", "firecracker"];
    let build = host
        .runner(&["build", "--boot-limit", limit])
        .args(small)
        .output()
        .expect("it starts");
    assert!(build.status.success(), "{}", said(&build));
    let runner = host.config().parent().and_then(Path::file_name);
    let name = runner
        .and_then(|name| name.to_str())
        .expect("text")
        .to_owned();
    let config = host
        .runner(&[
            "config",
            "--name",
            &name,
            "--group",
            host.group(),
            "--warm",
            "0:0",
        ])
        .args(small)
        .output()
        .expect("it starts");
    assert!(config.status.success(), "{}", said(&config));
    host.start_runner();
    let status = host.until_status("it runs", |status| status["mode"] == "running");
    assert_eq!(status["engine"], "firecracker");
    let in_session = |line: &str| {
        let job = host.submit(line).session("s-1").spawn();
        let outcome = job.wait_within(Duration::from_secs(600));
        outcome.expect_exit(0);
        host.log(&outcome.run_id())
    };
    let log = in_session("echo kept > ~/note; uname -r; echo in-firecracker");
    assert!(log.contains("in-firecracker"), "{log}");
    // It waits for its session's next job with less memory, which has it back.
    let status = host.until_status("the idle VM has given memory back", |status| {
        status["idle_vms"][0]["balloon"]["held_mb"].is_u64()
    });
    println!("     {}", status["idle_vms"][0]["balloon"]);
    assert!(in_session("cat ~/note").contains("kept"));
    assert!(host.stop().success(), "the runner stops as it should");

    let counts = [
        "--runs",
        "2",
        "--boots",
        "1",
        "--pickups",
        "3",
        "--idle",
        "1",
    ];
    let measured = host
        .runner(&["benchmark", "--json"])
        .args(small)
        .args(counts)
        .output()
        .expect("it starts");
    assert!(measured.status.success(), "{}", said(&measured));
    let figures: Value = serde_json::from_slice(&measured.stdout).expect("JSON");
    let steps = figures["steps_ms"].as_array().expect("steps");
    let steps: Vec<_> = steps
        .iter()
        .filter_map(|step| step["step"].as_str())
        .collect();
    let expected = [
        "process",
        "socket",
        "load and resume",
        "connect",
        "handshake",
        "mount",
        "clock and reseed",
        "ready",
    ];
    assert_eq!(steps, expected);
    println!("{figures:#}");
    host.finish();
}
