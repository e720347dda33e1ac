//! Who calls the runner and whose the home is.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A user of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    /// User id.
    pub(crate) uid: u32,
    /// Primary group id.
    pub(crate) gid: u32,
}

/// What the passwd entry of a uid says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    name: CString,
    gid: u32,
    home: PathBuf,
}

impl Account {
    /// The effective user of this process.
    pub(crate) fn current() -> Self {
        Self {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        }
    }

    /// Whom the process works for: under sudo the invoking user, otherwise its own user.
    pub(crate) fn invoking() -> Self {
        match sudo_uid() {
            Some(uid) => Self {
                uid,
                gid: entry(uid).map_or_else(sudo_gid, |entry| entry.gid),
            },
            None => Self::current(),
        }
    }

    /// The name of a user.
    pub(crate) fn name_of(uid: u32) -> Option<String> {
        entry(uid)?.name.into_string().ok()
    }

    /// The home directory: `$HOME` of an ordinary call; under sudo, which may have kept or replaced that variable,
    /// always the one in the invoking user's passwd entry.
    pub(crate) fn invoking_home() -> Result<PathBuf, u32> {
        if let Some(uid) = sudo_uid() {
            return home_of(uid).ok_or(uid);
        }
        if let Some(home) = std::env::var_os("HOME").map(PathBuf::from)
            && home.is_absolute()
        {
            return Ok(home);
        }
        let uid = Self::current().uid;
        home_of(uid).ok_or(uid)
    }

    /// Turns the calling thread, which must be the process's only one, into this user for good: supplementary
    /// groups, gid and uid. Needs root.
    pub(crate) fn become_it(self) -> io::Result<()> {
        use rustix::process::{Gid, Uid};
        let Self { uid, gid } = self;
        if let Some(entry) = entry(uid) {
            // SAFETY: `name` is a NUL-terminated string that lives through the call.
            if unsafe { libc::initgroups(entry.name.as_ptr(), gid) } != 0 {
                return Err(io::Error::last_os_error());
            }
        } else {
            rustix::thread::set_thread_groups(&[])?;
        }
        let gid = Gid::from_raw(gid);
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        let uid = Uid::from_raw(uid);
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    }
}

/// The uid that called sudo, if root was reached that way. Anybody else's `SUDO_UID` means nothing.
fn sudo_uid() -> Option<u32> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    std::env::var("SUDO_UID").ok()?.parse().ok()
}

fn sudo_gid() -> u32 {
    std::env::var("SUDO_GID")
        .ok()
        .and_then(|gid| gid.parse().ok())
        .unwrap_or_else(|| Account::current().gid)
}

fn home_of(uid: u32) -> Option<PathBuf> {
    entry(uid)
        .map(|entry| entry.home)
        .filter(|home| home.is_absolute())
}

/// The passwd entry of `uid`, whatever name service holds it.
fn entry(uid: u32) -> Option<Entry> {
    // glibc suggests 1 KiB and asks for more with ERANGE; entries beyond 1 MiB are nobody's.
    let mut size = 1024;
    while size <= 1 << 20 {
        let mut strings = vec![0_u8; size];
        let mut found = std::ptr::null_mut();
        // SAFETY: passwd is plain data for which all zeroes is a valid value (null pointers and zero ids).
        let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
        // SAFETY: all pointers are valid for the call and `strings.len()` is the buffer's true length.
        let error = unsafe {
            libc::getpwuid_r(
                uid,
                &mut entry,
                strings.as_mut_ptr().cast(),
                strings.len(),
                &mut found,
            )
        };
        if error == libc::ERANGE {
            size *= 4;
            continue;
        }
        if error != 0 || found.is_null() || entry.pw_dir.is_null() || entry.pw_name.is_null() {
            return None;
        }
        // SAFETY: on success both are NUL-terminated strings inside `strings`, which is still alive.
        let (name, home) = unsafe { (CStr::from_ptr(entry.pw_name), CStr::from_ptr(entry.pw_dir)) };
        return Some(Entry {
            name: name.to_owned(),
            gid: entry.pw_gid,
            home: Path::new(OsStr::from_bytes(home.to_bytes())).to_owned(),
        });
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_passwd_entry_is_found_and_nobodys_is_not() {
        let root = entry(0).unwrap();
        assert_eq!(root.name.to_bytes(), b"root");
        assert_eq!(root.gid, 0);
        assert_eq!(home_of(0), Some(PathBuf::from("/root")));
        assert_eq!(entry(4_000_000_001), None);
    }
}
