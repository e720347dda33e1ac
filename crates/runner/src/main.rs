//! The runner: a daemon that runs coding-agent jobs, each in its own microVM, and the commands around it.
//!
//! `main` parses the command line and dispatches; it starts no thread and no async runtime, because `start` and
//! `build` must fork the launcher while the process is still single-threaded. Commands start their own.

mod audit;
mod cli;
mod cmd;
mod config;
mod context;
mod control;
mod daemon;
mod engine;
mod executor;
mod firecracker;
mod gc;
mod home;
mod host_size;
mod http;
mod image;
mod metrics;
mod names;
mod network;
mod notify;
mod pool;
mod profile;
mod provider;
mod proxy;
mod queue;
mod resource_budget;
mod run_log;
mod status;
mod sync;
mod telemetry;
mod terminal;
#[cfg(test)]
mod test_alone;
mod vms;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
