//! The daemon: one task owns all state; everybody else sends it messages and does what it says.
//!
//! ```text
//!   provider (thread) ─┐                                   ┌─▶ provider: claim, complete
//!   signals ───────────┤            ┌────────┐             ├─▶ tasks: reserve, restore, execute, park, destroy
//!   tasks that ended ──┼─ Message ─▶│ Owner  │── Action ───┤
//!   control socket ────┤            │ (plan) │             ├─▶ status.json
//!   host's slots ──────┘            └────────┘             └─▶ what the control socket may look at
//! ```
//!
//! [`plan`] decides and does nothing; [`owner`] does and decides nothing. The owner never waits for anything slow:
//! what takes time is a task of its own whose end comes back as a message.

mod directory;
mod event;
mod leases;
mod message;
mod owner;
mod plan;
mod traces;
mod waiting;
mod watchers;

pub(crate) use event::CancelReason;
pub(crate) use owner::{Identity, Parts, run};
pub(crate) use watchers::{Inbox, Mailbox, forward, watch_host, watch_signals};
