//! Tests that cannot run here say so.

use std::io::Write;

/// The running test's name.
pub(crate) fn test_name() -> String {
    std::thread::current()
        .name()
        .unwrap_or("unnamed")
        .to_owned()
}

/// Reports this test as skipped: `SKIP <test>: <reason>`, past libtest's capture, which only catches the print macros.
/// `scripts/test.sh` counts these lines.
pub fn skip(reason: &str) {
    let line = format!("SKIP {}: {reason}\n", test_name());
    std::io::stdout()
        .write_all(line.as_bytes())
        .expect("stdout is open");
}
