//! What can go wrong with images, for the person who reads it.

use std::path::PathBuf;

use host::fs::FsError;

/// Errors of building and of using images.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// Ctrl-C or SIGTERM.
    #[error("interrupted; what was half built has been removed")]
    Interrupted,
    /// Somebody else than root.
    #[error(
        "building an image needs root (package installation in a root tree, a VM for its snapshot)"
    )]
    NotRoot,
    /// No certificate authority, and nobody who may make one.
    #[error("the proxy's certificate authority, which every image trusts, has not been made yet")]
    NoAuthority,
    /// The image was built for another proxy.
    #[error("the image trusts another certificate authority than this home's proxy has")]
    OtherAuthority,
    /// Too old a Python.
    #[error("this host's Python is {version}, and the proxy needs 3.11 or later")]
    OldPython {
        /// What it says of itself.
        version: String,
    },
    /// A program that does the work is not installed.
    #[error("{program} is not installed")]
    NoTool {
        /// Which.
        program: String,
    },
    /// A program failed.
    #[error("{what} failed ({status}{}){}", if *full { "; the disk was full" } else { "" }, tail(last))]
    Tool {
        /// The step, for a person.
        what: String,
        /// Its exit status.
        status: String,
        /// It found no room on a disk, by its own words or those of the file system.
        full: bool,
        /// The last lines it printed, escaped.
        last: Vec<String>,
    },
    /// The file system that holds the images is full, or too small to begin.
    #[error("not enough disk space in {}: {free_mb} MiB are free, building this image takes about {need_mb} MiB", path.display())]
    DiskFull {
        /// Where.
        path: PathBuf,
        /// What is left.
        free_mb: u64,
        /// What is wanted.
        need_mb: u64,
    },
    /// No usable package source.
    #[error("no package source for suite \"{suite}\" was found in this host's apt configuration")]
    NoSource {
        /// The suite looked for.
        suite: String,
    },
    /// This distribution is not supported.
    #[error("this host runs {0}; images can be built on Debian and Ubuntu")]
    Distribution(String),
    /// No package sources name this package.
    #[error("the package {package} was not found in the package sources")]
    NoPackage {
        /// Its name.
        package: String,
    },
    /// A module the guest needs is neither built in nor in the package.
    #[error("the distribution's kernel has no module {0}, which the guest needs")]
    NoModule(String),
    /// The kernel package has no kernel.
    #[error("the kernel package {package} cannot be used: {reason}")]
    Kernel {
        /// Which.
        package: String,
        /// Why.
        reason: String,
    },
    /// No guest binary was embedded and none was named.
    #[error("this runner was built without the guest binary {0}")]
    NoGuestBinary(&'static str),
    /// This runner was built without the flavour's data.
    #[error("this runner was built without the image flavour \"{0}\"")]
    NoFlavour(&'static str),
    /// An image or snapshot is not there.
    #[error("{what} {hash} is not built here")]
    Missing {
        /// `image` or `snapshot`.
        what: &'static str,
        /// Its hash.
        hash: String,
    },
    /// Somebody who must not be disturbed uses it, builds it or removes it.
    #[error("{what} {hash} is in use{}", holder.map(|pid| format!(" by process {pid}")).unwrap_or_default())]
    Busy {
        /// `image` or `snapshot`.
        what: &'static str,
        /// Its hash.
        hash: String,
        /// Who holds its lock.
        holder: Option<u32>,
    },
    /// A file is not what its manifest says.
    #[error("{} cannot be trusted: {reason}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// In what.
        reason: String,
    },
    /// The home.
    #[error(transparent)]
    Home(#[from] crate::home::HomeError),
    /// Files of the home.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// Other input or output.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What we were doing.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The VM of the snapshot.
    #[error(transparent)]
    Sandbox(#[from] sandbox::SandboxError),
    /// Firecracker's files.
    #[error(transparent)]
    Firecracker(#[from] crate::firecracker::FirecrackerError),
    /// The image was not built for the engine.
    #[error("the image {hash} was not built for {engine}")]
    NoSet {
        /// The image.
        hash: String,
        /// The engine's name as an option.
        engine: &'static str,
    },
    /// What was asked for does not run the image.
    #[error("{engine} does not run the image on this host: {reason}")]
    NotProved {
        /// Which.
        engine: &'static str,
        /// What became of the boot.
        reason: String,
    },
    /// The launcher.
    #[error(transparent)]
    Launcher(#[from] host::launcher::LauncherError),
    /// A manifest that cannot be written or read.
    #[error("{}: {source}", path.display())]
    Json {
        /// Which.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

impl ImageError {
    /// For `map_err`: an I/O error with its path.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    /// What somebody can do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        let text = match self {
            Self::NotRoot => "run it again with sudo".to_owned(),
            Self::NoAuthority => "run `sudo runner setup`, which makes it".to_owned(),
            Self::NoTool { .. } => {
                "install what is missing with `sudo runner setup --profile` and the profile's name"
                    .to_owned()
            }
            Self::DiskFull { .. } => {
                "free some space, or put the home elsewhere with --home DIR".to_owned()
            }
            Self::NoSource { suite } => {
                format!("name an archive with --mirror URL (and --suite NAME if it is not {suite})")
            }
            Self::NoPackage { .. } => {
                "run `sudo apt-get update`, and check --mirror and --suite if you gave them".to_owned()
            }
            Self::Firecracker(error) => return error.hint(),
            Self::NoSet { engine, .. } => {
                format!("build it for that engine: sudo runner build --engine {engine} --profile ORG/NAME")
            }
            Self::NotProved { .. } => {
                "use --engine auto or qemu; where the boot is only slow, allow it more time with --boot-limit SECONDS".to_owned()
            }
            Self::Sandbox(sandbox::SandboxError::Unavailable { engine: "Firecracker", .. }) => {
                "`runner doctor` shows what each engine lacks; `sudo runner setup --engine firecracker` fetches Firecracker".to_owned()
            }
            Self::NoGuestBinary(name) => {
                format!("build the runner with scripts/build.sh, or name the binary with --{name} PATH")
            }
            Self::Missing { .. } | Self::Damaged { .. } | Self::OtherAuthority => {
                "build it again with `sudo runner build --profile ORG/NAME`".to_owned()
            }
            Self::Tool { last, .. } if last.iter().any(|line| line.contains("Could not resolve") || line.contains("Failed to fetch")) => {
                "the package archive could not be reached: check the network, or name another with --mirror URL".to_owned()
            }
            _ => return None,
        };
        Some(text)
    }
}

/// The tail of a program's output, below the sentence.
fn tail(last: &[String]) -> String {
    last.iter().map(|line| format!("\n    {line}")).collect()
}
