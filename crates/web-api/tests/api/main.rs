//! The API over real NATS.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unreachable,
    reason = "helpers of tests"
)]

mod claims;
mod copies;
mod described;
mod edges;
mod faults;
mod feeds;
mod flow;
mod full_disk;
mod guest_agent;
mod housekeeping;
mod nats;
mod ordering;
mod partition;
mod push;
mod replica;
mod rotation;
mod slow;
mod tls;
mod tokens;

use std::io::Write as _;

use nats::Kind;
use replica::World;

/// A world, or a word about why there is none: past libtest's capture, for scripts/test.sh to count.
async fn world(kind: Kind) -> Option<World> {
    match World::new(kind).await {
        Ok(world) => Some(world),
        Err(reason) => {
            skip(&reason);
            None
        }
    }
}

fn skip(reason: &str) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("unnamed");
    let line = format!("SKIP {name}: {reason}\n");
    std::io::stdout().write_all(line.as_bytes()).unwrap();
}
