//! The one error of confined paths.

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// What went wrong with which path.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The system refused it.
    #[error("{} could not be {action}: {source}", path.display())]
    Io {
        /// The full path, for people.
        path: PathBuf,
        /// What was attempted, as a participle: "opened", "removed".
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The path leads, or may lead, out of its directory: absolute, with `..`, or through a symbolic link.
    #[error("{} was refused: it leads through a symbolic link or out of its directory", path.display())]
    Escapes {
        /// The full path.
        path: PathBuf,
    },
    /// Something else than a regular file stands there.
    #[error("{} was refused: it is not a regular file", path.display())]
    NotRegular {
        /// The full path.
        path: PathBuf,
    },
    /// The file is larger than its reader accepts.
    #[error("{} was refused: it is larger than {max} bytes", path.display())]
    TooLarge {
        /// The full path.
        path: PathBuf,
        /// The reader's limit, bytes.
        max: u64,
    },
    /// A directory that others could change under us.
    #[error(
        "{} was refused: {reason}. Give it back with `chown` or close it with `chmod go-w {}`",
        path.display(),
        path.display()
    )]
    Unsafe {
        /// The full path.
        path: PathBuf,
        /// Which property is wrong.
        reason: String,
    },
}

impl FsError {
    pub(crate) fn io(path: &Path, action: &'static str, errno: impl Into<io::Error>) -> FsError {
        let source = errno.into();
        let path = path.to_owned();
        match source.raw_os_error() {
            // ELOOP: a symbolic link on the way. EXDEV: RESOLVE_BENEATH met `..` or an absolute path.
            Some(code)
                if code == Errno::LOOP.raw_os_error() || code == Errno::XDEV.raw_os_error() =>
            {
                FsError::Escapes { path }
            }
            _ => FsError::Io {
                path,
                action,
                source,
            },
        }
    }

    /// The system's error kind, where the system was asked at all.
    pub fn kind(&self) -> Option<io::ErrorKind> {
        match self {
            FsError::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }

    /// Whether the path simply is not there.
    pub fn is_not_found(&self) -> bool {
        self.kind() == Some(io::ErrorKind::NotFound)
    }

    /// Whether something stands there already.
    pub fn is_already_exists(&self) -> bool {
        self.kind() == Some(io::ErrorKind::AlreadyExists)
    }
}

impl From<FsError> for io::Error {
    fn from(error: FsError) -> io::Error {
        let kind = error.kind().unwrap_or(io::ErrorKind::InvalidInput);
        io::Error::new(kind, error)
    }
}
