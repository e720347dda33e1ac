//! Builders that the black-box tests share: a host of their own for each test, with the built runner on it.
//!
//! ```no_run
//! let Some(host) = e2e::Host::new().start() else { return };
//! let outcome = host.submit("echo hello").run();
//! outcome.expect_exit(0);
//! host.finish();
//! ```
//!
//! Every [`Host`] has its own home, its own run directory and its own range of uids, so tests run beside one another
//! and beside other copies of themselves. [`Host::finish`] stops the runner and checks that nothing of it is left: no
//! process, cgroup, mount, socket, claimed job. A test that is killed leaves a runner whose parent-death signal ends
//! it, and a uid range that whoever takes it next sweeps first.
//!
//! Nothing here sleeps for a fixed time: waits end with the event, and deadlines are for hangs only.

mod api;
mod api_exec;
mod audit;
mod capture;
mod clock;
mod host;
mod metal;
mod mounts;
mod network_log;
mod process;
mod queue;
mod range;
mod search;
mod skip;
mod submit;
mod text;
mod wait;
mod world;

pub use api::Api;
pub use api_exec::{ApiExec, Ended};
pub use capture::Capture;
pub use clock::{DaemonClock, seconds_now};
pub use host::{Host, HostBuilder, copy_program, has_wheels, kept};
pub use metal::{Metal, NAME as METAL_NAME, Submission};
pub use mounts::in_own_mounts;
pub use network_log::NetworkLog;
pub use process::{Proc, processes_of_uids};
pub use queue::Job;
pub use search::{Needle, found_below, found_in};
pub use skip::skip;
pub use submit::{Outcome, Pending, Submit};
pub use text::Text;
pub use wait::{LONG, eventually, eventually_some};
pub use world::{HOST, WORLD, World};
