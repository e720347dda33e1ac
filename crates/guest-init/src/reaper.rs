//! The one place that waits for processes: PID 1 is the parent of its own children and of every orphan.

use std::collections::HashMap;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use guest_control::ExitStatus;
use guest_control::server::{OsError, watch};
use rustix::io::Errno;
use rustix::process::{WaitOptions, WaitStatus};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

/// Collects ended processes whenever SIGCHLD arrives. The signal stays blocked and is read from a descriptor, so no
/// handler ever runs in a freshly cloned child.
#[derive(Debug)]
pub(crate) struct Reaper {
    signals: AsyncFd<OwnedFd>,
    awaited: Mutex<HashMap<u32, Arc<Exit>>>,
    reaped: Notify,
}

/// How a process ended, once it has.
#[derive(Debug, Default)]
pub(crate) struct Exit {
    status: Mutex<Option<ExitStatus>>,
    known: Notify,
}

impl Exit {
    fn set(&self, status: ExitStatus) {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
        self.known.notify_waiters();
    }

    /// The status if the process has ended and was reaped.
    pub(crate) fn get(&self) -> Option<ExitStatus> {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end.
    pub(crate) async fn wait(&self) -> ExitStatus {
        loop {
            let known = self.known.notified();
            tokio::pin!(known);
            known.as_mut().enable();
            if let Some(status) = self.get() {
                return status;
            }
            known.await;
        }
    }
}

impl Reaper {
    /// Needs the event loop.
    pub(crate) fn new() -> Result<Self, OsError> {
        let failed = |error: io::Error| OsError::new("watching for ended processes", error);
        let signals = child_signals().map_err(failed)?;
        Ok(Self {
            signals: watch(signals, Interest::READABLE).map_err(failed)?,
            awaited: Mutex::new(HashMap::new()),
            reaped: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Arc<Exit>>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a process that was just started; nothing may wait in between.
    pub(crate) fn expect(&self, pid: u32) -> Arc<Exit> {
        let exit = Arc::new(Exit::default());
        self.lock().insert(pid, Arc::clone(&exit));
        exit
    }

    /// Reaps for ever.
    pub(crate) async fn run(&self) {
        loop {
            let Ok(mut ready) = self.signals.readable().await else {
                return;
            };
            let mut buffer = [0; 1024];
            // What was read says nothing that waiting does not say: signals merge. Nor is there ever more than fits, so
            // the next one raises readiness again.
            match rustix::io::read(&self.signals, &mut buffer) {
                Err(Errno::INTR) => {}
                Ok(_) | Err(_) => ready.clear_ready(),
            }
            self.reap();
        }
    }

    /// Collects what has ended; true when no child is left at all.
    pub(crate) fn reap(&self) -> bool {
        let mut collected = false;
        let childless = loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    collected = true;
                    let pid = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or_default();
                    // Orphans are nobody's business.
                    if let Some(exit) = self.lock().remove(&pid) {
                        exit.set(exit_status(status));
                    }
                }
                Err(Errno::INTR) => {}
                Ok(None) => break false,
                Err(_) => break true,
            }
        };
        if collected {
            self.reaped.notify_waiters();
        }
        childless
    }

    /// Waits until `done`, which is asked again whenever processes have ended.
    pub(crate) async fn until(&self, mut done: impl FnMut() -> bool) {
        loop {
            let reaped = self.reaped.notified();
            tokio::pin!(reaped);
            reaped.as_mut().enable();
            if done() {
                return;
            }
            reaped.await;
        }
    }
}

fn exit_status(status: WaitStatus) -> ExitStatus {
    match status.terminating_signal() {
        Some(signal) => ExitStatus::Signaled(signal),
        None => ExitStatus::Exited(status.exit_status().unwrap_or_default()),
    }
}

/// Blocks SIGCHLD and returns the descriptor it is read from.
fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero signal set is a valid value, and the calls below only fill and read it.
    let fd = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above returned this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
