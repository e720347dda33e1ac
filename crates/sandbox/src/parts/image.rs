//! The files of an image, opened for processes that are other users.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::error::SandboxError;
use crate::types::ImageFiles;

/// The files of an image, opened once and shown to every process.
#[derive(Debug)]
pub struct OpenImage {
    /// See [`ImageFiles`].
    pub kernel: File,
    /// See [`ImageFiles`].
    pub initrd: File,
    /// See [`ImageFiles`].
    pub rootfs: File,
    /// Where private disks go: the file system that holds the image has the room the budget counted.
    pub disk_dir: PathBuf,
}

impl OpenImage {
    /// Opens them. Fails as [`open`] does.
    pub fn open(image: &ImageFiles) -> Result<OpenImage, SandboxError> {
        Ok(OpenImage {
            kernel: open(&image.kernel)?,
            initrd: open(&image.initrd)?,
            rootfs: open(&image.rootfs)?,
            disk_dir: image
                .rootfs
                .parent()
                .map_or_else(|| PathBuf::from("."), PathBuf::from),
        })
    }
}

/// Opens a file that VM processes must be able to read, each as a user of its own; checked here because such a process
/// could not say why it failed.
pub fn open(path: &Path) -> Result<File, SandboxError> {
    let io_error = |source| SandboxError::Io {
        action: format!("open {}", path.display()),
        source,
    };
    let file = File::open(path).map_err(io_error)?;
    let mode = file.metadata().map_err(io_error)?.permissions().mode();
    if mode & 0o004 == 0 {
        return Err(SandboxError::BadImage {
            path: path.to_owned(),
            reason: "VM processes may not read it (mode without o+r)".to_owned(),
        });
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_vm_processes_may_not_read_is_refused_before_one_is_started() {
        let dir = tempfile::tempdir().unwrap();
        let image = ImageFiles {
            kernel: dir.path().join("kernel"),
            initrd: dir.path().join("initrd"),
            rootfs: dir.path().join("rootfs"),
        };
        for (path, mode) in [
            (&image.kernel, 0o444),
            (&image.initrd, 0o644),
            (&image.rootfs, 0o440),
        ] {
            std::fs::write(path, "x").unwrap();
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let error = OpenImage::open(&image).unwrap_err();
        assert!(matches!(&error, SandboxError::BadImage { path, .. } if *path == image.rootfs));
        std::fs::set_permissions(&image.rootfs, std::fs::Permissions::from_mode(0o444)).unwrap();
        assert_eq!(OpenImage::open(&image).unwrap().disk_dir, dir.path());
    }
}
