//! What must not be left after a runner has stopped.

use std::fs::{self, File};
use std::path::Path;

use rustix::fs::{FileType, FlockOperation, flock, lstat};

use crate::process::{processes_of_uids, processes_with_environment};
use crate::range::RunRange;

/// Everything of a stopped host that should not be there, as sentences; empty when all is well.
pub(crate) fn leftovers(range: &RunRange, home: &Path, group: &str) -> Vec<String> {
    let mut left = Vec::new();
    for process in processes_of_uids(&range.uids) {
        left.push(format!(
            "process {} ({}) of a slot",
            process.pid, process.name
        ));
    }
    for process in processes_of_uids(&range.services) {
        left.push(format!(
            "process {} ({}) of the proxy",
            process.pid, process.name
        ));
    }
    for process in processes_with_environment(&range.environment_entry()) {
        left.push(format!(
            "process {} ({}) of the runner",
            process.pid, process.name
        ));
    }
    for cgroup in range.cgroups() {
        left.push(format!("cgroup {}", cgroup.display()));
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    for mount in mounts.lines() {
        for place in [home, &range.run_dir] {
            let place = place.to_str().expect("test paths are text");
            if mount.contains(&format!(" {place}/")) || mount.contains(&format!(" {place} ")) {
                left.push(format!("mount {mount}"));
            }
        }
    }
    walk(&range.run_dir, &mut |path, kind| {
        if kind == FileType::Socket || kind == FileType::Fifo {
            left.push(format!("{kind:?} {}", path.display()));
        }
        if path
            .parent()
            .is_some_and(|parent| parent.ends_with("slots"))
            && kind == FileType::RegularFile
        {
            let lock = File::open(path).expect("a slot file opens");
            if flock(&lock, FlockOperation::NonBlockingLockShared).is_err() {
                left.push(format!("slot {} still locked", path.display()));
            }
        }
    });
    walk(home, &mut |path, kind| {
        if kind == FileType::Socket {
            left.push(format!("socket {}", path.display()));
        }
    });
    let queue = home.join("groups").join(group);
    walk(&queue, &mut |path, kind| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let in_directory = |directory: &str| {
            path.parent()
                .is_some_and(|parent| parent.ends_with(directory))
        };
        // Answers wait for their submitters, and lock files are never removed; jobs, claims, markers and temporaries
        // must be gone.
        let may_stay = name.ends_with(".result")
            || in_directory(".runners")
            // What somebody planted in the runner's place is set aside, not destroyed.
            || name.starts_with(".refused-")
            || (in_directory(".claims") && name == ".recovery");
        if kind != FileType::Directory && !may_stay {
            left.push(format!("queue file {}", path.display()));
        }
    });
    left
}

/// Every file below a directory, without following links.
fn walk(directory: &Path, visit: &mut impl FnMut(&Path, FileType)) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(stat) = lstat(&path) else { continue };
        let kind = FileType::from_raw_mode(stat.st_mode);
        visit(&path, kind);
        if kind == FileType::Directory {
            walk(&path, visit);
        }
    }
}
