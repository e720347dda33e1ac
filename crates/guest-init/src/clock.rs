//! What a guest needs after it was restored or resumed: the time, and entropy its siblings do not have.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use guest_control::Wake;
use guest_control::server::OsError;
use rustix::fs::{Mode, OFlags};
use rustix::time::{ClockId, Timespec};

/// `_IOW('R', 0x03, int[2])`, linux/random.h: adds bytes and credits them.
const RNDADDENTROPY: u64 = 0x4008_5203;
/// `_IO('R', 0x07)`, linux/random.h: makes the generator use them now instead of within a minute.
const RNDRESEEDCRNG: u64 = 0x5207;

/// The kernel's random generator, held open.
#[derive(Debug)]
pub(crate) struct Clock {
    random: OwnedFd,
}

/// `struct rand_pool_info` with its bytes behind it.
#[repr(C)]
struct PoolInfo {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    data: [u8; 32],
}

impl Clock {
    pub(crate) fn new() -> Result<Self, OsError> {
        let random = rustix::fs::open(
            "/dev/urandom",
            OFlags::RDWR | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|error| OsError::new("opening /dev/urandom", error))?;
        Ok(Self { random })
    }

    /// Sets both. Whoever gets an error must not start anything.
    pub(crate) fn wake(&self, wake: &Wake) -> Result<(), OsError> {
        self.reseed(&wake.entropy)
            .map_err(|error| OsError::new("reseeding the random generator", error))?;
        let time = Timespec {
            tv_sec: i64::try_from(wake.realtime_ns / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(wake.realtime_ns % 1_000_000_000).unwrap_or_default(),
        };
        rustix::time::clock_settime(ClockId::Realtime, time)
            .map_err(|error| OsError::new("setting the clock", error))
    }

    fn reseed(&self, entropy: &[u8; 32]) -> io::Result<()> {
        let info = PoolInfo {
            entropy_bits: 256,
            bytes: 32,
            data: *entropy,
        };
        let fd = self.random.as_raw_fd();
        // SAFETY: the descriptor is open and the kernel reads a header and `bytes` bytes behind it, all of `info`.
        let added = unsafe { libc::ioctl(fd, RNDADDENTROPY as _, &raw const info) };
        if added < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is open; this request takes no argument.
        let reseeded = unsafe { libc::ioctl(fd, RNDRESEEDCRNG as _, 0) };
        if reseeded < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}
