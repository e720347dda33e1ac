//! The channel's shared state and the one task that reads and writes the stream.
//!
//! Callers put frames into the outbox and wake the task; the task hands what arrives to the operation it names. Bytes
//! from the guest are untrusted: an unknown operation, data beyond credit or an answer of the wrong kind ends the
//! channel, and what an operation may hold is bounded by its window.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, oneshot};

use super::session::SessionShared;
use super::transfer::Transfer;
use crate::link::{Link, LinkError};
use crate::outbox::Outbox;
use crate::types::{CloseReason, ControlError};
use crate::wire::{self, Failure, OpId, Reply, ToGuest, ToHost};

/// Frames taken before it is the writer's turn: a guest that never stops sending does not keep us from answering.
const READ_TURN: u32 = 64;

/// The answer to a request, still without the operation's name.
pub(super) type Answer = Result<Result<Reply, Failure>, ControlError>;

/// An operation that is under way.
#[derive(Debug)]
pub(super) enum Op {
    /// Waits for one answer.
    Call(oneshot::Sender<Answer>),
    /// Waits for a ping's answer.
    Ping(oneshot::Sender<Result<(), ControlError>>),
    /// A process that is starting (the sender is there) or runs.
    Session(Option<oneshot::Sender<Answer>>, Arc<SessionShared>),
    /// A file on its way in either direction.
    Transfer(oneshot::Sender<Answer>, Arc<Transfer>),
}

#[derive(Debug, Default)]
struct State {
    outbox: Outbox,
    ops: HashMap<OpId, Op>,
    last_op: OpId,
    /// Every handle is gone.
    abandoned: bool,
    closed: Option<CloseReason>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    task: AtomicWaker,
    ended: Notify,
}

/// Keeps the channel open. The last one dropped closes it.
#[derive(Debug)]
pub(super) struct Handle {
    shared: Arc<Shared>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handle {
    /// Starts the channel's task on a stream whose handshake is done.
    pub(super) fn start<S>(link: Link<S>) -> Arc<Self>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let shared = Arc::new(Shared::default());
        tokio::spawn(run(link, Arc::clone(&shared)));
        Arc::new(Self { shared })
    }

    /// Registers an operation and queues its first frames.
    pub(super) fn begin(
        &self,
        op: Op,
        frames: impl FnOnce(OpId, &mut Outbox),
    ) -> Result<OpId, ControlError> {
        let mut state = self.shared.lock();
        if let Some(reason) = &state.closed {
            return Err(error_of(reason));
        }
        // Ids wrap after four thousand million operations; one that old and still running keeps its own.
        let mut id = state.last_op.wrapping_add(1);
        while state.ops.contains_key(&id) {
            id = id.wrapping_add(1);
        }
        state.last_op = id;
        state.ops.insert(id, op);
        frames(id, &mut state.outbox);
        drop(state);
        self.shared.task.wake();
        Ok(id)
    }

    /// Queues frames of a running operation.
    pub(super) fn push(&self, frames: impl FnOnce(&mut Outbox)) -> Result<(), ControlError> {
        let mut state = self.shared.lock();
        if let Some(reason) = &state.closed {
            return Err(error_of(reason));
        }
        frames(&mut state.outbox);
        drop(state);
        self.shared.task.wake();
        Ok(())
    }

    /// Waits for the channel's end.
    pub(super) async fn closed(&self) -> CloseReason {
        loop {
            let ended = self.shared.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if let Some(reason) = &self.shared.lock().closed {
                return reason.clone();
            }
            ended.await;
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.lock().abandoned = true;
        self.shared.task.wake();
    }
}

/// The error pending operations get when the channel ends for `reason`.
pub(super) fn error_of(reason: &CloseReason) -> ControlError {
    match reason {
        CloseReason::Local | CloseReason::GuestGone => ControlError::Closed,
        CloseReason::Protocol(what) => ControlError::Protocol(what.clone()),
    }
}

impl From<LinkError> for CloseReason {
    fn from(error: LinkError) -> Self {
        match error {
            LinkError::Gone => CloseReason::GuestGone,
            LinkError::Wire(error) => CloseReason::Protocol(error.to_string()),
        }
    }
}

/// Reads and writes until the channel ends, then fails what is pending.
async fn run<S: AsyncRead + AsyncWrite + Unpin>(mut link: Link<S>, shared: Arc<Shared>) {
    let reason = std::future::poll_fn(|cx| poll(&mut link, &shared, cx)).await;
    drop(link);
    let error = error_of(&reason);
    tracing::debug!(?reason, "control channel ended");
    let mut state = shared.lock();
    state.closed = Some(reason);
    let ops = std::mem::take(&mut state.ops);
    state.outbox = Outbox::default();
    drop(state);
    for op in ops.into_values() {
        op.fail(error.clone());
    }
    shared.ended.notify_waiters();
}

fn poll<S: AsyncRead + AsyncWrite + Unpin>(
    link: &mut Link<S>,
    shared: &Shared,
    cx: &mut Context<'_>,
) -> Poll<CloseReason> {
    shared.task.register(cx.waker());
    for frames in 0.. {
        if frames == READ_TURN {
            cx.waker().wake_by_ref();
            break;
        }
        match link.poll_recv(cx) {
            Poll::Pending => break,
            Poll::Ready(Err(error)) => return Poll::Ready(error.into()),
            Poll::Ready(Ok(frame)) => {
                if let Err(what) = receive(shared, &frame) {
                    return Poll::Ready(CloseReason::Protocol(what));
                }
            }
        }
    }
    let next = || {
        shared
            .lock()
            .outbox
            .next(|op, bytes| wire::encode(&ToGuest::Credit { op, bytes }, &[]))
    };
    match link.poll_send(cx, next) {
        Poll::Ready(Err(error)) => Poll::Ready(error.into()),
        // What is queued may still be on its way (a kill, say): an abandoned channel closes once it is sent.
        Poll::Ready(Ok(())) if shared.lock().abandoned => Poll::Ready(CloseReason::Local),
        Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
    }
}

/// Handles one frame; the error says how the guest broke the protocol.
fn receive(shared: &Shared, frame: &[u8]) -> Result<(), String> {
    let (message, payload) = wire::decode_to_host(frame).map_err(|error| error.to_string())?;
    match message {
        ToHost::Hello { .. } => Err("a second handshake".to_owned()),
        ToHost::Pong { op } => match shared.lock().ops.remove(&op) {
            Some(Op::Ping(answer)) => {
                // Whoever pinged may have stopped waiting.
                let _ = answer.send(Ok(()));
                Ok(())
            }
            _ => Err(format!("an answer to a ping that was not sent ({op})")),
        },
        ToHost::Reply { op, result } => reply(shared, op, result),
        ToHost::Data { op, stream } => {
            let grant = match shared.lock().ops.get(&op) {
                Some(Op::Session(None, session)) => {
                    let session = Arc::clone(session);
                    session.output(stream, payload)?
                }
                Some(Op::Transfer(_, transfer)) => {
                    transfer.received(Bytes::copy_from_slice(payload))?;
                    None
                }
                _ => return Err(format!("data for operation {op}, which takes none")),
            };
            if let Some(bytes) = grant {
                shared.lock().outbox.credit(op, bytes);
            }
            Ok(())
        }
        ToHost::InputClosed { op } => match shared.lock().ops.get(&op) {
            Some(Op::Session(None, session)) => {
                session.stdin_closed();
                Ok(())
            }
            _ => Err(format!("end of input for operation {op}, which has none")),
        },
        ToHost::Credit { op, bytes } => match shared.lock().ops.get(&op) {
            Some(Op::Session(None, session)) => Ok(session.stdin_credit(bytes)?),
            Some(Op::Transfer(_, transfer)) => Ok(transfer.credit(bytes)?),
            _ => Err(format!("credit for operation {op}, which sends nothing")),
        },
        ToHost::Exit { op, report } => {
            let ended = shared.lock().ops.remove(&op);
            match ended {
                Some(Op::Session(None, session)) => {
                    session.finish(Ok(report));
                    shared.lock().outbox.forget(op);
                    Ok(())
                }
                _ => Err(format!("the end of a process that does not run ({op})")),
            }
        }
    }
}

/// Hands an answer to whoever asked.
fn reply(shared: &Shared, op: OpId, result: Result<Reply, Failure>) -> Result<(), String> {
    let mut state = shared.lock();
    if let (Ok(Reply::Started { .. }), Some(Op::Session(started, _))) =
        (&result, state.ops.get_mut(&op))
    {
        let started = started
            .take()
            .ok_or_else(|| format!("a second start of operation {op}"))?;
        // When nobody waits any more, the guard in `Client::exec` has asked for the process's end.
        let _ = started.send(Ok(result));
        return Ok(());
    }
    match state.ops.remove(&op) {
        Some(Op::Call(answer) | Op::Transfer(answer, _)) => {
            state.outbox.forget(op);
            let _ = answer.send(Ok(result));
            Ok(())
        }
        Some(Op::Session(Some(started), _)) if result.is_err() => {
            let _ = started.send(Ok(result));
            Ok(())
        }
        _ => Err(format!("an answer to operation {op}, which waits for none")),
    }
}

impl Op {
    fn fail(self, error: ControlError) {
        match self {
            Op::Call(answer) => drop(answer.send(Err(error))),
            Op::Ping(answer) => drop(answer.send(Err(error))),
            Op::Session(started, session) => {
                session.finish(Err(error.clone()));
                if let Some(started) = started {
                    drop(started.send(Err(error)));
                }
            }
            Op::Transfer(answer, transfer) => {
                transfer.end();
                drop(answer.send(Err(error)));
            }
        }
    }
}

/// Shakes hands: sends a random nonce and waits for its echo.
pub(super) async fn shake_hands<S>(link: &mut Link<S>) -> Result<(), ControlError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let nonce = random_nonce().map_err(|error| ControlError::Protocol(error.to_string()))?;
    let hello = ToGuest::Hello {
        magic: wire::MAGIC,
        version: wire::VERSION,
        nonce,
    };
    let failed = |error: LinkError| error_of(&error.into());
    link.send(wire::encode(&hello, &[])).await.map_err(failed)?;
    let frame = link.recv().await.map_err(failed)?;
    match wire::decode_to_host(&frame) {
        Ok((
            ToHost::Hello {
                version,
                nonce: echo,
            },
            _,
        )) => {
            if version != wire::VERSION {
                return Err(ControlError::Protocol(format!(
                    "the guest speaks version {version}, this runner {}; build the image again",
                    wire::VERSION
                )));
            }
            if echo != nonce {
                return Err(ControlError::Protocol(
                    "the handshake's nonce came back changed".to_owned(),
                ));
            }
            Ok(())
        }
        Ok(_) => Err(ControlError::Protocol(
            "a message before the handshake".to_owned(),
        )),
        Err(error) => Err(ControlError::Protocol(error.to_string())),
    }
}

fn random_nonce() -> io::Result<wire::Nonce> {
    let mut nonce = wire::Nonce::default();
    let mut filled = 0;
    while let Some(rest) = nonce.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        filled += rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(nonce)
}
