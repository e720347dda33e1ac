//! What a hostile guest can do: end its own job.

use e2e::{Host, LONG, eventually};

/// Root writes into the port that PID 1 holds, which nobody can open a second time. It ends with its VM only.
const GARBAGE: &str = r#"sudo python3 - <<'END'
import ctypes, os, pathlib, time
libc = ctypes.CDLL(None)
# pidfd_open and pidfd_getfd
init = libc.syscall(434, 1, 0)
port = next(int(fd.name) for fd in pathlib.Path("/proc/1/fd").iterdir() if "vport" in os.readlink(fd))
port = libc.syscall(438, init, port, 0)
print("port", port, flush=True)
while port >= 0:
    try:
        os.write(port, os.urandom(4096))
    except BlockingIOError:
        time.sleep(0.01)
END"#;

/// The next job runs, and everything ends clean.
fn still_works(host: Host) {
    host.submit("true").run().expect_exit(0);
    host.finish();
}

#[test]
fn a_flood_of_output_is_cut_and_the_cut_is_marked() {
    let Some(host) = Host::new().option("log_max_mb", 1).start() else {
        return;
    };
    let outcome = host.submit("head -c 3000000 /dev/zero | tr '\\0' x").run();
    let log = std::fs::metadata(host.log_path(&outcome.run_id()))
        .unwrap()
        .len();
    assert!(log < 1_200_000, "the log has {log} bytes");
    let text = host.log(&outcome.run_id());
    let end = &text[text.len().saturating_sub(300)..];
    assert!(end.contains("cut") || end.contains("truncated"), "{end}");
    still_works(host);
}

#[test]
fn a_job_that_ends_with_children_holding_its_output_is_answered() {
    let Some(host) = Host::new().start() else {
        return;
    };
    host.submit("sleep 1000 & echo started")
        .run()
        .expect_exit(0);
    host.submit("setsid sleep 1000 & echo started")
        .run()
        .expect_exit(0);
    still_works(host);
}

#[test]
fn a_fork_bomb_ends_with_its_job_and_leaves_the_operator_in_control() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host
        .submit("bomb() { bomb | bomb & }; bomb; sleep 1000")
        .spawn();
    let run = job.running();
    let exec = host
        .runner(&["exec", &run, "--", "echo in control"])
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&exec.stdout),
        "in control\n",
        "{exec:?}"
    );
    let kill = host.runner(&["kill", &run]).output().unwrap();
    assert!(kill.status.success(), "{kill:?}");
    job.wait().expect_error(&["cancel"]);
    still_works(host);
}

#[test]
fn a_guest_that_fills_its_disk_fails_alone() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let outcome = host
        .submit("dd if=/dev/zero of=$HOME/big bs=4M count=1000")
        .run();
    assert_ne!(outcome.result()["exit_code"], 0, "{outcome:?}");
    let log = host.log(&outcome.run_id());
    assert!(log.contains("No space left"), "{log}");
    still_works(host);
}

#[test]
fn a_guest_that_eats_its_memory_is_told_so() {
    let Some(host) = Host::new().start() else {
        return;
    };
    host.submit("python3 -c 'x = [bytearray(1 << 20) for _ in range(1000)]'")
        .run()
        .expect_error(&["memory"]);
    still_works(host);
}

#[test]
fn a_guest_that_panics_or_powers_off_is_answered() {
    let Some(host) = Host::new().start() else {
        return;
    };
    // None has a limit of time that it could be answered by.
    let reset = "sudo kill -9 1; sudo python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x1234567)'; sleep 1000";
    for (prompt, why) in [
        (
            "sudo sh -c 'echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger'; sleep 1000",
            "kernel panicked",
        ),
        (
            "sudo sh -c 'echo o > /proc/sysrq-trigger'; sleep 1000",
            "powered itself off",
        ),
        (reset, "reset itself"),
    ] {
        host.submit(prompt).run().expect_error(&[why]);
    }
    still_works(host);
}

#[test]
fn garbage_on_the_control_channel_harms_only_the_guest_that_sent_it() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let outcome = host.submit(GARBAGE).run();
    outcome.expect_error(&["broke the control protocol"]);
    still_works(host);
}

#[test]
fn a_guest_that_closes_its_control_channel_is_killed_and_its_submitter_told() {
    let Some(host) = Host::new().start() else {
        return;
    };
    // Root takes the driver off the device below the port: PID 1 lives, and can never answer again.
    let prompt =
        "cd /sys/bus/virtio/drivers/virtio_console && ls -d virtio* | sudo tee unbind; sleep 1000";
    // No limit of time that it could be told by.
    let outcome = host.submit(prompt).run();
    outcome.expect_error(&["closed its control channel"]);
    eventually("the VM is gone", LONG, || host.vms().is_empty());
    still_works(host);
}

#[test]
fn a_vm_s_process_has_no_privileges_a_network_of_its_own_and_a_limit() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    let run = job.running();
    let vms = host.vms();
    assert_eq!(vms.len(), 1, "{vms:?}");
    let read =
        |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", vms[0].pid)).unwrap();
    let status = read("status");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    };
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!(field("NoNewPrivs"), "1");
    assert_eq!(field("Seccomp"), "2", "a filter");
    assert_eq!(field("Groups"), "");
    let uids: Vec<String> = field("Uid").split_whitespace().map(str::to_owned).collect();
    assert!(
        uids.iter().all(|uid| *uid == uids[0] && uid != "0"),
        "{uids:?}"
    );
    let devices = read("net/dev");
    let names: Vec<&str> = devices
        .lines()
        .skip(2)
        .filter_map(|line| Some(line.split_once(':')?.0.trim()))
        .collect();
    assert_eq!(
        names,
        ["lo", "tap0", "up0"],
        "its network namespace: the card's other end and the link to the hub"
    );
    let namespace =
        |pid: &str, kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    for kind in ["net", "mnt"] {
        assert_ne!(
            namespace(&vms[0].pid.to_string(), kind),
            namespace("self", kind),
            "{kind}"
        );
    }
    assert!(read("cgroup").contains("/vm0/"), "{}", read("cgroup"));
    // Nothing of the home can be reached by path.
    let home = format!("/proc/{}/root{}", vms[0].pid, host.home().display());
    assert!(!std::path::Path::new(&home).exists(), "{home}");
    assert!(host.runner(&["kill", &run]).status().unwrap().success());
    job.wait();
    host.finish();
}
