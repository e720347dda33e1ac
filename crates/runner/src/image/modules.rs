//! Which kernel modules the initramfs carries, in the order in which they can be loaded.
//!
//! A kernel package carries no `modules.dep` (it is made when the package is configured), so dependencies are read where
//! `depmod` reads them: in the `.modinfo` section of each module.

use std::collections::{BTreeMap, BTreeSet};

/// What the guest needs to reach its console port, disks, root and network. Whatever is built in is skipped.
pub(super) const WANTED: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "virtio_net",
    "erofs",
    "overlay",
];

/// Modules of one kernel by normalized name.
pub(super) trait ModuleTree {
    /// Whether it is built in.
    fn is_builtin(&self, name: &str) -> bool;
    /// Its uncompressed content; `None` when there is no such module.
    fn read(&mut self, name: &str) -> Result<Option<Vec<u8>>, super::ImageError>;
}

/// Names `-` and `_` alike, as the kernel does.
pub(super) fn normalize(name: &str) -> String {
    name.replace('-', "_")
}

/// One module and its content.
pub(super) type Loaded = (String, Vec<u8>);

/// The wanted modules with everything they depend on, dependencies first.
pub(super) fn load_order(
    tree: &mut dyn ModuleTree,
    wanted: &[&str],
) -> Result<Vec<Loaded>, super::ImageError> {
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for name in wanted {
        visit(tree, &normalize(name), &mut seen, &mut order)?;
    }
    Ok(order)
}

fn visit(
    tree: &mut dyn ModuleTree,
    name: &str,
    seen: &mut BTreeSet<String>,
    order: &mut Vec<Loaded>,
) -> Result<(), super::ImageError> {
    // Marked before its dependencies are visited: a cycle in a broken tree ends here.
    if !seen.insert(name.to_owned()) || tree.is_builtin(name) {
        return Ok(());
    }
    let Some(content) = tree.read(name)? else {
        return Err(super::ImageError::NoModule(name.to_owned()));
    };
    for dependency in depends(&content) {
        visit(tree, &normalize(&dependency), seen, order)?;
    }
    order.push((name.to_owned(), content));
    Ok(())
}

/// The `depends=` field of a module (ELF, 64 bit, little endian).
pub(super) fn depends(module: &[u8]) -> Vec<String> {
    let info = section(module, b".modinfo").unwrap_or_default();
    info.split(|byte| *byte == 0)
        .filter_map(|field| field.strip_prefix(b"depends="))
        .flat_map(|list| list.split(|byte| *byte == b','))
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect()
}

/// A section of an ELF64 little-endian file by name (System V ABI, chapter 4); `None` for anything else.
fn section<'a>(elf: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let table = usize::try_from(u64_at(elf, 0x28)?).ok()?;
    let entry_size = usize::from(u16_at(elf, 0x3a)?);
    let count = usize::from(u16_at(elf, 0x3c)?);
    let names_index = usize::from(u16_at(elf, 0x3e)?);
    let header = |index: usize| {
        let start = table.checked_add(index.checked_mul(entry_size)?)?;
        elf.get(start..start.checked_add(64)?)
    };
    let body = |header: &[u8]| {
        let offset = usize::try_from(u64_at(header, 0x18)?).ok()?;
        let size = usize::try_from(u64_at(header, 0x20)?).ok()?;
        elf.get(offset..offset.checked_add(size)?)
    };
    let names = body(header(names_index)?)?;
    (0..count).find_map(|index| {
        let header = header(index)?;
        let at = usize::try_from(u32_at(header, 0)?).ok()?;
        let rest = names.get(at..)?;
        let matches = rest.starts_with(name) && rest.get(name.len()) == Some(&0);
        if matches { body(header) } else { None }
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

/// Parses `modules.builtin` (one path a line) into normalized names.
pub(super) fn builtin_names(text: &str) -> BTreeSet<String> {
    text.lines().filter_map(module_name).collect()
}

/// `kernel/fs/erofs/erofs.ko.xz` → `erofs`; `None` for what is no module.
pub(super) fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let (stem, rest) = file.split_once(".ko")?;
    matches!(rest, "" | ".xz" | ".zst" | ".gz").then(|| normalize(stem))
}

/// Index of the module files of a kernel.
pub(super) type ModuleIndex = BTreeMap<String, std::path::PathBuf>;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Fake(BTreeMap<&'static str, &'static str>);

    impl ModuleTree for Fake {
        fn is_builtin(&self, name: &str) -> bool {
            name == "virtio"
        }
        fn read(&mut self, name: &str) -> Result<Option<Vec<u8>>, crate::image::ImageError> {
            Ok(self
                .0
                .get(name)
                .map(|depends| elf(&format!("license=GPL\0depends={depends}\0"))))
        }
    }

    /// A minimal ELF with a string table and a `.modinfo` section.
    fn elf(modinfo: &str) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut bytes = vec![0u8; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let info_at = bytes.len();
        bytes.extend_from_slice(modinfo.as_bytes());
        let names_at = bytes.len();
        bytes.extend_from_slice(names);
        let table = bytes.len();
        for (name, at, size) in [
            (0u32, 0, 0),
            (1, info_at, modinfo.len()),
            (10, names_at, names.len()),
        ] {
            let mut header = [0u8; 64];
            header[0..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            bytes.extend_from_slice(&header);
        }
        bytes[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        bytes[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
        bytes[0x3c..0x3e].copy_from_slice(&3u16.to_le_bytes());
        bytes[0x3e..0x40].copy_from_slice(&2u16.to_le_bytes());
        bytes
    }

    #[test]
    fn dependencies_come_first_once_and_builtins_are_skipped() {
        let mut tree = Fake(BTreeMap::from([
            ("virtio_mmio", "virtio,virtio-ring"),
            ("virtio_ring", "virtio"),
            ("virtio_blk", "virtio_ring"),
        ]));
        let order = load_order(&mut tree, &["virtio_blk", "virtio-mmio"]).unwrap();
        let names: Vec<_> = order.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["virtio_ring", "virtio_blk", "virtio_mmio"]);
    }

    #[test]
    fn a_module_that_is_nowhere_is_an_error_and_a_cycle_ends() {
        assert!(load_order(&mut Fake(BTreeMap::new()), &["erofs"]).is_err());
        let mut cycle = Fake(BTreeMap::from([("a", "b"), ("b", "a")]));
        assert_eq!(load_order(&mut cycle, &["a"]).unwrap().len(), 2);
    }

    #[test]
    fn module_names_are_found_in_paths() {
        assert_eq!(
            module_name("kernel/drivers/char/hw_random/virtio-rng.ko.xz").as_deref(),
            Some("virtio_rng")
        );
        assert_eq!(
            module_name("kernel/fs/ext4/ext4.ko").as_deref(),
            Some("ext4")
        );
        assert_eq!(module_name("kernel/modules.order"), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_fail(bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..300) {
            depends(&bytes);
            let whole = elf("depends=a,b\0");
            depends(whole.get(..cut.min(whole.len())).unwrap());
            let mut damaged = whole;
            for (at, byte) in bytes.iter().enumerate().take(damaged.len().saturating_sub(6)) {
                damaged[at + 6] ^= byte;
            }
            depends(&damaged);
        }
    }
}
