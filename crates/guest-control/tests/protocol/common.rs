//! A guest server over this machine's own processes, and streams to speak to it.
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

use guest_control::server::{Ended, Os, OsError, Process, Spawned, Stdio, serve, window};
use guest_control::{
    Client, ExecSpec, ExitReport, ExitStatus, FileSpec, GuestStats, MountSource, Wake,
};
use rustix::io::Errno;
use rustix::pty::OpenptFlags;
use tokio::io::DuplexStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Long enough for any machine; a test that waits this long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The operating system of the "guest": this machine, files below a temporary directory.
pub(crate) struct LocalOs {
    pub(crate) dir: tempfile::TempDir,
}

impl LocalOs {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            dir: tempfile::tempdir().unwrap(),
        })
    }

    fn inside(&self, path: &str) -> PathBuf {
        self.dir.path().join(path.trim_start_matches('/'))
    }
}

/// A process group; killed when nobody holds it any more.
pub(crate) struct LocalProcess {
    group: i32,
    ended: watch::Receiver<Option<ExitStatus>>,
}

pub(crate) struct LocalFile {
    file: tempfile::NamedTempFile,
    path: PathBuf,
}

impl io::Write for LocalFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.file.write(data)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn signal_group(group: i32, signal: i32) {
    // SAFETY: signals a process group that this test has made.
    unsafe { libc::kill(-group, signal) };
}

impl Drop for LocalProcess {
    fn drop(&mut self) {
        signal_group(self.group, libc::SIGKILL);
    }
}

impl Process for LocalProcess {
    fn signal(&self, signal: i32) -> Result<(), OsError> {
        signal_group(self.group, signal);
        Ok(())
    }
    fn kill(&self) {
        signal_group(self.group, libc::SIGKILL);
    }
    async fn wait(&self) -> ExitStatus {
        let mut ended = self.ended.clone();
        let status = ended.wait_for(Option::is_some).await.unwrap();
        status.unwrap()
    }
    fn report(&self, status: ExitStatus) -> ExitReport {
        ExitReport {
            status,
            oom_kills: 0,
            pids_limit_hits: 0,
            disk_free_bytes: 0,
        }
    }
    async fn kill_rest(&self) {
        self.kill();
    }
}

impl Os for LocalOs {
    type Process = LocalProcess;
    type NewFile = LocalFile;

    fn wake(&self, wake: &Wake) -> Result<(), OsError> {
        if wake.entropy == [0; 32] {
            return Err(OsError::new("reseeding", Errno::IO));
        }
        fs::write(self.inside("woken"), wake.realtime_ns.to_string()).unwrap();
        Ok(())
    }
    fn mount(&self, _: MountSource) -> Result<(), OsError> {
        Ok(())
    }
    async fn unmount(&self) -> Result<(), OsError> {
        Err(OsError::new("nothing is mounted", Errno::INVAL))
    }
    async fn kill_all(&self) -> Result<(), OsError> {
        Ok(())
    }
    fn spawn(&self, spec: &ExecSpec) -> Result<Spawned<LocalProcess>, OsError> {
        let (mut child, stdio) = start(spec).map_err(|error| OsError::new("starting", error))?;
        let (sender, ended) = watch::channel(None);
        let pid = child.id();
        std::thread::spawn(move || {
            let status = child.wait().unwrap();
            let status = match status.signal() {
                Some(signal) => ExitStatus::Signaled(signal),
                None => ExitStatus::Exited(status.code().unwrap()),
            };
            let _ = sender.send(Some(status));
        });
        Ok(Spawned {
            pid,
            stdio,
            process: LocalProcess {
                group: i32::try_from(pid).unwrap(),
                ended,
            },
        })
    }
    fn stats(&self) -> Result<GuestStats, OsError> {
        Ok(GuestStats {
            processes: 7,
            ..GuestStats::default()
        })
    }
    fn open(&self, path: &str) -> Result<File, OsError> {
        File::open(self.inside(path)).map_err(|error| OsError::new("opening", error))
    }
    fn create(&self, spec: &FileSpec) -> Result<LocalFile, OsError> {
        let path = self.inside(&spec.path);
        let parent = path.parent().unwrap();
        fs::metadata(parent).map_err(|error| OsError::new("creating", error))?;
        let file = tempfile::NamedTempFile::new_in(parent).unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(spec.mode)).unwrap();
        Ok(LocalFile { file, path })
    }
    fn commit(&self, file: LocalFile) -> Result<(), OsError> {
        file.file.persist(file.path).unwrap();
        Ok(())
    }
    fn shutdown(&self) {}
}

fn start(spec: &ExecSpec) -> io::Result<(Child, Stdio)> {
    use std::os::unix::ffi::OsStrExt;
    let argv: Vec<_> = spec
        .argv
        .iter()
        .map(|argument| std::ffi::OsStr::from_bytes(argument))
        .collect();
    let mut command = Command::new(argv[0]);
    command
        .args(&argv[1..])
        .envs(spec.env.iter().map(|(name, value)| (name, value)));
    if let Some(size) = spec.pty {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags)?;
        rustix::pty::unlockpt(&master)?;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
        rustix::termios::tcsetwinsize(&slave, window(size))?;
        rustix::io::ioctl_fionbio(&master, true)?;
        command
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave);
        // SAFETY: only system calls between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        let child = command.spawn()?;
        // The command keeps the terminal's other end open.
        drop(command);
        return Ok((child, Stdio::Terminal(master)));
    }
    command
        .process_group(0)
        .stdin(if spec.stdin {
            std::process::Stdio::piped()
        } else {
            std::process::Stdio::null()
        })
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let mut child = command.spawn()?;
    let nonblocking = |fd: OwnedFd| -> io::Result<OwnedFd> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(fd)
    };
    let stdio = Stdio::Pipes {
        stdin: match child.stdin.take() {
            Some(stdin) => Some(nonblocking(stdin.into())?),
            None => None,
        },
        stdout: nonblocking(child.stdout.take().unwrap().into())?,
        stderr: nonblocking(child.stderr.take().unwrap().into())?,
    };
    Ok((child, stdio))
}

/// A client and the server it speaks to.
pub(crate) struct Pair {
    pub(crate) client: Client,
    pub(crate) os: Arc<LocalOs>,
    pub(crate) server: JoinHandle<(Ended, DuplexStream)>,
}

/// A connected pair over a small in-memory pipe, so that back-pressure is felt.
pub(crate) async fn pair() -> Pair {
    pair_over(8 * 1024).await
}

/// A connected pair over a pipe that holds `width` bytes.
pub(crate) async fn pair_over(width: usize) -> Pair {
    let (near, mut far) = tokio::io::duplex(width);
    let os = LocalOs::new();
    let of_server = Arc::clone(&os);
    let server = tokio::spawn(async move {
        let ended = serve(&mut far, &of_server).await;
        (ended, far)
    });
    let client = Client::connect(near, PATIENCE).await.unwrap();
    Pair { client, os, server }
}

/// A command line.
pub(crate) fn argv(words: &[&str]) -> ExecSpec {
    ExecSpec {
        argv: words.iter().map(|word| word.as_bytes().to_vec()).collect(),
        kill_group_on_exit: true,
        ..ExecSpec::default()
    }
}

/// A shell script.
pub(crate) fn sh(script: &str) -> ExecSpec {
    argv(&["sh", "-c", script])
}

/// Fails the test instead of hanging.
pub(crate) async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future)
        .await
        .expect("in time")
}
