//! Tests in mount namespaces of their own: what they mount vanishes with them, however they end.

use std::process::{Command, Stdio};

use crate::skip::{skip, test_name};
use crate::text::Text;

/// Set inside.
const INSIDE: &str = "VM0_E2E_OWN_MOUNTS";

/// `Some` in a mount namespace of the test's own. Outside it, runs the same test again in one, passes its verdict on
/// and returns `None`: the caller returns.
pub fn in_own_mounts(module: &str) -> Option<()> {
    if std::env::var_os(INSIDE).is_some() {
        return Some(());
    }
    if !rustix::process::geteuid().is_root() {
        skip("it mounts a file system of its own, which needs root");
        return None;
    }
    let name = test_name();
    assert!(name.starts_with(module), "the test's name is {name}");
    let mut child = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--"])
        .arg("setpriv")
        .args(["--pdeathsig", "KILL", "--"])
        .arg(std::env::current_exe().expect("a test binary"))
        .args(["--exact", &name])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("unshare is installed");
    let output = Text::collect(child.stdout.take().expect("piped"));
    let status = child.wait().expect("our child");
    let output = output.all(crate::LONG);
    // What libtest says of the inner run must not be counted as if it stood for the outer one.
    let quoted: String = output.lines().map(|line| format!("| {line}\n")).collect();
    if let Some(at) = output.find("SKIP ") {
        let reason = output[at..]
            .lines()
            .next()
            .and_then(|line| line.split_once(": "));
        skip(reason.map_or("it says so inside", |(_, reason)| reason));
    }
    assert!(status.success(), "inside:\n{quoted}");
    None
}
