//! What tests need: run directories and uids of their own, so that they run beside one another and beside a runner.

use std::io::Write;
use std::path::Path;

use crate::fs::{Dir, FsError, Lock, LockKind};
use crate::launcher::LauncherConfig;
use crate::slot::{DEFAULT_UID_BASE, SLOTS};

/// First uid base of tests: past the default range, below systemd's foreign range (2147352576) with all of them.
const FIRST_BASE: u32 = DEFAULT_UID_BASE + 2 * SLOTS as u32;
/// How many tests may hold a range at once, on one machine.
const RANGES: u32 = 64;

/// Says that the running test is skipped, past libtest's capture (which only catches the print macros), in the form
/// that `scripts/test.sh` counts.
fn skip(reason: &str) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("unnamed");
    // Nobody reads a closed stdout.
    let _ = writeln!(std::io::stdout(), "SKIP {name}: {reason}");
}

/// A run directory and a range of uids that are this value's alone until it is dropped.
#[derive(Debug)]
pub struct TestHost {
    run_dir: tempfile::TempDir,
    uid_base: u32,
    _range: Lock,
}

impl TestHost {
    /// Takes the next free range. Only root can use one: returns nothing otherwise, after saying that the test is
    /// skipped.
    pub fn new() -> Option<TestHost> {
        if !rustix::process::geteuid().is_root() {
            skip("needs root, to make namespaces and change users");
            return None;
        }
        match TestHost::take() {
            Ok(host) => Some(host),
            Err(e) => {
                skip(&format!("no range of uids for it: {e}"));
                None
            }
        }
    }

    fn take() -> Result<TestHost, FsError> {
        let ranges = Dir::open(std::env::temp_dir())?.create_dir("vm0-test-uid-ranges", 0o700)?;
        loop {
            for number in 0..RANGES {
                let lock = ranges.try_lock(number.to_string(), LockKind::Exclusive, 0o600)?;
                if let Some(range) = lock {
                    let run_dir = tempfile::Builder::new().prefix("vm0-run-").tempdir();
                    return Ok(TestHost {
                        run_dir: run_dir
                            .map_err(|e| FsError::io(Path::new("run directory"), "made", e))?,
                        uid_base: FIRST_BASE + number * u32::from(SLOTS),
                        _range: range,
                    });
                }
            }
            // All taken: wait for one of them.
            drop(ranges.lock("0", LockKind::Exclusive, 0o600)?);
        }
    }

    /// A launcher's configuration here.
    pub fn config(&self, instance: &str) -> LauncherConfig {
        LauncherConfig {
            run_dir: self.run_dir.path().to_owned(),
            uid_base: self.uid_base,
            instance: instance.to_owned(),
        }
    }

    /// The run directory.
    pub fn run_dir(&self) -> &Path {
        self.run_dir.path()
    }

    /// Slot 0's uid.
    pub fn uid_base(&self) -> u32 {
        self.uid_base
    }
}
