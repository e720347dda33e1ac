//! The QEMU engine: a `microvm` machine on x86_64, `virt` on aarch64, with hardware KVM or software emulation (TCG).
//!
//! What happens to a VM, in the order of the modules:
//! - [`probe`](Findings::probe): what of QEMU and KVM this host has, and whether KVM is worth the name;
//! - `machine`: the command line, a pure function of the machine and of which descriptors it gets;
//! - `vm`: one process, started by the launcher with descriptors only, spoken to over QMP (`qmp`), its console's
//!   tail kept, its death put into a sentence (`death`);
//! - `snapshot`: cold boot, warm-up, save; `template`: the saved RAM in a sealed memfd, cloned privately.
//!
//! The template is safe from its clones by two independent means: the memfd is sealed against writes, and clones map
//! it privately. There is no balloon and no free-page reporting: QEMU's discard reaches through a private mapping
//! into the file below.
//!
//! aarch64 guests were run emulated (`tests/aarch64.rs`), on x86_64; nothing has been run on aarch64 hardware.

mod death;
mod disk;
mod engine;
mod machine;
mod probe;
mod qmp;
mod ram;
mod raw;
mod snapshot;
mod template;
mod tsc;
mod vm;

pub use engine::{QemuEngine, snapshot_key};
pub use machine::{Accel, Arch};
pub use probe::{Findings, Kvm, Qemu};
pub use raw::RawTimes;
