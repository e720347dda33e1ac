//! What a host in production needs beside working: Firecracker's advice (its docs/prod-host-setup.md and
//! docs/kernel-policy.md), point by point. docs/operations.md, "A metal host", says why and what the runner does by itself.
//!
//! Nothing here is FAIL: VMs run without it, only not as well separated, or not as fast.

use std::path::Path;

use host::launcher::{LauncherConfig, SERVICES};
use rustix::process::{Resource, getrlimit};

use super::{Check, Outcome, Subject};

/// All of them.
pub(super) const ALL: &[Check] = &[
    Check {
        name: "host kernel",
        run: |_| kernel(&rustix::system::uname().release().to_string_lossy()),
    },
    Check {
        name: "smt",
        run: |_| smt(ROOT),
    },
    Check {
        name: "ksm",
        run: |_| ksm(ROOT),
    },
    Check {
        name: "swap",
        run: |_| swap(ROOT),
    },
    Check {
        name: "cpu flaws",
        run: |_| flaws(ROOT),
    },
    Check {
        name: "microcode",
        run: |_| microcode(ROOT),
    },
    Check {
        name: "memory errors",
        run: |_| memory_errors(ROOT),
    },
    Check {
        name: "nested kvm",
        run: |_| nested(ROOT),
    },
    Check {
        name: "kvm huge pages",
        run: |_| kvm_huge_pages(ROOT),
    },
    Check {
        name: "kvm timers",
        run: |_| kvm_timers(ROOT),
    },
    Check {
        name: "cgroup v2",
        run: |_| cgroup_v2(ROOT),
    },
    Check {
        name: "cgroup moves",
        run: |_| cgroup_moves(ROOT),
    },
    Check {
        name: "host console",
        run: |_| console(ROOT),
    },
    Check {
        name: "huge pages",
        run: |_| huge_pages(ROOT),
    },
    Check {
        name: "descriptors",
        run: |_| descriptors(getrlimit(Resource::Nofile).maximum),
    },
    Check {
        name: "vm users",
        run: vm_users,
    },
    Check {
        name: "home's path",
        run: home_path,
    },
];

/// Where the host's files are; elsewhere in tests.
const ROOT: &str = "/";

/// A file of the kernel, without its newline.
fn read(root: &str, path: &str) -> Option<String> {
    let text = std::fs::read_to_string(Path::new(root).join(path)).ok()?;
    Some(text.trim().to_owned())
}

/// Host kernels that Firecracker 1.16 is tested with (firecracker: docs/kernel-policy.md).
const TESTED: &[&str] = &["5.10", "6.1", "6.18"];

fn kernel(release: &str) -> Outcome {
    let mut parts = release.split('.');
    let series = match (parts.next(), parts.next()) {
        (Some(major), Some(minor)) => {
            let digits = minor
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(minor.len());
            format!("{major}.{}", minor.get(..digits).unwrap_or(minor))
        }
        _ => release.to_owned(),
    };
    if TESTED.contains(&series.as_str()) {
        return Outcome::pass(format_args!(
            "Linux {series} is one that Firecracker is tested with"
        ));
    }
    Outcome::warn(
        format_args!("Linux {series} is none that Firecracker is tested with"),
        format_args!("boot one of {}", TESTED.join(", ")),
    )
}

fn smt(root: &str) -> Outcome {
    // kernel: Documentation/ABI/testing/sysfs-devices-system-cpu
    match read(root, "sys/devices/system/cpu/smt/control").as_deref() {
        Some("on") => Outcome::warn(
            "hyperthreads are on: VMs on the two threads of a core can spy on each other",
            "echo off > /sys/devices/system/cpu/smt/control, and for good the kernel parameter nosmt",
        ),
        Some(state) => Outcome::pass(format_args!("no hyperthreads ({state})")),
        None => Outcome::pass("this kernel knows no hyperthreads"),
    }
}

fn ksm(root: &str) -> Outcome {
    match read(root, "sys/kernel/mm/ksm/run").as_deref() {
        // 2: stopped, and what was merged is taken apart.
        None | Some("0" | "2") => Outcome::pass("equal pages of memory are not merged"),
        Some(_) => Outcome::warn(
            "equal pages of memory are merged (KSM): a VM can learn from timing what others hold",
            "echo 2 > /sys/kernel/mm/ksm/run, and for good `systemctl disable --now ksm ksmtuned`",
        ),
    }
}

fn swap(root: &str) -> Outcome {
    let text = read(root, "proc/swaps").unwrap_or_default();
    // zram stays in memory.
    let on_disk: Vec<_> = text
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| !name.starts_with("/dev/zram"))
        .collect();
    if on_disk.is_empty() {
        return Outcome::pass("no memory is swapped to a disk");
    }
    Outcome::warn(
        format_args!(
            "memory is swapped to {}: what VMs hold can end up on a disk",
            on_disk.join(", ")
        ),
        "swapoff -a, and remove it from /etc/fstab (or encrypt it)",
    )
}

fn flaws(root: &str) -> Outcome {
    let directory = Path::new(root).join("sys/devices/system/cpu/vulnerabilities");
    let Ok(entries) = std::fs::read_dir(&directory) else {
        return Outcome::warn(
            format_args!("{} cannot be read", directory.display()),
            "mount /sys, or boot a kernel of 4.15 or later",
        );
    };
    let mut open: Vec<String> = entries
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let state = std::fs::read_to_string(entry.path()).ok()?;
            let open = state.starts_with("Vulnerable") && name != "old_microcode";
            open.then_some(name)
        })
        .collect();
    open.sort();
    let disabled = read(root, "proc/cmdline")
        .unwrap_or_default()
        .split_whitespace()
        .any(|word| word == "mitigations=off");
    match (disabled, open.is_empty()) {
        (false, true) => Outcome::pass("the kernel knows no flaw of this CPU that is open"),
        (true, _) => Outcome::warn(
            "the kernel was told not to protect against the CPU's flaws (mitigations=off)",
            "remove mitigations=off from the kernel's parameters and reboot",
        ),
        (false, false) => Outcome::warn(
            format_args!("flaws of this CPU are open: {}", open.join(", ")),
            "upgrade kernel and microcode and reboot; `grep . /sys/devices/system/cpu/vulnerabilities/*` tells what each lacks",
        ),
    }
}

fn microcode(root: &str) -> Outcome {
    let cpuinfo = read(root, "proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| {
        let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
        flags.is_some_and(|line| line.split_whitespace().any(|word| word == flag))
    };
    if has("hypervisor") {
        return Outcome::pass("this is a virtual machine: its host loads the microcode");
    }
    let (package, firmware) = match () {
        () if cpuinfo.contains("GenuineIntel") => ("intel-microcode", "intel-ucode"),
        () if cpuinfo.contains("AuthenticAMD") => ("amd64-microcode", "amd-ucode"),
        () => return Outcome::pass("this CPU has no microcode that the system could load"),
    };
    let fix =
        format!("apt-get install {package} (section non-free-firmware on Debian), and reboot");
    if read(root, "sys/devices/system/cpu/vulnerabilities/old_microcode")
        .is_some_and(|state| state.starts_with("Vulnerable"))
    {
        return Outcome::warn("the kernel knows newer microcode for this CPU", fix);
    }
    let installed = ["lib/firmware", "usr/lib/firmware"]
        .iter()
        .any(|directory| Path::new(root).join(directory).join(firmware).is_dir());
    match installed {
        true => Outcome::pass("the system loads microcode"),
        false => Outcome::warn(format_args!("{package} is not installed"), fix),
    }
}

fn memory_errors(root: &str) -> Outcome {
    match Path::new(root)
        .join("sys/devices/system/edac/mc/mc0")
        .is_dir()
    {
        true => Outcome::pass("the kernel watches memory with error correction (EDAC)"),
        false => Outcome::warn(
            "the kernel sees no memory with error correction, which makes it hard to flip bits of other VMs (Rowhammer)",
            "look with `dmidecode -t memory`; use DDR4 or later with ECC and target row refresh",
        ),
    }
}

fn nested(root: &str) -> Outcome {
    for vendor in ["kvm_intel", "kvm_amd"] {
        if let Some("1" | "Y") =
            read(root, &format!("sys/module/{vendor}/parameters/nested")).as_deref()
        {
            return Outcome::warn(
                "VMs may run VMs of their own, which no job needs and which is one more way to attack the host",
                format_args!(
                    "echo 'options {vendor} nested=0' > /etc/modprobe.d/vm0-nested.conf, and reboot"
                ),
            );
        }
    }
    Outcome::pass("VMs run no VMs of their own")
}

/// Whether the CPU has the flaw for which KVM splits huge pages.
fn has_itlb_multihit(root: &str) -> bool {
    read(root, "sys/devices/system/cpu/vulnerabilities/itlb_multihit")
        .is_some_and(|state| state != "Not affected")
}

fn kvm_huge_pages(root: &str) -> Outcome {
    let Some(state) = read(root, "sys/module/kvm/parameters/nx_huge_pages") else {
        return Outcome::pass("this KVM has no nx_huge_pages");
    };
    let off = matches!(state.as_str(), "never" | "N");
    match (has_itlb_multihit(root), off, state.as_str()) {
        (true, true, _) => Outcome::warn(
            "this CPU has the flaw iTLB multihit, and KVM's protection (nx_huge_pages) is off: a VM can stop the host",
            "remove nx_huge_pages from /etc/modprobe.d, and reboot",
        ),
        (false, _, "never") => {
            Outcome::pass("KVM makes no thread for a flaw that this CPU has not")
        }
        (false, ..) => Outcome::warn(
            format_args!(
                "this CPU has not the flaw that nx_huge_pages={state} protects against, and each VM pays for it when it starts"
            ),
            "echo 'options kvm nx_huge_pages=never' > /etc/modprobe.d/vm0-kvm.conf, and load kvm again or reboot",
        ),
        (true, false, _) => {
            Outcome::pass(format_args!("nx_huge_pages={state}, as this CPU needs it"))
        }
    }
}

/// KVM's default, microseconds: 5000 timer interrupts a second (kernel: arch/x86/kvm/x86.c).
const MIN_TIMER_US: u64 = 200;

fn kvm_timers(root: &str) -> Outcome {
    let period = read(root, "sys/module/kvm/parameters/min_timer_period_us");
    match period.and_then(|text| text.parse::<u64>().ok()) {
        None => Outcome::pass("this KVM has no min_timer_period_us"),
        Some(period) if period >= MIN_TIMER_US => {
            Outcome::pass(format_args!("a VM's timer rings every {period} µs at most"))
        }
        Some(period) => Outcome::warn(
            format_args!("a VM's timer may ring every {period} µs: it can burn the host's CPU"),
            format_args!(
                "echo 'options kvm min_timer_period_us={MIN_TIMER_US}' >> /etc/modprobe.d/vm0-kvm.conf, and load kvm again or reboot"
            ),
        ),
    }
}

fn cgroup_v2(root: &str) -> Outcome {
    match Path::new(root)
        .join("sys/fs/cgroup/cgroup.controllers")
        .is_file()
    {
        true => Outcome::pass("the host uses cgroup v2 alone"),
        false => Outcome::warn(
            "the host uses cgroup v1, or both: limits on memory are less exact there",
            "add the kernel parameter systemd.unified_cgroup_hierarchy=1 and reboot",
        ),
    }
}

fn cgroup_moves(root: &str) -> Outcome {
    let mounts = read(root, "proc/self/mounts").unwrap_or_default();
    let mounted = mounts
        .lines()
        .filter(|line| line.split(' ').nth(2) == Some("cgroup2"))
        .any(|line| {
            line.split(' ')
                .nth(3)
                .is_some_and(|options| options.contains("favordynmods"))
        });
    if mounted {
        return Outcome::pass("putting a process into a cgroup is quick (favordynmods)");
    }
    let creates_thread =
        read(root, "sys/module/kvm/parameters/nx_huge_pages").is_some_and(|state| state != "never");
    match creates_thread {
        false => Outcome::pass("KVM moves no thread between cgroups when a VM starts"),
        true => Outcome::warn(
            "KVM moves a thread between cgroups for each VM, which Linux 6.0 and later do slowly",
            "mount -o remount,favordynmods /sys/fs/cgroup, at each boot",
        ),
    }
}

fn console(root: &str) -> Outcome {
    let parameters = read(root, "proc/cmdline").unwrap_or_default();
    let serial = parameters
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("console="))
        .any(|device| !device.starts_with("tty0") && device.starts_with("tty"));
    // kernel: Documentation/admin-guide/sysctl/kernel.rst: the first number is the console's level.
    let level = read(root, "proc/sys/kernel/printk").and_then(|text| {
        let first = text.split_whitespace().next()?;
        first.parse::<u32>().ok()
    });
    match (serial, level) {
        (true, Some(level)) if level > 4 => Outcome::warn(
            format_args!(
                "the kernel's messages (level {level}) go to a serial line, for which VMs wait when they start"
            ),
            "dmesg -n 1, and for good the kernel parameters quiet loglevel=1",
        ),
        _ => Outcome::pass("no VM waits for the kernel's console"),
    }
}

fn huge_pages(root: &str) -> Outcome {
    let text = read(root, "proc/meminfo").unwrap_or_default();
    let field = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let count = field("HugePages_Total:").unwrap_or(0);
    let size_kb = field("Hugepagesize:").unwrap_or(2048);
    if count == 0 {
        return Outcome::pass("no memory is kept for huge pages");
    }
    Outcome::warn(
        format_args!(
            "{} MiB are kept for huge pages, which no VM of this runner uses",
            count.saturating_mul(size_kb) / 1024
        ),
        "sysctl -w vm.nr_hugepages=0, and remove it from /etc/sysctl.d",
    )
}

/// Enough for the sockets, pidfds and files of a thousand VMs.
const DESCRIPTORS: u64 = 65_536;

fn descriptors(hard: Option<u64>) -> Outcome {
    match hard {
        Some(limit) if limit < DESCRIPTORS => Outcome::warn(
            format_args!("a process may have {limit} open files: too few for many VMs"),
            format_args!(
                "LimitNOFILE={DESCRIPTORS} in the service, or `* hard nofile {DESCRIPTORS}` in /etc/security/limits.conf"
            ),
        ),
        Some(limit) => Outcome::pass(format_args!("a process may have {limit} open files")),
        None => Outcome::pass("a process may have any number of open files"),
    }
}

fn vm_users(_: &Subject<'_>) -> Outcome {
    match LauncherConfig::from_env("doctor".to_owned()) {
        Ok(config) => users_from(ROOT, config.uid_base),
        Err(error) => Outcome::warn(&error, "unset VM0_RUNNER_UID_BASE, or set it to a number"),
    }
}

/// Each VM and each service runs as a user of its own: nobody else may have one of these.
fn users_from(root: &str, first: u32) -> Outcome {
    let count = u32::from(host::slot::SLOTS).saturating_add(u32::from(SERVICES));
    let last = first.saturating_add(count).saturating_sub(1);
    let mut taken = Vec::new();
    for (file, ranges) in [
        ("etc/passwd", false),
        ("etc/group", false),
        ("etc/subuid", true),
        ("etc/subgid", true),
    ] {
        for line in read(root, file).unwrap_or_default().lines() {
            let fields: Vec<_> = line.split(':').collect();
            let at = if ranges { 1 } else { 2 };
            let number = |index: usize| fields.get(index)?.parse::<u32>().ok();
            let Some(start) = number(at) else {
                continue;
            };
            let length = if ranges { number(2).unwrap_or(1) } else { 1 };
            let end = start.saturating_add(length.max(1)).saturating_sub(1);
            if start <= last && end >= first {
                let name = fields.first().copied().unwrap_or_default();
                taken.push(format!("{name} in /{file}"));
            }
        }
    }
    if taken.is_empty() {
        return Outcome::pass(format_args!("{first} to {last} are nobody else's"));
    }
    Outcome::warn(
        format_args!(
            "of the VMs' user ids {first} to {last} some belong to {}",
            taken.join(", ")
        ),
        "set VM0_RUNNER_UID_BASE to the first of as many free ids, for all runners of this host",
    )
}

fn home_path(subject: &Subject<'_>) -> Outcome {
    match writable_above(&subject.home) {
        None => Outcome::pass("nobody else can put another directory in the home's place"),
        Some(path) => Outcome::warn(
            format_args!("others may write in {}, above the home", path.display()),
            format_args!(
                "chmod go-w {}, or use another home with --home DIR",
                path.display()
            ),
        ),
    }
}

/// A directory on the way to `home` in which others than its owner may replace what is there.
fn writable_above(home: &Path) -> Option<&Path> {
    use std::os::unix::fs::MetadataExt;
    home.ancestors().skip(1).find(|path| {
        let sticky = 0o1000;
        std::fs::metadata(path)
            .is_ok_and(|meta| meta.mode() & 0o022 != 0 && meta.mode() & sticky == 0)
    })
}

#[cfg(test)]
#[path = "production_tests.rs"]
mod tests;
