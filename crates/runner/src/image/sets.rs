//! What each engine boots of an image: a kernel, an initramfs and the root in the form that this kernel mounts.
//!
//! The distribution's kernel, which QEMU boots, mounts erofs and needs modules; Firecracker's guest kernel has squashfs and
//! everything else built in. Both roots are packed from one tree.

use std::path::Path;

use sandbox::{EngineKind, ImageFiles};
use serde::{Deserialize, Serialize};

use super::manifest::KernelFacts;
use crate::firecracker::Installed;

/// Engines that boot the same files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Family {
    /// QEMU, however it runs CPUs.
    Qemu,
    /// Firecracker.
    Firecracker,
}

impl Family {
    /// Whose it is.
    pub(crate) fn of(kind: EngineKind) -> Self {
        match kind {
            EngineKind::Firecracker => Self::Firecracker,
            EngineKind::QemuKvm | EngineKind::QemuTcg | EngineKind::Fake => Self::Qemu,
        }
    }

    /// Its name as an option and in runner.yaml.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
        }
    }

    /// Names of its files in an image.
    pub(super) fn files(self) -> SetNames {
        match self {
            Self::Qemu => SetNames {
                kernel: "vmlinux",
                initrd: "initrd.cpio",
                rootfs: "rootfs.erofs",
            },
            Self::Firecracker => SetNames {
                kernel: "vmlinux-firecracker",
                initrd: "initrd-firecracker.cpio",
                rootfs: "rootfs.squashfs",
            },
        }
    }
}

/// Names of a set's files.
#[derive(Clone, Copy, Debug)]
pub(super) struct SetNames {
    pub(super) kernel: &'static str,
    pub(super) initrd: &'static str,
    pub(super) rootfs: &'static str,
}

/// One engine's files of an image, in its manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BootSet {
    /// File name.
    pub(crate) kernel: String,
    /// File name.
    pub(crate) initrd: String,
    /// File name.
    pub(crate) rootfs: String,
    /// Where the kernel came from.
    pub(crate) facts: KernelFacts,
}

impl BootSet {
    pub(super) fn new(family: Family, facts: KernelFacts) -> Self {
        let SetNames {
            kernel,
            initrd,
            rootfs,
        } = family.files();
        Self {
            kernel: kernel.to_owned(),
            initrd: initrd.to_owned(),
            rootfs: rootfs.to_owned(),
            facts,
        }
    }

    /// Its names, which the manifest has to describe.
    pub(super) fn names(&self) -> [&str; 3] {
        [&self.kernel, &self.initrd, &self.rootfs]
    }

    /// Its files in an image's directory.
    pub(super) fn at(&self, image: &Path) -> ImageFiles {
        ImageFiles {
            kernel: image.join(&self.kernel),
            initrd: image.join(&self.initrd),
            rootfs: image.join(&self.rootfs),
        }
    }
}

/// Which sets a build makes; at least one.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// QEMU's.
    pub(crate) qemu: bool,
    /// Firecracker's, with the kernel that is installed.
    pub(crate) firecracker: Option<Installed>,
}

impl Wanted {
    /// In order.
    pub(super) fn families(&self) -> Vec<Family> {
        let firecracker = self.firecracker.is_some();
        [
            (Family::Qemu, self.qemu),
            (Family::Firecracker, firecracker),
        ]
        .into_iter()
        .filter_map(|(family, wanted)| wanted.then_some(family))
        .collect()
    }
}
