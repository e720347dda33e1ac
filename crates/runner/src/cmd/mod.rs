//! One file a command. Each has an `Args` struct for the command line and `run(args, &Context)`.

pub(crate) mod audit;
pub(crate) mod benchmark;
pub(crate) mod build;
pub(crate) mod completion;
pub(crate) mod config;
pub(crate) mod cp;
pub(crate) mod doctor;
pub(crate) mod exec;
pub(crate) mod gc;
pub(crate) mod kill;
pub(crate) mod local;
pub(crate) mod logs;
mod parse;
pub(crate) mod policy;
pub(crate) mod service;
pub(crate) mod setup;
pub(crate) mod start;
pub(crate) mod top;
pub(crate) mod uninstall;
pub(crate) mod version;
