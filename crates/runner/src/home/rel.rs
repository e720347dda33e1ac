//! Typed paths below the home, relative to it, for use with its directory descriptor.

use std::path::{Path, PathBuf};

use crate::names::{GroupName, ImageHash, RunId, RunnerName};

/// `runners`.
pub(crate) const RUNNERS: &str = "runners";
/// `groups`.
pub(crate) const GROUPS: &str = "groups";
/// `images`.
pub(crate) const IMAGES: &str = "images";
/// `logs`.
pub(crate) const LOGS: &str = "logs";
/// `ca`.
pub(crate) const CA: &str = "ca";
/// `proxy`.
pub(crate) const PROXY: &str = "proxy";
/// `firecracker`.
pub(crate) const FIRECRACKER: &str = "firecracker";
/// `bin`.
pub(crate) const BIN: &str = "bin";
/// `locks`.
pub(crate) const LOCKS: &str = "locks";
/// Everything that stands at the top of a home.
pub(crate) const TOP: [&str; 9] = [
    RUNNERS,
    GROUPS,
    IMAGES,
    LOGS,
    CA,
    PROXY,
    FIRECRACKER,
    BIN,
    LOCKS,
];

/// `runners/<name>`.
pub(crate) fn runner(name: &RunnerName) -> PathBuf {
    Path::new(RUNNERS).join(name.as_str())
}

/// `runners/<name>/runner.yaml`.
pub(crate) fn runner_yaml(name: &RunnerName) -> PathBuf {
    runner(name).join("runner.yaml")
}

/// `runners/<name>/instances`.
pub(crate) fn instances(name: &RunnerName) -> PathBuf {
    runner(name).join("instances")
}

/// `groups/<org>/<name>`.
pub(crate) fn group(group: &GroupName) -> PathBuf {
    Path::new(GROUPS).join(group.as_str())
}

/// `images/<rootfs-hash>`.
pub(crate) fn image(rootfs: &ImageHash) -> PathBuf {
    Path::new(IMAGES).join(rootfs.as_str())
}

/// `images/<rootfs-hash>/snapshots/<snapshot-hash>`.
pub(crate) fn snapshot(rootfs: &ImageHash, snapshot: &ImageHash) -> PathBuf {
    image(rootfs).join("snapshots").join(snapshot.as_str())
}

/// `logs/system-<run>.log`.
pub(crate) fn system_log(run: &RunId) -> PathBuf {
    Path::new(LOGS).join(format!("system-{run}.log"))
}

/// `logs/network-<run>.jsonl`.
pub(crate) fn network_log(run: &RunId) -> PathBuf {
    Path::new(LOGS).join(format!("network-{run}.jsonl"))
}

/// `logs/runner-<name>.log`.
pub(crate) fn runner_log(name: &RunnerName) -> PathBuf {
    Path::new(LOGS).join(format!("runner-{name}.log"))
}
