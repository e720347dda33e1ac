//! Processes under the real jailer. Needs root; most need `jailer` and `firecracker` in PATH and say so where there are none.
#![cfg(test)]

use std::fs::{File, Permissions};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use host::launcher::{
    CgroupLimits, ForkedLauncher, JailFile, JailName, JailSpec, Jailed, Launcher,
};
use host::slot::{HostLimits, LeaseKind, Resources, SlotId, SlotRecord};
use host::test_support::{TestHost, program};
use rustix::process::{Pid, Signal};

/// Longer than anything here takes on a busy machine; what is waited for comes sooner.
const PATIENCE: Duration = Duration::from_secs(30);

struct Programs {
    jailer: File,
    firecracker: File,
}

fn programs() -> Option<Programs> {
    Some(Programs {
        jailer: program("jailer")?,
        firecracker: program("firecracker")?,
    })
}

fn start(host: &TestHost) -> (Launcher, u32) {
    let forked = ForkedLauncher::fork_in_tests(host.config("jailed")).unwrap();
    let pid = forked.pid();
    (forked.attach().unwrap(), pid)
}

async fn reserve(launcher: &Launcher) -> SlotId {
    let resources = Resources {
        vcpu: 1,
        memory_mb: 64,
        disk_mb: 64,
    };
    let record = SlotRecord {
        instance: "jailed".to_owned(),
        kind: LeaseKind::Firm,
        resources,
        run_id: None,
        shared_mb: 0,
    };
    let total = Resources {
        vcpu: 100,
        memory_mb: 10_000,
        disk_mb: 10_000,
    };
    launcher
        .reserve(record, HostLimits { total })
        .await
        .unwrap()
}

/// A file with a name, that VM processes may use.
fn file(dir: &Path, name: &str, mode: u32) -> File {
    let path = dir.join(name);
    std::fs::write(&path, name).unwrap();
    std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    File::options().read(true).write(true).open(&path).unwrap()
}

/// The process and what it prints.
async fn launch(
    launcher: &Launcher,
    slot: SlotId,
    programs: &Programs,
    files: Vec<JailFile>,
) -> (Jailed, UnixStream) {
    let (console, theirs) = UnixStream::pair().unwrap();
    let spec = JailSpec {
        slot,
        jailer: programs.jailer.try_clone().unwrap(),
        program: programs.firecracker.try_clone().unwrap(),
        args: vec!["--api-sock".into(), "/control/api.sock".into()],
        files,
        console: theirs.into(),
        network: None,
        limits: CgroupLimits {
            memory_max: 256 << 20,
            pids_max: 16,
            cpu_weight: 100,
        },
    };
    (launcher.launch_jailed(spec).await.unwrap(), console)
}

/// Looks again until it holds: for what the kernel does a moment later and tells nobody.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("{what}"));
}

/// Waits until the program has taken the jailer's place and made its socket.
async fn ready(jailed: &Jailed) -> UnixStream {
    let socket = format!("/proc/self/fd/{}/api.sock", jailed.control.as_raw_fd());
    let mut connection = None;
    eventually("its API socket does not come", || {
        connection = UnixStream::connect(&socket).ok();
        connection.is_some()
    })
    .await;
    connection.unwrap()
}

fn proc(jailed: &Jailed, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/{name}", jailed.process.pid))
}

/// Processes of a uid.
fn of_uid(uid: u32) -> Vec<u32> {
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    pids.filter(|entry| entry.metadata().is_ok_and(|meta| meta.uid() == uid))
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

async fn death(pidfd: OwnedFd) {
    // SAFETY: an OwnedFd keeps its descriptor open and the same as long as it lives.
    let pidfd = unsafe { tokio::io::unix::AsyncFd::register(pidfd).unwrap() };
    let readable = tokio::time::timeout(PATIENCE, pidfd.readable()).await;
    let _ = readable.expect("it did not die").unwrap();
}

#[tokio::test]
async fn a_jailed_process_has_a_root_of_its_own_and_no_privileges() {
    let Some(host) = TestHost::new() else { return };
    let Some(programs) = programs() else { return };
    let (launcher, _) = start(&host);
    let slot = reserve(&launcher).await;
    let dir = tempfile::tempdir().unwrap();
    let files = vec![
        JailFile {
            file: file(dir.path(), "kernel", 0o444),
            name: JailName::Kernel,
            writable: false,
        },
        JailFile {
            file: file(dir.path(), "disk", 0o666),
            name: JailName::Disk,
            writable: true,
        },
    ];
    let (jailed, _console) = launch(&launcher, slot, &programs, files).await;
    std::fs::remove_file(dir.path().join("disk")).unwrap();
    ready(&jailed).await;

    let uid = host.uid_base() + u32::from(slot.0);
    let status = std::fs::read_to_string(proc(&jailed, "status")).unwrap();
    let expected = [
        format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}"),
        format!("Gid:\t{uid}\t{uid}\t{uid}\t{uid}"),
        "CapEff:\t0000000000000000".to_owned(),
        "CapPrm:\t0000000000000000".to_owned(),
        "CapAmb:\t0000000000000000".to_owned(),
        "NoNewPrivs:\t1".to_owned(),
    ];
    for line in expected {
        assert!(status.lines().any(|l| l == line), "{line} in\n{status}");
    }
    for namespace in ["mnt", "net", "pid", "ipc", "uts"] {
        let of = |path: PathBuf| std::fs::read_link(path.join("ns").join(namespace)).unwrap();
        assert_ne!(
            of(proc(&jailed, "")),
            of("/proc/self".into()),
            "{namespace}"
        );
    }
    let root = proc(&jailed, "root");
    let mut names: Vec<_> = std::fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let expected = [
        "control",
        "dev",
        "disk",
        "firecracker",
        "firecracker.pid",
        "kernel",
        "run",
    ];
    assert_eq!(names, expected);
    // The kernel's own word on what may be written: this process is root, which only a mount stops.
    let write = |name: &str| File::options().write(true).open(root.join(name));
    let refused = write("kernel").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    write("disk").unwrap().write_all(b"written").unwrap();
    assert!(of_uid(uid).contains(&jailed.process.pid));
    let groups = std::fs::read_to_string(proc(&jailed, "cgroup")).unwrap();
    let group = format!("/vm0/{uid}");
    if Path::new("/sys/fs/cgroup")
        .join(format!(".{group}"))
        .exists()
    {
        assert!(groups.contains(&group), "{groups}");
    }

    launcher.release(slot).await.unwrap();
    assert!(of_uid(uid).is_empty(), "a process was left");
    launcher.shutdown().await;
}

#[tokio::test]
async fn a_stopped_process_is_stopped_and_goes_on() {
    let Some(host) = TestHost::new() else { return };
    let Some(programs) = programs() else { return };
    let (launcher, _) = start(&host);
    let slot = reserve(&launcher).await;
    let (jailed, _console) = launch(&launcher, slot, &programs, Vec::new()).await;
    ready(&jailed).await;
    let state = || {
        let stat = std::fs::read_to_string(proc(&jailed, "stat")).unwrap();
        stat.rsplit(") ").next().unwrap().chars().next().unwrap()
    };
    for _ in 0..2 {
        launcher.freeze(slot).await.unwrap();
        eventually("it does not stop", || state() == 'T').await;
        launcher.thaw(slot).await.unwrap();
        eventually("it does not go on", || state() != 'T').await;
    }
    // A stopped one can be killed.
    launcher.freeze(slot).await.unwrap();
    let reaped = launcher.kill(slot).await.unwrap().unwrap();
    assert_eq!(reaped.signal, Some(9));
    launcher.release(slot).await.unwrap();
    launcher.shutdown().await;
}

#[tokio::test]
async fn a_process_that_dies_takes_its_keeper_along_and_the_slot_is_free_for_another() {
    let Some(host) = TestHost::new() else { return };
    let Some(programs) = programs() else { return };
    let (launcher, _) = start(&host);
    let slot = reserve(&launcher).await;
    let uid = host.uid_base() + u32::from(slot.0);
    for _ in 0..3 {
        let (jailed, _console) = launch(&launcher, slot, &programs, Vec::new()).await;
        ready(&jailed).await;
        assert_eq!(of_uid(uid).len(), 2, "the process and its keeper");
        let pid = Pid::from_raw(jailed.process.pid.try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
        let reaped = launcher.wait(slot).await.unwrap();
        assert_eq!(reaped.signal, Some(9));
        eventually("the keeper is left", || of_uid(uid).is_empty()).await;
    }
    launcher.release(slot).await.unwrap();
    launcher.shutdown().await;
}

#[tokio::test]
async fn the_death_of_the_launcher_ends_a_jailed_process_and_leaves_nothing() {
    let Some(host) = TestHost::new() else { return };
    let Some(programs) = programs() else { return };
    let (launcher, launcher_pid) = start(&host);
    let slot = reserve(&launcher).await;
    let uid = host.uid_base() + u32::from(slot.0);
    let (jailed, _console) = launch(&launcher, slot, &programs, Vec::new()).await;
    ready(&jailed).await;
    let pid = Pid::from_raw(launcher_pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
    death(jailed.process.pidfd).await;
    eventually("something is left", || of_uid(uid).is_empty()).await;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let run_dir = host.run_dir().display().to_string();
    assert!(!mounts.contains(&run_dir), "{mounts}");
    // What had a name, the slot's file and group, the next launcher takes back.
    let (next, _) = start(&host);
    assert_eq!(next.reclaim_orphans().await.unwrap(), 1);
    next.shutdown().await;
}

#[tokio::test]
async fn two_started_at_once_know_nothing_of_each_other() {
    let Some(host) = TestHost::new() else { return };
    let Some(programs) = programs() else { return };
    let (launcher, _) = start(&host);
    let (one, two) = (reserve(&launcher).await, reserve(&launcher).await);
    let ((a, _a), (b, _b)) = tokio::join!(
        launch(&launcher, one, &programs, Vec::new()),
        launch(&launcher, two, &programs, Vec::new()),
    );
    tokio::join!(ready(&a), ready(&b));
    for namespace in ["mnt", "net", "pid", "ipc", "uts"] {
        let of = |jailed: &Jailed| std::fs::read_link(proc(jailed, "ns").join(namespace)).unwrap();
        assert_ne!(of(&a), of(&b), "{namespace}");
    }
    launcher.shutdown().await;
    death(a.process.pidfd).await;
    death(b.process.pidfd).await;
}

#[tokio::test]
async fn a_program_that_is_replaced_under_a_running_daemon_stays_what_it_was() {
    let Some(host) = TestHost::new() else { return };
    let Some(mut programs) = programs() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("firecracker");
    std::fs::copy(
        format!("/proc/self/fd/{}", programs.firecracker.as_raw_fd()),
        &path,
    )
    .unwrap();
    programs.firecracker = File::open(&path).unwrap();
    let next = file(dir.path(), "next", 0o755);
    std::fs::rename(dir.path().join("next"), &path).unwrap();
    drop(next);
    let (launcher, _) = start(&host);
    let slot = reserve(&launcher).await;
    for _ in 0..2 {
        let (jailed, _console) = launch(&launcher, slot, &programs, Vec::new()).await;
        ready(&jailed).await;
        launcher.kill(slot).await.unwrap();
    }
    launcher.release(slot).await.unwrap();
    launcher.shutdown().await;
}

#[tokio::test]
async fn a_file_without_a_name_cannot_be_shown_and_the_slot_is_as_before() {
    let Some(host) = TestHost::new() else { return };
    let Some(programs) = programs() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (launcher, _) = start(&host);
    let slot = reserve(&launcher).await;
    let uid = host.uid_base() + u32::from(slot.0);
    let kernel = file(dir.path(), "kernel", 0o444);
    std::fs::remove_file(dir.path().join("kernel")).unwrap();
    let (_console, theirs) = UnixStream::pair().unwrap();
    let spec = JailSpec {
        slot,
        jailer: programs.jailer.try_clone().unwrap(),
        program: programs.firecracker.try_clone().unwrap(),
        args: Vec::new(),
        files: vec![JailFile {
            file: kernel,
            name: JailName::Kernel,
            writable: false,
        }],
        console: theirs.into(),
        network: None,
        limits: CgroupLimits::default(),
    };
    let error = launcher.launch_jailed(spec).await.unwrap_err().to_string();
    assert!(error.contains("show a file"), "{error}");
    eventually("something is left", || of_uid(uid).is_empty()).await;
    let (jailed, _console) = launch(&launcher, slot, &programs, Vec::new()).await;
    ready(&jailed).await;
    launcher.release(slot).await.unwrap();
    launcher.shutdown().await;
}

#[tokio::test]
async fn only_programs_that_root_alone_can_write_are_run_as_root() {
    let Some(host) = TestHost::new() else { return };
    let (launcher, _) = start(&host);
    let slot = reserve(&launcher).await;
    let dir = tempfile::tempdir().unwrap();
    let good = || Programs {
        jailer: file(dir.path(), "jailer", 0o755),
        firecracker: file(dir.path(), "firecracker", 0o755),
    };
    let foreign = file(dir.path(), "jailer-of-somebody", 0o755);
    std::os::unix::fs::chown(dir.path().join("jailer-of-somebody"), Some(1000), None).unwrap();
    let bad = [
        (
            "only root can write",
            Programs {
                jailer: file(dir.path(), "jailer-open", 0o775),
                ..good()
            },
        ),
        (
            "only root can write",
            Programs {
                jailer: foreign,
                ..good()
            },
        ),
        (
            "not named like a jailer",
            Programs {
                jailer: file(dir.path(), "bash", 0o755),
                ..good()
            },
        ),
        (
            "not named like a firecracker",
            Programs {
                firecracker: file(dir.path(), "sh", 0o755),
                ..good()
            },
        ),
        // This one would be run, and is no program.
        ("execute the jailer", good()),
    ];
    for (expected, programs) in bad {
        let (_console, theirs) = UnixStream::pair().unwrap();
        let spec = JailSpec {
            slot,
            jailer: programs.jailer,
            program: programs.firecracker,
            args: Vec::new(),
            files: Vec::new(),
            console: theirs.into(),
            network: None,
            limits: CgroupLimits::default(),
        };
        let error = launcher.launch_jailed(spec).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    launcher.release(slot).await.unwrap();
    launcher.shutdown().await;
}
