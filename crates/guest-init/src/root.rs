//! The agent's root: an overlay on the image, in a mount namespace that guest-init only visits to build it.
//!
//! pivot_root rather than chroot: the kernel refuses user namespaces to a process whose root is not its namespace's, and
//! sandboxes (Chromium's, bubblewrap) need them.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use guest_control::MountSource;
use guest_control::server::OsError;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::boot::{AGENT, IMAGE, WRITABLE, attach, make_dir};
use crate::kmsg;
use crate::users::{Contents, Etc};

/// Account files and the like: longer ones are not what they seem.
const SMALL_FILE: u64 = 1024 * 1024;
/// `_IO(0x12, 97)`, linux/fs.h: writes back and forgets a block device's cached blocks.
const BLKFLSBUF: u64 = 0x1261;
/// Device nodes every program may expect: name, major, minor. The disks and the control port are not among them.
const NODES: [(&str, u32, u32); 8] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("kmsg", 1, 11),
    ("tty", 5, 0),
    ("fuse", 10, 229),
];

/// The mounted root. Dropping it drops the namespace as soon as no process is in it.
#[derive(Debug)]
pub(crate) struct Root {
    namespace: OwnedFd,
    dir: OwnedFd,
    etc: Etc,
}

impl Root {
    /// Builds it on `source`.
    pub(crate) fn build(source: MountSource) -> Result<Self, OsError> {
        let home = namespace()?;
        // SAFETY: this process has one thread and shares its file system context with nobody.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
            .map_err(|error| OsError::new("making a mount namespace", error))?;
        let root = populate(source).and_then(|()| {
            let dir = crate::boot::open_dir("/")?;
            Ok(Self {
                namespace: namespace()?,
                dir,
                etc: Etc::open()?,
            })
        });
        rustix::thread::move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Mount))
            .map_err(|error| OsError::new("returning from the agent's mount namespace", error))?;
        root
    }

    /// For a child to enter.
    pub(crate) fn namespace(&self) -> &OwnedFd {
        &self.namespace
    }

    /// What its account files say.
    pub(crate) fn etc(&self) -> Arc<Contents> {
        self.etc.read(self)
    }

    /// Opens a path as a process inside would see it.
    pub(crate) fn open(&self, path: &str, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC;
        loop {
            match rustix::fs::openat2(&self.dir, path, flags, mode, inside) {
                // A rename somewhere on the way.
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return result,
            }
        }
    }

    /// Opens a regular file for reading. What else there may be (a FIFO, a device) is not even opened.
    pub(crate) fn open_regular(&self, path: &str) -> Result<OwnedFd, OsError> {
        let failed = |error: Errno| OsError::new(format_args!("opening {path:?}"), error);
        let found = self
            .open(path, OFlags::PATH, Mode::empty())
            .map_err(failed)?;
        let stat = rustix::fs::fstat(&found).map_err(failed)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(failed(Errno::ISDIR)),
            _ => {
                return Err(OsError::new(
                    format_args!("{path:?} is not a regular file"),
                    Errno::INVAL,
                ));
            }
        }
        // The very file that was looked at, whatever the path names by now.
        let number = std::os::fd::AsRawFd::as_raw_fd(&found);
        rustix::fs::openat(
            CWD,
            format!("/proc/self/fd/{number}"),
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
            Mode::empty(),
        )
        .map_err(failed)
    }

    /// Contents of a small text file.
    pub(crate) fn read_small(&self, path: &str) -> Result<String, OsError> {
        let file = std::fs::File::from(self.open_regular(path)?);
        let mut bytes = Vec::new();
        file.take(SMALL_FILE)
            .read_to_end(&mut bytes)
            .map_err(|error| OsError::new(format_args!("reading {path:?}"), error))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Bytes free on the writable layer.
    pub(crate) fn free_bytes(&self) -> Result<u64, OsError> {
        rustix::fs::fstatvfs(&self.dir)
            .map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize))
            .map_err(|error| OsError::new("asking for free disk space", error))
    }

    /// Opens a directory, creating what is missing on the way with the given owner.
    pub(crate) fn open_or_create_dir(
        &self,
        path: &str,
        uid: u32,
        gid: u32,
    ) -> Result<OwnedFd, OsError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        match self.open(path, flags, Mode::empty()) {
            Err(Errno::NOENT) => {}
            result => {
                return result.map_err(|error| {
                    OsError::new(format_args!("opening the directory {path:?}"), error)
                });
            }
        }
        let failed =
            |error: Errno| OsError::new(format_args!("creating the directory {path:?}"), error);
        let mut prefix = String::from("/");
        let mut dir = self.open("/", flags, Mode::empty()).map_err(failed)?;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            prefix.push_str(name);
            dir = match self.open(&prefix, flags, Mode::empty()) {
                Err(Errno::NOENT) => {
                    rustix::fs::mkdirat(&dir, name, Mode::from_raw_mode(0o755)).map_err(failed)?;
                    let owner = Some(rustix::fs::Uid::from_raw(uid));
                    let group = Some(rustix::fs::Gid::from_raw(gid));
                    rustix::fs::chownat(&dir, name, owner, group, AtFlags::SYMLINK_NOFOLLOW)
                        .map_err(failed)?;
                    self.open(&prefix, flags, Mode::empty()).map_err(failed)?
                }
                result => result.map_err(failed)?,
            };
            prefix.push('/');
        }
        Ok(dir)
    }
}

fn namespace() -> Result<OwnedFd, OsError> {
    rustix::fs::open(
        "/proc/self/ns/mnt",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| OsError::new("opening the mount namespace", error))
}

/// Builds everything in the present (fresh) namespace and makes it its root.
fn populate(source: MountSource) -> Result<(), OsError> {
    // Nothing that is mounted here may appear in guest-init's namespace, or the other way round.
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .map_err(|error| OsError::new("separating the mount namespaces", error))?;
    match source {
        MountSource::Tmpfs => attach("tmpfs", WRITABLE, c"mode=0755", MountFlags::NODEV)?,
        MountSource::Disk => mount_disk()?,
    }
    let (upper, work) = (format!("{WRITABLE}/upper"), format!("{WRITABLE}/work"));
    make_dir(&upper)?;
    make_dir(&work)?;
    // redirect_dir lets a directory of the image be renamed, as it could be on any other file system.
    let options = format!("lowerdir={IMAGE},upperdir={upper},workdir={work},redirect_dir=on");
    let options = crate::environment::c_string(options, "the overlay's options")?;
    mount("overlay", AGENT, "overlay", MountFlags::NOATIME, &*options)
        .map_err(|error| OsError::new("mounting the overlay", error))?;
    virtual_file_systems()?;
    pivot().map_err(|error| OsError::new("pivoting into the agent's root", error))
}

fn mount_disk() -> Result<(), OsError> {
    let device = "/dev/vdb";
    let failed = |error: Errno| OsError::new(format_args!("mounting the disk {device}"), error);
    let disk =
        rustix::fs::open(device, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    // A restored guest may remember blocks of the disk that its snapshot was taken with.
    // SAFETY: the descriptor is an open block device; the request takes no argument.
    if unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&disk), BLKFLSBUF as _, 0) } < 0 {
        kmsg::log(&format!(
            "dropping old blocks of {device}: {}",
            std::io::Error::last_os_error()
        ));
    }
    drop(disk);
    // No write barriers: the disk lives exactly as long as this guest, a crash leaves nothing to recover.
    mount(
        device,
        WRITABLE,
        "ext4",
        MountFlags::NOATIME | MountFlags::NODEV,
        c"barrier=0",
    )
    .map_err(failed)
}

/// What Linux programs expect below `/`, none of it writable by an ordinary account except where they must be.
fn virtual_file_systems() -> Result<(), OsError> {
    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let at = |path: &str| format!("{AGENT}{path}");
    attach("proc", &at("/proc"), c"", quiet)?;
    attach("sysfs", &at("/sys"), c"", quiet)?;
    let cgroup = at("/sys/fs/cgroup");
    attach("cgroup2", &cgroup, c"", quiet | MountFlags::RDONLY)?;
    attach(
        "tmpfs",
        &at("/dev"),
        c"mode=0755,size=1m",
        MountFlags::NOSUID,
    )?;
    attach(
        "devpts",
        &at("/dev/pts"),
        c"newinstance,ptmxmode=0666,mode=0620,gid=5",
        MountFlags::NOSUID | MountFlags::NOEXEC,
    )?;
    attach(
        "tmpfs",
        &at("/dev/shm"),
        c"mode=1777",
        MountFlags::NOSUID | MountFlags::NODEV,
    )?;
    attach(
        "tmpfs",
        &at("/run"),
        c"mode=0755,size=25%",
        MountFlags::NOSUID | MountFlags::NODEV,
    )?;
    devices().map_err(|error| OsError::new("filling the agent's /dev", error))?;
    let tmp = at("/tmp");
    make_dir(&tmp)?;
    rustix::fs::chmod(&tmp, Mode::from_raw_mode(0o1777))
        .map_err(|error| OsError::new("opening /tmp to everybody", error))
}

fn devices() -> Result<(), Errno> {
    let all = Mode::from_raw_mode(0o666);
    for (name, major, minor) in NODES {
        let path = format!("{AGENT}/dev/{name}");
        let mode = if name == "kmsg" {
            Mode::from_raw_mode(0o600)
        } else {
            all
        };
        let device = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(CWD, &path, FileType::CharacterDevice, mode, device)?;
        // The umask has taken its share.
        rustix::fs::chmod(&path, mode)?;
    }
    for (target, link) in [
        ("pts/ptmx", "ptmx"),
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
    ] {
        rustix::fs::symlink(target, format!("{AGENT}/dev/{link}"))?;
    }
    Ok(())
}

/// Makes the overlay the namespace's root and lets go of everything outside it.
fn pivot() -> Result<(), Errno> {
    rustix::process::chdir(AGENT)?;
    // Old and new root stacked on one directory: the old one is then the current directory's parent mount.
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")
}
