//! The host's end.

mod channel;
mod ring;
mod session;
mod transfer;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::oneshot;

use channel::{Answer, Handle, Op, error_of};
use session::SessionShared;
pub use session::{Output, OutputChunk, Session};
use transfer::Transfer;

use crate::link::Link;
use crate::outbox::Outbox;
use crate::types::{CloseReason, ControlError, ExecSpec, FileSpec, GuestStats, MountSource, Wake};
use crate::wire::{self, Failure, MAX_PAYLOAD, MAX_REQUEST, OpId, Reply, Request, ToGuest, WINDOW};

/// How long the guest may take for a short operation. Generous: an emulated guest on a host under full load is slow,
/// and a guest that is gone is noticed at once by the end of its stream.
const REPLY_LIMIT: Duration = Duration::from_secs(60);

/// A handle on one VM's control channel. Clones share the channel; it closes when they and all its sessions are dropped.
#[derive(Clone, Debug)]
pub struct Client {
    handle: Arc<Handle>,
}

impl Client {
    /// Shakes hands over `stream` (random nonce) within `limit` and starts the channel's task on the current runtime.
    pub async fn connect<S>(stream: S, limit: Duration) -> Result<Client, ControlError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut link = Link::new(stream);
        tokio::time::timeout(limit, channel::shake_hands(&mut link))
            .await
            .map_err(|_| ControlError::Timeout {
                operation: "the handshake",
                limit,
            })??;
        Ok(Client {
            handle: Handle::start(link),
        })
    }

    /// Round trip.
    pub async fn ping(&self) -> Result<Duration, ControlError> {
        let (sender, answer) = oneshot::channel();
        let start = Instant::now();
        self.handle.begin(Op::Ping(sender), |op, outbox| {
            outbox.control(wire::encode(&ToGuest::Ping { op }, &[]));
        })?;
        within("a ping", answer).await?;
        Ok(start.elapsed())
    }

    /// Starts a process. Dropping the future before it is done kills what may have been started.
    pub async fn exec(&self, spec: ExecSpec) -> Result<Session, ControlError> {
        const WHAT: &str = "start the process";
        let session = Arc::new(SessionShared::new(spec.stdin || spec.pty.is_some()));
        let parts = Parts::encode(&Request::Exec(spec), WHAT)?;
        let (sender, answer) = oneshot::channel();
        let op = self.handle.begin(
            Op::Session(Some(sender), Arc::clone(&session)),
            |op, outbox| parts.queue(op, outbox),
        )?;
        let guard = AbortGuard::new(&self.handle, op);
        let reply = within(WHAT, answer).await?;
        guard.disarm();
        match reply {
            Ok(Reply::Started { pid }) => {
                Ok(Session::new(pid, op, session, Arc::clone(&self.handle)))
            }
            other => Err(unexpected(WHAT, other)),
        }
    }

    /// Sets clock and entropy without starting anything.
    pub async fn wake(&self, wake: Wake) -> Result<(), ControlError> {
        self.call(&Request::Wake(wake), "set clock and entropy")
            .await
    }

    /// Builds the agent's root on `source`.
    pub async fn mount(&self, source: MountSource) -> Result<(), ControlError> {
        self.call(&Request::Mount(source), "mount the agent's root")
            .await
    }

    /// Kills every agent process and drops the agent's root.
    pub async fn unmount(&self) -> Result<(), ControlError> {
        self.call(&Request::Unmount, "drop the agent's root").await
    }

    /// Kills every process but the control server's own; the root stays (parking).
    pub async fn kill_all(&self) -> Result<(), ControlError> {
        self.call(&Request::KillAll, "kill all processes").await
    }

    /// After it returned both decoders are empty and stay so until the next `connect`: the moment to snapshot.
    /// Fails with `EBUSY` while another operation runs.
    pub async fn quiesce(self) -> Result<(), ControlError> {
        self.call(&Request::Quiesce, "become quiet").await
    }

    /// Asks the guest to sync and power off. Returns when it has agreed; `closed` says when it is gone.
    pub async fn shutdown(&self) -> Result<(), ControlError> {
        self.call(&Request::Shutdown, "shut down").await
    }

    /// Figures about the guest.
    pub async fn stats(&self) -> Result<GuestStats, ControlError> {
        const WHAT: &str = "report its figures";
        match self.request(&Request::Stats, WHAT).await? {
            Ok(Reply::Stats(stats)) => Ok(stats),
            other => Err(unexpected(WHAT, other)),
        }
    }

    /// Streams a regular guest file to `sink`; returns its length.
    pub async fn read_file<W: AsyncWrite + Unpin>(
        &self,
        path: &str,
        mut sink: W,
    ) -> Result<u64, ControlError> {
        const WHAT: &str = "read the file";
        let request = Request::ReadFile {
            path: path.to_owned(),
        };
        let parts = Parts::encode(&request, WHAT)?;
        let transfer = Arc::new(Transfer::download());
        let (op, mut answer) = self.begin_transfer(&transfer, &parts)?;
        let guard = AbortGuard::new(&self.handle, op);
        let mut length = 0u64;
        // Credit goes back in pieces of a quarter window, so that small reads cost no message each.
        let mut owed = 0u32;
        let reply = loop {
            tokio::select! {
                biased;
                Some(piece) = transfer.piece() => {
                    write_piece(&mut sink, &piece).await?;
                    length += piece.len() as u64;
                    owed += u32::try_from(piece.len()).unwrap_or(WINDOW);
                }
                reply = &mut answer => break reply,
            }
            if owed >= WINDOW / 4 {
                transfer.consumed(owed);
                self.handle.push(|outbox| outbox.credit(op, owed))?;
                owed = 0;
            }
        };
        // What arrived between looking for a piece and seeing the answer.
        while let Some(piece) = transfer.take() {
            write_piece(&mut sink, &piece).await?;
            length += piece.len() as u64;
        }
        guard.disarm();
        sink.flush()
            .await
            .map_err(|error| local_io("write what was read", &error))?;
        match reply.map_err(|_| ControlError::Closed)?? {
            Ok(Reply::Length(sent)) if sent == length => Ok(length),
            other => Err(unexpected(WHAT, other)),
        }
    }

    /// Streams `source` to a guest file, which appears whole by rename; returns its length.
    pub async fn write_file<R: AsyncRead + Unpin>(
        &self,
        spec: FileSpec,
        mut source: R,
    ) -> Result<u64, ControlError> {
        const WHAT: &str = "write the file";
        let parts = Parts::encode(&Request::WriteFile(spec), WHAT)?;
        let transfer = Arc::new(Transfer::upload());
        let (op, mut answer) = self.begin_transfer(&transfer, &parts)?;
        let guard = AbortGuard::new(&self.handle, op);
        let mut buffer = BytesMut::with_capacity(MAX_PAYLOAD);
        let reply = 'send: loop {
            buffer.reserve(MAX_PAYLOAD);
            let read = tokio::select! {
                biased;
                // An answer before the end of the data: the guest has refused it.
                reply = &mut answer => break 'send reply,
                read = source.read_buf(&mut buffer) => read,
            };
            if read.map_err(|error| local_io("read what is to be written", &error))? == 0 {
                let end = wire::encode(&ToGuest::End { op }, &[]);
                self.handle.push(|outbox| outbox.ordered(op, end))?;
                // No limit: the guest may be writing a window of data to a slow disk, and its end ends this too.
                break 'send (&mut answer).await;
            }
            while !buffer.is_empty() {
                let wanted = u32::try_from(buffer.len().min(MAX_PAYLOAD)).unwrap_or(WINDOW);
                let room = tokio::select! {
                    biased;
                    reply = &mut answer => break 'send reply,
                    Some(room) = transfer.room(wanted) => room,
                    // The channel has ended; the answer says why.
                    else => break 'send (&mut answer).await,
                };
                let piece = buffer.split_to(room as usize);
                let frame = wire::encode(&ToGuest::Data { op }, &piece);
                self.handle.push(|outbox| outbox.bulk(op, frame))?;
            }
        };
        guard.disarm();
        match reply.map_err(|_| ControlError::Closed)?? {
            Ok(Reply::Length(length)) => Ok(length),
            other => Err(unexpected(WHAT, other)),
        }
    }

    /// Waits until the channel has ended and says why.
    pub async fn closed(&self) -> CloseReason {
        self.handle.closed().await
    }

    /// Begins a file operation; its answer arrives beside its data.
    fn begin_transfer(
        &self,
        transfer: &Arc<Transfer>,
        parts: &Parts,
    ) -> Result<(OpId, oneshot::Receiver<Answer>), ControlError> {
        let (sender, answer) = oneshot::channel();
        let op = self
            .handle
            .begin(Op::Transfer(sender, Arc::clone(transfer)), |op, outbox| {
                parts.queue(op, outbox)
            })?;
        Ok((op, answer))
    }

    async fn call(&self, request: &Request, what: &'static str) -> Result<(), ControlError> {
        match self.request(request, what).await? {
            Ok(Reply::Done) => Ok(()),
            other => Err(unexpected(what, other)),
        }
    }

    async fn request(
        &self,
        request: &Request,
        what: &'static str,
    ) -> Result<Result<Reply, Failure>, ControlError> {
        let parts = Parts::encode(request, what)?;
        let (sender, answer) = oneshot::channel();
        self.handle
            .begin(Op::Call(sender), |op, outbox| parts.queue(op, outbox))?;
        within(what, answer).await
    }
}

/// An encoded request, cut into frames when it is queued.
struct Parts(Vec<u8>);

impl Parts {
    fn encode(request: &Request, what: &'static str) -> Result<Self, ControlError> {
        let bytes = postcard::to_stdvec(request)
            .map_err(|error| ControlError::Protocol(error.to_string()))?;
        if bytes.len() > MAX_REQUEST {
            return Err(ControlError::Guest {
                operation: what,
                errno: Some(rustix::io::Errno::TOOBIG.raw_os_error()),
                message: format!(
                    "arguments and environment take {} bytes, more than the {MAX_REQUEST} a request may have",
                    bytes.len()
                ),
            });
        }
        Ok(Self(bytes))
    }

    fn queue(&self, op: OpId, outbox: &mut Outbox) {
        let mut chunks = self.0.chunks(MAX_PAYLOAD).peekable();
        while let Some(chunk) = chunks.next() {
            let last = chunks.peek().is_none();
            outbox.bulk(op, wire::encode(&ToGuest::Part { op, last }, chunk));
        }
    }
}

/// Abandons an operation in the guest when the future that runs it is dropped half-way.
struct AbortGuard<'a> {
    handle: Option<&'a Handle>,
    op: OpId,
}

impl<'a> AbortGuard<'a> {
    fn new(handle: &'a Handle, op: OpId) -> Self {
        Self {
            handle: Some(handle),
            op,
        }
    }

    fn disarm(mut self) {
        self.handle = None;
    }
}

impl Drop for AbortGuard<'_> {
    fn drop(&mut self) {
        if let Some(handle) = self.handle {
            let frame = wire::encode(&ToGuest::Abort { op: self.op }, &[]);
            // Behind the request itself, which may still be queued. On a closed channel there is nothing to abandon.
            let _ = handle.push(|outbox| outbox.ordered(self.op, frame));
        }
    }
}

/// Waits for an answer, but not for ever.
async fn within<T>(
    operation: &'static str,
    answer: oneshot::Receiver<Result<T, ControlError>>,
) -> Result<T, ControlError> {
    match tokio::time::timeout(REPLY_LIMIT, answer).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => Err(error_of(&CloseReason::Local)),
        Err(_) => Err(ControlError::Timeout {
            operation,
            limit: REPLY_LIMIT,
        }),
    }
}

/// The error for an answer that is not the success that was hoped for.
fn unexpected(operation: &'static str, answer: Result<Reply, Failure>) -> ControlError {
    match answer {
        Err(failure) => ControlError::Guest {
            operation,
            errno: failure.errno,
            // The guest chose these words; they must not move anybody's cursor.
            message: escape_controls(&failure.message),
        },
        Ok(_) => ControlError::Protocol(format!("an answer of the wrong kind to {operation:?}")),
    }
}

fn escape_controls(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let (escaped, plain) = if c.is_control() {
                (Some(c.escape_default()), None)
            } else {
                (None, Some(c))
            };
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}

async fn write_piece<W: AsyncWrite + Unpin>(
    sink: &mut W,
    piece: &[u8],
) -> Result<(), ControlError> {
    sink.write_all(piece)
        .await
        .map_err(|error| local_io("write what was read", &error))
}

/// A failure of the host's own file, on its way to or from the guest.
fn local_io(operation: &'static str, error: &std::io::Error) -> ControlError {
    ControlError::Local {
        operation,
        errno: error.raw_os_error(),
        message: error.to_string(),
    }
}
