//! Messages to the console. Rare: the host has no better place to look when the control channel does not come up.

use std::io::Write;

/// Prints one line.
pub(crate) fn log(message: &str) {
    // There is nobody left to tell when the console cannot be written.
    let _ = writeln!(std::io::stderr(), "guest-init: {message}");
}
