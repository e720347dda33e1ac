//! From the kernel's hand-over to a guest that can serve: mounts, modules, cgroups, kernel settings.

use std::ffi::CStr;
use std::fs;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;

use guest_control::server::OsError;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{Resource, Rlimit};

use crate::{cgroup, kmsg, network};

/// Where the image is mounted in guest-init's own tree.
pub(crate) const IMAGE: &str = "/image";
/// Where the writable layer is mounted while the agent's root is built.
pub(crate) const WRITABLE: &str = "/writable";
/// Where the agent's root is built.
pub(crate) const AGENT: &str = "/agent";
/// sched(7); libc does not have it for musl.
const SCHED_RESET_ON_FORK: libc::c_int = 0x4000_0000;
/// Tree that becomes `/` once the modules are loaded.
const NEW_ROOT: &str = "/newroot";

/// Does everything that needs no event loop.
pub(crate) fn prepare() -> Result<(), OsError> {
    // Umask and descriptor limits are inherited by everything.
    rustix::process::umask(Mode::from_raw_mode(0o022));
    kernel_file_systems()?;
    open_console();
    load_modules();
    own_root()?;
    mount_image()?;
    cgroup::prepare()?;
    settings();
    Ok(())
}

fn kernel_file_systems() -> Result<(), OsError> {
    // devtmpfs unconditionally: an initramfs that brings its own /dev/console would otherwise hide /dev/vda.
    attach("devtmpfs", "/dev", c"mode=0755", MountFlags::NOSUID)?;
    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    attach("proc", "/proc", c"", quiet)?;
    attach("sysfs", "/sys", c"", quiet)
}

/// Mounts a virtual file system on a directory, which is created.
pub(crate) fn attach(
    kind: &str,
    target: &str,
    options: &CStr,
    flags: MountFlags,
) -> Result<(), OsError> {
    make_dir(target)?;
    mount(kind, target, kind, flags, options)
        .map_err(|error| OsError::new(format_args!("mounting {kind} on {target}"), error))
}

pub(crate) fn make_dir(path: &str) -> Result<(), OsError> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(OsError::new(format_args!("creating {path}"), error)),
    }
}

/// Gives PID 1 a standard input and output if the kernel found no console in the initramfs, so that no descriptor opened
/// later is mistaken for one.
fn open_console() {
    for path in ["/dev/console", "/dev/null"] {
        let Ok(console) = rustix::fs::open(path, OFlags::RDWR | OFlags::NOCTTY, Mode::empty())
        else {
            continue;
        };
        // Failing leaves the guest without words, not without work.
        let _ = rustix::stdio::dup2_stdin(&console);
        let _ = rustix::stdio::dup2_stdout(&console);
        let _ = rustix::stdio::dup2_stderr(&console);
        return;
    }
}

/// Loads the modules the initramfs brings, in the order it names. What is missing shows soon enough by name (no disk, no
/// port), so a failure is said and passed over: another kernel may have the module built in.
fn load_modules() {
    let Ok(order) = fs::read_to_string("/modules/order") else {
        return;
    };
    for name in order.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let path = Path::new("/modules").join(name.trim_start_matches('/'));
        let path = if path.exists() { path } else { name.into() };
        let loaded = fs::File::open(&path)
            .and_then(|file| Ok(rustix::system::finit_module(file.as_fd(), c"", 0)?));
        match loaded {
            Ok(()) => {
                // Its memory is of no more use: the initramfs is RAM.
                let _ = fs::remove_file(&path);
            }
            Err(error) if error.raw_os_error() == Some(Errno::EXIST.raw_os_error()) => {}
            Err(error) => kmsg::log(&format!("loading {}: {error}", path.display())),
        }
    }
}

/// Moves from the initramfs, which cannot be pivoted away from, to a small tmpfs of our own.
fn own_root() -> Result<(), OsError> {
    attach("tmpfs", NEW_ROOT, c"mode=0755,size=1m", MountFlags::NOSUID)?;
    for dir in ["dev", "proc", "sys"] {
        let (from, to) = (format!("/{dir}"), format!("{NEW_ROOT}/{dir}"));
        make_dir(&to)?;
        mount_move(&from, &to)
            .map_err(|error| OsError::new(format_args!("moving {from}"), error))?;
    }
    let enter = || -> io::Result<()> {
        rustix::process::chdir(NEW_ROOT)?;
        mount_move(".", "/")?;
        rustix::process::chroot(".")?;
        rustix::process::chdir("/")?;
        Ok(())
    };
    enter().map_err(|error| OsError::new("entering the new root", error))?;
    for dir in [IMAGE, WRITABLE, AGENT] {
        make_dir(dir)?;
    }
    Ok(())
}

fn mount_image() -> Result<(), OsError> {
    let kind = image_kind()?;
    let flags = MountFlags::RDONLY | MountFlags::NOATIME;
    mount("/dev/vda", IMAGE, kind, flags, c"").map_err(|error| {
        OsError::new(
            format_args!("mounting the image /dev/vda, which is {kind},"),
            error,
        )
    })
}

/// Which file system the image is: each kernel mounts one of two (erofs, squashfs), and the build writes the right one.
fn image_kind() -> Result<&'static str, OsError> {
    let mut start = [0; 1028];
    let read = fs::File::open("/dev/vda").and_then(|mut disk| disk.read_exact(&mut start));
    read.map_err(|error| OsError::new("reading the image /dev/vda", error))?;
    kind_of(&start).ok_or_else(|| {
        OsError::new(
            "recognising the image /dev/vda (neither erofs nor squashfs)",
            Errno::INVAL,
        )
    })
}

/// By the magic numbers of linux/magic.h, little-endian: squashfs has its own at 0, erofs behind 1024 bytes of nothing.
fn kind_of(start: &[u8]) -> Option<&'static str> {
    if start.get(1024..1028) == Some(&0xe0f5_e1e2_u32.to_le_bytes()) {
        Some("erofs")
    } else if start.get(..4) == Some(b"hsqs") {
        Some("squashfs")
    } else {
        None
    }
}

/// Kernel settings. None is worth a guest: failures are said and passed over.
fn settings() {
    // The image's, because its /etc/hosts knows it.
    let hostname = fs::read_to_string(format!("{IMAGE}/etc/hostname")).unwrap_or_default();
    let files = [
        // A dead peer is noticed after two minutes; the defaults exceed a job's time limit.
        ("/proc/sys/net/ipv4/tcp_keepalive_time", "60"),
        ("/proc/sys/net/ipv4/tcp_keepalive_intvl", "10"),
        ("/proc/sys/net/ipv4/tcp_keepalive_probes", "6"),
        ("/proc/sys/kernel/hostname", hostname.trim()),
    ];
    for (path, value) in files {
        if let Err(error) = fs::write(path, value) {
            kmsg::log(&format!("writing {path}: {error}"));
        }
    }
    if let Err(error) = run_first() {
        kmsg::log(&format!("taking a real-time priority: {error}"));
    }
    if let Err(error) = network::start() {
        kmsg::log(&format!("setting up the network: {error}"));
    }
    // As systemd has it: programs that use select() see few descriptors unless they ask for more.
    let limit = Rlimit {
        current: Some(1024),
        maximum: Some(512 * 1024),
    };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, limit) {
        kmsg::log(&format!("raising the descriptor limit: {error}"));
    }
}

/// Lets this process run before any other, so that a thousand busy ones do not keep the host waiting. What it starts is
/// scheduled normally (SCHED_RESET_ON_FORK), and the kernel leaves others a twentieth of the time in any case.
fn run_first() -> io::Result<()> {
    // The kernel's structure; some C libraries have further fields behind it.
    let priority: libc::c_int = 1;
    let policy = libc::SCHED_FIFO | SCHED_RESET_ON_FORK;
    // By number: musl's wrapper of this call always fails.
    // SAFETY: the kernel reads one `struct sched_param`, which is one int.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_setscheduler,
            0usize,
            policy,
            &raw const priority,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Opens a directory to look up others below it.
pub(crate) fn open_dir(path: &str) -> Result<std::os::fd::OwnedFd, OsError> {
    rustix::fs::openat(
        CWD,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| OsError::new(format_args!("opening {path}"), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_recognised_by_its_magic_number() {
        let mut start = [0; 1028];
        assert_eq!(kind_of(&start), None);
        start[..4].copy_from_slice(b"hsqs");
        assert_eq!(kind_of(&start), Some("squashfs"));
        start[..4].fill(0);
        start[1024..].copy_from_slice(&[0xe2, 0xe1, 0xf5, 0xe0]);
        assert_eq!(kind_of(&start), Some("erofs"));
        assert_eq!(kind_of(&start[..1027]), None);
    }
}
