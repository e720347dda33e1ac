//! Errands: work that would keep the launcher from answering, done by a child of it that sends back what it made.
//!
//! A child has the launcher's memory as it was at the fork, may move between namespaces, and dies with the launcher.
//! One that takes too long is killed.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::RecvFlags;
use rustix::process::{PidfdFlags, Signal, WaitOptions};

use crate::launcher::fork::{self, Forked};
use crate::launcher::{socket_pair, wire};

/// How often running errands are looked at, beside every answer.
pub(super) const LOOK: Duration = Duration::from_millis(100);
/// How long one may take: a thousand times what it does on an idle host.
const LIMIT: Duration = Duration::from_secs(10);

/// What an errand brings back: a number, if there is one to tell, and descriptors.
pub(super) type Brought = Result<(u16, Vec<OwnedFd>), String>;

/// A child at work.
#[derive(Debug)]
pub(super) struct Errand {
    socket: OwnedFd,
    pidfd: OwnedFd,
    deadline: Instant,
}

impl Errand {
    /// Starts it. The child is reaped with all others.
    pub(super) fn start(work: impl FnOnce() -> Brought) -> io::Result<Errand> {
        let (ours, theirs) = socket_pair()?;
        let launcher = rustix::process::getpid();
        // SAFETY: the launcher is single-threaded, so the child may do what any process may; it ends in `_exit` below.
        let pid = match unsafe { fork::fork(None) }? {
            Forked::Child { .. } => {
                drop(ours);
                let dies_with_us =
                    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).is_ok()
                        && rustix::process::getppid() == Some(launcher);
                let brought = if dies_with_us {
                    work()
                } else {
                    Err("the launcher is gone".to_owned())
                };
                // SAFETY: ends the process without running anything of the launcher's.
                unsafe { libc::_exit(i32::from(report(&theirs, brought).is_err())) }
            }
            Forked::Parent(pid) => pid,
        };
        // Cannot be somebody else's number: a child stays until we reap it.
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(e) => {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
                let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
                return Err(e.into());
            }
        };
        Ok(Errand {
            socket: ours,
            pidfd,
            deadline: Instant::now() + LIMIT,
        })
    }

    /// Becomes readable when there is something to ask for.
    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// What it brought, once it has.
    pub(super) fn poll(&self, buffer: &mut [u8]) -> Option<Brought> {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        let ready = rustix::event::poll(&mut fds, Some(&Timespec::default()));
        if !matches!(ready, Ok(ready) if ready > 0) {
            if Instant::now() < self.deadline {
                return None;
            }
            self.kill();
            return Some(Err(format!(
                "it was not done within {} seconds",
                LIMIT.as_secs()
            )));
        }
        let received =
            wire::receive::<Result<u16, String>>(&self.socket, buffer, RecvFlags::DONTWAIT);
        Some(match received {
            Ok(Some((result, fds))) => result.map(|number| (number, fds)),
            Ok(None) => Err("the process that was to do it died".to_owned()),
            Err(e) => Err(e.to_string()),
        })
    }

    /// Ends it wherever it is.
    pub(super) fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

fn report(socket: &OwnedFd, brought: Brought) -> rustix::io::Result<()> {
    let (answer, fds) = match brought {
        Ok((number, fds)) => (Ok(number), fds),
        Err(message) => (Err(message), Vec::new()),
    };
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let bytes = wire::encode::<Result<u16, String>>(&answer)?;
    wire::send(socket, &bytes, &fds)
}
