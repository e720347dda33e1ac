//! The daemon's side of the connection: requests with numbers, answers to whoever waits for that number.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown};
use rustix::process::WaitOptions;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};

use super::wire::{self, Op, Reply, Request, Response};
use super::{ForkedLauncher, LauncherError};

type Answer = (Result<Reply, wire::Refusal>, Vec<OwnedFd>);

/// What all clones of the handle share; the launcher ends when the last is dropped.
#[derive(Debug)]
pub(super) struct Connection {
    socket: Arc<AsyncFd<OwnedFd>>,
    waiting: Arc<Waiting>,
    next: AtomicU64,
    gone: watch::Receiver<bool>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// `None` once the launcher is gone: nobody may wait any more.
    requests: Mutex<Option<HashMap<u64, Waiter>>>,
}

#[derive(Debug)]
struct Waiter {
    answer: oneshot::Sender<Answer>,
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, Option<HashMap<u64, Waiter>>> {
        // The map is whole between any two of its operations.
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    pub(super) fn new(forked: ForkedLauncher) -> std::io::Result<Connection> {
        let ForkedLauncher { socket, pidfd, pid } = forked;
        rustix::io::ioctl_fionbio(&socket, true)?;
        // SAFETY: an OwnedFd answers `as_raw_fd` with the same open descriptor as long as it lives.
        let socket = Arc::new(unsafe { AsyncFd::register(socket)? });
        // SAFETY: as above.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE)? };
        let waiting = Arc::new(Waiting {
            requests: Mutex::new(Some(HashMap::new())),
        });
        let (gone_sender, gone) = watch::channel(false);
        let (reader, reader_waiting) = (Arc::clone(&socket), Arc::clone(&waiting));
        tokio::spawn(async move {
            read_answers(&reader, &reader_waiting).await;
            // Whatever ended it: a launcher that nobody hears any more has to end as well, or its VMs run on unowned. One
            // that is gone does not mind.
            let _ = rustix::net::shutdown(reader.as_fd(), Shutdown::Both);
            // Dropping the waiters tells each of them that the launcher is gone.
            reader_waiting.lock().take();
            // Its cleaning is over when it has exited; then nobody finds a zombie of it.
            let _ = pidfd.readable().await;
            let _ = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG);
            gone_sender.send_replace(true);
        });
        Ok(Connection {
            socket,
            waiting,
            next: AtomicU64::new(1),
            gone,
        })
    }

    /// Sends a request with descriptors beside it and waits for its answer.
    pub(super) async fn ask(
        &self,
        op: Op,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), LauncherError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, receiver) = oneshot::channel();
        match self.waiting.lock().as_mut() {
            Some(requests) => requests.insert(id, Waiter { answer }),
            None => return Err(LauncherError::Gone),
        };
        if let Err(error) = self.send(&Request { id, op }, fds).await {
            if let Some(requests) = self.waiting.lock().as_mut() {
                requests.remove(&id);
            }
            return Err(error);
        }
        let (result, fds) = receiver.await.map_err(|_| LauncherError::Gone)?;
        Ok((result?, fds))
    }

    async fn send(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), LauncherError> {
        let cannot = |message: Errno| LauncherError::Step {
            step: "be asked".to_owned(),
            message: message.to_string(),
        };
        let bytes = wire::encode(request).map_err(cannot)?;
        let sent = self
            .socket
            .async_io(Interest::WRITABLE, |socket| {
                wire::send(socket, &bytes, fds).map_err(Into::into)
            })
            .await;
        sent.map_err(|e| match Errno::from_io_error(&e) {
            Some(Errno::PIPE | Errno::CONNRESET) | None => LauncherError::Gone,
            Some(errno) => cannot(errno),
        })
    }

    pub(super) async fn gone(&self) {
        let mut gone = self.gone.clone();
        // An error means that the reading task is gone, and the runtime with it.
        let _ = gone.wait_for(|gone| *gone).await;
    }

    /// Tells the launcher that the daemon is done.
    pub(super) fn close(&self) {
        let _ = rustix::net::shutdown(self.socket.as_fd(), Shutdown::Both);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

/// Hands out answers until the launcher is gone, or says what cannot be received: descriptors, where we have none free.
async fn read_answers(socket: &AsyncFd<OwnedFd>, waiting: &Waiting) {
    let mut buffer = vec![0; wire::MAX_MESSAGE];
    loop {
        let received = socket
            .async_io(Interest::READABLE, |socket| {
                wire::receive::<Response>(socket, &mut buffer, RecvFlags::DONTWAIT)
                    .map_err(Into::into)
            })
            .await;
        let Ok(Some((Response { id, result }, fds))) = received else {
            return;
        };
        let waiter = waiting.lock().as_mut().and_then(|all| all.remove(&id));
        let unheard = match waiter {
            Some(waiter) => waiter.answer.send((result, fds)).err(),
            None => None,
        };
        // Whoever asked for a slot or a network and was cancelled meanwhile cannot give it back: do it for them.
        let undo = match unheard {
            Some((Ok(Reply::Slot(slot)), _)) => Some(Op::Release(slot)),
            Some((Ok(Reply::Network(network)), _)) => Some(Op::DestroyNetwork(network)),
            _ => None,
        };
        if let Some(op) = undo
            && let Ok(bytes) = wire::encode(&Request { id: 0, op })
        {
            let _ = socket
                .async_io(Interest::WRITABLE, |socket| {
                    wire::send(socket, &bytes, &[]).map_err(Into::into)
                })
                .await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::*;

    #[tokio::test]
    async fn a_launcher_that_cannot_be_heard_any_more_ends() {
        let (ours, theirs) = super::super::socket_pair().unwrap();
        // Lives until its socket is closed, as the launcher does.
        let mut child = Command::new("cat")
            .stdin(Stdio::from(theirs.try_clone().unwrap()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = Pid::from_child(&child);
        let forked = ForkedLauncher {
            socket: ours,
            pidfd: pidfd_open(pid, PidfdFlags::empty()).unwrap(),
            pid,
        };
        let connection = Connection::new(forked).unwrap();
        // As with an answer whose descriptors found no room, nothing can be made of it.
        wire::send(&theirs, b"\xff", &[]).unwrap();
        let gone = tokio::time::timeout(Duration::from_secs(10), connection.gone());
        gone.await.expect("the launcher to end");
        let asked = connection.ask(Op::Usage, &[]).await;
        assert!(matches!(asked, Err(LauncherError::Gone)), "{asked:?}");
        // The connection has reaped it, as its own child.
        child.wait().unwrap_err();
    }
}
