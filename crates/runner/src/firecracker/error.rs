//! What can go wrong with Firecracker's files, for the person who reads it.

use std::path::PathBuf;
use std::time::Duration;

use host::fs::FsError;

/// Errors of fetching and of using them.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FirecrackerError {
    /// Ctrl-C or SIGTERM.
    #[error(
        "interrupted; what was fetched of Firecracker so far is kept, and the next `runner setup` goes on from there"
    )]
    Interrupted,
    /// There is no release for this machine.
    #[error("Firecracker has no release for {0}")]
    Architecture(&'static str),
    /// The operator's own pins make no sense.
    #[error("{} cannot be used as the pins of Firecracker: {reason}", path.display())]
    Pins {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Nothing is installed.
    #[error("Firecracker is not installed for this home")]
    NotInstalled,
    /// What is installed is for another runner.
    #[error("Firecracker {found} is installed, and this runner is made for {wanted}")]
    OtherVersion {
        /// What is there.
        found: String,
        /// What is wanted.
        wanted: String,
    },
    /// A file is not what was pinned.
    #[error("{} is not what was pinned: its SHA-256 is {found}, expected was {expected}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// Its hash.
        found: String,
        /// The pin.
        expected: String,
    },
    /// What was fetched is not what was pinned.
    #[error(
        "{what} is not what this runner pins: its SHA-256 is {found}, expected was {expected}; it was thrown away"
    )]
    Tampered {
        /// URL or path.
        what: String,
        /// Its hash.
        found: String,
        /// The pin.
        expected: String,
    },
    /// More than any of these files has.
    #[error(
        "{what} is larger than {max_mb} MiB, which no file of Firecracker is; it was thrown away"
    )]
    TooLarge {
        /// URL or path.
        what: String,
        /// The bound, MiB.
        max_mb: u64,
    },
    /// The archive has the right hash, but not the programs.
    #[error("the archive {0} has no usable {1}")]
    Archive(String, String),
    /// The server has no such file, or does not give it.
    #[error("{url}: the server answers {status}")]
    Refused {
        /// Where.
        url: String,
        /// Its status.
        status: String,
    },
    /// Not reached, or cut off again and again.
    #[error("{url} could not be fetched in {attempts} attempts: {reason}")]
    Unreachable {
        /// Where.
        url: String,
        /// How often it was tried without getting any further.
        attempts: u32,
        /// The last attempt's end.
        reason: String,
    },
    /// The server says nothing.
    #[error("nothing came for {0:?}")]
    Stalled(Duration),
    /// A file of the directory is not there.
    #[error("cannot read {}: {source}", path.display())]
    Local {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// No room.
    #[error("the disk that holds {} is full", .0.display())]
    DiskFull(PathBuf),
    /// No client.
    #[error("the HTTP client cannot be set up: {0}")]
    Client(String),
    /// Output.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The home.
    #[error(transparent)]
    Home(#[from] crate::home::HomeError),
    /// Files of the home.
    #[error(transparent)]
    Fs(#[from] FsError),
}

impl FirecrackerError {
    /// What somebody can do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        let text = match self {
            Self::NotInstalled | Self::OtherVersion { .. } | Self::Damaged { .. } => {
                "sudo runner setup --engine firecracker"
            }
            Self::Refused { .. } | Self::Unreachable { .. } => {
                "name a mirror or a directory that has the file with --from, or do without Firecracker with --engine qemu"
            }
            Self::Tampered { .. } => {
                "fetch it from another place with --from; for a build of your own, name its hashes with --firecracker-pins FILE"
            }
            Self::Local { .. } => {
                "docs/operations.md lists the files; or do without Firecracker with --engine qemu"
            }
            Self::DiskFull(_) => "free some space, or put the home elsewhere with --home DIR",
            Self::Architecture(_) => "use --engine qemu",
            _ => return None,
        };
        Some(text.to_owned())
    }

    /// A failed write: a full disk is told as such.
    pub(super) fn write(path: PathBuf) -> impl FnOnce(std::io::Error) -> Self {
        move |source| match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Self::DiskFull(path)
            }
            _ => Self::Write { path, source },
        }
    }
}
