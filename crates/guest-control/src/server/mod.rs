//! The guest's end.
//!
//! One task reads and writes the stream and starts what is asked for; every session and file transfer has a task of its
//! own. The stream is served until the host goes away, becomes quiet for a snapshot, or asks for the end:
//!
//! ```text
//!   waiting for Hello ──▶ serving ──▶ Ended::Quiet       decoders empty; call `serve` again on the same stream
//!          ▲                 ├──────▶ Ended::HostGone    kill everything; call `serve` on the next connection
//!          └── any other ────┼──────▶ Ended::Protocol    likewise, after dropping what is still in the stream
//!              message       └──────▶ Ended::Shutdown
//! ```

mod fd;
mod file;
mod flow;
mod os;
mod session;
mod state;

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncWrite};

pub use fd::watch;
use flow::Flow;
pub use os::{Os, OsError, Process, Spawned, Stdio};
use session::{Ends, Wishes};
use state::{Running, Shared};

use crate::link::{Link, LinkError};
use crate::types::{ExecSpec, PtySize};
use crate::wire::{self, MAX_REQUEST, OpId, Reply, Request, ToGuest, ToHost};

/// Why [`serve`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The host asked for quiet, was told so, and nothing is in either direction.
    Quiet,
    /// The host asked for the guest's end and was told so.
    Shutdown,
    /// The stream ended.
    HostGone,
    /// The host sent what is not the protocol.
    Protocol(String),
}

/// Why the serving loop stops, once everything queued is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stopping {
    Quiet,
    Shutdown,
}

/// Waits for a handshake on `stream` and serves it until it ends. Operations still under way are given up then; their
/// processes are the caller's to kill.
pub async fn serve<S, O>(stream: &mut S, os: &Arc<O>) -> Ended
where
    S: AsyncRead + AsyncWrite + Unpin,
    O: Os,
{
    let mut link = Link::new(stream);
    if let Err(ended) = shake_hands(&mut link).await {
        return ended;
    }
    let shared = Arc::new(Shared::new(Arc::clone(os)));
    let mut stopping = None;
    let ended = std::future::poll_fn(|cx| poll(&mut link, &shared, &mut stopping, cx)).await;
    for (_, running) in shared.lock().ops.drain() {
        if let Some(task) = running.task {
            task.abort();
        }
    }
    if ended == Ended::Quiet && link.has_unread() {
        return Ended::Protocol("a message after the request to become quiet".to_owned());
    }
    ended
}

impl From<LinkError> for Ended {
    fn from(error: LinkError) -> Self {
        match error {
            LinkError::Gone => Ended::HostGone,
            LinkError::Wire(error) => Ended::Protocol(error.to_string()),
        }
    }
}

async fn shake_hands<S: AsyncRead + AsyncWrite + Unpin>(link: &mut Link<S>) -> Result<(), Ended> {
    let frame = link.recv().await?;
    match wire::decode_to_guest(&frame) {
        Ok((
            ToGuest::Hello {
                magic: wire::MAGIC,
                nonce,
                ..
            },
            _,
        )) => {
            // The host compares versions: it is the one with somebody to tell.
            let hello = ToHost::Hello {
                version: wire::VERSION,
                nonce,
            };
            link.send(wire::encode(&hello, &[])).await?;
            Ok(())
        }
        Ok(_) => Err(Ended::Protocol("a message before the handshake".to_owned())),
        Err(error) => Err(Ended::Protocol(error.to_string())),
    }
}

fn poll<S, O>(
    link: &mut Link<S>,
    shared: &Arc<Shared<O>>,
    stopping: &mut Option<Stopping>,
    cx: &mut Context<'_>,
) -> Poll<Ended>
where
    S: AsyncRead + AsyncWrite + Unpin,
    O: Os,
{
    shared.task.register(cx.waker());
    while stopping.is_none() {
        match link.poll_recv(cx) {
            Poll::Pending => break,
            Poll::Ready(Err(error)) => return Poll::Ready(error.into()),
            Poll::Ready(Ok(frame)) => match receive(shared, &frame) {
                Ok(wish) => *stopping = wish,
                Err(what) => return Poll::Ready(Ended::Protocol(what)),
            },
        }
        if let Poll::Ready(Err(error)) = send(link, shared, cx) {
            return Poll::Ready(error.into());
        }
    }
    match send(link, shared, cx) {
        Poll::Ready(Err(error)) => Poll::Ready(error.into()),
        Poll::Ready(Ok(())) => match stopping {
            Some(Stopping::Quiet) => Poll::Ready(Ended::Quiet),
            Some(Stopping::Shutdown) => Poll::Ready(Ended::Shutdown),
            None => Poll::Pending,
        },
        Poll::Pending => Poll::Pending,
    }
}

fn send<S, O>(
    link: &mut Link<S>,
    shared: &Shared<O>,
    cx: &mut Context<'_>,
) -> Poll<Result<(), LinkError>>
where
    S: AsyncRead + AsyncWrite + Unpin,
    O: Os,
{
    link.poll_send(cx, || {
        shared
            .lock()
            .outbox
            .next(|op, bytes| wire::encode(&ToHost::Credit { op, bytes }, &[]))
    })
}

/// Handles one frame. Messages for operations that have ended meanwhile are normal and dropped.
fn receive<O: Os>(shared: &Arc<Shared<O>>, frame: &[u8]) -> Result<Option<Stopping>, String> {
    let (message, payload) = wire::decode_to_guest(frame).map_err(|error| error.to_string())?;
    match message {
        ToGuest::Hello { .. } => return Err("a second handshake".to_owned()),
        ToGuest::Ping { op } => {
            let pong = wire::encode(&ToHost::Pong { op }, &[]);
            shared.lock().outbox.control(pong);
        }
        ToGuest::Part { op, last } => {
            if let Some(bytes) = assemble(shared, op, last, payload)? {
                let request = wire::decode_request(&bytes).map_err(|error| error.to_string())?;
                return Ok(start(shared, op, request));
            }
        }
        ToGuest::Data { op } => {
            if let Some(running) = shared.lock().ops.get(&op)
                && !running.flow.received(Bytes::copy_from_slice(payload))
            {
                return Err(format!("input beyond the window of operation {op}"));
            }
        }
        ToGuest::End { op } => with(shared, op, |running| running.flow.input_ended()),
        ToGuest::Credit { op, bytes } => with(shared, op, |running| running.flow.credit(bytes)),
        ToGuest::Signal { op, signal } => with(shared, op, |running| {
            if let Some(process) = &running.process {
                // It may just have ended; the host will hear of that.
                let _ = process.signal(signal);
            }
        }),
        ToGuest::Resize { op, size } => with(shared, op, |running| {
            if let Some(terminal) = &running.terminal {
                // A terminal that is being hung up needs no size.
                let _ = rustix::termios::tcsetwinsize(terminal.get_ref(), window(size));
            }
        }),
        ToGuest::Abort { op } => with(shared, op, |running| {
            running.flow.abort();
            if let Some(process) = &running.process {
                process.kill();
            }
        }),
    }
    Ok(None)
}

/// A terminal's size as the kernel takes it.
pub fn window(size: PtySize) -> rustix::termios::Winsize {
    rustix::termios::Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn with<O: Os>(shared: &Shared<O>, op: OpId, act: impl FnOnce(&Running<O::Process>)) {
    if let Some(running) = shared.lock().ops.get(&op) {
        act(running);
    }
}

/// Adds a part to a request; returns the request when it is whole.
fn assemble<O: Os>(
    shared: &Shared<O>,
    op: OpId,
    last: bool,
    payload: &[u8],
) -> Result<Option<Vec<u8>>, String> {
    let mut state = shared.lock();
    if state.ops.contains_key(&op) {
        return Err(format!("a second request for operation {op}"));
    }
    let begun: usize = state.requests.values().map(Vec::len).sum();
    if begun + payload.len() > 2 * MAX_REQUEST {
        return Err("requests longer than any may be".to_owned());
    }
    let mut bytes = state.requests.remove(&op).unwrap_or_default();
    bytes.extend_from_slice(payload);
    if last {
        return Ok(Some(bytes));
    }
    state.requests.insert(op, bytes);
    Ok(None)
}

/// Starts what a request asks for.
fn start<O: Os>(shared: &Arc<Shared<O>>, op: OpId, request: Request) -> Option<Stopping> {
    let os = &shared.os;
    match request {
        Request::Exec(spec) => {
            if let Err(error) = exec(shared, op, &spec) {
                shared.reply(op, Err(error));
            }
        }
        Request::Wake(wake) => shared.reply(op, os.wake(&wake).map(|()| Reply::Done)),
        Request::Mount(source) => shared.reply(op, os.mount(source).map(|()| Reply::Done)),
        Request::Stats => shared.reply(op, os.stats().map(Reply::Stats)),
        Request::Unmount => task(shared, op, |shared, _| async move {
            let result = shared.os.unmount().await;
            shared.reply(op, result.map(|()| Reply::Done));
        }),
        Request::KillAll => task(shared, op, |shared, _| async move {
            let result = shared.os.kill_all().await;
            shared.reply(op, result.map(|()| Reply::Done));
        }),
        Request::ReadFile { path } => task(shared, op, |shared, flow| {
            file::send(shared, op, flow, path)
        }),
        Request::WriteFile(spec) => task(shared, op, |shared, flow| {
            file::receive(shared, op, flow, spec)
        }),
        Request::Quiesce => {
            let state = shared.lock();
            let busy = !state.ops.is_empty() || !state.requests.is_empty();
            drop(state);
            if !busy {
                shared.reply(op, Ok(Reply::Done));
                return Some(Stopping::Quiet);
            }
            let error = OsError::new("other operations are under way", Errno::BUSY);
            shared.reply(op, Err(error));
        }
        Request::Shutdown => {
            shared.reply(op, Ok(Reply::Done));
            return Some(Stopping::Shutdown);
        }
    }
    None
}

/// Starts an operation's task.
fn task<O, F>(shared: &Arc<Shared<O>>, op: OpId, make: impl FnOnce(Arc<Shared<O>>, Arc<Flow>) -> F)
where
    O: Os,
    F: Future<Output = ()> + Send + 'static,
{
    let flow = Arc::new(Flow::new());
    let running = Running {
        flow: Arc::clone(&flow),
        process: None,
        terminal: None,
        task: None,
    };
    shared.lock().ops.insert(op, running);
    spawn(shared, op, make(Arc::clone(shared), flow));
}

fn spawn<O: Os>(shared: &Shared<O>, op: OpId, future: impl Future<Output = ()> + Send + 'static) {
    let task = tokio::spawn(future).abort_handle();
    // On a runtime with several threads it may have ended already.
    if let Some(running) = shared.lock().ops.get_mut(&op) {
        running.task = Some(task);
    }
}

fn exec<O: Os>(shared: &Arc<Shared<O>>, op: OpId, spec: &ExecSpec) -> Result<(), OsError> {
    if let Some(wake) = &spec.wake {
        shared.os.wake(wake)?;
    }
    let spawned = shared.os.spawn(spec)?;
    let process = Arc::new(spawned.process);
    let ends = Ends::new(spawned.stdio).map_err(|error| {
        process.kill();
        OsError::new("watching the process's output", error)
    })?;
    let flow = Arc::new(Flow::new());
    let running = Running {
        flow: Arc::clone(&flow),
        process: Some(Arc::clone(&process)),
        terminal: match &ends {
            Ends::Terminal(master) => Some(Arc::clone(master)),
            Ends::Pipes { .. } => None,
        },
        task: None,
    };
    let started = ToHost::Reply {
        op,
        result: Ok(Reply::Started { pid: spawned.pid }),
    };
    let mut state = shared.lock();
    state.ops.insert(op, running);
    state.outbox.ordered(op, wire::encode(&started, &[]));
    drop(state);
    let wishes = Wishes {
        timeout: spec.timeout,
        kill_group_on_exit: spec.kill_group_on_exit,
    };
    spawn(
        shared,
        op,
        session::run(Arc::clone(shared), op, flow, process, ends, wishes),
    );
    Ok(())
}
