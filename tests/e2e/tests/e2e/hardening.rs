//! What the unit takes from the runner that its work does not need, tried from inside the unit, and outside it for
//! comparison.

use e2e::{METAL_NAME, Metal};
use serde_json::Value;

const PROBE: &str = include_str!("hardening.py");

/// What is refused in the unit, and with which error.
const REFUSED: [(&str, &str); 10] = [
    ("write /usr", "EROFS"),
    ("write /etc", "EROFS"),
    ("write /boot", "EROFS"),
    ("see /tmp", "ENOENT"),
    ("open a device", "EPERM"),
    ("set the host's name", "EPERM"),
    ("ask for the kernel's log", "EPERM"),
    ("change the personality", "EPERM"),
    ("be scheduled in real time", "EPERM"),
    ("account processes", "EPERM"),
];

/// What an attempt says that nothing refuses, where that is not "ok".
const OTHERWISE: [(&str, &str); 2] = [
    ("be scheduled in real time", "EINVAL"),
    ("account processes", "ENOENT"),
];

/// What `systemd-analyze security` may say at most, in tenths: of 100, which is no restriction at all. What is missing
/// the unit names with its reason.
const EXPOSURE: u32 = 76;

/// Capabilities that the unit keeps, by their numbers in Linux: include/uapi/linux/capability.h.
const KEPT: [u32; 19] = [
    0,  // CHOWN
    1,  // DAC_OVERRIDE
    2,  // DAC_READ_SEARCH
    3,  // FOWNER
    4,  // FSETID
    5,  // KILL
    6,  // SETGID
    7,  // SETUID
    8,  // SETPCAP
    10, // NET_BIND_SERVICE
    12, // NET_ADMIN
    13, // NET_RAW
    14, // IPC_LOCK
    18, // SYS_CHROOT
    19, // SYS_PTRACE
    21, // SYS_ADMIN
    23, // SYS_NICE
    24, // SYS_RESOURCE
    27, // MKNOD
];

#[test]
fn the_unit_takes_from_the_runner_what_it_does_not_need_and_jobs_run_all_the_same() {
    let Some(metal) = Metal::unified("vm0/small") else {
        return;
    };
    metal.deploy_local();
    metal.on_host(&format!(
        "cat >probe.py <<'PROBE'\n{PROBE}PROBE\ntouch /tmp/of-the-host"
    ));
    let said = |file: &str| -> Value {
        serde_json::from_str(&metal.on_host(&format!("cat {file}"))).expect("JSON")
    };
    metal.on_host("sudo -n python3 probe.py /home/dev/outside && sudo -n chmod 644 outside");
    let outside = said("outside");

    // A command before the daemon, with all that the unit sets for that.
    let place = format!("/etc/systemd/system/vm0-runner-{METAL_NAME}.service.d");
    let probe = "/usr/bin/python3 /home/dev/probe.py /home/dev/inside";
    metal.on_host(&format!(
        "sudo -n mkdir {place} && printf '[Service]\\nExecStartPre={probe}\\n' | sudo -n tee {place}/probe.conf && \
         sudo -n systemctl daemon-reload && sudo -n systemctl restart vm0-runner-{METAL_NAME} && sudo -n chmod 644 inside"
    ));
    let inside = said("inside");
    for (attempt, error) in REFUSED {
        // Or it would not be the unit that refuses it.
        let otherwise = OTHERWISE.iter().find(|(name, _)| *name == attempt);
        let otherwise = otherwise.map_or("ok", |(_, said)| said);
        assert_eq!(outside[attempt], otherwise, "{attempt}, outside: {outside}");
        assert_eq!(inside[attempt], error, "{attempt}, inside: {inside}");
    }
    assert_eq!(inside["open /dev/net/tun"], "ok", "{inside}");
    assert_eq!(inside["NoNewPrivs"], "1", "{inside}");
    let kept: u64 = KEPT.iter().map(|number| 1 << number).sum();
    // Of those that the host has itself: a container may lack some.
    let bound = |found: &Value| found["CapBnd"].as_u64().expect("a number");
    assert_eq!(bound(&inside), kept & bound(&outside), "{inside} {outside}");
    assert_ne!(bound(&outside) & !kept, 0, "{outside}");
    // Nothing of it has become weaker.
    let analyzed = metal.on_host(&format!(
        "systemd-analyze security --no-pager --threshold={EXPOSURE} vm0-runner-{METAL_NAME}"
    ));
    assert!(analyzed.contains("Overall exposure level"), "{analyzed}");
    // And none of it is in the way of a job.
    metal.submit("true").expect_exit(0);
    metal.finish();
}
