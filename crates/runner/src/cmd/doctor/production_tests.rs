//! Each check against a host made of files.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::super::Status;
use super::*;

/// A root with these files.
struct Root(tempfile::TempDir);

impl Root {
    fn new(files: &[(&str, &str)]) -> Self {
        let root = Self(tempfile::tempdir().unwrap());
        for (path, text) in files {
            let path = root.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        root
    }

    fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }
}

/// What a check says of a host with these files: its word where something is to be done.
fn warned(check: fn(&str) -> Outcome, files: &[(&str, &str)]) -> Option<String> {
    let outcome = check(Root::new(files).path());
    assert_eq!(outcome.fix.is_some(), outcome.status == Status::Warn);
    outcome.fix.map(|fix| format!("{} → {fix}", outcome.found))
}

fn good(check: fn(&str) -> Outcome, files: &[(&str, &str)]) {
    assert_eq!(warned(check, files), None);
}

fn bad(check: fn(&str) -> Outcome, files: &[(&str, &str)], words: &[&str]) {
    let said = warned(check, files).unwrap_or_else(|| panic!("{files:?} is good"));
    for word in words {
        assert!(said.contains(word), "{said}");
    }
}

const FLAWS: &str = "sys/devices/system/cpu/vulnerabilities";

#[test]
fn hyperthreads_merged_pages_and_swap_are_found() {
    let control = "sys/devices/system/cpu/smt/control";
    bad(smt, &[(control, "on")], &["nosmt"]);
    for state in ["off", "forceoff", "notsupported", "notimplemented"] {
        good(smt, &[(control, state)]);
    }
    good(smt, &[]);

    let run = "sys/kernel/mm/ksm/run";
    bad(ksm, &[(run, "1")], &["echo 2"]);
    good(ksm, &[(run, "0")]);
    good(ksm, &[(run, "2")]);
    good(ksm, &[]);

    let head = "Filename\t\t\tType\t\tSize\t\tUsed\t\tPriority";
    let with = |device: &str| format!("{head}\n{device} partition 8388604 0 -2");
    bad(
        swap,
        &[("proc/swaps", &with("/dev/sda2"))],
        &["/dev/sda2", "swapoff"],
    );
    bad(swap, &[("proc/swaps", &with("/swapfile"))], &["/swapfile"]);
    good(swap, &[("proc/swaps", &with("/dev/zram0"))]);
    good(swap, &[("proc/swaps", head)]);
}

#[test]
fn open_flaws_of_the_cpu_are_named() {
    let mds = format!("{FLAWS}/mds");
    let l1tf = format!("{FLAWS}/l1tf");
    let fine = [
        (l1tf.as_str(), "Not affected"),
        (&mds, "Mitigation: Clear CPU buffers; SMT vulnerable"),
    ];
    good(flaws, &fine);
    bad(
        flaws,
        &[
            (
                &mds,
                "Vulnerable: Clear CPU buffers attempted, no microcode",
            ),
            (&l1tf, "Not affected"),
        ],
        &["mds"],
    );
    let mut off = fine.to_vec();
    off.push(("proc/cmdline", "ro mitigations=off quiet"));
    bad(flaws, &off, &["mitigations=off"]);
    bad(flaws, &[], &["vulnerabilities"]);
}

#[test]
fn microcode_is_the_systems_on_metal_only() {
    let metal = "vendor_id : GenuineIntel\nflags : fpu vmx";
    bad(microcode, &[("proc/cpuinfo", metal)], &["intel-microcode"]);
    let amd = "vendor_id : AuthenticAMD\nflags : fpu svm";
    bad(microcode, &[("proc/cpuinfo", amd)], &["amd64-microcode"]);
    good(
        microcode,
        &[
            ("proc/cpuinfo", metal),
            ("lib/firmware/intel-ucode/06-55", "x"),
        ],
    );
    good(
        microcode,
        &[(
            "proc/cpuinfo",
            "vendor_id : GenuineIntel\nflags : fpu hypervisor",
        )],
    );
    let old = format!("{FLAWS}/old_microcode");
    let files = [
        ("proc/cpuinfo", metal),
        ("lib/firmware/intel-ucode/06-55", "x"),
        (&old, "Vulnerable"),
    ];
    bad(microcode, &files, &["newer"]);
    good(flaws, &[(&old, "Vulnerable")]);
}

#[test]
fn memory_without_correction_is_told() {
    bad(memory_errors, &[], &["dmidecode"]);
    good(
        memory_errors,
        &[("sys/devices/system/edac/mc/mc0/ce_count", "0")],
    );
}

#[test]
fn parameters_of_kvm_fit_the_cpu() {
    let pages = "sys/module/kvm/parameters/nx_huge_pages";
    let flaw = format!("{FLAWS}/itlb_multihit");
    let flaw = flaw.as_str();
    bad(
        kvm_huge_pages,
        &[(pages, "Y"), (flaw, "Not affected")],
        &["never"],
    );
    good(kvm_huge_pages, &[(pages, "never"), (flaw, "Not affected")]);
    good(
        kvm_huge_pages,
        &[(pages, "Y"), (flaw, "KVM: Mitigation: Split huge pages")],
    );
    bad(
        kvm_huge_pages,
        &[(pages, "never"), (flaw, "KVM: Vulnerable")],
        &["stop the host"],
    );
    good(kvm_huge_pages, &[]);

    let timers = "sys/module/kvm/parameters/min_timer_period_us";
    good(kvm_timers, &[(timers, "200")]);
    good(kvm_timers, &[(timers, "500")]);
    bad(kvm_timers, &[(timers, "20")], &["min_timer_period_us=200"]);
    good(kvm_timers, &[]);

    bad(
        nested,
        &[("sys/module/kvm_amd/parameters/nested", "1")],
        &["kvm_amd nested=0"],
    );
    bad(
        nested,
        &[("sys/module/kvm_intel/parameters/nested", "Y")],
        &["kvm_intel nested=0"],
    );
    good(nested, &[("sys/module/kvm_intel/parameters/nested", "N")]);
    good(nested, &[]);
}

#[test]
fn cgroups_are_v2_and_quick() {
    good(
        cgroup_v2,
        &[("sys/fs/cgroup/cgroup.controllers", "cpu memory")],
    );
    bad(
        cgroup_v2,
        &[("sys/fs/cgroup/memory/tasks", "")],
        &["unified_cgroup_hierarchy"],
    );

    let pages = "sys/module/kvm/parameters/nx_huge_pages";
    let plain = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0";
    let quick = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,favordynmods 0 0";
    bad(
        cgroup_moves,
        &[(pages, "Y"), ("proc/self/mounts", plain)],
        &["favordynmods"],
    );
    good(cgroup_moves, &[(pages, "Y"), ("proc/self/mounts", quick)]);
    good(
        cgroup_moves,
        &[(pages, "never"), ("proc/self/mounts", plain)],
    );
}

#[test]
fn a_serial_console_that_gets_everything_is_told() {
    let (line, printk) = ("proc/cmdline", "proc/sys/kernel/printk");
    bad(
        console,
        &[(line, "ro console=ttyS0,115200"), (printk, "7\t4\t1\t7")],
        &["loglevel=1"],
    );
    bad(
        console,
        &[(line, "console=tty0 console=ttyAMA0"), (printk, "7 4 1 7")],
        &["dmesg -n 1"],
    );
    good(console, &[(line, "console=ttyS0"), (printk, "1\t4\t1\t7")]);
    good(
        console,
        &[(line, "console=tty0 ro"), (printk, "7\t4\t1\t7")],
    );
}

#[test]
fn memory_that_nobody_uses_is_told() {
    let text = |count: u32| {
        format!("MemTotal: 1 kB\nHugePages_Total:   {count}\nHugepagesize:       2048 kB")
    };
    bad(
        huge_pages,
        &[("proc/meminfo", &text(512))],
        &["1024 MiB", "nr_hugepages=0"],
    );
    good(huge_pages, &[("proc/meminfo", &text(0))]);
}

#[test]
fn limits_and_kernels_are_compared_as_numbers() {
    assert_eq!(descriptors(Some(4096)).status, Status::Warn);
    assert_eq!(descriptors(Some(1 << 20)).status, Status::Pass);
    assert_eq!(descriptors(None).status, Status::Pass);
    assert_eq!(kernel("6.1.0-56-cloud-amd64").status, Status::Pass);
    assert_eq!(kernel("6.18.3").status, Status::Pass);
    assert_eq!(kernel("5.10-rc1").status, Status::Pass);
    assert_eq!(kernel("6.12.1").status, Status::Warn);
    assert_eq!(kernel("6.10.1").status, Status::Warn);
    assert_eq!(kernel("odd").status, Status::Warn);
}

#[test]
fn a_user_who_has_a_vms_id_is_found() {
    let first = 100_000;
    for (file, line, free) in [
        ("etc/passwd", "alice:x:1000:1000::/home/alice:/bin/sh", true),
        (
            "etc/passwd",
            "alice:x:100007:1000::/home/alice:/bin/sh",
            false,
        ),
        ("etc/group", "staff:x:100000:", false),
        ("etc/subuid", "alice:34465:65536", false),
        ("etc/subuid", "alice:34464:65536", true),
        ("etc/subgid", "alice:165536:65536", true),
        ("etc/passwd", "garbage", true),
    ] {
        let outcome = users_from(Root::new(&[(file, line)]).path(), first);
        let expected = if free { Status::Pass } else { Status::Warn };
        assert_eq!(outcome.status, expected, "{line}: {}", outcome.found);
    }
}

#[test]
fn a_directory_above_the_home_that_others_write_in_is_found() {
    let temp = tempfile::tempdir().unwrap();
    let open = temp.path().join("open");
    fs::create_dir_all(open.join("home")).unwrap();
    let mode = |mode| fs::set_permissions(&open, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o755);
    assert_eq!(writable_above(&open.join("home")), None);
    mode(0o777);
    assert_eq!(writable_above(&open.join("home")), Some(open.as_path()));
    // As /tmp: others may not rename what is not theirs.
    mode(0o1777);
    assert_eq!(writable_above(&open.join("home")), None);
}
