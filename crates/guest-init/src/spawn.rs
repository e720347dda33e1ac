//! From a request to a running process.

use std::ffi::{CString, c_char};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use guest_control::server::{OsError, Process, Spawned, Stdio, window};
use guest_control::{ExecSpec, ExitReport, ExitStatus};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;

use crate::cgroup::{Cgroups, Lease};
use crate::clone::{Child, Failure, start};
use crate::environment::{build, c_string, candidates, strings};
use crate::reaper::{Exit, Reaper};
use crate::root::Root;

/// A session's first process and its cgroup.
#[derive(Debug)]
pub(crate) struct Session {
    pid: u32,
    exit: Arc<Exit>,
    cgroup: Lease,
    root: Arc<Root>,
    reaper: Arc<Reaper>,
}

/// Starts a process in the agent's root.
pub(crate) fn spawn(
    spec: &ExecSpec,
    root: &Arc<Root>,
    cgroups: &Arc<Cgroups>,
    reaper: &Arc<Reaper>,
) -> Result<Spawned<Session>, OsError> {
    let program = spec
        .argv
        .first()
        .ok_or_else(|| OsError::new("an empty command", Errno::INVAL))?;
    let etc = root.etc();
    let account = etc.account(&spec.user)?;
    let env = build(account, &etc.environment, spec);
    let path = env.get("PATH").map(String::as_str).unwrap_or_default();
    let candidates = Pointers::new(candidates(program, path)?);
    let argv = Pointers::new(
        spec.argv
            .iter()
            .map(|argument| c_string(argument.as_slice(), "an argument"))
            .collect::<Result<_, _>>()?,
    );
    let envp = Pointers::new(strings(&env)?);
    let cwd = spec.cwd.as_deref().unwrap_or(&account.home);
    let cwd = root.open_or_create_dir(cwd, account.uid, account.gid)?;
    let ends = Ends::open(spec, root)?;
    let cgroup = Lease::take(cgroups)?;
    let cgroup_dir = cgroup
        .get()
        .ok_or_else(|| OsError::new("the session's cgroup", Errno::NOENT))?
        .dir()
        .as_raw_fd();
    let mut child = Child {
        stdio: ends.child(),
        terminal: spec.pty.is_some(),
        namespace: root.namespace().as_raw_fd(),
        cwd: cwd.as_raw_fd(),
        uid: account.uid,
        gid: account.gid,
        groups: account.groups.as_ptr(),
        group_count: account.groups.len(),
        candidates: candidates.as_ptr(),
        argv: argv.as_ptr(),
        envp: envp.as_ptr(),
        failure: Failure::default(),
    };
    let pid =
        start(&mut child, cgroup_dir).map_err(|error| OsError::new("starting a process", error))?;
    let name = String::from_utf8_lossy(program);
    let Failure { step, errno } = child.failure;
    if errno != 0 {
        return Err(OsError::new(
            format_args!("{step} for {name:?}"),
            Errno::from_raw_os_error(errno),
        ));
    }
    Ok(Spawned {
        pid,
        stdio: ends.into_host(),
        process: Session {
            pid,
            exit: reaper.expect(pid),
            cgroup,
            root: Arc::clone(root),
            reaper: Arc::clone(reaper),
        },
    })
}

/// C strings and the null-terminated array of pointers to them that execve takes.
struct Pointers {
    pointers: Vec<*const c_char>,
    /// What the pointers point to.
    _strings: Vec<CString>,
}

impl Pointers {
    fn new(strings: Vec<CString>) -> Self {
        let mut pointers: Vec<_> = strings.iter().map(|string| string.as_ptr()).collect();
        pointers.push(std::ptr::null());
        Self {
            pointers,
            _strings: strings,
        }
    }

    fn as_ptr(&self) -> *const *const c_char {
        self.pointers.as_ptr()
    }
}

/// Both ends of a process's input and output. The child's close when this is dropped or turned into the host's.
enum Ends {
    Pipes {
        stdin: (OwnedFd, Option<OwnedFd>),
        stdout: (OwnedFd, OwnedFd),
        stderr: (OwnedFd, OwnedFd),
    },
    Terminal {
        master: OwnedFd,
        slave: OwnedFd,
    },
}

impl Ends {
    fn open(spec: &ExecSpec, root: &Root) -> Result<Self, OsError> {
        match spec.pty {
            Some(size) => {
                let (master, slave) =
                    terminal(root).map_err(|error| OsError::new("opening a terminal", error))?;
                rustix::termios::tcsetwinsize(&slave, window(size))
                    .map_err(|error| OsError::new("sizing the terminal", error))?;
                Ok(Self::Terminal { master, slave })
            }
            None => {
                Self::pipes(spec.stdin, root).map_err(|error| OsError::new("making pipes", error))
            }
        }
    }

    fn pipes(stdin: bool, root: &Root) -> Result<Self, Errno> {
        // Only our own ends must not block; a program is entitled to blocking ones.
        let output = || {
            let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&read, true)?;
            Ok((read, write))
        };
        let stdin = if stdin {
            let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&write, true)?;
            (read, Some(write))
        } else {
            (root.open("/dev/null", OFlags::RDONLY, Mode::empty())?, None)
        };
        Ok(Self::Pipes {
            stdin,
            stdout: output()?,
            stderr: output()?,
        })
    }

    fn child(&self) -> [i32; 3] {
        match self {
            Self::Pipes {
                stdin,
                stdout,
                stderr,
            } => [
                stdin.0.as_raw_fd(),
                stdout.1.as_raw_fd(),
                stderr.1.as_raw_fd(),
            ],
            Self::Terminal { slave, .. } => [slave.as_raw_fd(); 3],
        }
    }

    fn into_host(self) -> Stdio {
        match self {
            Self::Pipes {
                stdin,
                stdout,
                stderr,
            } => Stdio::Pipes {
                stdin: stdin.1,
                stdout: stdout.0,
                stderr: stderr.0,
            },
            Self::Terminal { master, .. } => Stdio::Terminal(master),
        }
    }
}

/// A terminal of the agent's own devpts, so that its name there is right.
fn terminal(root: &Root) -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    let master = root.open("/dev/pts/ptmx", flags | OFlags::NONBLOCK, Mode::empty())?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(
        &master,
        rustix::pty::OpenptFlags::RDWR
            | rustix::pty::OpenptFlags::NOCTTY
            | rustix::pty::OpenptFlags::CLOEXEC,
    )?;
    Ok((master, slave))
}

impl Process for Session {
    fn signal(&self, signal: i32) -> Result<(), OsError> {
        // Once reaped, the number may be somebody else's.
        if self.exit.get().is_some() {
            return Ok(());
        }
        let group = i32::try_from(self.pid).unwrap_or(i32::MAX);
        // SAFETY: sends a signal to the group of a process that we have not reaped.
        if unsafe { libc::kill(-group, signal) } < 0 {
            let error = std::io::Error::last_os_error();
            return Err(OsError::new("sending the signal", error));
        }
        Ok(())
    }

    fn kill(&self) {
        if let Some(cgroup) = self.cgroup.get() {
            cgroup.kill();
        }
    }

    async fn wait(&self) -> ExitStatus {
        self.exit.wait().await
    }

    fn report(&self, status: ExitStatus) -> ExitReport {
        let counters = self
            .cgroup
            .get()
            .map(|cgroup| cgroup.counters())
            .unwrap_or_default();
        ExitReport {
            status,
            oom_kills: counters.oom_kills,
            pids_limit_hits: counters.pids_limit_hits,
            disk_free_bytes: self.root.free_bytes().unwrap_or(0),
        }
    }

    async fn kill_rest(&self) {
        let Some(cgroup) = self.cgroup.get() else {
            return;
        };
        self.reaper
            .until(|| {
                let rest = cgroup.populated();
                if rest {
                    cgroup.kill();
                }
                !rest
            })
            .await;
    }
}
