//! A run directory and a range of uids that nobody else uses.

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FlockOperation, flock};

use crate::process::{processes_of_uids, processes_with_environment};

/// Where every copy of the tests on this machine finds the locks.
const ROOT: &str = "/run/vm0-e2e";
/// Well below the runner's own range, in the same unassigned span.
const FIRST_UID: u32 = 2_110_000_000;
/// Slots of one host.
const SLOTS: u32 = 4096;
/// And its services, the proxies, whose uids follow.
const SERVICES: u32 = 16;
const RANGES: u32 = 256;

/// Held as long as the test runs.
pub(crate) struct RunRange {
    pub(crate) number: u32,
    pub(crate) run_dir: PathBuf,
    /// Of its VMs.
    pub(crate) uids: Range<u32>,
    /// Of its proxies.
    pub(crate) services: Range<u32>,
    _lock: File,
}

impl RunRange {
    /// The variable that the servers of a world carry, with the range's number.
    pub(crate) const WORLD_VARIABLE: &str = "VM0_E2E_WORLD";

    /// The name of one of its network namespaces.
    pub(crate) fn namespace(&self, which: &str) -> String {
        format!("vm0e2e-{}-{which}", self.number)
    }

    /// Its network namespaces that there are.
    fn namespaces(&self) -> Vec<String> {
        let prefix = self.namespace("");
        fs::read_dir("/run/netns")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with(&prefix))
            .collect()
    }

    /// Takes a free range, and clears what a killed holder left in it.
    pub(crate) fn take() -> Self {
        fs::create_dir_all(ROOT).expect("root may write to /run");
        for number in 0..RANGES {
            let path = format!("{ROOT}/{number}.lock");
            let lock = File::create(&path).expect("a lock can be made");
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            let first = FIRST_UID + number * (SLOTS + SERVICES);
            let services = first + SLOTS;
            let range = Self {
                number,
                run_dir: format!("{ROOT}/{number}").into(),
                uids: first..services,
                services: services..services + SERVICES,
                _lock: lock,
            };
            range.clear();
            return range;
        }
        panic!("all {RANGES} ranges of {ROOT} are taken");
    }

    /// The variable that every process of this host carries.
    pub(crate) fn environment_entry(&self) -> String {
        format!("VM0_RUNNER_RUN_DIR={}", self.run_dir.display())
    }

    /// The range's cgroups, as `vm0/<uid>` in every hierarchy.
    pub(crate) fn cgroups(&self) -> Vec<PathBuf> {
        let mut hierarchies = vec![PathBuf::from("/sys/fs/cgroup")];
        hierarchies.extend(
            fs::read_dir("/sys/fs/cgroup")
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path()),
        );
        hierarchies
            .iter()
            .filter_map(|hierarchy| fs::read_dir(hierarchy.join("vm0")).ok())
            .flatten()
            .flatten()
            .filter(|entry| {
                let uid = entry
                    .file_name()
                    .to_str()
                    .and_then(|name| name.parse().ok());
                uid.is_some_and(|uid| self.uids.contains(&uid) || self.services.contains(&uid))
            })
            .map(|entry| entry.path())
            .collect()
    }

    /// The groups that a metal host was put into, one a hierarchy.
    pub(crate) fn container_cgroups(&self) -> Vec<PathBuf> {
        let name = format!("vm0e2e-{}", self.number);
        let mut hierarchies = vec![PathBuf::from("/sys/fs/cgroup")];
        hierarchies.extend(
            fs::read_dir("/sys/fs/cgroup")
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path()),
        );
        hierarchies
            .iter()
            .map(|hierarchy| hierarchy.join(&name))
            .filter(|group| group.is_dir())
            .collect()
    }

    /// Ends every process of the range and removes its files: only for what a killed or failed test left.
    pub(crate) fn clear(&self) {
        let ours = std::process::id();
        let mut left = processes_with_environment(&self.environment_entry());
        left.retain(|process| process.pid != ours);
        left.extend(processes_of_uids(&self.uids));
        left.extend(processes_of_uids(&self.services));
        left.extend(processes_with_environment(&format!(
            "{}={}",
            Self::WORLD_VARIABLE,
            self.number
        )));
        for process in &left {
            process.kill();
        }
        for process in &left {
            process.ends_within(crate::LONG);
        }
        for cgroup in self.cgroups() {
            // Gone in the meantime, or still counting a zombie: the runner clears a slot before it uses it.
            let _ = fs::remove_dir(cgroup);
        }
        for group in self.container_cgroups() {
            // As above: the next holder tries again.
            remove_groups(&group);
        }
        for namespace in self.namespaces() {
            // Gone in the meantime is as good.
            let _ = Command::new("ip")
                .args(["netns", "delete", &namespace])
                .stdin(Stdio::null())
                .status();
        }
        match fs::remove_dir_all(&self.run_dir) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => panic!("{} cannot be removed: {error}", self.run_dir.display()),
        }
    }
}

/// Removes a control group and all below it; false if one of them still has processes.
pub(crate) fn remove_groups(group: &Path) -> bool {
    let Ok(entries) = fs::read_dir(group) else {
        return true;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    fs::remove_dir(group).is_ok()
}
