//! Firecracker and its jailer on this host.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use sandbox::SandboxError;

/// The oldest version that will do: 1.16.0 loses vsock when a snapshot is restored, and older ones do not know
/// `vsock_override`.
pub(crate) const OLDEST: Version = Version {
    major: 1,
    minor: 16,
    patch: 1,
};

/// A version of Firecracker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Changes with what breaks.
    pub major: u32,
    /// Changes with what is new.
    pub minor: u32,
    /// Changes with what is repaired.
    pub patch: u32,
}

impl FromStr for Version {
    type Err = String;

    /// `1.16.1`, with or without a `v` before it and what follows a `-` behind it.
    fn from_str(text: &str) -> Result<Version, String> {
        let bare = text.trim().trim_start_matches('v');
        let numbers = bare.split('-').next().unwrap_or_default();
        let mut parts = numbers.split('.').map(str::parse::<u32>);
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(Ok(major)), Some(Ok(minor)), Some(Ok(patch)), None) => Ok(Version {
                major,
                minor,
                patch,
            }),
            _ => Err(format!("{text:?} is no version of Firecracker")),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// Both programs, opened: whoever replaces them on disk changes nothing for VMs of this engine.
#[derive(Debug)]
pub struct Programs {
    pub(crate) firecracker: File,
    pub(crate) jailer: File,
    pub(crate) version: Version,
}

impl Programs {
    /// Opens them and asks each for its version, which takes some milliseconds. The launcher runs only programs of root's
    /// that nobody else can write, named `firecracker…` and `jailer…`.
    pub fn open(firecracker: &Path, jailer: &Path) -> Result<Programs, SandboxError> {
        let version = version_of(firecracker)?;
        let of_jailer = version_of(jailer)?;
        if version != of_jailer {
            return Err(unavailable(format!(
                "{} is of version {version} and {} of version {of_jailer}; install a pair with `runner setup`",
                firecracker.display(),
                jailer.display()
            )));
        }
        if version < OLDEST {
            return Err(unavailable(format!(
                "{} is of version {version}, and VMs need {OLDEST} or newer; install it with `runner setup`",
                firecracker.display()
            )));
        }
        Ok(Programs {
            firecracker: open(firecracker)?,
            jailer: open(jailer)?,
            version,
        })
    }

    /// As [`Programs::open`], with `firecracker` and `jailer` as they are found in `path`, a list of directories such as
    /// the environment's `PATH`.
    pub fn find(path: &std::ffi::OsStr) -> Result<Programs, SandboxError> {
        let find = |name: &str| -> Result<PathBuf, SandboxError> {
            std::env::split_paths(path)
                .map(|dir| dir.join(name))
                .find(|program| program.is_file())
                .ok_or_else(|| {
                    unavailable(format!(
                        "there is no program {name} in PATH; install it with `runner setup`"
                    ))
                })
        };
        Programs::open(&find("firecracker")?, &find("jailer")?)
    }

    /// Firecracker's version.
    pub fn version(&self) -> Version {
        self.version
    }
}

fn unavailable(reason: String) -> SandboxError {
    SandboxError::Unavailable {
        engine: "Firecracker",
        reason,
    }
}

fn open(path: &Path) -> Result<File, SandboxError> {
    File::open(path).map_err(|error| unavailable(format!("{}: {error}", path.display())))
}

fn version_of(path: &Path) -> Result<Version, SandboxError> {
    let output = Command::new(path)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| unavailable(format!("{} cannot be run: {error}", path.display())))?;
    let text = String::from_utf8_lossy(&output.stdout);
    // "Firecracker v1.16.1" and "Jailer v1.16.1", in the first line.
    let word = text.split_whitespace().nth(1).unwrap_or_default();
    word.parse().map_err(|_| {
        unavailable(format!(
            "{} does not tell its version: {:?}",
            path.display(),
            text.lines().next().unwrap_or_default()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn versions_are_read_and_compared_as_numbers() {
        let version = |text: &str| text.parse::<Version>();
        assert_eq!(version("v1.16.1").unwrap(), OLDEST);
        assert!(version("1.17.0-dev").unwrap() > OLDEST);
        assert!(version("1.9.12").unwrap() < OLDEST);
        for bad in ["", "1.16", "1.16.1.2", "one.two.three", "1.16.x"] {
            assert!(version(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_old_or_uneven_or_mute_pair_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let program = |name: &str, says: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\necho '{says}'\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let reason = |firecracker: &str, jailer: &str| {
            Programs::open(
                &program("firecracker", firecracker),
                &program("jailer", jailer),
            )
            .unwrap_err()
            .to_string()
        };
        assert!(reason("Firecracker v1.16.0", "Jailer v1.16.0").contains("1.16.1 or newer"));
        assert!(reason("Firecracker v1.16.1", "Jailer v1.17.0").contains("install a pair"));
        assert!(reason("hello", "Jailer v1.17.0").contains("does not tell its version"));
        let none = Programs::find(dir.path().join("nowhere").as_os_str()).unwrap_err();
        assert!(none.to_string().contains("runner setup"), "{none}");
    }
}
