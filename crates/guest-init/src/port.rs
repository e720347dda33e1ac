//! The transport: a virtio-serial port, found by its name.
//!
//! While no host is connected, reads return 0 and polls say "hung up"; a change raises one edge-triggered event. The
//! event loop remembers a hang-up for as long as a descriptor is registered, so it is registered anew whenever the host
//! has come back.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use guest_control::server::watch;
use rustix::event::{PollFd, PollFlags, Timespec, epoll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, Interest, ReadBuf};

/// How often the port is looked for while the driver announces it.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// How long at most.
const LOOK_LIMIT: Duration = Duration::from_secs(30);

/// The open port.
#[derive(Debug)]
pub(crate) struct Port {
    fd: OwnedFd,
    /// A second descriptor of the same open file, in the event loop while a host is there.
    watched: Option<AsyncFd<OwnedFd>>,
}

impl Port {
    /// Waits for the port called `name` and opens it.
    pub(crate) async fn open(name: &str) -> io::Result<Self> {
        let find = async {
            loop {
                match find(name) {
                    Some(device) => return device,
                    None => tokio::time::sleep(LOOK_AGAIN).await,
                }
            }
        };
        let device = tokio::time::timeout(LOOK_LIMIT, find)
            .await
            .map_err(|_| io::Error::from(Errno::NODEV))?;
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let fd = rustix::fs::open(device, flags, Mode::empty())?;
        Ok(Self { fd, watched: None })
    }

    /// Waits until a host is connected.
    pub(crate) async fn wait_for_host(&mut self) -> io::Result<()> {
        if self.watched.is_some() && !self.hung_up()? {
            return Ok(());
        }
        self.watched = None;
        if self.hung_up()? {
            self.wait_for_event().await?;
        }
        self.register()
    }

    /// Waits for the end of the hang-up in an epoll of its own, whose own descriptor never hangs up.
    async fn wait_for_event(&self) -> io::Result<()> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let interest = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&events, &self.fd, epoll::EventData::new_u64(0), interest)?;
        let events = watch(events, Interest::READABLE)?;
        while self.hung_up()? {
            let mut ready = events.readable().await?;
            let mut buffer = [epoll::Event {
                flags: epoll::EventFlags::empty(),
                data: epoll::EventData::new_u64(0),
            }];
            let at_once = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            epoll::wait(events.get_ref(), buffer.as_mut_slice(), Some(&at_once))?;
            ready.clear_ready();
        }
        Ok(())
    }

    /// Drops bytes until the host disconnects.
    pub(crate) async fn discard_until_host_goes(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; 4096];
        while self.read(&mut buffer).await? > 0 {}
        Ok(())
    }

    fn hung_up(&self) -> io::Result<bool> {
        let mut polled = [PollFd::new(&self.fd, PollFlags::IN)];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        rustix::event::poll(&mut polled, Some(&at_once))?;
        let [polled] = polled;
        Ok(polled.revents().contains(PollFlags::HUP))
    }

    fn register(&mut self) -> io::Result<()> {
        // The old registration goes first: both are of the same open file.
        self.watched = None;
        let copy = rustix::io::fcntl_dupfd_cloexec(&self.fd, 3)?;
        self.watched = Some(watch(copy, Interest::READABLE | Interest::WRITABLE)?);
        Ok(())
    }

    /// Retries `io` until it does not block any more; `None` when the host has gone.
    fn poll_io(
        &mut self,
        cx: &mut Context<'_>,
        interest: Interest,
        mut io: impl FnMut(&OwnedFd) -> Result<usize, Errno>,
    ) -> Poll<io::Result<Option<usize>>> {
        loop {
            let Some(watched) = &self.watched else {
                return Poll::Ready(Ok(None));
            };
            let mut guard = ready!(if interest.is_readable() {
                watched.poll_read_ready(cx)
            } else {
                watched.poll_write_ready(cx)
            })?;
            match io(&self.fd) {
                Ok(count) => return Poll::Ready(Ok(Some(count))),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let remembered = guard.ready();
                    guard.clear_ready();
                    if remembered.is_read_closed() || remembered.is_write_closed() {
                        // A hang-up that is over, or is not.
                        if self.hung_up()? {
                            return Poll::Ready(Ok(None));
                        }
                        self.register()?;
                    }
                }
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl AsyncRead for Port {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // SAFETY: nothing in it is made uninitialised: only the kernel writes to it.
        let unfilled = unsafe { buffer.unfilled_mut() };
        let count = ready!(self.poll_io(cx, Interest::READABLE, |fd| {
            let (filled, _) = rustix::io::read(fd, &mut *unfilled)?;
            Ok(filled.len())
        }))?
        .unwrap_or(0);
        // SAFETY: the kernel has written so many bytes at the beginning of it.
        unsafe { buffer.assume_init(count) };
        buffer.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Port {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(self.poll_io(cx, Interest::WRITABLE, |fd| rustix::io::write(fd, data)))?;
        Poll::Ready(count.ok_or_else(|| Errno::PIPE.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The device of the port called `name`.
fn find(name: &str) -> Option<PathBuf> {
    fs::read_dir("/sys/class/virtio-ports")
        .ok()?
        .flatten()
        .find(|entry| {
            fs::read_to_string(entry.path().join("name")).is_ok_and(|found| found.trim() == name)
        })
        .map(|entry| PathBuf::from("/dev").join(entry.file_name()))
        .filter(|device| device.exists())
}
