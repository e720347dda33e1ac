//! A daemon for the control socket's tests: guest-control's real server, whose guest is this host, on an in-memory
//! stream.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use guest_control::server::{self, Os, OsError, Process, Spawned};
use guest_control::{
    Client, ExecSpec, ExitReport, ExitStatus, FileSpec, GuestStats, MountSource, Wake,
};
use host::fs::{Lock, LockKind};
use policy::{Policy, RuleArgument};
use rustix::fs::OFlags;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::protocol::{Failure, Refusal, RunInfo};
use super::server::RunLookup;
use crate::audit::Audit;
use crate::home::{Home, rel};
use crate::names::RunId;

/// Waits for something that comes about by itself.
pub(super) async fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let limit = tokio::time::Instant::now() + Duration::from_secs(20);
    while !check() {
        assert!(tokio::time::Instant::now() < limit, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Counts what the guest has running.
#[derive(Debug, Default)]
struct Counts {
    processes: AtomicUsize,
    dropped_files: AtomicUsize,
}

/// This host, as a guest.
struct Guest {
    counts: Arc<Counts>,
}

struct TestProcess {
    group: Pid,
    ended: watch::Receiver<Option<ExitStatus>>,
}

fn end_of(status: std::process::ExitStatus) -> ExitStatus {
    match status.signal() {
        Some(signal) => ExitStatus::Signaled(signal),
        None => ExitStatus::Exited(status.code().unwrap_or(-1)),
    }
}

impl Process for TestProcess {
    fn signal(&self, signal: i32) -> Result<(), OsError> {
        let signal = Signal::from_named_raw(signal)
            .ok_or_else(|| OsError::new("signal", io::ErrorKind::InvalidInput))?;
        kill_process_group(self.group, signal).map_err(|error| OsError::new("signal", error))
    }
    fn kill(&self) {
        if self.ended.borrow().is_none() {
            let _ = kill_process_group(self.group, Signal::KILL);
        }
    }
    async fn wait(&self) -> ExitStatus {
        let mut ended = self.ended.clone();
        let status = ended.wait_for(Option::is_some).await;
        status.ok().and_then(|status| *status).unwrap()
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
        let _ = kill_process_group(self.group, Signal::KILL);
    }
}

/// A file being written; dropped before its commit it is removed.
struct NewFile {
    file: File,
    path: PathBuf,
    committed: bool,
    counts: Arc<Counts>,
}

impl Write for NewFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.file.write(data)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl NewFile {
    fn temporary(path: &Path) -> PathBuf {
        path.with_extension("being-written")
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.committed {
            let _ = std::fs::remove_file(Self::temporary(&self.path));
            self.counts.dropped_files.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// A pipe whose host end does not block: (host's, process's).
fn pipe(host_writes: bool) -> (OwnedFd, Stdio) {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
    let (host, process) = if host_writes {
        (write, read)
    } else {
        (read, write)
    };
    unblock(&host);
    (host, process.into())
}

fn unblock(fd: impl AsFd) {
    let flags = rustix::fs::fcntl_getfl(&fd).unwrap();
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).unwrap();
}

impl Os for Guest {
    type Process = TestProcess;
    type NewFile = NewFile;

    fn wake(&self, _: &Wake) -> Result<(), OsError> {
        Ok(())
    }
    fn mount(&self, _: MountSource) -> Result<(), OsError> {
        Ok(())
    }
    async fn unmount(&self) -> Result<(), OsError> {
        Ok(())
    }
    async fn kill_all(&self) -> Result<(), OsError> {
        Ok(())
    }

    fn spawn(&self, spec: &ExecSpec) -> Result<Spawned<TestProcess>, OsError> {
        use std::os::unix::ffi::OsStrExt;
        let (program, args) = spec.argv.split_first().unwrap();
        let mut command = Command::new(std::ffi::OsStr::from_bytes(program));
        command.args(args.iter().map(|arg| std::ffi::OsStr::from_bytes(arg)));
        let stdio = if let Some(size) = spec.pty {
            use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
            let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
                .map_err(|error| OsError::new("open a terminal", error))?;
            grantpt(&master).unwrap();
            unlockpt(&master).unwrap();
            let name = ptsname(&master, Vec::new()).unwrap();
            let slave = File::options()
                .read(true)
                .write(true)
                .open(name.to_str().unwrap())
                .unwrap();
            rustix::termios::tcsetwinsize(
                &slave,
                rustix::termios::Winsize {
                    ws_row: size.rows,
                    ws_col: size.cols,
                    ws_xpixel: 0,
                    ws_ypixel: 0,
                },
            )
            .unwrap();
            unblock(&master);
            command
                .stdin(slave.try_clone().unwrap())
                .stdout(slave.try_clone().unwrap())
                .stderr(slave);
            // SAFETY: setsid and the ioctl are system calls and touch no memory of the parent.
            unsafe {
                command.pre_exec(|| {
                    rustix::process::setsid()?;
                    rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                    Ok(())
                });
            }
            server::Stdio::Terminal(master)
        } else {
            let (stdin, process_stdin) = pipe(true);
            let (stdout, process_stdout) = pipe(false);
            let (stderr, process_stderr) = pipe(false);
            command
                .stdin(process_stdin)
                .stdout(process_stdout)
                .stderr(process_stderr)
                .process_group(0);
            server::Stdio::Pipes {
                stdin: spec.stdin.then_some(stdin),
                stdout,
                stderr,
            }
        };
        let mut child = command
            .spawn()
            .map_err(|error| OsError::new("start the program", error))?;
        drop(command);
        let pid = child.id();
        self.counts.processes.fetch_add(1, Ordering::SeqCst);
        let counts = Arc::clone(&self.counts);
        let (tell, ended) = watch::channel(None);
        std::thread::spawn(move || {
            let status = child.wait().unwrap();
            counts.processes.fetch_sub(1, Ordering::SeqCst);
            let _ = tell.send(Some(end_of(status)));
        });
        Ok(Spawned {
            pid,
            stdio,
            process: TestProcess {
                group: Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(),
                ended,
            },
        })
    }

    fn stats(&self) -> Result<GuestStats, OsError> {
        Ok(GuestStats::default())
    }
    fn open(&self, path: &str) -> Result<File, OsError> {
        File::open(path).map_err(|error| OsError::new("open the file", error))
    }
    fn create(&self, spec: &FileSpec) -> Result<NewFile, OsError> {
        let path = PathBuf::from(&spec.path);
        let file = File::create(NewFile::temporary(&path))
            .map_err(|error| OsError::new("make the file", error))?;
        Ok(NewFile {
            file,
            path,
            committed: false,
            counts: Arc::clone(&self.counts),
        })
    }
    fn commit(&self, mut file: NewFile) -> Result<(), OsError> {
        std::fs::rename(NewFile::temporary(&file.path), &file.path)
            .map_err(|error| OsError::new("put the file into its place", error))?;
        file.committed = true;
        Ok(())
    }
    fn shutdown(&self) {}
}

struct Lookup {
    info: RunInfo,
    client: Mutex<Option<Client>>,
    cancelled: AtomicBool,
    policy: Mutex<Policy>,
}

#[async_trait]
impl RunLookup for Lookup {
    async fn retire(&self, _: u32) {}

    async fn runs(&self) -> Vec<RunInfo> {
        vec![self.info.clone()]
    }
    fn snapshot(&self) -> Option<crate::status::Status> {
        None
    }
    fn blot(&self, _: RunId, text: String) -> String {
        text.replace("s3cret", "[secret]")
    }
    async fn client(&self, run: RunId) -> Result<Client, Failure> {
        let client = self.client.lock().unwrap().clone();
        match client {
            Some(client) if run == self.info.run_id => Ok(client),
            _ => Err(Failure::new("no such run")),
        }
    }
    async fn cancel(&self, run: RunId) -> Result<(), Failure> {
        if run != self.info.run_id {
            return Err(Failure::new("no such run"));
        }
        self.cancelled.store(true, Ordering::SeqCst);
        Ok(())
    }
    async fn status(&self) -> String {
        "{}".to_owned()
    }
    async fn policy(&self, run: RunId) -> Result<String, Refusal> {
        self.change_policy(run, &[], &[]).await
    }
    async fn change_policy(
        &self,
        run: RunId,
        deny: &[RuleArgument],
        allow: &[RuleArgument],
    ) -> Result<String, Refusal> {
        if run != self.info.run_id {
            return Err(Refusal::new("no such run", "name another"));
        }
        let mut policy = self.policy.lock().unwrap();
        let denied = deny.iter().map(RuleArgument::deny);
        let allowed = allow.iter().map(RuleArgument::allow);
        *policy = policy
            .with_rules_first(denied.chain(allowed).collect())
            .map_err(|error| Refusal::new(error, "name fewer"))?;
        Ok(policy.to_json())
    }
}

/// A home with one live runner that runs one job.
pub(super) struct Daemon {
    pub(super) home: Home,
    guest_dir: tempfile::TempDir,
    lookup: Arc<Lookup>,
    counts: Arc<Counts>,
    lock: Lock,
    tasks: Vec<JoinHandle<()>>,
    _temp: tempfile::TempDir,
}

impl Daemon {
    /// Starts it in the current runtime.
    pub(super) fn start() -> Self {
        let temp = tempfile::tempdir().unwrap();
        // Deeper than a socket's address is long.
        let home = Home::open_or_create(&temp.path().join("d".repeat(120))).unwrap();
        let runner = "demo".parse().unwrap();
        let instance = home.ensure_dir(rel::instances(&runner).join("i1")).unwrap();
        let lock = instance
            .try_lock("lock", LockKind::Exclusive, 0o600)
            .unwrap()
            .unwrap();
        let listener = instance.bind_socket(super::SOCKET, 0o600).unwrap();
        let counts = Arc::new(Counts::default());
        let guest = Arc::new(Guest {
            counts: Arc::clone(&counts),
        });
        let lookup = Arc::new(Lookup {
            info: RunInfo {
                run_id: RunId::random(),
                profile: "vm0/small".parse().unwrap(),
                phase: "running".to_owned(),
                since_unix: 1,
            },
            client: Mutex::new(None),
            cancelled: AtomicBool::new(false),
            policy: Mutex::default(),
        });
        let (near, mut far) = tokio::io::duplex(64 << 10);
        let mut tasks = vec![tokio::spawn(async move {
            server::serve(&mut far, &guest).await;
        })];
        let shared = Arc::clone(&lookup);
        let audit = Self::audit(&home);
        let owner = home.owner().uid;
        tasks.push(tokio::spawn(async move {
            let client = Client::connect(near, Duration::from_secs(10)).await;
            *shared.client.lock().unwrap() = Some(client.unwrap());
            super::server::serve(listener, owner, shared, audit)
                .await
                .unwrap();
        }));
        Self {
            home,
            guest_dir: tempfile::tempdir().unwrap(),
            lookup,
            counts,
            lock,
            tasks,
            _temp: temp,
        }
    }

    /// The audit log of this home.
    pub(super) fn audit(home: &Home) -> Audit {
        home.logs().unwrap();
        let dir = home.dir().try_clone().unwrap();
        let name = "demo".parse().unwrap();
        Audit::new(move || dir.open_dir(rel::LOGS), name, "i1".to_owned())
    }

    pub(super) fn lookup(&self) -> Arc<dyn RunLookup> {
        Arc::clone(&self.lookup) as Arc<_>
    }
    pub(super) fn run(&self) -> RunId {
        self.lookup.info.run_id
    }
    pub(super) fn guest_dir(&self) -> &Path {
        self.guest_dir.path()
    }
    pub(super) fn processes(&self) -> usize {
        self.counts.processes.load(Ordering::SeqCst)
    }
    pub(super) fn dropped_files(&self) -> usize {
        self.counts.dropped_files.load(Ordering::SeqCst)
    }
    pub(super) fn is_cancelled(&self) -> bool {
        self.lookup.cancelled.load(Ordering::SeqCst)
    }

    /// Ends the daemon as its death would: the lock is free, the socket file stays.
    pub(super) fn stop(self) -> StoppedHome {
        for task in &self.tasks {
            task.abort();
        }
        drop(self.lock);
        StoppedHome {
            home: self.home,
            _temp: self._temp,
        }
    }
}

/// The home of a daemon that has ended.
pub(super) struct StoppedHome {
    home: Home,
    _temp: tempfile::TempDir,
}

impl std::ops::Deref for StoppedHome {
    type Target = Home;
    fn deref(&self) -> &Home {
        &self.home
    }
}
