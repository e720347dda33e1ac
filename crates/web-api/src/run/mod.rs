//! A run's life, as pure functions over its entry: no clock, no storage.
//!
//! ```text
//!               claim                       complete
//!   Queued ──────────────▶ Running(epoch) ──────────────▶ Done(completed)
//!     ▲ │                    │ │ ▲ │
//!     │ │                    │ │ └─┘ renew, cancel (asks the runner to end it), advise
//!     │ │ cancel             │ │
//!     │ └────────▶ Done(cancelled) ◀── release or expire, when it is to be cancelled
//!     │                      │
//!     ├── release ───────────┤
//!     └── expire, may retry ─┤
//!                            └── expire ────────▶ Done(runner lost)
//! ```
//!
//! Each claim raises the epoch. What a runner or guest says counts only with the epoch of the claim that the run has
//! now: that is the fence which keeps out whoever lost it. `Done` is for good.

mod entry;
#[cfg(test)]
pub(crate) mod fixture;
mod transition;

pub use entry::{Advice, Entry, Lease, SpecAt, State, TITLE_CHARS};
pub use transition::{Command, MAX_ERROR_BYTES, Refusal, Step, transition};
