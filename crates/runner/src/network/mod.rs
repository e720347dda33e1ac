//! The network of jobs, as the daemon sees it: who is behind which address, what they may reach, what they did.

mod log;
mod mirror;
mod registrations;

pub(crate) use log::NetworkLog;
pub(crate) use registrations::{Registration, Registrations};
