//! Where the tests find what they test, and leave what they keep.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::skip::skip;

/// The checkout.
pub(crate) fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("tests/e2e is two levels down")
}

pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| top().join("target"), PathBuf::from)
}

/// The binary under test.
pub(crate) fn binary() -> PathBuf {
    std::env::var_os("VM0_RUNNER_BIN")
        .map_or_else(|| target().join("release/runner"), PathBuf::from)
}

/// The home that holds the images.
pub(crate) fn images() -> PathBuf {
    std::env::var_os("VM0_TEST_IMAGES").map_or_else(|| target().join("test-home"), PathBuf::from)
}

/// Whether the wheels are there that pip installs inside a VM; otherwise reports why the test is skipped.
pub fn has_wheels() -> bool {
    let there = wheels().join("complete").exists();
    if !there {
        skip(&format!(
            "the wheels that pip would install are not in {} (scripts/test.sh --slow brings them)",
            wheels().display()
        ));
    }
    there
}

/// Wheels that pip installs inside a VM.
pub(crate) fn wheels() -> PathBuf {
    std::env::var_os("VM0_TEST_WHEELS").map_or_else(|| target().join("test-wheels"), PathBuf::from)
}

/// Where a test leaves a file for a person to look at.
pub fn kept(name: &str) -> PathBuf {
    let directory = target().join("test-kept");
    fs::create_dir_all(&directory).expect("the target directory can be written");
    directory.join(name)
}

/// Hashes of a profile's image, as `runner build --dry-run` prints them; `None` when it is not built.
pub(crate) fn hashes(profile: &str) -> Option<(String, String)> {
    let output = Command::new(binary())
        .args(["build", "--dry-run", "--profile", profile])
        .env("VM0_RUNNER_HOME", images())
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let value = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .map(str::to_owned)
    };
    let (rootfs, snapshot) = (value("rootfs_hash")?, value("snapshot_hash")?);
    images()
        .join(format!(
            "images/{rootfs}/snapshots/{snapshot}/manifest.json"
        ))
        .exists()
        .then_some((rootfs, snapshot))
}
