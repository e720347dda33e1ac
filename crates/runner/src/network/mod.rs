//! The network of jobs, as the daemon sees it: who is behind which address, what they may reach, what they did.

mod directory;
mod hub;
mod kernel;
mod log;
mod mirror;
mod registrations;
mod sources;

pub(crate) use hub::{Admission, JobNetworks, NetworkError, NetworkSettings};
#[cfg(test)]
pub(crate) use log::NetworkLog;
pub(crate) use mirror::REGISTRY_FILE;
pub(crate) use registrations::{Registration, Registrations};
