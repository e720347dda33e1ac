//! Writes the initramfs: an uncompressed `newc` cpio archive (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Uncompressed on purpose: under emulation unpacking would cost more than reading.

use std::io::{self, Write};

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;

/// Writes entries one after another; [`Archive::finish`] ends it.
pub(super) struct Archive<W> {
    out: W,
    next_inode: u32,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, next_inode: 1 }
    }

    /// A directory, owned by root. Parents come first.
    pub(super) fn directory(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.entry(path, DIRECTORY | mode, 2, &[])
    }

    /// A regular file, owned by root.
    pub(super) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, REGULAR | mode, 1, content)
    }

    /// Ends the archive and gives the writer back.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.next_inode = 0;
        self.entry("TRAILER!!!", 0, 1, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, links: u32, content: &[u8]) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let name_size = u32::try_from(path.len())
            .map_err(io::Error::other)?
            .saturating_add(1);
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [
            self.next_inode,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            0,
            0,
            name_size,
            0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header += &format!("{field:08x}");
        }
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(path.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(header.len().saturating_add(path.len()).saturating_add(1))?;
        self.out.write_all(content)?;
        self.pad(content.len())?;
        self.next_inode = self.next_inode.saturating_add(1);
        Ok(())
    }

    /// Header plus name, and content, each end on a multiple of four.
    fn pad(&mut self, written: usize) -> io::Result<()> {
        let zeros = written.next_multiple_of(4).saturating_sub(written);
        self.out
            .write_all([0u8; 3].get(..zeros).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reader of the format: name and content of each entry.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + n * 8..14 + n * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            let start = (110 + name_size).next_multiple_of(4);
            let content = bytes[start..start + size].to_vec();
            bytes = &bytes[(start + size).next_multiple_of(4)..];
            if name == "TRAILER!!!" {
                assert!(bytes.is_empty());
                return entries;
            }
            entries.push((name, mode, content));
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("modules", 0o755).unwrap();
        for length in 0..9 {
            archive
                .file(&"n".repeat(length + 1), 0o644, &vec![7; length])
                .unwrap();
        }
        let entries = read(&archive.finish().unwrap());
        assert_eq!(entries.len(), 10);
        assert_eq!(entries[0], ("modules".into(), 0o040_755, vec![]));
        assert_eq!(entries[9], ("n".repeat(9), 0o100_644, vec![7; 8]));
    }
}
