//! What an image can be made of: the flavours under `crates/runner/image/`, embedded by `build.rs`.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::embedded::FLAVOUR_FILES;
use crate::profile::Flavour;

impl Flavour {
    /// Its directory under `crates/runner/image/`, and its name in runner.yaml.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Flavour::Small => "small",
            Flavour::Full => "full",
        }
    }

    /// Disk space a build needs in the images directory at its peak (tree plus erofs), MiB; measured, with room.
    pub(crate) fn build_space_mb(self) -> u64 {
        match self {
            Flavour::Small => 1024,
            Flavour::Full => 6 * 1024,
        }
    }

    /// Size of its root in the form of one more engine, MiB; measured, with room.
    pub(crate) fn packed_mb(self) -> u64 {
        match self {
            Flavour::Small => 256,
            Flavour::Full => 2048,
        }
    }

    /// Programs its build runs beside [`super::build::TOOLS`], and the package of each.
    pub(crate) fn tools(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Flavour::Small => &[],
            Flavour::Full => &[("npm", "npm")],
        }
    }

    /// Files of `common/` and of this flavour, in a fixed order.
    pub(crate) fn files(self) -> impl Iterator<Item = &'static FlavourFile> {
        FLAVOUR_FILES.iter().filter(
            move |file| matches!(file.directory(), Some(d) if d == "common" || d == self.name()),
        )
    }

    /// One file of the flavour, as text.
    fn text(self, name: &str) -> Option<&'static str> {
        let path = format!("{}/{name}", self.name());
        let file = FLAVOUR_FILES.iter().find(|file| file.path == path)?;
        std::str::from_utf8(file.bytes).ok()
    }

    /// Distribution packages. Empty when this runner was built without the flavour.
    pub(crate) fn packages(self) -> Vec<&'static str> {
        lines(self.text("packages.txt").unwrap_or_default())
    }

    /// Command lines that fill the page cache before a snapshot.
    pub(crate) fn warm_up(self) -> Vec<&'static str> {
        lines(self.text("warm-up.txt").unwrap_or_default())
    }

    /// Whether it brings its own `customize.sh`.
    pub(crate) fn customizes(self) -> bool {
        self.text("customize.sh").is_some()
    }

    /// Writes `common/` and the flavour's directory below `target`, scripts executable.
    pub(crate) fn materialize(self, target: &Path) -> io::Result<()> {
        for file in self.files() {
            let path = target.join(file.path);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(&path, file.bytes)?;
            let mode = if file.bytes.starts_with(b"#!") {
                0o755
            } else {
                0o644
            };
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        }
        Ok(())
    }
}

/// One embedded file.
#[derive(Debug)]
pub(crate) struct FlavourFile {
    /// `<directory>/<path>`.
    pub(crate) path: &'static str,
    /// Its content.
    pub(crate) bytes: &'static [u8],
}

impl FlavourFile {
    fn directory(&self) -> Option<&'static str> {
        self.path.split_once('/').map(|(directory, _)| directory)
    }
}

/// Lines without comments and blanks.
fn lines(text: &'static str) -> Vec<&'static str> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_small_flavour_has_what_the_daemon_and_the_tests_rely_on() {
        let packages = Flavour::Small.packages();
        for needed in ["bash", "coreutils", "git", "python3", "sudo"] {
            assert!(packages.contains(&needed), "{needed} is missing");
        }
        assert!(!Flavour::Small.warm_up().is_empty());
    }

    #[test]
    fn materializing_writes_scripts_executable_and_nothing_of_another_flavour() {
        let directory = tempfile::tempdir().unwrap();
        Flavour::Small.materialize(directory.path()).unwrap();
        let script = directory.path().join("common/customize.sh");
        assert_eq!(
            fs::metadata(script).unwrap().permissions().mode() & 0o777,
            0o755
        );
        assert!(directory.path().join("small/packages.txt").exists());
        assert!(!directory.path().join("full").exists());
    }
}
