//! The binaries that run inside the guest: embedded by `build.rs`, or named on the command line.

use std::borrow::Cow;
use std::fs;
use std::path::PathBuf;

use super::ImageError;
use super::embedded;

/// Where to take them from instead of this program.
#[derive(Clone, Debug, Default)]
pub(crate) struct GuestPaths {
    /// `--guest-init`.
    pub(crate) init: Option<PathBuf>,
    /// `--guest-agent`.
    pub(crate) agent: Option<PathBuf>,
    /// `--guest-mock-claude`.
    pub(crate) mock_claude: Option<PathBuf>,
}

/// Their bytes.
#[derive(Debug)]
pub(crate) struct GuestBinaries {
    pub(super) init: Cow<'static, [u8]>,
    pub(super) agent: Cow<'static, [u8]>,
    pub(super) mock_claude: Cow<'static, [u8]>,
}

impl GuestBinaries {
    /// Reads the named ones and takes the others from this program.
    pub(crate) fn load(paths: &GuestPaths) -> Result<Self, ImageError> {
        Ok(Self {
            init: one("guest-init", paths.init.as_ref(), embedded::GUEST_INIT)?,
            agent: one("guest-agent", paths.agent.as_ref(), embedded::GUEST_AGENT)?,
            mock_claude: one(
                "guest-mock-claude",
                paths.mock_claude.as_ref(),
                embedded::GUEST_MOCK_CLAUDE,
            )?,
        })
    }

    /// Whether this program carries all of them.
    pub(crate) fn are_embedded() -> bool {
        embedded::GUEST_INIT.is_some()
            && embedded::GUEST_AGENT.is_some()
            && embedded::GUEST_MOCK_CLAUDE.is_some()
    }

    /// Name and content, in a fixed order.
    pub(super) fn all(&self) -> [(&'static str, &[u8]); 3] {
        [
            ("guest-init", &self.init),
            ("guest-agent", &self.agent),
            ("guest-mock-claude", &self.mock_claude),
        ]
    }
}

fn one(
    name: &'static str,
    path: Option<&PathBuf>,
    embedded: Option<&'static [u8]>,
) -> Result<Cow<'static, [u8]>, ImageError> {
    let bytes = match path {
        Some(path) => Cow::Owned(fs::read(path).map_err(ImageError::io("read", path))?),
        None => Cow::Borrowed(embedded.ok_or(ImageError::NoGuestBinary(name))?),
    };
    if let Some(path) = path
        && !bytes.starts_with(b"\x7fELF")
    {
        return Err(ImageError::Damaged {
            path: path.clone(),
            reason: "it is no Linux program (ELF)".to_owned(),
        });
    }
    Ok(bytes)
}
