//! Linux plumbing behind small traits: launcher, slots, cgroups, pidfd, locks, confined paths.

pub mod fs;
pub mod launcher;
pub mod slot;
