//! A private apt: the chosen sources only, its lists and caches in a directory of ours.
//!
//! The host's own lists are neither needed nor changed, and the same sources serve mmdebstrap and the kernel. apt verifies
//! signatures with the host's keys and every package against the signed index.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::ImageError;
use super::progress::Steps;
use super::sources::Sources;
use super::tools::Tool;

/// How old package lists may be when a build begins.
const FRESH: Duration = Duration::from_secs(3600);

/// File that holds the kernel package of the lists; its age is theirs.
const KERNEL: &str = "kernel.json";

/// An apt state directory.
#[derive(Debug)]
pub(super) struct Apt {
    directory: PathBuf,
    arch: &'static str,
}

/// One package as the index names it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Package {
    /// Name.
    pub(crate) name: String,
    /// Version.
    pub(crate) version: String,
    /// SHA-256 of the .deb, from the signed index.
    pub(crate) sha256: String,
    #[serde(skip)]
    depends: String,
}

impl Package {
    /// The first dependency whose name `accept` likes.
    pub(super) fn dependency(&self, accept: impl Fn(&str) -> bool) -> Option<&str> {
        self.depends
            .split(',')
            .filter_map(|alternative| alternative.split_whitespace().next())
            .find(|name| accept(name))
    }
}

impl Apt {
    /// Prepares the directory; touches the network only in [`Apt::refresh`].
    pub(super) fn new(
        directory: PathBuf,
        sources: &Sources,
        arch: &'static str,
    ) -> Result<Self, ImageError> {
        for part in ["state/lists/partial", "cache/archives/partial"] {
            let path = directory.join(part);
            fs::create_dir_all(&path).map_err(ImageError::io("create", &path))?;
        }
        let apt = Self { directory, arch };
        let path = apt.sources();
        let text = sources.to_deb822();
        if fs::read_to_string(&path).ok().as_deref() != Some(text.as_str()) {
            fs::write(&path, text).map_err(ImageError::io("write", &path))?;
        }
        Ok(apt)
    }

    /// The sources file, deb822.
    pub(super) fn sources(&self) -> PathBuf {
        self.directory.join("build.sources")
    }

    /// The kernel that was the newest when lists were last fetched. Without it nothing was ever fetched from these sources.
    pub(super) fn kernel(&self) -> Option<Package> {
        let bytes = fs::read(self.directory.join(KERNEL)).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Whether the lists are fresh enough for a build.
    pub(super) fn is_fresh(&self) -> bool {
        let fetched = fs::metadata(self.directory.join(KERNEL)).and_then(|meta| meta.modified());
        let age = fetched.ok().and_then(|at| at.elapsed().ok());
        age.is_some_and(|age| age < FRESH)
    }

    /// Fetches the package lists. Afterwards [`Apt::keep_kernel`] says that they are there.
    pub(super) async fn refresh(&self, steps: &Steps) -> Result<(), ImageError> {
        let tool = self.tool("apt-get").args(["update", "--error-on=any"]);
        tool.run("fetching the package lists", steps)
            .await
            .map(drop)
    }

    /// Keeps what [`Apt::kernel`] gives, with the time of the lists.
    pub(super) fn keep_kernel(&self, kernel: &Package) -> Result<(), ImageError> {
        let (path, new) = (
            self.directory.join(KERNEL),
            self.directory.join("kernel.json.new"),
        );
        let text = serde_json::to_vec(kernel).map_err(|source| ImageError::Json {
            path: path.clone(),
            source,
        })?;
        fs::write(&new, text).map_err(ImageError::io("write", &new))?;
        fs::rename(&new, &path).map_err(ImageError::io("write", &path))
    }

    /// The candidate version of a package.
    pub(super) async fn candidate(&self, name: &str, steps: &Steps) -> Result<Package, ImageError> {
        let missing = || ImageError::NoPackage {
            package: name.to_owned(),
        };
        let text = self
            .tool("apt-cache")
            .args(["show", "--no-all-versions", name])
            .run("looking a package up", steps)
            .await
            .map_err(|error| match error {
                ImageError::Tool { .. } => missing(),
                other => other,
            })?;
        let field = |key: &str| {
            let value = text
                .lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
            value.map(str::to_owned)
        };
        match (field("Version"), field("SHA256")) {
            (Some(version), Some(sha256)) => {
                let depends = field("Depends").unwrap_or_default();
                Ok(Package {
                    name: name.to_owned(),
                    version,
                    sha256,
                    depends,
                })
            }
            _ => Err(missing()),
        }
    }

    /// Downloads a package into `directory`, verified by apt against the signed index; gives the .deb.
    pub(super) async fn download(
        &self,
        package: &Package,
        directory: &Path,
        steps: &Steps,
    ) -> Result<PathBuf, ImageError> {
        fs::create_dir_all(directory).map_err(ImageError::io("create", directory))?;
        self.tool("apt-get")
            .arg("download")
            .arg(format!("{}={}", package.name, package.version))
            .in_directory(directory)
            .run("downloading the kernel package", steps)
            .await?;
        let prefix = format!("{}_", package.name);
        let entries = fs::read_dir(directory).map_err(ImageError::io("list", directory))?;
        entries
            .filter_map(Result::ok)
            .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .map(|entry| entry.path())
            .ok_or_else(|| ImageError::NoPackage {
                package: package.name.clone(),
            })
    }

    fn tool(&self, program: &'static str) -> Tool {
        let at = |option: &str, path: &Path| format!("{option}={}", path.display());
        let mut options = vec![
            at("Dir::Etc::SourceList", &self.sources()),
            "Dir::Etc::SourceParts=-".to_owned(),
            at("Dir::State", &self.directory.join("state")),
            "Dir::State::status=/dev/null".to_owned(),
            at("Dir::Cache", &self.directory.join("cache")),
            // Some container images turn these caches off; they make a look-up 15 times faster.
            "Dir::Cache::pkgcache=pkgcache.bin".to_owned(),
            "Dir::Cache::srcpkgcache=srcpkgcache.bin".to_owned(),
            format!("APT::Architecture={}", self.arch),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ];
        if rustix::process::geteuid().is_root() {
            // apt's own user cannot enter a private home.
            options.push("APT::Sandbox::User=root".to_owned());
        }
        let options = options
            .into_iter()
            .flat_map(|option| ["-o".to_owned(), option]);
        Tool::new(program).arg("-q").args(options)
    }
}
