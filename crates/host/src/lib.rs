//! Linux plumbing behind small traits: launcher, slots, networks, cgroups, pidfd, locks, confined paths.

pub mod cgroup;
pub mod fs;
pub mod handover;
pub mod launcher;
pub mod net;
pub mod process;
pub mod slot;
#[cfg(any(test, feature = "test-support"))]
pub mod test_support;
