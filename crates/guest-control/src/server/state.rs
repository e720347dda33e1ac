//! What the server's task and the operations' tasks share.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use rustix::io::Errno;
use serde::Serialize;
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;

use super::flow::Flow;
use super::os::{Os, OsError};
use crate::outbox::Outbox;
use crate::wire::{self, Failure, MAX_PAYLOAD, OpId, Reply, ToHost};

/// State of one connection.
pub(super) struct Shared<O: Os> {
    pub(super) os: Arc<O>,
    state: Mutex<State<O::Process>>,
    pub(super) task: AtomicWaker,
    /// One read buffer for all pumps: each read is copied out at once.
    scratch: Mutex<Vec<u8>>,
}

pub(super) struct State<P> {
    pub(super) outbox: Outbox,
    pub(super) ops: HashMap<OpId, Running<P>>,
    /// Requests of which parts have arrived.
    pub(super) requests: HashMap<OpId, Vec<u8>>,
}

/// An operation under way.
pub(super) struct Running<P> {
    pub(super) flow: Arc<Flow>,
    /// The process, for a session.
    pub(super) process: Option<Arc<P>>,
    /// Its terminal, if it has one.
    pub(super) terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    /// Ends its task; there is none for a moment while the operation starts.
    pub(super) task: Option<AbortHandle>,
}

impl<O: Os> Shared<O> {
    pub(super) fn new(os: Arc<O>) -> Self {
        Self {
            os,
            state: Mutex::new(State {
                outbox: Outbox::default(),
                ops: HashMap::new(),
                requests: HashMap::new(),
            }),
            task: AtomicWaker::new(),
            scratch: Mutex::new(vec![0; MAX_PAYLOAD]),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State<O::Process>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues frames.
    pub(super) fn send(&self, frames: impl FnOnce(&mut Outbox)) {
        frames(&mut self.lock().outbox);
        self.task.wake();
    }

    /// Ends an operation with its last message.
    pub(super) fn finish<M: Serialize>(&self, op: OpId, message: &M) {
        let frame = wire::encode(message, &[]);
        let mut state = self.lock();
        state.ops.remove(&op);
        state.outbox.last(op, frame);
        drop(state);
        self.task.wake();
    }

    /// Ends an operation with its answer.
    pub(super) fn reply(&self, op: OpId, result: Result<Reply, OsError>) {
        let result = result.map_err(failure);
        self.finish(op, &ToHost::Reply { op, result });
    }

    /// Reads at most `limit` bytes and lets `make` turn them into a frame.
    pub(super) fn read(
        &self,
        fd: BorrowedFd<'_>,
        limit: u32,
        make: impl FnOnce(&[u8]) -> Bytes,
    ) -> Result<(u32, Bytes), Errno> {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = scratch.len().min(limit as usize);
        let buffer = scratch.get_mut(..limit).ok_or(Errno::INVAL)?;
        let length = rustix::io::read(fd, &mut *buffer)?;
        let data = buffer.get(..length).ok_or(Errno::INVAL)?;
        let frame = make(data);
        Ok((u32::try_from(length).map_err(|_| Errno::OVERFLOW)?, frame))
    }
}

/// Longest error message sent to the host.
const MAX_MESSAGE: usize = 4096;

fn failure(error: OsError) -> Failure {
    let mut message = error.message;
    if message.len() > MAX_MESSAGE {
        let cut = (0..=MAX_MESSAGE)
            .rev()
            .find(|at| message.is_char_boundary(*at));
        message.truncate(cut.unwrap_or(0));
    }
    Failure {
        errno: error.errno,
        message,
    }
}
