//! Images: what a VM boots (kernel, initramfs, root file system) and the snapshots it is restored from.
//!
//! `plan` decides what an image is and gives it its address; `build` makes it (`sources`, `apt`: where packages come from;
//! `rootfs`, `kernel` with `modules` and `cpio`: its parts; `tools`: the programs that do the work); `store` keeps it,
//! described by its `manifest`, and verifies it before anybody uses it; `sets`: what of it each engine boots.

mod apt;
pub(crate) mod build;
mod cpio;
mod embedded;
mod error;
mod flavour;
#[cfg(test)]
mod foreign_tests;
mod guest;
mod kernel;
mod manifest;
mod modules;
mod newest;
mod plan;
mod progress;
pub(crate) mod proof;
mod rootfs;
mod sets;
pub(crate) mod snapshot;
mod sources;
mod staging;
mod store;
mod tools;
mod verify;
pub(crate) mod warm_up;

pub(crate) use error::ImageError;
pub(crate) use guest::{GuestBinaries, GuestPaths};
pub(crate) use manifest::{sha256, sha256_of};
pub(crate) use newest::{newest_build, newest_proof};
pub(crate) use plan::{Plan, Request};
pub(crate) use progress::Steps;
pub(crate) use sets::{Family, Wanted};
pub(crate) use snapshot::SnapshotPlan;
pub(crate) use sources::host_suite;
pub(crate) use staging::{abandoned, lock_name, staged, staging_name};
pub(crate) use store::{InUse, MANIFEST, Store, StoredSnapshot};
pub(crate) use tools::Tool;
