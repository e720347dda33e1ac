//! Whatever a guest sends after its handshake: decoder, credit and operation table of the host's end.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../crates/guest-control/tests/protocol/treachery.rs"]
#[allow(dead_code, reason = "the property tests use more of it")]
mod treachery;

fuzz_target!(|bytes: &[u8]| {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime")
        .block_on(treachery::garbage_from_guest(bytes));
});
