//! What a sandbox engine is: traits, types, errors, the life-cycle state machine, capabilities, a fake engine for
//! tests (feature `fake`) and the conformance suite every engine passes (feature `conformance`).

#[cfg(feature = "conformance")]
pub mod conformance;
mod engine;
mod error;
#[cfg(feature = "fake")]
pub mod fake;
mod owner;
pub mod parts;
mod proof;
mod sandbox;
mod types;

pub use engine::{Engine, Progress, Template, Vm};
pub use error::SandboxError;
pub use proof::{PROOF_SHAPE, Proof, prove};
pub use sandbox::{Limits, PausedAs, Sandbox, State};
pub use types::{
    BalloonStats, Capabilities, Death, DeviceStats, EngineKind, ImageFiles, IoLimits, MemoryStats,
    Place, Shape, SnapshotInputs, SnapshotOutcome, StepTimes,
};
