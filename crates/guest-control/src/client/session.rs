//! A process in the guest as the host sees it: its output ring, its stdin window, its end.

use std::sync::Arc;

use bytes::Bytes;

use super::channel::Handle;
use super::ring::{RING, Ring};
use crate::types::{ControlError, ExitReport, PtySize, Stream};
use crate::watched::Watched;
use crate::wire::{self, MAX_PAYLOAD, OpId, ToGuest, WINDOW};

/// A running (or ended) process in the guest, kept with a 1 MiB ring of its output. Clones share it. Dropping all of
/// them leaves the process running.
#[derive(Clone, Debug)]
pub struct Session {
    pid: u32,
    op: OpId,
    shared: Arc<SessionShared>,
    handle: Arc<Handle>,
}

/// One reader attached to a session's output.
#[derive(Debug)]
pub struct Output {
    op: OpId,
    next: u64,
    /// Number of the lossless reader, when this is one.
    lossless: Option<u64>,
    shared: Arc<SessionShared>,
    handle: Arc<Handle>,
}

/// A piece of output.
#[derive(Clone, Debug)]
pub struct OutputChunk {
    /// Where it came from.
    pub stream: Stream,
    /// Byte offset of `data` in the session's combined output; a jump means the ring overwrote what was between.
    pub offset: u64,
    /// The bytes.
    pub data: Bytes,
}

/// What the channel's task, the session's handles and its readers share.
#[derive(Debug)]
pub(super) struct SessionShared {
    state: Watched<SessionState>,
}

#[derive(Debug)]
struct SessionState {
    ring: Ring,
    /// Bytes the guest may send in all, counted from the session's start.
    granted: u64,
    /// The lossless reader, if one is attached.
    lossless: Option<LosslessReader>,
    /// Lossless readers so far; numbers them.
    lossless_readers: u64,
    /// Bytes of stdin the guest has room for.
    stdin_credit: u32,
    /// Stdin can still be sent.
    stdin_open: bool,
    end: Option<Result<ExitReport, ControlError>>,
}

/// The reader that holds the guest back.
#[derive(Clone, Copy, Debug)]
struct LosslessReader {
    number: u64,
    /// Offset of the first byte it has not been given.
    next: u64,
}

impl SessionState {
    /// Credit to send so that the guest may have a window of output in flight, and a lossless reader loses nothing.
    fn grant(&mut self) -> Option<u32> {
        let window = u64::from(WINDOW);
        let mut limit = self.ring.end() + window;
        if let Some(reader) = self.lossless {
            limit = limit.min(reader.next + RING);
        }
        let more = limit.saturating_sub(self.granted);
        // Small grants would cost a message each; a quarter of the window keeps the guest sending meanwhile.
        if self.end.is_some() || more < window / 4 {
            return None;
        }
        self.granted += more;
        u32::try_from(more).ok()
    }
}

impl SessionShared {
    pub(super) fn new(stdin: bool) -> Self {
        Self {
            state: Watched::new(SessionState {
                ring: Ring::default(),
                granted: u64::from(WINDOW),
                lossless: None,
                lossless_readers: 0,
                stdin_credit: WINDOW,
                stdin_open: stdin,
                end: None,
            }),
        }
    }

    /// Takes output from the guest; returns credit to send.
    pub(super) fn output(&self, stream: Stream, data: &[u8]) -> Result<Option<u32>, &'static str> {
        let mut state = self.state.lock();
        if state.ring.end() + data.len() as u64 > state.granted {
            return Err("output beyond the credit it was given");
        }
        let hold = state.lossless.map(|reader| reader.next);
        state.ring.push(stream, data, hold);
        let grant = state.grant();
        drop(state);
        self.state.notify();
        Ok(grant)
    }

    /// The guest has taken stdin.
    pub(super) fn stdin_credit(&self, bytes: u32) -> Result<(), &'static str> {
        let mut state = self.state.lock();
        let credit = state.stdin_credit.saturating_add(bytes);
        if credit > WINDOW {
            return Err("more credit than there was data");
        }
        state.stdin_credit = credit;
        drop(state);
        self.state.notify();
        Ok(())
    }

    /// The process closed its stdin.
    pub(super) fn stdin_closed(&self) {
        self.state.lock().stdin_open = false;
        self.state.notify();
    }

    /// The session is over.
    pub(super) fn finish(&self, end: Result<ExitReport, ControlError>) {
        let mut state = self.state.lock();
        state.stdin_open = false;
        state.end.get_or_insert(end);
        drop(state);
        self.state.notify();
    }
}

impl Session {
    pub(super) fn new(pid: u32, op: OpId, shared: Arc<SessionShared>, handle: Arc<Handle>) -> Self {
        Self {
            pid,
            op,
            shared,
            handle,
        }
    }

    /// Process id in the guest.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Attaches a reader at `offset` (0: from the oldest byte kept). A lossless reader holds the guest back
    /// (credit) instead of losing bytes; at most one reader of a session is lossless: a second one replaces the first,
    /// which goes on as an ordinary reader.
    pub fn attach(&self, offset: u64, lossless: bool) -> Output {
        let mut state = self.shared.state.lock();
        let next = offset.clamp(state.ring.start(), state.ring.end());
        let lossless = lossless.then(|| {
            state.lossless_readers += 1;
            let number = state.lossless_readers;
            state.lossless = Some(LosslessReader { number, next });
            number
        });
        drop(state);
        Output {
            op: self.op,
            next,
            lossless,
            shared: Arc::clone(&self.shared),
            handle: Arc::clone(&self.handle),
        }
    }

    /// Sends stdin; waits for credit. Fails with `EPIPE` when the process does not read it any more.
    pub async fn write_stdin(&self, mut data: Bytes) -> Result<(), ControlError> {
        while !data.is_empty() {
            let wanted = data.len().min(MAX_PAYLOAD);
            let taken = self
                .shared
                .state
                .until(|state| {
                    if !state.stdin_open {
                        return Some(Err(stdin_error(state)));
                    }
                    let taken = u32::try_from(wanted)
                        .unwrap_or(WINDOW)
                        .min(state.stdin_credit);
                    state.stdin_credit -= taken;
                    (taken > 0).then_some(Ok(taken))
                })
                .await?;
            let piece = data.split_to(taken as usize);
            let frame = wire::encode(&ToGuest::Data { op: self.op }, &piece);
            self.handle.push(|outbox| outbox.bulk(self.op, frame))?;
        }
        Ok(())
    }

    /// End of stdin.
    pub async fn close_stdin(&self) -> Result<(), ControlError> {
        let was_open = std::mem::replace(&mut self.shared.state.lock().stdin_open, false);
        if !was_open {
            return Ok(());
        }
        let frame = wire::encode(&ToGuest::End { op: self.op }, &[]);
        self.handle.push(|outbox| outbox.ordered(self.op, frame))
    }

    /// Signals the process's group. Nothing happens when it has ended.
    pub async fn signal(&self, signal: i32) -> Result<(), ControlError> {
        self.control(ToGuest::Signal {
            op: self.op,
            signal,
        })
    }

    /// Kills the session's whole cgroup. Nothing happens when it has ended.
    pub async fn kill(&self) -> Result<(), ControlError> {
        self.control(ToGuest::Abort { op: self.op })
    }

    /// New terminal size.
    pub async fn resize(&self, size: PtySize) -> Result<(), ControlError> {
        self.control(ToGuest::Resize { op: self.op, size })
    }

    /// Waits for the end, without consuming output. All output is in the ring before this returns.
    pub async fn wait(&self) -> Result<ExitReport, ControlError> {
        self.shared.state.until(|state| state.end.clone()).await
    }

    fn control(&self, message: ToGuest) -> Result<(), ControlError> {
        if self.shared.state.lock().end.is_some() {
            return Ok(());
        }
        let frame = wire::encode(&message, &[]);
        self.handle.push(|outbox| outbox.control(frame))
    }
}

fn stdin_error(state: &SessionState) -> ControlError {
    match &state.end {
        Some(Err(error)) => error.clone(),
        _ => ControlError::Guest {
            operation: "send stdin",
            errno: Some(rustix::io::Errno::PIPE.raw_os_error()),
            message: "the process does not read its stdin".to_owned(),
        },
    }
}

impl Output {
    /// Next piece; `None` at the end of the session's output. Cancel safe.
    pub async fn next(&mut self) -> Option<OutputChunk> {
        let at = self.next;
        let found = self
            .shared
            .state
            .until(|state| match state.ring.read(at) {
                Some(piece) => Some(Some(piece)),
                None => state.end.is_some().then_some(None),
            })
            .await;
        let (stream, offset, data) = found?;
        self.next = offset + data.len() as u64;
        self.advance(false);
        Some(OutputChunk {
            stream,
            offset,
            data,
        })
    }

    /// Tells the guest that this reader has made room, or with `detach` that it holds nothing back any more.
    fn advance(&self, detach: bool) {
        let Some(number) = self.lossless else { return };
        let mut state = self.shared.state.lock();
        if state.lossless.is_none_or(|reader| reader.number != number) {
            return;
        }
        state.lossless = (!detach).then_some(LosslessReader {
            number,
            next: self.next,
        });
        let grant = state.grant();
        drop(state);
        if let Some(bytes) = grant {
            // A closed channel needs no credit.
            let _ = self.handle.push(|outbox| outbox.credit(self.op, bytes));
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.advance(true);
    }
}
