//! What tests need: run directories and uids of their own, so that they run beside one another and beside a runner.

pub mod net;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::fs::{Dir, FsError, Lock, LockKind};
use crate::launcher::{LauncherConfig, SERVICES};
use crate::slot::{DEFAULT_UID_BASE, SLOTS};

/// First uid base of tests: past the default range, below systemd's foreign range (2147352576) with all of them.
const FIRST_BASE: u32 = DEFAULT_UID_BASE + 3 * 4096;
/// How many tests may hold a range at once, on one machine.
const RANGES: u32 = 64;

/// Says that the running test is skipped, past libtest's capture (which only catches the print macros), in the form
/// that `scripts/test.sh` counts.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("unnamed");
    // Nobody reads a closed stdout.
    let _ = writeln!(std::io::stdout(), "SKIP {name}: {reason}");
}

/// A program from `PATH`, opened; says what the running test is skipped for where there is none.
pub fn program(name: &str) -> Option<File> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).find_map(|dir| File::open(dir.join(name)).ok());
    if found.is_none() {
        skip(&format!("needs {name} in PATH"));
    }
    found
}

/// A run directory and a range of uids that are this value's alone until it is dropped.
///
/// The directory's place follows from the range: what a killed test left there is removed by the next that takes it.
#[derive(Debug)]
pub struct TestHost {
    ranges: Dir,
    number: u32,
    run_dir: PathBuf,
    _range: Lock,
}

impl TestHost {
    /// Takes the next free range. Only root can use one: returns nothing otherwise, after saying that the test is skipped.
    ///
    /// # Panics
    ///
    /// Where the temporary directory cannot be used: a test that cannot run must not pass.
    #[expect(clippy::panic, reason = "only tests call it")]
    pub fn new() -> Option<TestHost> {
        if !rustix::process::geteuid().is_root() {
            skip("needs root, to make namespaces and change users");
            return None;
        }
        match TestHost::take() {
            Ok(host) => Some(host),
            Err(e) => panic!("no range of uids for this test: {e}"),
        }
    }

    fn take() -> Result<TestHost, FsError> {
        let place = std::env::temp_dir().join("vm0-test-hosts");
        loop {
            let ranges = Dir::open(std::env::temp_dir())?.create_dir("vm0-test-hosts", 0o711)?;
            for number in 0..RANGES {
                let file = format!("{number}.lock");
                let range = match ranges.try_lock(file, LockKind::Exclusive, 0o600) {
                    Ok(Some(range)) => range,
                    Ok(None) => continue,
                    // The last test of another process removed the directory under us.
                    Err(e) if e.is_not_found() => break,
                    Err(e) => return Err(e),
                };
                ranges.remove_tree(number.to_string())?;
                ranges.create_new_dir(number.to_string(), 0o755)?;
                return Ok(TestHost {
                    run_dir: place.join(number.to_string()),
                    ranges,
                    number,
                    _range: range,
                });
            }
            // All are taken, which 64 tests at once are needed for: look again.
            std::thread::yield_now();
        }
    }

    /// A launcher's configuration here.
    pub fn config(&self, instance: &str) -> LauncherConfig {
        LauncherConfig {
            run_dir: self.run_dir.clone(),
            uid_base: self.uid_base(),
            instance: instance.to_owned(),
        }
    }

    /// The run directory.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Slot 0's uid.
    pub fn uid_base(&self) -> u32 {
        FIRST_BASE + self.number * u32::from(SLOTS + SERVICES)
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        // A launcher may still be cleaning: what it adds now, the next test in this range removes.
        let _ = self.ranges.remove_tree(self.number.to_string());
        let _ = self.ranges.remove_file(format!("{}.lock", self.number));
        let _ = std::fs::remove_dir(std::env::temp_dir().join("vm0-test-hosts"));
    }
}
