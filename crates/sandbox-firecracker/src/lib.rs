//! The Firecracker engine: microVMs under Firecracker's jailer, on hardware KVM.
//!
//! What happens to a VM, in the order of the modules:
//! - `programs`: Firecracker and its jailer, opened once: what is replaced on disk meanwhile does not matter;
//! - `machine`: the requests that describe a machine, pure functions of its size;
//! - `api`: the typed client of Firecracker's socket;
//! - `process`: one jailed process, started by the launcher, its sockets awaited, its death put into a sentence;
//! - `metrics`: what Firecracker counts of its devices, over a pipe;
//! - `vm`: its guest, over vsock: brought up, paused, its memory reclaimed;
//! - `snapshot`: cold boot, warm-up, save; `template`: the saved files, shown read-only to every clone.
//!
//! Every jail has the same files under the same names, and every network namespace the same device, so one snapshot
//! serves all clones.
//!
//! **A paused VM's process is stopped by a signal.** Firecracker 1.16 can stop the virtual CPUs itself, but after such a
//! pause it never again delivers to the guest what the host sends over vsock. Its own pause is used to save a snapshot,
//! after which the process ends.
//!
//! What was never run on hardware KVM is said in docs/architecture.md.

mod api;
mod death;
mod engine;
mod machine;
mod metrics;
mod process;
mod programs;
mod snapshot;
mod template;
mod vm;
mod vsock;

pub use engine::{FirecrackerEngine, Options, snapshot_key};
pub use programs::{Programs, Version};
