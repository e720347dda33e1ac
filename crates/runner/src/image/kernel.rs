//! The guest's kernel: the distribution's own for VMs, unpacked; and the initramfs that goes with it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::ImageError;
use super::apt::{Apt, Package};
use super::cpio::Archive;
use super::manifest::{Coverage, KernelFacts};
use super::modules::{self, ModuleIndex, ModuleTree, WANTED};
use super::progress::Steps;
use super::sets::Family;
use super::sources::Distribution;
use super::tools::Tool;
use crate::firecracker::Installed;

/// The kernel package that the meta package stands for now.
pub(super) async fn resolve(
    apt: &Apt,
    distribution: Distribution,
    arch: &str,
    steps: &Steps,
) -> Result<Package, ImageError> {
    let meta = apt
        .candidate(&distribution.kernel_package(arch), steps)
        .await?;
    let versioned = meta
        .dependency(is_versioned_image)
        .ok_or_else(|| ImageError::NoPackage {
            package: meta.name.clone(),
        })?;
    // Ubuntu's meta package of VMs leads over another meta package.
    apt.candidate(versioned, steps).await
}

/// `linux-image-6.1.0-9-cloud-amd64`, `linux-image-unsigned-…`: a kernel, not a meta package.
fn is_versioned_image(name: &str) -> bool {
    name.strip_prefix("linux-image-")
        .map(|rest| rest.strip_prefix("unsigned-").unwrap_or(rest))
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// Downloads and unpacks the kernel below `work`, writes `vmlinux` and `initrd.cpio` into `target`.
pub(super) async fn build(
    apt: &Apt,
    package: &Package,
    guest_init: &[u8],
    work: &Path,
    target: &Path,
    steps: &Steps,
) -> Result<KernelFacts, ImageError> {
    let tree = work.join("kernel");
    let mut packages = vec![package.clone()];
    unpack(apt, package, work, &tree, steps).await?;
    // Ubuntu keeps modules in packages of their own.
    let release = release(package);
    for extra in [
        format!("linux-modules-{release}"),
        format!("linux-modules-extra-{release}"),
    ] {
        if let Ok(found) = apt.candidate(&extra, steps).await {
            unpack(apt, &found, work, &tree, steps).await?;
            packages.push(found);
        }
    }
    let modules = Modules::index(&tree, work, package)?;
    let form = unpack_kernel(
        &tree,
        package,
        &release,
        work,
        &target.join(Family::Qemu.files().kernel),
        steps,
    )
    .await?;
    let loaded = modules.load(steps).await?;
    let initrd = target.join(Family::Qemu.files().initrd);
    write_initrd(&initrd, guest_init, &loaded).map_err(ImageError::io("write", &initrd))?;
    let modules = loaded.into_iter().map(|(name, _)| name).collect();
    Ok(KernelFacts {
        release,
        packages,
        form: form.to_owned(),
        modules,
    })
}

/// Writes Firecracker's pinned kernel and an initramfs without modules, of which it needs none, into `target`.
pub(super) fn pinned(
    firecracker: &Installed,
    guest_init: &[u8],
    target: &Path,
) -> Result<KernelFacts, ImageError> {
    let names = Family::Firecracker.files();
    let path = target.join(names.kernel);
    let mut kernel = firecracker.kernel()?;
    let mut copy = fs::File::create_new(&path).map_err(ImageError::io("create", &path))?;
    std::io::copy(&mut kernel, &mut copy).map_err(ImageError::io("write", &path))?;
    let initrd = target.join(names.initrd);
    write_initrd(&initrd, guest_init, &[]).map_err(ImageError::io("write", &initrd))?;
    Ok(KernelFacts {
        release: firecracker.pins().kernel.to_string(),
        packages: Vec::new(),
        form: "pinned".to_owned(),
        modules: Vec::new(),
    })
}

fn release(package: &Package) -> String {
    let name = package
        .name
        .strip_prefix("linux-image-")
        .unwrap_or(&package.name);
    name.strip_prefix("unsigned-").unwrap_or(name).to_owned()
}

async fn unpack(
    apt: &Apt,
    package: &Package,
    work: &Path,
    tree: &Path,
    steps: &Steps,
) -> Result<(), ImageError> {
    let deb = apt.download(package, &work.join("debs"), steps).await?;
    // apt has compared it with the signed index; the manifest's pin must be of this very file.
    let file = fs::File::open(&deb).map_err(ImageError::io("open", &deb))?;
    let found = super::manifest::measure(&file, Coverage::Whole)
        .map_err(ImageError::io("read", &deb))?
        .sha256;
    if found != package.sha256 {
        return Err(ImageError::Damaged {
            path: deb,
            reason: format!(
                "its SHA-256 is {found}, the signed index says {}",
                package.sha256
            ),
        });
    }
    Tool::new("dpkg-deb")
        .arg("-x")
        .arg(&deb)
        .arg(tree)
        .run("unpacking the kernel package", steps)
        .await?;
    Ok(())
}

/// How a payload is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    Gzip,
    Xz,
    Zstd,
    Lz4,
}

impl Packing {
    /// By magic number (kernel: lib/decompress.c).
    fn of(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', ..] => Some(Self::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            [0x02, 0x21, 0x4c, 0x18, ..] => Some(Self::Lz4),
            _ => None,
        }
    }

    fn program(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
        }
    }

    /// The distribution's own programs do this: dpkg needs most of them anyway, and four decoders fewer are linked in.
    async fn unpack(self, packed: &Path, target: &Path, steps: &Steps) -> Result<(), ImageError> {
        Tool::new(self.program())
            .arg("-dc")
            .input(packed)
            .output(target)
            .run("unpacking", steps)
            .await
            .map(drop)
    }
}

/// Writes the kernel in the form an emulated machine boots fastest; says which.
async fn unpack_kernel(
    tree: &Path,
    package: &Package,
    release: &str,
    work: &Path,
    target: &Path,
    steps: &Steps,
) -> Result<&'static str, ImageError> {
    let path = tree.join("boot").join(format!("vmlinuz-{release}"));
    let image = fs::read(&path).map_err(|error| ImageError::Kernel {
        package: package.name.clone(),
        reason: format!("it has no {}: {error}", path.display()),
    })?;
    // On x86_64 the payload lies in a bzImage; an arm64 kernel is a plain image or one gzip stream.
    if is_plain(&image) {
        fs::write(target, &image).map_err(ImageError::io("write", target))?;
        return Ok("Image");
    }
    let payload = payload(&image).unwrap_or(&image);
    if let Some(packing) = Packing::of(payload) {
        let packed = work.join("payload");
        fs::write(&packed, payload).map_err(ImageError::io("write", &packed))?;
        if packing.unpack(&packed, target, steps).await.is_ok() {
            return Ok("vmlinux");
        }
        let _ = fs::remove_file(target);
    }
    steps.note("the kernel could not be unpacked and is used as the distribution packs it; it boots a little slower");
    fs::write(target, &image).map_err(ImageError::io("write", target))?;
    Ok("as packaged")
}

/// Whether it is an arm64 kernel that nothing packs (kernel: Documentation/arch/arm64/booting.rst).
fn is_plain(image: &[u8]) -> bool {
    image.get(56..60) == Some(b"ARM\x64")
}

/// The compressed kernel inside a bzImage (kernel: Documentation/arch/x86/boot.rst, protocol 2.08 and up).
fn payload(image: &[u8]) -> Option<&[u8]> {
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = match image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(*sectors),
    };
    let offset = usize::try_from(modules::u32_at(image, 0x248)?).ok()?;
    let length = usize::try_from(modules::u32_at(image, 0x24c)?).ok()?;
    let start = setup_sectors
        .checked_add(1)?
        .checked_mul(512)?
        .checked_add(offset)?;
    let payload = image.get(start..start.checked_add(length)?)?;
    // All formats but gzip, which has it itself, are followed by four bytes of uncompressed size.
    match Packing::of(payload)? {
        Packing::Gzip => Some(payload),
        _ => payload.get(..payload.len().checked_sub(4)?),
    }
}

/// The modules of an unpacked kernel package.
struct Modules {
    builtin: BTreeSet<String>,
    index: ModuleIndex,
    work: PathBuf,
}

impl Modules {
    fn index(tree: &Path, work: &Path, package: &Package) -> Result<Self, ImageError> {
        let unusable = |reason: String| ImageError::Kernel {
            package: package.name.clone(),
            reason,
        };
        // usr/lib where the distribution has merged the two.
        let base = ["lib/modules", "usr/lib/modules"]
            .iter()
            .map(|directory| tree.join(directory).join(release(package)))
            .find(|directory| directory.is_dir())
            .ok_or_else(|| unusable("it has no modules".to_owned()))?;
        let builtin = base.join("modules.builtin");
        let builtin = fs::read_to_string(&builtin)
            .map_err(|error| unusable(format!("{}: {error}", builtin.display())))?;
        let mut index = ModuleIndex::new();
        collect(&base, &mut index)?;
        Ok(Self {
            builtin: modules::builtin_names(&builtin),
            index,
            work: work.to_owned(),
        })
    }

    /// Unpacks what may be needed, then orders it.
    async fn load(mut self, steps: &Steps) -> Result<Vec<(String, Vec<u8>)>, ImageError> {
        // Packed modules (.xz, .zst) are unpacked by a program, one at a time, as the walk meets them: so the walk runs
        // again with one more module until nothing is missing. There are about a dozen.
        loop {
            match modules::load_order(&mut self, WANTED) {
                Err(ImageError::NoModule(name)) => {
                    let Some(packed) = self.index.get(&name).cloned() else {
                        return Err(ImageError::NoModule(name));
                    };
                    let bytes = fs::read(&packed).map_err(ImageError::io("read", &packed))?;
                    let Some(packing) = Packing::of(&bytes) else {
                        return Err(ImageError::NoModule(name));
                    };
                    let target = self.work.join(format!("{name}.ko"));
                    packing.unpack(&packed, &target, steps).await?;
                    self.index.insert(name, target);
                }
                done => return done,
            }
        }
    }
}

impl ModuleTree for Modules {
    fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(name)
    }

    fn read(&mut self, name: &str) -> Result<Option<Vec<u8>>, ImageError> {
        let Some(path) = self.index.get(name) else {
            return Ok(None);
        };
        let bytes = fs::read(path).map_err(ImageError::io("read", path))?;
        Ok(Packing::of(&bytes).is_none().then_some(bytes))
    }
}

fn collect(directory: &Path, index: &mut ModuleIndex) -> Result<(), ImageError> {
    for entry in fs::read_dir(directory).map_err(ImageError::io("list", directory))? {
        let entry = entry.map_err(ImageError::io("list", directory))?;
        let path = entry.path();
        let kind = entry
            .file_type()
            .map_err(ImageError::io("examine", &path))?;
        if kind.is_dir() {
            collect(&path, index)?;
        } else if kind.is_file()
            && let Some(name) = modules::module_name(&path.to_string_lossy())
        {
            index.insert(name, path);
        }
    }
    Ok(())
}

/// `/init`, `/modules/*.ko` and `/modules/order`, one module a line in load order.
fn write_initrd(
    path: &Path,
    guest_init: &[u8],
    modules: &[(String, Vec<u8>)],
) -> std::io::Result<()> {
    let mut archive = Archive::new(std::io::BufWriter::new(fs::File::create_new(path)?));
    for directory in ["dev", "proc", "sys", "modules"] {
        archive.directory(directory, 0o755)?;
    }
    archive.file("init", 0o755, guest_init)?;
    let mut order = String::new();
    for (name, content) in modules {
        archive.file(&format!("modules/{name}.ko"), 0o644, content)?;
        order += &format!("{name}.ko\n");
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    archive.finish().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bz_image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x400 + 16];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(b"after the payload");
        image
    }

    #[test]
    fn the_payload_is_found_and_the_size_behind_it_cut_off() {
        assert_eq!(
            payload(&bz_image(b"\x02\x21\x4c\x18data\x10\0\0\0")),
            Some(&b"\x02\x21\x4c\x18data"[..])
        );
        assert_eq!(
            payload(&bz_image(b"\x1f\x8bdata\x10\0\0\0")),
            Some(&b"\x1f\x8bdata\x10\0\0\0"[..])
        );
        assert_eq!(payload(&bz_image(b"unknown")), None);
        assert_eq!(payload(b"no kernel"), None);
    }

    #[test]
    fn meta_packages_are_told_from_kernels() {
        assert!(is_versioned_image("linux-image-6.1.0-56-cloud-amd64"));
        assert!(is_versioned_image("linux-image-unsigned-6.8.0-1-generic"));
        assert!(!is_versioned_image("linux-image-generic"));
        assert!(!is_versioned_image("linux-modules-6.8.0-1-generic"));
    }

    proptest! {
        #[test]
        fn no_header_leads_out_of_the_image(offset: u32, length: u32, sectors: u8) {
            let mut image = bz_image(b"\x1f\x8bdata");
            image[0x1f1] = sectors;
            image[0x248..0x24c].copy_from_slice(&offset.to_le_bytes());
            image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
            let _ = payload(&image);
        }
    }
}
