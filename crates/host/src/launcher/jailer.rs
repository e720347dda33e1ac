//! From fork to a jailer's exec: the root directory that a jailed process gets, and what the jailer may do as root.
//!
//! The mount namespace belongs to the process alone and everything in it is on a tmpfs: what the jailer makes (directories,
//! device nodes, its copy of the program) goes with the process. Files are shown in it by the descriptors that came from
//! the daemon; no path of the home is used, so nobody can turn one into a link on the way.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::io::{self, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags};
use rustix::process::Resource;
use rustix::thread::LinkNameSpaceType;

use super::child::{self, At, Step};
use super::jailed::{CONTROL_DIR, JailName, METRICS_PIPE};
use super::wire;
use crate::cgroup::Cgroups;
use crate::net;

/// In the namespaces that [`jail`](super::jail) makes for jailers: where the jails' tmpfs is mounted.
pub(super) const SITE: &str = "/vm";
/// Name of the program, without which the jailer would refuse it.
const PROGRAM: &str = "firecracker";
/// What a process may keep in its root: the jailer's copy of the program (3 MiB), sockets, and nothing to speak of.
const ROOT_OPTIONS: &std::ffi::CStr = c"mode=0711,size=16m,nr_inodes=64";
/// Capabilities, by number (linux/capability.h), that the jailer uses: to own files (0), to get at them whoever owns
/// them (1, 3), to change its ids (6, 7), to change root and mounts (18, 21), its limits (24), to make devices (27).
const JAILERS: [u32; 9] = [0, 1, 3, 6, 7, 18, 21, 24, 27];

/// Everything the child needs, gathered before the fork.
pub(super) struct Plan<'a> {
    pub(super) uid: u32,
    /// Name of the jail, for the jailer.
    pub(super) id: String,
    pub(super) jailer: OwnedFd,
    pub(super) program: OwnedFd,
    pub(super) console: OwnedFd,
    pub(super) args: Vec<CString>,
    pub(super) files: Vec<(OwnedFd, JailName, bool)>,
    pub(super) mount_namespace: BorrowedFd<'a>,
    /// An empty one of its own, with a device in it, if none is given.
    pub(super) network: Option<BorrowedFd<'a>>,
    pub(super) oom_score_adj: i32,
    pub(super) cgroups: &'a Cgroups,
    pub(super) pids_max: u32,
    /// Where the control directory is sent.
    pub(super) control: OwnedFd,
}

/// Whether a program may be run as root because the unprivileged daemon says so: only if root alone can have made it
/// what it is.
pub(super) fn check_program(file: &OwnedFd, what: &str) -> Result<(), String> {
    let meta = file
        .try_clone()
        .and_then(|copy| fs::File::from(copy).metadata())
        .map_err(|e| format!("look at the {what}: {e}"))?;
    let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default();
    let shown = path.display();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if !name.starts_with(what) {
        return Err(format!("{shown} is not named like a {what}"));
    }
    if !meta.is_file() || meta.uid() != 0 || meta.mode() & 0o022 != 0 {
        return Err(format!(
            "the {what} {shown} must be a file of root's that only root can write; install it with `runner setup`"
        ));
    }
    Ok(())
}

/// Runs in the child and ends in the jailer's exec. Only returns with the step that failed.
pub(super) fn become_jailer(plan: &Plan<'_>, in_group: bool) -> Step<Infallible> {
    rustix::process::setsid().at("start a session")?;
    child::raise_oom_score(plan.oom_score_adj).at("set oom_score_adj")?;
    rustix::process::setpriority_process(None, 0).at("take the usual priority")?;
    plan.cgroups
        .join(plan.uid, in_group)
        .at("join the slot's cgroup")?;

    // What is mounted or opened where the host's paths are comes before we leave them.
    let copies = copies(plan).at("copy what the jail shows")?;
    enter_network(plan)?;
    let console = [1, 2].map(|number| plan.console.try_clone().map(|fd| (fd, number)));
    let console: Vec<_> = console
        .into_iter()
        .collect::<io::Result<_>>()
        .at("copy the console")?;
    child::arrange_descriptors(&console).at("arrange descriptors")?;

    let mount = Some(LinkNameSpaceType::Mount);
    rustix::thread::move_into_link_name_space(plan.mount_namespace, mount)
        .at("enter the mount namespace")?;
    // SAFETY: takes no pointers; the process is single-threaded.
    child::checked(unsafe { libc::unshare(libc::CLONE_NEWNS) }).at("make a mount namespace")?;
    rustix::process::chdir("/").at("enter /")?;
    // SAFETY: umask has no preconditions. The jailed program's sockets are for the daemon too, which reaches them by
    // its descriptor of their directory; nobody else can.
    unsafe { libc::umask(0) };
    furnish(plan, &copies)?;

    child::limit(Resource::Core, 0).at("forbid core files")?;
    if plan.pids_max > 0 {
        child::limit(Resource::Nproc, u64::from(plan.pids_max)).at("limit processes")?;
    }
    child::drop_bounding(&JAILERS).at("drop capabilities")?;
    rustix::thread::set_no_new_privs(true).at("forbid new privileges")?;
    child::reset_signals().at("reset signals")?;
    execute(plan)
}

fn enter_network(plan: &Plan<'_>) -> Step<()> {
    if let Some(network) = plan.network {
        net::enter(network).at("enter its network")?;
    } else {
        let tap = net::namespace::enter_new()
            .and_then(|_| net::tap::open())
            .at("make a network that leads nowhere")?;
        net::tap::leave_to(tap, plan.uid).at("leave it its device")?;
    }
    // SAFETY: takes no pointers; the process is single-threaded.
    child::checked(unsafe { libc::unshare(libc::CLONE_NEWIPC | libc::CLONE_NEWUTS) })
        .map(drop)
        .at("enter namespaces of its own")
}

/// Mounts of their own of the program and the files, in the plan's order.
fn copies(plan: &Plan<'_>) -> rustix::io::Result<Vec<OwnedFd>> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    std::iter::once(&plan.program)
        .chain(plan.files.iter().map(|(file, _, _)| file))
        .map(|file| rustix::mount::open_tree(file, "", flags))
        .collect()
}

/// Makes the jail's directories, shows the files in them and sends the control directory to the launcher.
fn furnish(plan: &Plan<'_>, copies: &[OwnedFd]) -> Step<()> {
    rustix::mount::mount("tmpfs", SITE, "tmpfs", MountFlags::NOSUID, ROOT_OPTIONS)
        .at("mount the jail")?;
    let site = Path::new(SITE);
    let base = site.join("jails");
    let root = base.join(PROGRAM).join(&plan.id).join("root");
    let mut directories = fs::DirBuilder::new();
    directories
        .recursive(true)
        .mode(0o711)
        .create(&root)
        .at("make the jail's directories")?;
    let control = root.join(CONTROL_DIR);
    fs::create_dir(&control)
        .and_then(|()| fs::set_permissions(&control, fs::Permissions::from_mode(0o755)))
        .and_then(|()| chown(&control, Some(plan.uid), Some(plan.uid)))
        .at("make the control directory")?;
    // For everybody who gets into the directory, which is the process and who is sent it.
    let everybody = fs::Permissions::from_mode(0o666);
    let pipe = control.join(METRICS_PIPE);
    rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
        .map_err(io::Error::from)
        .and_then(|()| fs::set_permissions(&pipe, everybody))
        .and_then(|()| chown(&pipe, Some(plan.uid), Some(plan.uid)))
        .at("make the pipe for its metrics")?;

    let mut copies = copies.iter();
    if let Some(copy) = copies.next() {
        let place = site.join(PROGRAM);
        let unlinked = rustix::fs::fstat(&plan.program).is_ok_and(|stat| stat.st_nlink == 0);
        if unlinked {
            copy_program(&plan.program, &place).at("copy the program, which was replaced")?;
        } else {
            show(copy, &place, true, false).at("show the program")?;
        }
    }
    for ((_, name, writable), copy) in plan.files.iter().zip(copies) {
        show(copy, &root.join(name.as_str()), false, *writable)
            .at("show a file, which must have its name until then,")?;
    }

    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let control =
        rustix::fs::open(&control, flags, Mode::empty()).at("open the control directory")?;
    // A message of no bytes would be the end of the connection.
    wire::encode(&true)
        .and_then(|bytes| wire::send(&plan.control, &bytes, &[control.as_fd()]))
        .at("hand the control directory over")
}

/// Shows a file at `place`, which is made.
fn show(copy: &OwnedFd, place: &Path, executable: bool, writable: bool) -> io::Result<()> {
    fs::File::create(place)?;
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(copy, "", CWD, place, empty)?;
    let mut flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV;
    if !executable {
        flags |= MountFlags::NOEXEC;
    }
    if !writable {
        flags |= MountFlags::RDONLY;
    }
    rustix::mount::mount_remount(place, flags, c"")?;
    Ok(())
}

/// For a program that was replaced on disk since the daemon opened it: what has no name cannot be shown by one.
fn copy_program(program: &OwnedFd, place: &Path) -> io::Result<()> {
    let mut from = fs::File::from(program.try_clone()?);
    // All starts share the open file and its offset, and the launcher starts one at a time.
    from.rewind()?;
    let mut to = fs::File::create(place)?;
    to.set_permissions(fs::Permissions::from_mode(0o755))?;
    io::copy(&mut from, &mut to).map(drop)
}

fn execute(plan: &Plan<'_>) -> Step<Infallible> {
    let words = [
        "jailer".to_owned(),
        "--id".to_owned(),
        plan.id.clone(),
        "--exec-file".to_owned(),
        format!("{SITE}/{PROGRAM}"),
        "--uid".to_owned(),
        plan.uid.to_string(),
        "--gid".to_owned(),
        plan.uid.to_string(),
        "--chroot-base-dir".to_owned(),
        format!("{SITE}/jails"),
        "--".to_owned(),
    ];
    let mut argv = Vec::with_capacity(words.len().saturating_add(plan.args.len()));
    for word in words {
        argv.push(CString::new(word).at("name the jail")?);
    }
    argv.extend(plan.args.iter().cloned());
    let argv = child::pointers(&argv);
    let environment = child::pointers(&[]);
    // SAFETY: every argument is a NUL-terminated string that outlives the call, and both arrays end in NULL.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            plan.jailer.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Err(("execute the jailer", io::Error::last_os_error()))
}
