//! The launcher's life, with real processes, namespaces and cgroups. Needs root; says so and passes where there is
//! none.
#![cfg(test)]

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::time::Duration;

use host::launcher::{CgroupLimits, ForkedLauncher, LaunchSpec, Launcher, LauncherError, Reaped};
use host::slot::{HostLimits, LeaseKind, Resources, SlotId, SlotRecord, held_slots};
use host::test_support::TestHost;

const VM: Resources = Resources {
    vcpu: 1,
    memory_mb: 256,
    disk_mb: 100,
};

const LIMITS: HostLimits = HostLimits {
    total: Resources {
        vcpu: 2,
        memory_mb: 512,
        disk_mb: 200,
    },
};

fn record(instance: &str, kind: LeaseKind) -> SlotRecord {
    SlotRecord {
        instance: instance.to_owned(),
        kind,
        resources: VM,
        run_id: None,
    }
}

fn start(host: &TestHost, instance: &str) -> (Launcher, u32) {
    let forked = ForkedLauncher::fork_in_tests(host.config(instance)).unwrap();
    let pid = forked.pid();
    (forked.attach().unwrap(), pid)
}

fn shell(slot: SlotId, script: &str) -> (LaunchSpec, File) {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let spec = LaunchSpec {
        slot,
        program: "/bin/bash".into(),
        args: vec!["-c".into(), script.into()],
        fds: vec![(write.try_clone().unwrap(), 1), (write, 2)],
        devices: Vec::new(),
        limits: CgroupLimits {
            memory_max: 64 << 20,
            pids_max: 32,
            cpu_weight: 50,
        },
    };
    (spec, File::from(read))
}

async fn run(launcher: &Launcher, slot: SlotId, script: &str) -> (String, Reaped) {
    let (spec, output) = shell(slot, script);
    launcher.launch(spec).await.unwrap();
    let reaped = launcher.wait(slot).await.unwrap();
    (read_all(output).await, reaped)
}

async fn read_all(mut output: File) -> String {
    tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        text
    })
    .await
    .unwrap()
}

async fn within_a_second<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(1), future)
        .await
        .expect("it took longer than a second")
}

/// Resolves when the process behind the pidfd is dead.
async fn death(pidfd: OwnedFd) {
    // SAFETY: an OwnedFd keeps its descriptor open and the same as long as it lives.
    let pidfd = unsafe { tokio::io::unix::AsyncFd::register(pidfd).unwrap() };
    let _ = pidfd.readable().await.unwrap();
}

#[tokio::test]
async fn a_child_sees_and_may_do_nothing_but_its_work() {
    let Some(host) = TestHost::new() else { return };
    let (launcher, _) = start(&host, "a");
    let slot = launcher
        .reserve(record("a", LeaseKind::Firm), LIMITS)
        .await
        .unwrap();
    let script = r#"
        echo "id $(id -u) $(id -g) $(id -G)"
        grep -E '^(Cap|NoNewPrivs|Uid|Gid|Groups)' /proc/self/status
        echo "root: $(ls -A /)"; echo "etc: $(ls /etc)"; echo "dev: $(ls /dev)"
        echo "pids: $(ls /proc | grep -c '^[0-9]')"
        echo "net: $(cat /proc/self/net/dev | tail -n +3 | cut -d: -f1 | xargs)"
        (echo > /dev/tcp/127.0.0.1/9) 2>&1 | grep -o 'Network is unreachable'
        touch /x /dev/x /usr/x 2>&1 | grep -c 'Read-only'
        echo "env: $(env | cut -d= -f1 | grep -vE '^(PWD|SHLVL|_|OLDPWD)$' | xargs)"
        echo "fds: $(ls /proc/self/fd | xargs)"
        echo "limits: $(ulimit -c) $(ulimit -f)"
        echo "oom: $(cat /proc/self/oom_score_adj)"
        mount -t tmpfs none /proc 2>/dev/null || echo no mount
        kill -0 1 2>/dev/null || echo no kill
    "#;
    let (seen, reaped) = run(&launcher, slot, script).await;
    let uid = host.uid_base() + u32::from(slot.0);
    let mut expected = vec![
        format!("id {uid} {uid} {uid}"),
        format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}"),
        "NoNewPrivs:\t1".to_owned(),
        "net: lo".to_owned(),
        "Network is unreachable".to_owned(),
        "3".to_owned(),
        "env: ".to_owned(),
        "fds: 0 1 2 3".to_owned(),
        "limits: 0 unlimited".to_owned(),
        "oom: 500".to_owned(),
        "no mount".to_owned(),
        "no kill".to_owned(),
    ];
    expected.extend(
        ["Inh", "Prm", "Eff", "Bnd", "Amb"].map(|set| format!("Cap{set}:\t0000000000000000")),
    );
    for line in expected {
        assert!(
            seen.lines().any(|l| l.trim_end() == line.trim_end()),
            "{line:?} is not in:\n{seen}"
        );
    }
    for hidden in [
        "home", "run", "tmp", "root", "var", "work", "passwd", "sda", "kvm",
    ] {
        assert!(
            !seen.lines().any(|l| l == hidden),
            "{hidden} is in:\n{seen}"
        );
    }
    assert_eq!(reaped.code, Some(0), "{seen}");
    launcher.release(slot).await.unwrap();
    launcher.shutdown().await;
}

#[tokio::test]
async fn death_is_reported_and_a_slot_serves_again() {
    let Some(host) = TestHost::new() else { return };
    let (launcher, _) = start(&host, "a");
    let slot = launcher
        .reserve(record("a", LeaseKind::Firm), LIMITS)
        .await
        .unwrap();
    let (_, reaped) = run(&launcher, slot, "exit 7").await;
    assert_eq!((reaped.code, reaped.signal), (Some(7), None));

    // What the process left behind dies with the slot's kill, and so does what it forked away.
    let (spec, mut output) = shell(slot, "sleep 1000 & setsid sleep 1000 & echo up; wait");
    let process = launcher.launch(spec).await.unwrap();
    output.read_exact(&mut [0; 3]).unwrap();
    let (second, _output) = shell(slot, "true");
    let error = launcher.launch(second).await.unwrap_err().to_string();
    assert!(error.contains("one runs in it already"), "{error}");
    let memory = launcher.memory(slot).await.unwrap();
    assert!(memory.rss > 0 && memory.private_dirty <= memory.rss);
    let killed = within_a_second(launcher.kill(slot)).await.unwrap().unwrap();
    assert_eq!(killed.signal, Some(9));
    assert!(!killed.oom_killed);
    within_a_second(death(process.pidfd)).await;
    // The pipe ends only when the last of them is gone.
    assert_eq!(within_a_second(read_all(output)).await, "");
    launcher.release(slot).await.unwrap();
    assert!(held_slots(host.run_dir()).unwrap().is_empty());
    assert!(matches!(
        launcher.wait(slot).await,
        Err(LauncherError::Step { .. })
    ));
    launcher.shutdown().await;
}
