//! The runner's home directory: where it is, who owns it, and everything below it (docs/architecture.md, "Home").
//!
//! It is opened once, as a directory descriptor; everything below is reached through that descriptor, without
//! following symbolic links, so a link planted in it leads nowhere. Its owner is as powerful as root on this host,
//! because root starts binaries from it: a home that others may write in is refused.

mod account;
pub(crate) mod rel;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use host::fs::{Dir, FsError};

pub(crate) use account::Account;

use crate::names::{GroupName, RunnerName};
use crate::status::STATUS_FILE;

/// Others may pass through, to a group that a Unix group shares, but not look around.
const PASSAGE: u32 = 0o711;
/// The owner's alone.
const PRIVATE: u32 = 0o700;

/// The home, open.
#[derive(Debug)]
pub(crate) struct Home {
    dir: Dir,
    path: PathBuf,
    owner: Account,
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
    /// It belongs to somebody else.
    #[error(
        "{} belongs to uid {owner}, and this is uid {caller}: a runner's home is used by its owner or root",
        path.display()
    )]
    Foreign {
        /// The home.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who we are, or who called sudo.
        caller: u32,
    },
    /// Something in it was refused or failed.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// Input or output outside it.
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
    /// For who reports errors of the file system only.
    pub(crate) fn into_fs(self) -> FsError {
        match self {
            Self::Fs(error) => error,
            other => FsError::Io {
                path: PathBuf::from(rel::LOGS),
                action: "opened",
                source: std::io::Error::other(other.to_string()),
            },
        }
    }

    /// What to do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Unknown { .. } => Some("name it with --home DIR or VM0_RUNNER_HOME".to_owned()),
            Self::Foreign { .. } => {
                Some("use another home with --home DIR or VM0_RUNNER_HOME".to_owned())
            }
            Self::Fs(_) | Self::Io { .. } => None,
        }
    }
}

impl Home {
    /// Opens the home at an absolute path, creating it, owned by the invoking user, when it is missing.
    pub(crate) fn open_or_create(path: &Path) -> Result<Self, HomeError> {
        match Dir::open(path) {
            Ok(dir) => Self::from_dir(dir, path),
            Err(error) if error.is_not_found() => {
                let io = |source| HomeError::Io {
                    action: "create the directories above",
                    path: path.to_owned(),
                    source,
                };
                let parent = path.parent().unwrap_or(Path::new("/"));
                std::fs::create_dir_all(parent).map_err(io)?;
                let name = path.file_name().ok_or_else(|| {
                    io(std::io::Error::other(
                        "it does not end in a directory's name",
                    ))
                })?;
                let dir = Dir::open(parent)?.create_dir(name, PASSAGE)?;
                let invoking = Account::invoking();
                if invoking != Account::current() {
                    dir.set_owner(invoking.uid, invoking.gid)?;
                }
                Self::from_dir(dir, path)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Opens the home as somebody who uses a group in it: it may be another user's, who shares the group's
    /// directory through a Unix group.
    pub(crate) fn open_as_guest(path: &Path) -> Result<Self, HomeError> {
        match Dir::open(path) {
            Ok(dir) => {
                let home = Self::examine(dir, path)?;
                home.dir.require_private(home.owner.uid)?;
                Ok(home)
            }
            Err(error) if error.is_not_found() => Self::open_or_create(path),
            Err(error) => Err(error.into()),
        }
    }

    fn examine(dir: Dir, path: &Path) -> Result<Self, HomeError> {
        use std::os::unix::fs::MetadataExt;
        let metadata = dir.own_metadata()?;
        Ok(Self {
            dir,
            path: path.to_owned(),
            owner: Account {
                uid: metadata.uid(),
                gid: metadata.gid(),
            },
        })
    }

    fn from_dir(dir: Dir, path: &Path) -> Result<Self, HomeError> {
        let home = Self::examine(dir, path)?;
        let owner = home.owner;
        // Root itself may use anybody's home (a service does, and the daemon then becomes its owner); somebody who
        // called sudo only his own or root's.
        let caller = Account::invoking().uid;
        if caller != 0 && owner.uid != caller && owner.uid != 0 {
            return Err(HomeError::Foreign {
                path: path.to_owned(),
                owner: owner.uid,
                caller,
            });
        }
        home.dir.require_private(owner.uid)?;
        Ok(home)
    }

    /// Its absolute path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The absolute path of something in it, for messages and for files that other programs open; `rel` is from
    /// [`rel`].
    pub(crate) fn at(&self, rel: impl AsRef<Path>) -> PathBuf {
        self.path.join(rel)
    }

    /// The instance whose status stands under the runner's name, whether it lives or not.
    pub(crate) fn shown_instance(&self, runner: &RunnerName) -> Option<OsString> {
        let link = self.at(rel::runner(runner).join(STATUS_FILE));
        let target = std::fs::read_link(link).ok()?;
        Some(target.parent()?.file_name()?.to_owned())
    }

    /// Its descriptor.
    pub(crate) fn dir(&self) -> &Dir {
        &self.dir
    }

    /// Whose it is.
    pub(crate) fn owner(&self) -> Account {
        self.owner
    }

    /// Turns a process that root started into the home's owner, for good, so that whatever it makes belongs to
    /// the owner. Only while the process has one thread. Nothing happens when it already is the owner.
    pub(crate) fn become_owner(&self) -> Result<(), HomeError> {
        let current = Account::current();
        if current.uid != 0 || self.owner.uid == 0 {
            return Ok(());
        }
        self.owner.become_it().map_err(|source| HomeError::Io {
            action: "become the owner of",
            path: self.path.clone(),
            source,
        })
    }

    /// Opens a directory below the home, making what is missing of it: owned by the home's owner, closed to others
    /// (but for the passage to groups).
    pub(crate) fn ensure_dir(&self, rel: impl AsRef<Path>) -> Result<Dir, HomeError> {
        let rel = rel.as_ref();
        let mut dir = self.dir.try_clone()?;
        let mode = |depth: usize| {
            if rel.starts_with(rel::GROUPS) && depth < 2 {
                PASSAGE
            } else {
                PRIVATE
            }
        };
        for (depth, component) in rel.components().enumerate() {
            dir = self.ensure_child(&dir, Path::new(component.as_os_str()), mode(depth))?;
        }
        Ok(dir)
    }

    fn ensure_child(&self, parent: &Dir, name: &Path, mode: u32) -> Result<Dir, HomeError> {
        match parent.open_dir(name) {
            Err(error) if error.is_not_found() => {}
            other => return Ok(other?),
        }
        match parent.create_new_dir(name, mode) {
            Ok(dir) => {
                if Account::current().uid == 0 && self.owner.uid != 0 {
                    dir.set_owner(self.owner.uid, self.owner.gid)?;
                }
                Ok(dir)
            }
            // Somebody else made it in the meantime.
            Err(error) if error.is_already_exists() => Ok(parent.open_dir(name)?),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens a group's directory, making it when it is missing (0700; an operator may open it to a Unix group
    /// with mode 3770).
    pub(crate) fn group(&self, group: &GroupName) -> Result<Dir, HomeError> {
        self.ensure_dir(rel::group(group))
    }

    /// Opens the directory of logs, making it when it is missing.
    pub(crate) fn logs(&self) -> Result<Dir, HomeError> {
        self.ensure_dir(rel::LOGS)
    }
}

/// The absolute path of the home: `named` if given, else `.vm0-runner` in the invoking user's home directory.
pub(crate) fn resolve(named: Option<&Path>) -> Result<PathBuf, HomeError> {
    let path = match named {
        Some(named) => named.to_owned(),
        None => Account::invoking_home()
            .map_err(|uid| HomeError::Unknown { uid })?
            .join(".vm0-runner"),
    };
    std::path::absolute(&path).map_err(|source| HomeError::Io {
        action: "make absolute",
        path,
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_named_home_is_made_absolute() {
        assert_eq!(
            resolve(Some(Path::new("/srv/x"))).unwrap(),
            Path::new("/srv/x")
        );
        let here = std::env::current_dir().unwrap();
        assert_eq!(resolve(Some(Path::new("x"))).unwrap(), here.join("x"));
    }

    #[test]
    fn a_missing_home_is_made_and_its_directories_are_closed_to_others() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("a/b/home");
        let home = Home::open_or_create(&path).unwrap();
        home.group(&"vm0/demo".parse().unwrap()).unwrap();
        home.logs().unwrap();
        assert_eq!(mode(&path), 0o711);
        assert_eq!(mode(&path.join("groups")), 0o711);
        assert_eq!(mode(&path.join("groups/vm0")), 0o711);
        assert_eq!(mode(&path.join("groups/vm0/demo")), 0o700);
        assert_eq!(mode(&path.join("logs")), 0o700);
        Home::open_or_create(&path).unwrap();
    }

    #[test]
    fn a_home_that_others_may_write_in_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        for open in [0o777, 0o770, 0o702] {
            std::fs::set_permissions(temp.path(), std::fs::Permissions::from_mode(open)).unwrap();
            let error = Home::open_or_create(temp.path()).unwrap_err();
            assert!(matches!(error, HomeError::Fs(_)), "{error}");
        }
    }

    #[test]
    fn links_planted_in_the_home_lead_nowhere() {
        let temp = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&temp.path().join("home")).unwrap();
        symlink(outside.path(), home.at("groups")).unwrap();
        home.group(&"vm0/demo".parse().unwrap()).unwrap_err();
        std::fs::remove_file(home.at("groups")).unwrap();
        home.ensure_dir("groups/vm0").unwrap();
        symlink(outside.path(), home.at("groups/vm0/demo")).unwrap();
        home.group(&"vm0/demo".parse().unwrap()).unwrap_err();
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}
