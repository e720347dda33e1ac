//! The transport of machines without a virtio-serial port: connections of the host to a vsock port.
//!
//! A restored guest's old connections are reset and the listening socket stays, so each clone's host simply connects.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use guest_control::VSOCK_PORT;
use guest_control::server::watch;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use crate::kmsg;

/// Connections that may wait while one is served: the host makes one at a time.
const BACKLOG: libc::c_int = 4;

/// Listens for the host.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: AsyncFd<OwnedFd>,
}

/// A connection of the host's.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: AsyncFd<OwnedFd>,
}

impl Listener {
    /// Binds the port.
    pub(crate) fn open() -> io::Result<Self> {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: takes no pointers.
        let socket = owned(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) })?;
        let mut address = address();
        address.svm_port = VSOCK_PORT;
        address.svm_cid = libc::VMADDR_CID_ANY;
        // SAFETY: the descriptor is open, and the kernel reads one `sockaddr_vm`, which outlives the call.
        checked(unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of_address(),
            )
        })?;
        // SAFETY: the descriptor is open; takes no pointers.
        checked(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) })?;
        Ok(Self {
            socket: watch(socket, Interest::READABLE)?,
        })
    }

    /// Waits for the host's next connection. Those of processes of this guest, which a kernel with a vsock loopback
    /// would let through, are closed.
    pub(crate) async fn accept(&self) -> io::Result<Stream> {
        loop {
            let mut ready = self.socket.readable().await?;
            let mut peer = address();
            let mut length = size_of_address();
            let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            let listening = self.socket.get_ref().as_raw_fd();
            // SAFETY: the descriptor is open; the kernel writes at most `length` bytes to `peer`, and both outlive the call.
            let accepted = owned(unsafe {
                libc::accept4(listening, (&raw mut peer).cast(), &raw mut length, flags)
            });
            match accepted {
                Ok(socket) if peer.svm_cid == libc::VMADDR_CID_HOST => {
                    let both = Interest::READABLE | Interest::WRITABLE;
                    return Ok(Stream {
                        socket: watch(socket, both)?,
                    });
                }
                Ok(_) => kmsg::log(&format!(
                    "refused a control connection of CID {}, which is not the host",
                    peer.svm_cid
                )),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                // The connection was reset before it was accepted, as at a restore.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted
                            | io::ErrorKind::ConnectionAborted
                            | io::ErrorKind::ConnectionReset
                    ) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.socket.poll_read_ready(cx))?;
            // SAFETY: nothing in it is made uninitialised: only the kernel writes to it.
            let unfilled = unsafe { buffer.unfilled_mut() };
            match rustix::io::read(guard.get_inner(), unfilled) {
                Ok((filled, _)) => {
                    let count = filled.len();
                    // SAFETY: the kernel has written so many bytes at the beginning of it.
                    unsafe { buffer.assume_init(count) };
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.socket.poll_write_ready(cx))?;
            let flags = rustix::net::SendFlags::NOSIGNAL;
            match rustix::net::send(guard.get_inner(), data, flags) {
                Ok(count) => return Poll::Ready(Ok(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn address() -> libc::sockaddr_vm {
    // SAFETY: an all-zero `sockaddr_vm` is a valid value of this plain C structure.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default();
    address
}

fn size_of_address() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).unwrap_or_default()
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn owned(result: libc::c_int) -> io::Result<OwnedFd> {
    let fd = checked(result)?;
    // SAFETY: the call before returned a new descriptor, which nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
