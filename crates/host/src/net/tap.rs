//! The device whose other end is the VM's network card.
//!
//! It lives as long as a descriptor of it is open. The launcher keeps one, so that it outlasts the VMs that use it one
//! after another, and needs no name on disk and no persistence flag that a killed launcher would leave set.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Its name, the same in every VM's namespace.
pub(crate) const NAME: &str = "tap0";
/// The kernel queues 500 packets for whoever reads a tap; one more read finds it empty.
const QUEUE: usize = 512;

/// Makes `tap0` in the calling thread's namespace. Packets carry the header of virtio-net, which lets guest and kernel
/// leave checksums and segmentation to one another.
pub(crate) fn open() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let tap = rustix::fs::open("/dev/net/tun", flags, Mode::empty())
        .map_err(|e| io::Error::new(io::Error::from(e).kind(), format!("/dev/net/tun: {e}")))?;
    // SAFETY: an all-zero `ifreq` is a valid value of this plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
        *to = libc::c_char::try_from(from).unwrap_or_default();
    }
    let kind = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(kind).unwrap_or_default();
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one `ifreq`, which outlives the call.
    let made = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tap)
}

/// Leaves the device without a descriptor, to be opened by name by processes of `uid`, which may have no privilege. It is
/// still gone with its namespace.
pub(crate) fn leave_to(tap: OwnedFd, uid: u32) -> io::Result<()> {
    set(&tap, libc::TUNSETOWNER as _, uid.into())?;
    set(&tap, libc::TUNSETPERSIST as _, 1)
}

/// Takes back the device that was left to somebody who has closed it: it lives as long as the descriptor again.
pub(crate) fn take_back() -> io::Result<OwnedFd> {
    let tap = open()?;
    set(&tap, libc::TUNSETPERSIST as _, 0)?;
    Ok(tap)
}

fn set(tap: &OwnedFd, what: libc::c_ulong, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the descriptor is an open tap, and these requests take their argument by value.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), what as _, value) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Throws away what is queued for a VM that is gone.
pub(crate) fn drain(tap: impl AsFd) -> io::Result<()> {
    // The flag belongs to the open file, which the last VM's process may have changed.
    let flags = rustix::fs::fcntl_getfl(tap.as_fd())? | OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(tap.as_fd(), flags)?;
    let mut packet = [0_u8; 2048];
    for _ in 0..QUEUE {
        match rustix::io::read(tap.as_fd(), &mut packet) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
    Err(io::Error::other("packets for the last VM keep coming"))
}
