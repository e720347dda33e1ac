//! Signals that ask the agent to end, as something `poll` can wait for.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::event::{EventfdFlags, eventfd};

/// Signals forwarded to the CLI.
const FORWARDED: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// The last signal received, 0 for none.
static RECEIVED: AtomicI32 = AtomicI32::new(0);

/// Where the handler says that there is one.
static WAKE: AtomicI32 = AtomicI32::new(-1);

/// Catches the signals for the rest of the process's life. The returned descriptor is readable once one came;
/// it must be kept. A caught signal, unlike a blocked or ignored one, is back to its default in the CLI.
pub(crate) fn catch() -> io::Result<OwnedFd> {
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    WAKE.store(wake.as_raw_fd(), Ordering::SeqCst);
    for signal in FORWARDED {
        // SAFETY: the handler only uses atomics and write(2), both allowed in a signal handler; a zeroed
        // sigaction is a valid one (no flags, empty mask).
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as extern "C" fn(i32) as libc::sighandler_t;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(wake)
}

/// Where the handler says that a checkpoint is wanted.
static CHECKPOINT: AtomicI32 = AtomicI32::new(-1);

/// Catches SIGUSR1 for the rest of the process's life. The returned descriptor can be read once for all that came
/// since the last time, and waits for the next; it must be kept.
pub(crate) fn catch_checkpoint() -> io::Result<OwnedFd> {
    let wanted = eventfd(0, EventfdFlags::CLOEXEC)?;
    CHECKPOINT.store(wanted.as_raw_fd(), Ordering::SeqCst);
    // SAFETY: as for `catch`: the handler only loads an atomic and calls write(2).
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = checkpoint_handler as extern "C" fn(i32) as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut())
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(wanted)
}

extern "C" fn checkpoint_handler(_signal: i32) {
    let one: u64 = 1;
    // SAFETY: writes eight bytes of a live local to the event descriptor, which is kept.
    unsafe {
        libc::write(
            CHECKPOINT.load(Ordering::SeqCst),
            (&raw const one).cast(),
            8,
        )
    };
}

/// The signal that came, if one did.
pub(crate) fn received() -> Option<i32> {
    let signal = RECEIVED.load(Ordering::SeqCst);
    (signal != 0).then_some(signal)
}

extern "C" fn handler(signal: i32) {
    RECEIVED.store(signal, Ordering::SeqCst);
    let one: u64 = 1;
    // SAFETY: writes eight bytes of a live local to the event descriptor; a failure can only mean that it is
    // already readable.
    unsafe { libc::write(WAKE.load(Ordering::SeqCst), (&raw const one).cast(), 8) };
}
