//! What a hostile guest can do: end its own job.

use std::time::Instant;

use e2e::{Host, LONG, eventually};

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
        .timeout_secs(30)
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
    let outcome = job.wait();
    assert_ne!(outcome.result()["exit_code"], 0, "{outcome:?}");
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
    for prompt in [
        "sudo sh -c 'echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger'; sleep 1000",
        "sudo sh -c 'echo o > /proc/sysrq-trigger'; sleep 1000",
        "sudo kill -9 1; sudo reboot -f; sleep 1000",
    ] {
        let outcome = host.submit(prompt).timeout_secs(20).run();
        assert_ne!(outcome.result()["exit_code"], 0, "{prompt}: {outcome:?}");
    }
    still_works(host);
}

#[test]
fn garbage_on_the_control_channel_harms_only_the_guest_that_sent_it() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let prompt = "for port in /dev/vport* /dev/virtio-ports/*; do \
                  sudo timeout 5 sh -c \"head -c 1000000 /dev/urandom > $port\"; done; exit 5";
    let outcome = host.submit(prompt).timeout_secs(60).run();
    assert_ne!(outcome.result()["exit_code"], 0, "{outcome:?}");
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
    let begin = Instant::now();
    let outcome = host.submit(prompt).timeout_secs(170).run();
    outcome.expect_error(&["closed its control channel"]);
    assert!(
        begin.elapsed() < LONG / 2,
        "told by the job's timeout only: {outcome:?}"
    );
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
    // Its own device and its link to the hub: nothing of the host's.
    assert_eq!(names, ["lo", "tap0", "up0"], "its network namespace");
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
