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
        shared_mb: 0,
    }
}

async fn reserve(
    launcher: &Launcher,
    instance: &str,
    kind: LeaseKind,
) -> Result<SlotId, LauncherError> {
    launcher.reserve(record(instance, kind), LIMITS).await
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
        network: None,
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

/// Longer than anything here takes on a busy machine; what is waited for comes sooner.
const PATIENCE: Duration = Duration::from_secs(20);

async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .expect("it does not end")
}

/// Gives a slot back. Where the kernel lets go of its control group late, the launcher says so and goes on by itself.
async fn give_back(launcher: &Launcher, slot: SlotId) {
    let Err(error) = launcher.release(slot).await else {
        return;
    };
    assert!(error.to_string().contains("is not empty"), "{error}");
    in_time(async {
        while launcher.wait(slot).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
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
        echo "oom: $(cat /proc/self/oom_score_adj) nice: $(nice)"
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
        "oom: 500 nice: 0".to_owned(),
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
    give_back(&launcher, slot).await;
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
    let killed = in_time(launcher.kill(slot)).await.unwrap().unwrap();
    assert_eq!(killed.signal, Some(9));
    assert!(!killed.oom_killed);
    in_time(death(process.pidfd)).await;
    // The pipe ends only when the last of them is gone.
    assert_eq!(in_time(read_all(output)).await, "");
    give_back(&launcher, slot).await;
    let error = launcher.wait(slot).await.unwrap_err().to_string();
    assert!(error.contains("this runner does not hold it"), "{error}");
    launcher.shutdown().await;
    assert!(held_slots(host.run_dir()).unwrap().is_empty());
    assert!(matches!(
        launcher.kill(slot).await,
        Err(LauncherError::Gone)
    ));
}

#[tokio::test]
async fn a_failed_start_says_why_and_leaves_the_slot_usable() {
    let Some(host) = TestHost::new() else { return };
    let (launcher, _) = start(&host, "a");
    let slot = reserve(&launcher, "a", LeaseKind::Firm).await.unwrap();
    let attempt = async |change: fn(&mut LaunchSpec)| {
        let (mut spec, _output) = shell(slot, "true");
        change(&mut spec);
        launcher.launch(spec).await.unwrap_err().to_string()
    };
    for (change, why) in [
        (
            (|spec| spec.program = "/usr/bin/not-there".into()) as fn(&mut LaunchSpec),
            "could not execute the program: No such file",
        ),
        (|spec| spec.program = "bash".into(), "no absolute path"),
        (
            |spec| spec.devices = vec!["/dev/mem".into()],
            "/dev/mem may not be given",
        ),
        (
            |spec| spec.args = vec!["x".repeat(200_000).into()],
            "Message too long",
        ),
    ] {
        let error = attempt(change).await;
        assert!(error.contains(why), "{error}");
    }
    let (seen, _) = run(&launcher, slot, "echo fine").await;
    assert_eq!(seen, "fine\n");
    launcher.shutdown().await;
}

#[tokio::test]
async fn limits_hold_and_running_out_of_memory_is_told() {
    let Some(host) = TestHost::new() else { return };
    let (launcher, _) = start(&host, "a");
    let slot = reserve(&launcher, "a", LeaseKind::Firm).await.unwrap();
    let (_, reaped) = run(
        &launcher,
        slot,
        "exec tail -c 300M < <(head -c 400M /dev/zero)",
    )
    .await;
    assert!(reaped.oom_killed, "{reaped:?}");
    assert_eq!(reaped.signal, Some(9));

    // A fork bomb stays in its slot and dies with it.
    let (spec, mut output) = shell(
        slot,
        "bomb() { bomb | bomb & }; echo up; bomb; wait; sleep 1000",
    );
    launcher.launch(spec).await.unwrap();
    output.read_exact(&mut [0; 3]).unwrap();
    in_time(launcher.kill(slot)).await.unwrap();
    let uid = host.uid_base() + u32::from(slot.0);
    assert_eq!(processes_of(uid), Vec::<u32>::new());
    let (seen, reaped) = run(&launcher, slot, "(echo fork works)").await;
    assert_eq!((seen.as_str(), reaped.oom_killed), ("fork works\n", false));
    launcher.shutdown().await;
}

#[tokio::test]
async fn everything_dies_within_a_second_of_the_daemon() {
    let Some(host) = TestHost::new() else { return };
    let (launcher, launcher_pid) = start(&host, "a");
    let mut deaths = Vec::new();
    for _ in 0..5 {
        let slot = reserve(&launcher, "a", LeaseKind::Revocable).await.unwrap();
        let (spec, _output) = shell(slot, "trap '' TERM INT HUP; sleep 1000 & sleep 1000");
        deaths.push(launcher.launch(spec).await.unwrap().pidfd);
    }
    // As the kernel does when the daemon dies: the last descriptor of the connection goes.
    drop(launcher);
    // The one test of how long it takes; everywhere else it is enough that it ends.
    let all_dead = async {
        for pidfd in deaths {
            death(pidfd).await;
        }
        exit_of(launcher_pid).await;
    };
    tokio::time::timeout(Duration::from_secs(1), all_dead)
        .await
        .expect("it took longer than a second");
    for n in 0..5 {
        assert_eq!(processes_of(host.uid_base() + n), Vec::<u32>::new());
    }
    assert_eq!(
        std::fs::read_dir(host.run_dir().join("slots"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(groups_of(&host), Vec::<String>::new());
}

#[tokio::test]
async fn everything_dies_with_a_killed_launcher_and_the_next_one_cleans_up() {
    let Some(host) = TestHost::new() else { return };
    let (launcher, launcher_pid) = start(&host, "a");
    let slot = reserve(&launcher, "a", LeaseKind::Firm).await.unwrap();
    // The main process dies with the launcher; what it forked off is what the next launcher finds.
    let (spec, mut output) = shell(slot, "setsid sleep 1000 & echo up; wait");
    let process = launcher.launch(spec).await.unwrap();
    output.read_exact(&mut [0; 3]).unwrap();
    let waiting = tokio::spawn({
        let launcher = launcher.clone();
        async move { launcher.wait(slot).await }
    });
    kill(launcher_pid);
    in_time(async {
        death(process.pidfd).await;
        launcher.gone().await;
        assert!(matches!(waiting.await.unwrap(), Err(LauncherError::Gone)));
    })
    .await;
    assert!(matches!(launcher.usage().await, Err(LauncherError::Gone)));
    assert!(held_slots(host.run_dir()).unwrap().is_empty());
    let uid = host.uid_base() + u32::from(slot.0);
    assert_eq!(processes_of(uid).len(), 1);

    let (next, _) = start(&host, "b");
    // The kernel may let go of its control group late: then it is left for the next time.
    let reclaimed = in_time(async {
        loop {
            match next.reclaim_orphans().await.unwrap() {
                0 => {}
                reclaimed => return reclaimed,
            }
        }
    });
    assert_eq!(reclaimed.await, 1);
    assert_eq!(next.reclaim_orphans().await.unwrap(), 0);
    assert_eq!(processes_of(uid), Vec::<u32>::new());
    assert_eq!(groups_of(&host), Vec::<String>::new());
    next.shutdown().await;
}

#[tokio::test]
async fn a_slot_left_by_a_dead_owner_is_clean_when_it_is_given_again() {
    let Some(host) = TestHost::new() else { return };
    let (first, first_pid) = start(&host, "a");
    let slot = reserve(&first, "a", LeaseKind::Firm).await.unwrap();
    let (spec, mut output) = shell(slot, "setsid sleep 1000 & echo up; wait");
    first.launch(spec).await.unwrap();
    output.read_exact(&mut [0; 3]).unwrap();
    kill(first_pid);
    first.gone().await;
    let (second, _) = start(&host, "b");
    // Where the kernel lets go of its control group late, another is given meanwhile.
    in_time(async {
        loop {
            let given = reserve(&second, "b", LeaseKind::Firm).await.unwrap();
            if given == slot {
                return;
            }
            give_back(&second, given).await;
        }
    })
    .await;
    assert_eq!(
        processes_of(host.uid_base() + u32::from(slot.0)),
        Vec::<u32>::new()
    );
    second.shutdown().await;
}

#[tokio::test]
async fn two_launchers_share_one_budget() {
    let Some(host) = TestHost::new() else { return };
    let (one, one_pid) = start(&host, "one");
    let (two, _) = start(&host, "two");
    let a = reserve(&one, "one", LeaseKind::Firm).await.unwrap();
    let b = reserve(&two, "two", LeaseKind::Firm).await.unwrap();
    let warm = reserve(&two, "two", LeaseKind::Revocable).await.unwrap();
    assert!(a != b && b != warm && a != warm);
    let usage = one.usage().await.unwrap();
    assert_eq!((usage.firm_count, usage.revocable_count), (2, 1));
    assert_eq!(usage, two.usage().await.unwrap());
    for launcher in [&one, &two] {
        let refused = reserve(launcher, "x", LeaseKind::Firm).await.unwrap_err();
        assert!(matches!(refused, LauncherError::NoRoom(full) if full == usage));
    }
    // What is revocable becomes firm only if it fits.
    let claim = record("two", LeaseKind::Firm);
    let refused = two.update(warm, claim.clone(), LIMITS).await.unwrap_err();
    assert!(matches!(refused, LauncherError::NoRoom(_)));
    one.release(a).await.unwrap();
    two.update(warm, claim, LIMITS).await.unwrap();
    assert_eq!(one.usage().await.unwrap().firm_count, 2);
    // One runner cannot touch the other's slots.
    assert!(one.release(b).await.is_err());
    assert!(one.kill(b).await.is_err());

    // A dead runner's slots count no more.
    let a = reserve(&one, "one", LeaseKind::Revocable).await.unwrap();
    kill(one_pid);
    one.gone().await;
    assert_eq!(two.usage().await.unwrap().revocable_count, 0);
    assert_eq!(reserve(&two, "two", LeaseKind::Revocable).await.unwrap(), a);
    two.shutdown().await;
}

#[tokio::test]
async fn many_launches_at_once_are_all_answered() {
    let Some(host) = TestHost::new() else { return };
    let (launcher, _) = start(&host, "a");
    let tasks: Vec<_> = (0..32)
        .map(|n: i32| {
            let launcher = launcher.clone();
            tokio::spawn(async move {
                let slot = reserve(&launcher, "a", LeaseKind::Revocable).await.unwrap();
                let (seen, reaped) = run(&launcher, slot, &format!("echo $UID; exit {n}")).await;
                give_back(&launcher, slot).await;
                assert_eq!(reaped.code, Some(n));
                seen.trim().parse::<u32>().unwrap()
            })
        })
        .collect();
    for task in tasks {
        let uid = task.await.unwrap();
        assert!((host.uid_base()..host.uid_base() + 4096).contains(&uid));
    }
    launcher.shutdown().await;
}

#[tokio::test]
async fn a_reservation_whose_caller_was_cancelled_is_given_back() {
    let Some(host) = TestHost::new() else { return };
    let (launcher, _) = start(&host, "a");
    for _ in 0..20 {
        let mut asking = Box::pin(reserve(&launcher, "a", LeaseKind::Firm));
        // Polled once: the request is on its way, nobody waits for the answer.
        assert!(
            std::future::poll_fn(|context| {
                std::task::Poll::Ready(asking.as_mut().poll(context).is_pending())
            })
            .await
        );
    }
    in_time(async { while launcher.usage().await.unwrap().firm_count > 0 {} }).await;
    launcher.shutdown().await;
}

#[test]
fn a_daemon_without_privileges_can_do_all_of_it() {
    let Some(host) = TestHost::new() else { return };
    let daemon = || {
        let forked = ForkedLauncher::fork_in_tests(host.config("a")).unwrap();
        // This thread only, and the ones the runtime makes from it.
        let nobody = rustix::thread::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        assert!(std::fs::write(host.run_dir().join("x"), "").is_err());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let launcher = forked.attach().unwrap();
            let slot = reserve(&launcher, "a", LeaseKind::Firm).await.unwrap();
            let (spec, mut output) = shell(slot, "echo up; sleep 1000; true");
            launcher.launch(spec).await.unwrap();
            output.read_exact(&mut [0; 3]).unwrap();
            assert!(launcher.memory(slot).await.unwrap().rss > 1 << 20);
            assert_eq!(launcher.usage().await.unwrap().firm_count, 1);
            let killed = launcher.kill(slot).await.unwrap().unwrap();
            assert_eq!(killed.signal, Some(9));
            give_back(&launcher, slot).await;
            launcher.shutdown().await;
        });
        assert!(held_slots(host.run_dir()).unwrap().is_empty());
    };
    std::thread::scope(|scope| scope.spawn(daemon).join().unwrap());
}

#[tokio::test]
async fn signals_of_a_terminal_or_a_service_manager_do_not_end_it() {
    let Some(host) = TestHost::new() else { return };
    let (launcher, launcher_pid) = start(&host, "a");
    let slot = reserve(&launcher, "a", LeaseKind::Firm).await.unwrap();
    use rustix::process::Signal;
    let signals = [
        Signal::INT,
        Signal::TERM,
        Signal::HUP,
        Signal::QUIT,
        Signal::USR1,
        Signal::USR2,
    ];
    for signal in signals {
        signal_to(launcher_pid, signal);
    }
    // What it ignores itself its children do not inherit.
    let (spec, mut output) = shell(slot, "echo up; exec sleep 1000");
    let process = launcher.launch(spec).await.unwrap();
    output.read_exact(&mut [0; 3]).unwrap();
    signal_to(process.pid, Signal::TERM);
    let reaped = in_time(launcher.wait(slot)).await.unwrap();
    assert_eq!(reaped.signal, Some(15));
    launcher.shutdown().await;
}

#[test]
fn it_is_not_forked_from_a_process_with_threads() {
    let Some(host) = TestHost::new() else { return };
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let other = std::thread::spawn(move || stopped.recv());
    let error = ForkedLauncher::fork(host.config("a")).unwrap_err();
    assert!(error.to_string().contains("threads run already"), "{error}");
    drop(stop);
    assert!(other.join().unwrap().is_err());
}

fn signal_to(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

fn kill(pid: u32) {
    signal_to(pid, rustix::process::Signal::KILL);
}

/// Resolves when the process is gone or dead and unreaped.
async fn exit_of(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    if let Ok(fd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) {
        death(fd).await;
    }
}

/// Live processes of a uid.
fn processes_of(uid: u32) -> Vec<u32> {
    let pids = std::fs::read_dir("/proc").unwrap();
    pids.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let dead = status.contains("\nState:\tZ") || status.contains("\nState:\tX");
            status.contains(&format!("\nUid:\t{uid}\t")) && !dead
        })
        .collect()
}

/// Control groups named after this host's uids.
fn groups_of(host: &TestHost) -> Vec<String> {
    let range = host.uid_base()..host.uid_base() + 4096;
    let hierarchies = std::fs::read_dir("/sys/fs/cgroup").unwrap();
    let mut places: Vec<_> = hierarchies.map(|h| h.unwrap().path().join("vm0")).collect();
    places.push("/sys/fs/cgroup/vm0".into());
    let groups = places
        .iter()
        .filter_map(|place| std::fs::read_dir(place).ok());
    groups
        .flatten()
        .filter_map(|group| group.ok()?.file_name().into_string().ok())
        .filter(|name| name.parse().is_ok_and(|uid: u32| range.contains(&uid)))
        .collect()
}
