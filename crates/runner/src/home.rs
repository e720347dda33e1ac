//! The runner's home directory: where it is, and the typed paths below it (docs/architecture.md, "Home").

use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::names::{GroupName, ImageHash, RunId, RunnerName};

/// Paths relative to the home, for use with its directory descriptor.
pub(crate) mod rel {
    use super::{GroupName, ImageHash, Path, PathBuf, RunId, RunnerName};

    /// `runners/<name>`.
    pub(crate) fn runner(name: &RunnerName) -> PathBuf {
        Path::new("runners").join(name.as_str())
    }

    /// `runners/<name>/runner.yaml`.
    pub(crate) fn runner_yaml(name: &RunnerName) -> PathBuf {
        runner(name).join("runner.yaml")
    }

    /// `runners/<name>/instances`.
    pub(crate) fn instances(name: &RunnerName) -> PathBuf {
        runner(name).join("instances")
    }

    /// `groups/<org>/<name>`.
    pub(crate) fn group(group: &GroupName) -> PathBuf {
        Path::new("groups").join(group.as_str())
    }

    /// `images/<rootfs-hash>`.
    pub(crate) fn image(rootfs: &ImageHash) -> PathBuf {
        Path::new("images").join(rootfs.as_str())
    }

    /// `images/<rootfs-hash>/snapshots/<snapshot-hash>`.
    pub(crate) fn snapshot(rootfs: &ImageHash, snapshot: &ImageHash) -> PathBuf {
        image(rootfs).join("snapshots").join(snapshot.as_str())
    }

    /// `logs`.
    pub(crate) const LOGS: &str = "logs";

    /// `logs/system-<run>.log`.
    pub(crate) fn system_log(run: &RunId) -> PathBuf {
        Path::new(LOGS).join(format!("system-{run}.log"))
    }

    /// `logs/runner-<name>.log`.
    pub(crate) fn runner_log(name: &RunnerName) -> PathBuf {
        Path::new(LOGS).join(format!("runner-{name}.log"))
    }

    /// `locks`.
    pub(crate) const LOCKS: &str = "locks";
}

/// Why the home cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HomeError {
    /// Nothing says where it is.
    #[error("cannot tell where the runner's home is: uid {uid} has no home directory")]
    Unknown {
        /// Whose home was looked for.
        uid: u32,
    },
    /// Input or output.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What we were doing.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
}

impl HomeError {
    /// What to do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Unknown { .. } => Some("name it with --home DIR or VM0_RUNNER_HOME".to_owned()),
            Self::Io { .. } => None,
        }
    }
}

/// The home, open.
#[derive(Debug)]
pub(crate) struct Home {
    path: PathBuf,
}

impl Home {
    /// Opens the home at an absolute path, creating it when it is missing.
    pub(crate) fn open_or_create(path: &Path) -> Result<Self, HomeError> {
        std::fs::create_dir_all(path).map_err(|source| HomeError::Io {
            action: "create the home",
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// Its absolute path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The absolute path of something in it; `rel` is from [`rel`].
    pub(crate) fn at(&self, rel: impl AsRef<Path>) -> PathBuf {
        self.path.join(rel)
    }
}

/// The absolute path of the home: `named` if given, else `.vm0-runner` in the user's home directory.
///
/// Under sudo that is the invoking user's, from the passwd entry of `SUDO_UID`, never `$HOME`, which sudo may have
/// kept or replaced.
pub(crate) fn resolve(named: Option<&Path>) -> Result<PathBuf, HomeError> {
    let path = match named {
        Some(named) => named.to_owned(),
        None => user_home()?.join(".vm0-runner"),
    };
    std::path::absolute(&path).map_err(|source| HomeError::Io {
        action: "make absolute",
        path,
        source,
    })
}

/// The uid that called sudo, if root was reached that way.
pub(crate) fn sudo_uid() -> Option<u32> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    std::env::var("SUDO_UID").ok()?.parse().ok()
}

fn user_home() -> Result<PathBuf, HomeError> {
    if let Some(uid) = sudo_uid() {
        return passwd_home(uid).ok_or(HomeError::Unknown { uid });
    }
    if let Some(home) = std::env::var_os("HOME").map(PathBuf::from)
        && home.is_absolute()
    {
        return Ok(home);
    }
    let uid = rustix::process::geteuid().as_raw();
    passwd_home(uid).ok_or(HomeError::Unknown { uid })
}

/// The home directory in the passwd entry of `uid`, whatever name service holds it.
fn passwd_home(uid: u32) -> Option<PathBuf> {
    // glibc suggests 1 KiB and asks for more with ERANGE; entries beyond 1 MiB are nobody's.
    let mut size = 1024;
    while size <= 1 << 20 {
        let mut strings = vec![0_u8; size];
        let mut found = std::ptr::null_mut();
        // SAFETY: passwd is plain data for which all zeroes is a valid value (null pointers and zero ids).
        let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
        // SAFETY: all pointers are valid for the call and `strings.len()` is the buffer's true length.
        let error = unsafe {
            libc::getpwuid_r(
                uid,
                &mut entry,
                strings.as_mut_ptr().cast(),
                strings.len(),
                &mut found,
            )
        };
        if error == libc::ERANGE {
            size *= 4;
            continue;
        }
        if error != 0 || found.is_null() || entry.pw_dir.is_null() {
            return None;
        }
        // SAFETY: on success pw_dir is a NUL-terminated string inside `strings`, which is still alive.
        let home = unsafe { CStr::from_ptr(entry.pw_dir) };
        let home = Path::new(OsStr::from_bytes(home.to_bytes()));
        return home.is_absolute().then(|| home.to_owned());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_home_is_made_absolute_and_roots_passwd_entry_is_found() {
        assert_eq!(
            resolve(Some(Path::new("/srv/x"))).unwrap(),
            Path::new("/srv/x")
        );
        let here = std::env::current_dir().unwrap();
        assert_eq!(resolve(Some(Path::new("x"))).unwrap(), here.join("x"));
        assert_eq!(passwd_home(0), Some(PathBuf::from("/root")));
        assert_eq!(passwd_home(4_000_000_001), None);
    }
}
