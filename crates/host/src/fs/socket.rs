//! Unix sockets below a directory, whatever the length of its path.
//!
//! A socket address holds 107 bytes; a home may be deeper. `/proc/self/fd/<n>/<name>` names the same place in a few
//! bytes, and the descriptor has already been resolved without following links.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode};

use super::dir::Dir;
use super::error::FsError;

impl Dir {
    /// Binds a listening stream socket at `rel` with `mode`. Whatever socket a dead process left there is removed
    /// first: hold the lock that makes you its owner.
    pub fn bind_socket(&self, rel: impl AsRef<Path>, mode: u32) -> Result<UnixListener, FsError> {
        let rel = rel.as_ref();
        let (parent, name) = self.parent(rel)?;
        if let Some(meta) = parent.metadata(&name)?
            && meta.file_type().is_socket()
        {
            parent.remove_file(&name)?;
        }
        let short = short_path(&parent, Path::new(&name));
        let listener = UnixListener::bind(&short)
            .map_err(|e| FsError::io(&self.display_path(rel), "bound", e))?;
        // Between bind and this a connector meets the umask's mode; callers that care keep the directory closed.
        rustix::fs::chmodat(&parent, &name, Mode::from_raw_mode(mode), AtFlags::empty())
            .map_err(|e| FsError::io(&self.display_path(rel), "given its mode", e))?;
        Ok(listener)
    }

    /// Connects to the stream socket at `rel`; a symbolic link or anything else than a socket is refused.
    pub fn connect_socket(&self, rel: impl AsRef<Path>) -> Result<UnixStream, FsError> {
        let rel = rel.as_ref();
        let fd = self.open_path(rel)?;
        // Connecting through the descriptor reaches exactly the inode that was resolved.
        UnixStream::connect(format!("/proc/self/fd/{}", fd.as_raw_fd()))
            .map_err(|e| FsError::io(&self.display_path(rel), "connected to", e))
    }
}

fn short_path(dir: &Dir, name: &Path) -> PathBuf {
    use std::os::fd::AsFd;
    Path::new("/proc/self/fd")
        .join(dir.as_fd().as_raw_fd().to_string())
        .join(name)
}
