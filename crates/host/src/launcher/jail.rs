//! The private mount namespace of VM processes: a root on tmpfs that shows the system's programs and libraries
//! read-only, an empty-handed /proc and a handful of devices. Nothing of /home, /run, /tmp, /etc or /sys.
//!
//! It is made once for each set of devices, by a forked helper, and joined by every process of that set.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};
use rustix::net::RecvFlags;
use rustix::process::WaitOptions;

use super::fork::{self, Forked};
use super::wire;

/// Devices every process sees.
const COMMON_DEVICES: [&str; 5] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
];

/// Devices a launch may ask for. Anything else of /dev would be a way around the walls: the daemon that asks is not root.
const ALLOWED_DEVICES: [&str; 3] = ["/dev/kvm", "/dev/vhost-vsock", "/dev/net/tun"];

/// Top-level directories that hold programs and libraries where /usr is not merged, and links into /usr where it is.
const SYSTEM_DIRS: [&str; 6] = ["/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"];

/// Files of /etc without which dynamically linked programs do not find their libraries.
const ETC: [&str; 2] = ["/etc/ld.so.cache", "/etc/alternatives"];

/// The host's trust in certificate authorities, for services; never its private keys.
const CERTIFICATES: [&str; 4] = [
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/etc/ca-certificates",
    "/etc/pki",
];

/// Top-level directories under which nothing else may be shown to a service.
const TAKEN: [&str; 11] = [
    "usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "etc", "proc", "dev", "tmp",
];

/// The namespaces made so far.
#[derive(Debug)]
pub(super) struct Jails {
    /// An empty directory on which the helper, in its own namespace, builds the new root.
    site: PathBuf,
    made: HashMap<Vec<PathBuf>, OwnedFd>,
    for_jailers: Option<OwnedFd>,
}

/// What a service sees beside what every process does: the system's certificates, a place for temporary files, and this.
#[derive(Debug)]
pub(super) struct ServiceRoot {
    /// Content of its /etc/resolv.conf.
    pub(super) resolv_conf: String,
    /// Directories and files, shown read-only under these paths.
    pub(super) shown: Vec<(OwnedFd, PathBuf)>,
}

impl Jails {
    pub(super) fn new(site: PathBuf) -> Jails {
        Jails {
            site,
            made: HashMap::new(),
            for_jailers: None,
        }
    }

    /// The namespace that shows exactly these devices beside the common ones.
    pub(super) fn for_devices(&mut self, mut devices: Vec<PathBuf>) -> Result<&OwnedFd, String> {
        devices.sort();
        devices.dedup();
        if let Some(device) = devices.iter().find(|device| {
            !ALLOWED_DEVICES
                .iter()
                .any(|allowed| Path::new(allowed) == *device)
        }) {
            return Err(format!("{} may not be given to a VM", device.display()));
        }
        let site = &self.site;
        match self.made.entry(devices) {
            std::collections::hash_map::Entry::Occupied(made) => Ok(made.into_mut()),
            std::collections::hash_map::Entry::Vacant(vacant) => {
                let namespace = make(site, vacant.key(), None)?;
                Ok(vacant.insert(namespace))
            }
        }
    }

    /// A namespace with nothing but an empty directory for the jail that a jailer's process makes in a copy of it. There
    /// is little to copy, which is what makes starts beside one another fast.
    pub(super) fn for_jailer(&mut self) -> Result<&OwnedFd, String> {
        match &mut self.for_jailers {
            Some(made) => Ok(made),
            none => {
                let site = self.site.clone();
                let namespace = make_by(|| build_empty(&site))?;
                Ok(none.insert(namespace))
            }
        }
    }

    /// A namespace for one start of a service.
    pub(super) fn for_service(&self, root: &ServiceRoot) -> Result<OwnedFd, String> {
        for (_, path) in &root.shown {
            let mut parts = path.components();
            let begins = matches!(parts.next(), Some(Component::RootDir));
            let top = parts.clone().next();
            let taken = top.is_none_or(|top| TAKEN.iter().any(|taken| top.as_os_str() == *taken));
            if !begins || taken || !parts.all(|part| matches!(part, Component::Normal(_))) {
                return Err(format!(
                    "nothing may be shown to a service at {}",
                    path.display()
                ));
            }
        }
        make(&self.site, &[], Some(root))
    }
}

fn make(
    site: &Path,
    devices: &[PathBuf],
    service: Option<&ServiceRoot>,
) -> Result<OwnedFd, String> {
    make_by(|| build(site, devices, service))
}

fn make_by(build: impl FnOnce() -> Step<OwnedFd>) -> Result<OwnedFd, String> {
    let (ours, theirs) = super::socket_pair().map_err(|e| e.to_string())?;
    // SAFETY: the launcher is single-threaded, so the child may do what any process may; it ends in `_exit` below.
    match unsafe { fork::fork(None) } {
        Err(e) => Err(e.to_string()),
        Ok(Forked::Child { .. }) => {
            let result = build().map_err(|(step, e)| format!("{step}: {e}"));
            let (answer, namespace) = match result {
                Ok(namespace) => (Ok(()), Some(namespace)),
                Err(message) => (Err(message), None),
            };
            let fds: Vec<_> = namespace.iter().map(AsFd::as_fd).collect();
            let sent = wire::encode::<Result<(), String>>(&answer)
                .and_then(|bytes| wire::send(&theirs, &bytes, &fds));
            // SAFETY: ends the process without running anything of the parent's.
            unsafe { libc::_exit(i32::from(sent.is_err())) }
        }
        Ok(Forked::Parent(pid)) => {
            drop(theirs);
            let mut buffer = vec![0; 4096];
            let answer =
                wire::receive::<Result<(), String>>(&ours, &mut buffer, RecvFlags::empty());
            let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
            match answer {
                Ok(Some((Ok(()), fds))) => fds
                    .into_iter()
                    .next()
                    .ok_or_else(|| "no namespace came back".to_owned()),
                Ok(Some((Err(message), _))) => Err(message),
                Ok(None) => Err("its helper died".to_owned()),
                Err(e) => Err(e.to_string()),
            }
        }
    }
}

type Step<T> = Result<T, (&'static str, io::Error)>;

/// Names the step that failed.
trait At<T> {
    fn at(self, step: &'static str) -> Step<T>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, step: &'static str) -> Step<T> {
        self.map_err(|e| (step, e.into()))
    }
}

/// Moves the calling process into a new mount namespace, furnishes it, and returns it.
fn build(site: &Path, devices: &[PathBuf], service: Option<&ServiceRoot>) -> Step<OwnedFd> {
    // Copies of what a service is shown, as long as we are where it was opened: only from there may it be mounted.
    let shown = service
        .map_or_else(|| Ok(Vec::new()), copies)
        .at("copy what a service is shown")?;
    let namespace = begin(site)?;
    let quiet = MountFlags::NOSUID | MountFlags::NODEV;
    let place = |path: &str| site.join(path.trim_start_matches('/'));

    bind_dir("/usr", &place("/usr")).at("show /usr")?;
    for dir in SYSTEM_DIRS {
        match fs::symlink_metadata(dir) {
            Ok(meta) if meta.is_symlink() => fs::read_link(dir)
                .and_then(|target| symlink(target, place(dir)))
                .at("link a system directory")?,
            Ok(_) => bind_dir(dir, &place(dir)).at("show a system directory")?,
            Err(_) => {}
        }
    }
    fs::create_dir(place("/etc")).at("make /etc")?;
    for path in ETC {
        show(Path::new(path), &place(path)).at("show a part of /etc")?;
    }
    if let Some(service) = service {
        furnish(site, service, shown)?;
    }

    fs::create_dir(place("/proc")).at("make /proc")?;
    let no_exec = quiet | MountFlags::NOEXEC;
    // subset=pid leaves only processes, hidepid=2 only one's own: options of this mount alone since Linux 5.8, which
    // is therefore the oldest that will do.
    rustix::mount::mount(
        "proc",
        place("/proc"),
        "proc",
        no_exec,
        c"hidepid=2,subset=pid",
    )
    .at("mount /proc")?;

    fs::create_dir(place("/dev")).at("make /dev")?;
    let dev = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_tmpfs(&place("/dev"), dev, c"mode=0755,size=64k").at("mount /dev")?;
    let wanted = COMMON_DEVICES.iter().map(Path::new);
    for device in wanted.chain(devices.iter().map(PathBuf::as_path)) {
        make_device(device, site).at("make a device")?;
    }
    symlink("/proc/self/fd", place("/dev/fd")).at("link /dev/fd")?;

    for mount in ["/dev", "/"] {
        let flags = if mount == "/" { quiet } else { dev } | MountFlags::BIND | MountFlags::RDONLY;
        rustix::mount::mount_remount(place(mount), flags, c"").at("close the new root")?;
    }
    finish(site)?;
    Ok(namespace)
}

/// As [`build`], with nothing in it but where jails go.
fn build_empty(site: &Path) -> Step<OwnedFd> {
    let namespace = begin(site)?;
    let jails = site.join(super::jailer::SITE.trim_start_matches('/'));
    fs::create_dir(jails).at("make the jails' place")?;
    finish(site)?;
    Ok(namespace)
}

/// Moves into a new mount namespace, which is returned, and mounts what becomes its root.
fn begin(site: &Path) -> Step<OwnedFd> {
    // SAFETY: takes no pointers; the process is single-threaded.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return Err(("unshare", io::Error::last_os_error()));
    }
    let namespace = fs::File::open("/proc/self/ns/mnt").at("open the namespace")?;
    // SAFETY: umask has no preconditions.
    unsafe { libc::umask(0) };
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).at("make mounts private")?;
    let quiet = MountFlags::NOSUID | MountFlags::NODEV;
    mount_tmpfs(site, quiet, c"mode=0755,size=1m").at("mount the new root")?;
    Ok(namespace.into())
}

/// Leaves the old root for the new one.
fn finish(site: &Path) -> Step<()> {
    std::env::set_current_dir(site).at("enter the new root")?;
    rustix::process::pivot_root(".", ".").at("turn to the new root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).at("leave the old root")
}

/// What only services have.
fn furnish(site: &Path, service: &ServiceRoot, shown: Vec<OwnedFd>) -> Step<()> {
    let place = |path: &str| site.join(path.trim_start_matches('/'));
    for path in CERTIFICATES {
        show(Path::new(path), &place(path)).at("show the certificates")?;
    }
    fs::write(place("/etc/resolv.conf"), &service.resolv_conf).at("write /etc/resolv.conf")?;
    fs::write(place("/etc/hosts"), "127.0.0.1 localhost\n").at("write /etc/hosts")?;
    fs::create_dir(place("/tmp")).at("make /tmp")?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_tmpfs(&place("/tmp"), flags, c"mode=1777,size=256m").at("mount /tmp")?;
    for (copy, (fd, path)) in shown.iter().zip(&service.shown) {
        let target = site.join(path.strip_prefix("/").unwrap_or(path));
        let kind = rustix::fs::fstat(fd)
            .at("look at what a service is shown")?
            .st_mode;
        let is_dir = FileType::from_raw_mode(kind) == FileType::Directory;
        make_place(&target, is_dir).at("make a place for what a service is shown")?;
        rustix::mount::move_mount(
            copy,
            "",
            CWD,
            &target,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .at("show a service what it is shown")?;
        close(&target).at("close what a service is shown")?;
    }
    Ok(())
}

/// Mounts of their own of what the descriptors are open on.
fn copies(service: &ServiceRoot) -> rustix::io::Result<Vec<OwnedFd>> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let shown = service.shown.iter();
    shown
        .map(|(fd, _)| rustix::mount::open_tree(fd, "", flags))
        .collect()
}

/// Shows a file or directory read-only at `to`, with the directories above it; nothing where there is none.
fn show(from: &Path, to: &Path) -> io::Result<()> {
    let Ok(meta) = fs::metadata(from) else {
        return Ok(());
    };
    make_place(to, meta.is_dir())?;
    bind(from, to)
}

/// Something to mount a directory or a file on.
fn make_place(at: &Path, is_dir: bool) -> io::Result<()> {
    if let Some(parent) = at.parent() {
        fs::create_dir_all(parent)?;
    }
    if is_dir {
        fs::create_dir_all(at)
    } else {
        fs::File::create(at).map(drop)
    }
}

fn mount_tmpfs(at: &Path, flags: MountFlags, options: &CStr) -> rustix::io::Result<()> {
    rustix::mount::mount("tmpfs", at, "tmpfs", flags, options)
}

fn bind_dir(from: &str, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    bind(Path::new(from), to)
}

fn bind(from: &Path, to: &Path) -> io::Result<()> {
    rustix::mount::mount_bind(from, to)?;
    close(to)
}

/// Makes a mount one that is only read.
fn close(mount: &Path) -> io::Result<()> {
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount_remount(mount, flags, c"")?;
    Ok(())
}

/// Makes the same device node below `site`, open to all: whoever is in the namespace may use it.
fn make_device(device: &Path, site: &Path) -> io::Result<()> {
    let meta = fs::metadata(device)?;
    if !meta.file_type().is_char_device() {
        return Err(io::Error::other(format!(
            "{} is not a character device",
            device.display()
        )));
    }
    let node = site.join(device.strip_prefix("/").unwrap_or(device));
    if let Some(parent) = node.parent() {
        fs::create_dir_all(parent)?;
    }
    rustix::fs::mknodat(
        CWD,
        &node,
        FileType::CharacterDevice,
        Mode::from_raw_mode(0o666),
        meta.rdev(),
    )?;
    fs::set_permissions(&node, fs::Permissions::from_mode(0o666))
}
