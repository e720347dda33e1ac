//! Two programs out of a release's archive, which has been verified.

use std::fs::File;
use std::io::{Read, Seek, Write};

use flate2::read::GzDecoder;
use host::fs::{Access, Dir};
use sha2::{Digest, Sha256};
use tar::{Archive, EntryType};

use super::FirecrackerError;
use super::install::{FIRECRACKER, JAILER};
use super::pins::{Pins, Sha256Hex};

/// Largest program, bytes; those of 1.16 have 3 MB.
const MAX_PROGRAM: u64 = 64 << 20;

/// Writes `firecracker` and `jailer` into `target`, each of the pinned content.
pub(super) fn unpack(
    archive: &mut File,
    pins: &Pins,
    target: &Dir,
) -> Result<(), FirecrackerError> {
    let name = super::source::archive_name(pins);
    let broken = |error: std::io::Error| {
        FirecrackerError::Archive(name.clone(), format!("content: {error}"))
    };
    archive.rewind().map_err(broken)?;
    let arch = std::env::consts::ARCH;
    let version = &pins.version;
    // Firecracker's releases: `release-v1.16.1-x86_64/firecracker-v1.16.1-x86_64`, and many files more.
    let path_of = |program: &str| {
        format!("release-v{version}-{arch}/{program}-v{version}-{arch}").into_bytes()
    };
    let mut missing = vec![
        (FIRECRACKER, path_of(FIRECRACKER), &pins.firecracker_sha256),
        (JAILER, path_of(JAILER), &pins.jailer_sha256),
    ];
    let mut entries = Archive::new(GzDecoder::new(archive));
    for entry in entries.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let found = {
            let path = entry.path_bytes();
            let path = path.strip_prefix(b"./").unwrap_or(&path);
            missing.iter().position(|(_, wanted, _)| wanted == path)
        };
        let Some(index) = found.filter(|_| entry.header().entry_type() == EntryType::Regular)
        else {
            continue;
        };
        let (program, _, expected) = missing.swap_remove(index);
        write(&mut entry, program, expected, target, &name)?;
        if missing.is_empty() {
            return Ok(());
        }
    }
    let names: Vec<_> = missing.iter().map(|(program, ..)| *program).collect();
    Err(FirecrackerError::Archive(name, names.join(" and no ")))
}

fn write(
    entry: &mut impl Read,
    program: &str,
    expected: &Sha256Hex,
    target: &Dir,
    archive: &str,
) -> Result<(), FirecrackerError> {
    let path = target.display_path(program);
    let mut bytes = Vec::new();
    let read = entry.take(MAX_PROGRAM + 1).read_to_end(&mut bytes);
    let size = read.map_err(|error| {
        FirecrackerError::Archive(archive.to_owned(), format!("{program}: {error}"))
    })?;
    if size as u64 > MAX_PROGRAM {
        return Err(FirecrackerError::TooLarge {
            what: format!("{program} in {archive}"),
            max_mb: MAX_PROGRAM >> 20,
        });
    }
    let found = hex::encode(Sha256::digest(&bytes));
    if found != expected.as_str() {
        return Err(FirecrackerError::Tampered {
            what: format!("{program} in {archive}"),
            found,
            expected: expected.to_string(),
        });
    }
    let mut file = target.open_file(program, Access::CreateNew { mode: 0o755 })?;
    file.write_all(&bytes)
        .and_then(|()| file.sync_all())
        .map_err(FirecrackerError::write(path))
}
