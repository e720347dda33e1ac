//! For unit tests that change what all of their process share.

use std::process::Command;

/// Set in a test's own process.
const ALONE: &str = "VM0_TEST_ALONE";

/// Runs this very test in a process of its own, which `prepare` may change, and says so; false there. `name` is the test's,
/// `module` its `module_path!()`.
pub(crate) fn elsewhere(module: &str, name: &str, prepare: impl FnOnce(&mut Command)) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return false;
    }
    let module = module.strip_prefix("runner::").unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", &format!("{module}::{name}")])
        .env(ALONE, "1");
    prepare(&mut command);
    let test = command.output().unwrap();
    let told = String::from_utf8_lossy(&test.stdout);
    assert!(test.status.success() && told.contains("1 passed"), "{told}");
    true
}
