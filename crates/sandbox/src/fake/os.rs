//! The operating system of a fake guest: files in memory, processes the test plays.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use guest_control::server::{Os, OsError, Process, Spawned, Stdio};
use guest_control::{ExecSpec, ExitReport, ExitStatus, FileSpec, GuestStats, MountSource, Wake};
use tokio::sync::watch;

use super::Program;
use super::guest::{FakeEvent, Log, lock};

pub(super) struct FakeOs {
    program: Program,
    log: Log,
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    running: Mutex<Vec<FakeProcess>>,
}

impl FakeOs {
    pub(super) fn new(program: Program, log: Log) -> FakeOs {
        FakeOs {
            program,
            log,
            files: Mutex::default(),
            running: Mutex::default(),
        }
    }

    fn kill_running(&self) {
        for process in lock(&self.running).drain(..) {
            process.kill();
        }
    }
}

/// A "process" in the hands of the test. Dropping it unfinished is its death by SIGKILL.
pub struct FakeExec {
    /// What was asked for.
    pub spec: ExecSpec,
    process: FakeProcess,
    stdout: Option<File>,
    stderr: Option<File>,
    stdin: Option<OwnedFd>,
}

impl FakeExec {
    /// Prints to its standard output; at most a pipe's worth (64 KiB) may be unread by the host.
    pub fn print(&mut self, text: &str) {
        if let Some(stdout) = &mut self.stdout {
            let _ = stdout.write_all(text.as_bytes());
        }
    }

    /// Prints to its standard error.
    pub fn print_error(&mut self, text: &str) {
        if let Some(stderr) = &mut self.stderr {
            let _ = stderr.write_all(text.as_bytes());
        }
    }

    /// The read end of its standard input (non-blocking), if the host sends any.
    pub fn take_stdin(&mut self) -> Option<OwnedFd> {
        self.stdin.take()
    }

    /// It exits.
    pub fn exit(self, code: i32) {
        self.finish(ExitReport {
            status: ExitStatus::Exited(code),
            oom_kills: 0,
            pids_limit_hits: 0,
            disk_free_bytes: 1 << 30,
        });
    }

    /// It ends with this report.
    pub fn finish(mut self, report: ExitReport) {
        // The pipes close before the end is known, as a kernel does it.
        self.stdout = None;
        self.stderr = None;
        self.process.end(report);
    }

    /// Resolves when the host has killed it or sent it a signal; says which signal.
    pub async fn signalled(&self) -> i32 {
        let mut signals = self.process.signals.subscribe();
        match signals.wait_for(Option::is_some).await {
            Ok(signal) => signal.unwrap_or(SIGKILL),
            Err(_) => SIGKILL,
        }
    }
}

impl Drop for FakeExec {
    fn drop(&mut self) {
        self.stdout = None;
        self.stderr = None;
        self.process.end(killed());
    }
}

const SIGKILL: i32 = 9;

fn killed() -> ExitReport {
    ExitReport {
        status: ExitStatus::Signaled(SIGKILL),
        oom_kills: 0,
        pids_limit_hits: 0,
        disk_free_bytes: 0,
    }
}

/// The server's handle on the same.
#[derive(Clone)]
pub(super) struct FakeProcess {
    report: Arc<watch::Sender<Option<ExitReport>>>,
    signals: Arc<watch::Sender<Option<i32>>>,
}

impl FakeProcess {
    fn end(&self, report: ExitReport) {
        self.report.send_if_modified(|seen| {
            let first = seen.is_none();
            if first {
                *seen = Some(report);
            }
            first
        });
    }
}

impl Process for FakeProcess {
    fn signal(&self, signal: i32) -> Result<(), OsError> {
        self.signals.send_replace(Some(signal));
        if signal == SIGKILL {
            self.end(killed());
        }
        Ok(())
    }

    fn kill(&self) {
        self.signals.send_replace(Some(SIGKILL));
        self.end(killed());
    }

    async fn wait(&self) -> ExitStatus {
        let mut report = self.report.subscribe();
        match report.wait_for(Option::is_some).await {
            Ok(report) => report
                .as_ref()
                .map_or(killed().status, |report| report.status),
            Err(_) => killed().status,
        }
    }

    fn report(&self, status: ExitStatus) -> ExitReport {
        let report = self.report.borrow().clone().unwrap_or_else(killed);
        ExitReport { status, ..report }
    }

    async fn kill_rest(&self) {}
}

/// A file being written.
pub(super) struct NewFile {
    path: String,
    data: Vec<u8>,
}

impl Write for NewFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.data.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Os for FakeOs {
    type Process = FakeProcess;
    type NewFile = NewFile;

    fn wake(&self, _: &Wake) -> Result<(), OsError> {
        self.log.add(FakeEvent::Woken);
        Ok(())
    }

    fn mount(&self, source: MountSource) -> Result<(), OsError> {
        self.log.add(FakeEvent::Mounted(source));
        Ok(())
    }

    async fn unmount(&self) -> Result<(), OsError> {
        self.kill_running();
        self.log.add(FakeEvent::Unmounted);
        Ok(())
    }

    async fn kill_all(&self) -> Result<(), OsError> {
        self.kill_running();
        self.log.add(FakeEvent::KilledAll);
        Ok(())
    }

    fn spawn(&self, spec: &ExecSpec) -> Result<Spawned<FakeProcess>, OsError> {
        let process = FakeProcess {
            report: Arc::new(watch::Sender::new(None)),
            signals: Arc::new(watch::Sender::new(None)),
        };
        let (stdout_read, stdout) = pipe()?;
        let (stderr_read, stderr) = pipe()?;
        let (stdin, stdin_write) = if spec.stdin {
            let (read, write) = pipe()?;
            (Some(read), Some(write))
        } else {
            (None, None)
        };
        let program = spec.argv.first().cloned().unwrap_or_default();
        self.log.add(FakeEvent::Started(
            String::from_utf8_lossy(&program).into_owned(),
        ));
        lock(&self.running).push(process.clone());
        (self.program)(FakeExec {
            spec: spec.clone(),
            process: process.clone(),
            stdout: Some(File::from(stdout)),
            stderr: Some(File::from(stderr)),
            stdin,
        });
        Ok(Spawned {
            pid: 100,
            stdio: Stdio::Pipes {
                stdin: stdin_write,
                stdout: stdout_read,
                stderr: stderr_read,
            },
            process,
        })
    }

    fn stats(&self) -> Result<GuestStats, OsError> {
        Ok(GuestStats::default())
    }

    fn open(&self, path: &str) -> Result<File, OsError> {
        let files = lock(&self.files);
        let data = files
            .get(path)
            .ok_or_else(|| OsError::new(path, io::ErrorKind::NotFound))?;
        let (read, write) = pipe()?;
        File::from(write)
            .write_all(data)
            .map_err(|error| OsError::new(path, error))?;
        Ok(File::from(read))
    }

    fn create(&self, spec: &FileSpec) -> Result<NewFile, OsError> {
        Ok(NewFile {
            path: spec.path.clone(),
            data: Vec::new(),
        })
    }

    fn commit(&self, file: NewFile) -> Result<(), OsError> {
        lock(&self.files).insert(file.path, file.data);
        Ok(())
    }

    fn shutdown(&self) {}
}

fn pipe() -> Result<(OwnedFd, OwnedFd), OsError> {
    use rustix::pipe::PipeFlags;
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
        .map_err(|error| OsError::new("make a pipe", error))
}
