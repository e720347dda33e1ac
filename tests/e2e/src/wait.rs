//! Waiting for what somebody else does.

use std::time::{Duration, Instant};

/// Deadline of waits that should end in seconds: a guest under emulation on a busy machine is slow, a hang is for ever.
pub const LONG: Duration = Duration::from_secs(180);

/// Waits until `condition` holds; panics with `what` after `deadline`.
///
/// For states that nothing announces to us, such as the process table: looks again every 10 ms.
pub fn eventually(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    eventually_some(what, deadline, || condition().then_some(()));
}

/// Like [`eventually`], with a value.
pub fn eventually_some<T>(
    what: &str,
    deadline: Duration,
    mut attempt: impl FnMut() -> Option<T>,
) -> T {
    let begin = Instant::now();
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(
            begin.elapsed() < deadline,
            "not within {deadline:?}: {what}"
        );
        std::thread::park_timeout(Duration::from_millis(10));
    }
}
