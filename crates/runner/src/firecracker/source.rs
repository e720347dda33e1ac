//! Where Firecracker's files come from.

use std::path::PathBuf;
use std::str::FromStr;

use reqwest::Url;

use super::pins::Pins;

/// Whom to ask.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// Their publishers: Firecracker's releases, and the bucket of its CI for the guest kernel.
    Upstream,
    /// A web server that has both files side by side.
    Mirror(Url),
    /// A directory that has both files.
    Directory(PathBuf),
}

/// Where Firecracker publishes its releases.
const RELEASES: &str = "https://github.com/firecracker-microvm/firecracker/releases/download";
/// Where Firecracker's CI keeps the guest kernels that it boots (firecracker: docs/getting-started.md).
const KERNELS: &str = "https://s3.amazonaws.com/spec.ccfc.min/firecracker-ci/v1.14";

/// One file's place.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// On a web server.
    Remote(Url),
    /// Here.
    Local(PathBuf),
}

impl FromStr for Source {
    type Err = String;

    /// A URL is a mirror, everything else a directory.
    fn from_str(text: &str) -> Result<Self, String> {
        if !text.starts_with("http://") && !text.starts_with("https://") {
            return match text.is_empty() {
                true => Err("it is a directory or a URL".to_owned()),
                false => Ok(Self::Directory(text.into())),
            };
        }
        let mut url = Url::parse(text).map_err(|error| format!("it is no URL: {error}"))?;
        if url.query().is_some() || url.fragment().is_some() {
            return Err("a mirror's URL has no `?` and no `#`".to_owned());
        }
        // `join` replaces what stands behind the last slash.
        if !url.path().ends_with('/') {
            url.set_path(&format!("{}/", url.path()));
        }
        Ok(Self::Mirror(url))
    }
}

/// The archive's name, the same everywhere.
pub(super) fn archive_name(pins: &Pins) -> String {
    format!(
        "firecracker-v{}-{}.tgz",
        pins.version,
        std::env::consts::ARCH
    )
}

/// The kernel's name on mirrors and in directories, which may have several architectures.
pub(super) fn kernel_name(pins: &Pins) -> String {
    format!("{}-{}", pins.kernel, std::env::consts::ARCH)
}

impl Source {
    pub(super) fn archive(&self, pins: &Pins) -> Result<Place, String> {
        self.file(&archive_name(pins), || {
            format!("{RELEASES}/v{}/{}", pins.version, archive_name(pins))
        })
    }

    pub(super) fn kernel(&self, pins: &Pins) -> Result<Place, String> {
        self.file(&kernel_name(pins), || {
            format!("{KERNELS}/{}/{}", std::env::consts::ARCH, pins.kernel)
        })
    }

    fn file(&self, name: &str, upstream: impl Fn() -> String) -> Result<Place, String> {
        let url = match self {
            Self::Upstream => Url::parse(&upstream()),
            Self::Mirror(base) => base.join(name),
            Self::Directory(path) => return Ok(Place::Local(path.join(name))),
        };
        url.map(Place::Remote).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(source: &str) -> String {
        let pins = Pins::built_in().unwrap();
        match source.parse::<Source>().unwrap().archive(&pins).unwrap() {
            Place::Remote(url) => url.to_string(),
            Place::Local(path) => path.display().to_string(),
        }
    }

    #[test]
    fn a_mirror_is_a_directory_with_or_without_its_slash() {
        let name = archive_name(&Pins::built_in().unwrap());
        let expected = format!("https://mirror.example.com/fc/{name}");
        assert_eq!(place("https://mirror.example.com/fc"), expected);
        assert_eq!(place("https://mirror.example.com/fc/"), expected);
        assert_eq!(place("/media/files"), format!("/media/files/{name}"));
    }

    #[test]
    fn what_is_neither_is_refused() {
        for text in ["", "https://", "http://example.com/?file="] {
            assert!(text.parse::<Source>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_publishers_places_are_complete() {
        let pins = Pins::built_in().unwrap();
        for place in [
            Source::Upstream.archive(&pins),
            Source::Upstream.kernel(&pins),
        ] {
            let Ok(Place::Remote(url)) = place else {
                panic!("no URL");
            };
            assert_eq!(url.scheme(), "https");
            assert!(url.path().contains(std::env::consts::ARCH));
        }
    }
}
