//! The root file system: packages by mmdebstrap, the flavour's customization, the guest's own binaries, packed in the form
//! that each engine's kernel mounts.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::ImageError;
use super::apt::Apt;
use super::guest::GuestBinaries;
use super::progress::Steps;
use super::sets::Family;
use super::tools::Tool;
use crate::profile::Flavour;
use crate::proxy::Authority;

/// What dpkg leaves out: nobody reads manuals in a VM. Licences stay.
const EXCLUDED: &[&str] = &[
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
];

/// How the tree is packed; part of the image's address.
///
/// Not compressed: the pages of a compressed root would be unpacked by the guest's processor, and an emulated one does that
/// twenty times slower than the host; the file lies in the host's page cache once for all VMs either way.
pub(super) const EROFS_OPTIONS: &[&str] = &["-U766d3000-0000-4000-8000-000000000000"];

/// How the tree is packed for a kernel without erofs; part of the image's address. Not compressed either, for the same
/// reasons, and so that nothing depends on which decompressors a kernel has; the times in it are fixed.
pub(super) const SQUASHFS_OPTIONS: &[&str] = &[
    "-noappend",
    "-noI",
    "-noId",
    "-noD",
    "-noF",
    "-noX",
    "-no-exports",
    "-mkfs-time",
    "0",
];

/// What the packed root consists of.
#[derive(Debug)]
pub(super) struct Rootfs {
    pub(super) packages: BTreeMap<String, String>,
    pub(super) tree_bytes: u64,
}

/// What goes into a tree.
pub(super) struct Tree<'a> {
    pub(super) flavour: Flavour,
    pub(super) suite: &'a str,
    pub(super) arch: &'a str,
    pub(super) guest: &'a GuestBinaries,
    /// Whom everything in it trusts beside the world's.
    pub(super) authority: &'a Authority,
    /// A directory of ours to work in.
    pub(super) work: &'a Path,
}

impl Tree<'_> {
    /// Builds the tree and packs it for each of the engines, into `target`.
    pub(super) async fn build(
        &self,
        apt: &Apt,
        families: &[Family],
        target: &Path,
        steps: &Steps,
    ) -> Result<Rootfs, ImageError> {
        let root = self.work.join("root");
        let data = self.work.join("flavour");
        self.flavour
            .materialize(&data)
            .map_err(ImageError::io("write", &data))?;
        let certificate = data.join("common/proxy-ca.crt");
        fs::write(&certificate, self.authority.certificate())
            .map_err(ImageError::io("write", &certificate))?;

        steps.begin("installing packages");
        self.install(apt, &root, &data, steps).await?;

        steps.begin("finishing the root file system");
        self.add_guest_binaries(&root)?;
        Tool::new("sh")
            .arg(data.join("common/finish.sh"))
            .arg(&root)
            .caged()
            .run("finishing the root file system", steps)
            .await?;
        let packages = installed(&root)?;
        let tree_bytes = tree_size(&root)?;

        for family in families {
            let step = format!("packing the root file system for {}", family.name());
            steps.begin(&step);
            let file = target.join(family.files().rootfs);
            let tool = match family {
                Family::Qemu => Tool::new("mkfs.erofs")
                    .arg("--quiet")
                    .args(EROFS_OPTIONS)
                    .arg(file)
                    .arg(&root),
                Family::Firecracker => Tool::new("mksquashfs")
                    .arg(&root)
                    .arg(file)
                    .args(["-quiet", "-no-progress"])
                    .args(SQUASHFS_OPTIONS),
            };
            tool.run(&step, steps).await?;
        }
        Ok(Rootfs {
            packages,
            tree_bytes,
        })
    }

    async fn install(
        &self,
        apt: &Apt,
        root: &Path,
        data: &Path,
        steps: &Steps,
    ) -> Result<(), ImageError> {
        let mut tool = Tool::new("mmdebstrap")
            .args(["--mode=root", "--variant=minbase", "--format=directory"])
            .arg(format!("--architectures={}", self.arch))
            .arg(format!("--include={}", self.flavour.packages().join(",")))
            // Nothing here survives a power cut anyway: an interrupted build is thrown away.
            .arg("--dpkgopt=force-unsafe-io")
            .arg("--aptopt=Acquire::Languages \"none\"")
            .arg("--aptopt=Acquire::Retries \"3\"")
            .args(EXCLUDED.iter().map(|option| format!("--dpkgopt={option}")))
            .arg(hook(&data.join("common")));
        if self.flavour.customizes() {
            tool = tool.arg(hook(&data.join(self.flavour.name())));
        }
        tool.arg(self.suite)
            .arg(root)
            .arg(apt.sources())
            .env("IMAGE_ARCH", self.arch)
            .env("IMAGE_SUITE", self.suite)
            .needs_room(self.work)
            .caged()
            .run("installing packages", steps)
            .await?;
        Ok(())
    }

    fn add_guest_binaries(&self, root: &Path) -> Result<(), ImageError> {
        let bin = root.join("usr/local/bin");
        for (name, bytes) in [
            ("guest-agent", &self.guest.agent),
            ("guest-mock-claude", &self.guest.mock_claude),
        ] {
            let path = bin.join(name);
            fs::write(&path, bytes).map_err(ImageError::io("write", &path))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
                .map_err(ImageError::io("change the mode of", &path))?;
        }
        Ok(())
    }
}

/// A customize hook: the directory's `customize.sh`, started there. mmdebstrap runs hooks with `sh -c` and the root as `$1`.
fn hook(directory: &Path) -> String {
    // The home's own path may hold anything, so it is quoted.
    let quoted = directory.to_string_lossy().replace('\'', "'\\''");
    format!("--customize-hook=cd '{quoted}' && ./customize.sh \"$1\"")
}

/// Name and version of every package, from dpkg's own database.
fn installed(root: &Path) -> Result<BTreeMap<String, String>, ImageError> {
    let path = root.join("var/lib/dpkg/status");
    let text = fs::read_to_string(&path).map_err(ImageError::io("read", &path))?;
    Ok(text
        .split("\n\n")
        .filter_map(|stanza| {
            let field = |key: &str| {
                stanza
                    .lines()
                    .find_map(|line| line.strip_prefix(key)?.strip_prefix(": "))
            };
            field("Status")?
                .ends_with(" installed")
                .then_some((field("Package")?.to_owned(), field("Version")?.to_owned()))
        })
        .collect())
}

/// Bytes of all regular files.
fn tree_size(directory: &Path) -> Result<u64, ImageError> {
    let mut sum: u64 = 0;
    for entry in fs::read_dir(directory).map_err(ImageError::io("list", directory))? {
        let entry = entry.map_err(ImageError::io("list", directory))?;
        let meta = entry
            .metadata()
            .map_err(ImageError::io("examine", entry.path()))?;
        let size = if meta.is_dir() {
            tree_size(&entry.path())?
        } else {
            meta.len()
        };
        sum = sum.saturating_add(size);
    }
    Ok(sum)
}
