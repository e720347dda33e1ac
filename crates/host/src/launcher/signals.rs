//! The launcher's signals: SIGCHLD as something to poll, all that is meant for the daemon ignored.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Signals that a terminal, a service manager or a person sends to the whole group: the daemon decides what they
/// mean, and the launcher ends when the daemon does.
pub(super) const IGNORED_SIGNALS: [libc::c_int; 7] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGPIPE,
];

/// Ignores what is not for us and turns SIGCHLD into something to poll.
pub(super) fn take_signals() -> io::Result<OwnedFd> {
    for signal in IGNORED_SIGNALS {
        // SAFETY: SIG_IGN is a valid disposition for these signals.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: sigset_t is plain data, initialised by sigemptyset before it is read; signalfd gives a new descriptor
    // that nobody else owns.
    unsafe {
        // The process we were forked from may have ignored it, which would reap children behind our back.
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        if libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}
