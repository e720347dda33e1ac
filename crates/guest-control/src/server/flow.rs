//! Windows of one operation in the guest: input that has arrived, output the host has room for.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::watched::Watched;
use crate::wire::WINDOW;

/// Flow state shared by the server's task, which receives, and the operation's own.
#[derive(Debug)]
pub(super) struct Flow {
    state: Watched<State>,
}

#[derive(Debug)]
struct State {
    input: VecDeque<Bytes>,
    input_ended: bool,
    /// Bytes the host may still send.
    may_receive: u32,
    /// Bytes the host has room for.
    may_send: u32,
    /// The host has given the operation up.
    aborted: bool,
    /// No more output is waited for.
    output_over: bool,
}

/// The host has given the operation up.
#[derive(Debug)]
pub(super) struct Aborted;

impl Flow {
    pub(super) fn new() -> Self {
        Self {
            state: Watched::new(State {
                input: VecDeque::new(),
                input_ended: false,
                may_receive: WINDOW,
                may_send: WINDOW,
                aborted: false,
                output_over: false,
            }),
        }
    }

    /// Takes input from the host; false when it goes beyond the window.
    #[must_use]
    pub(super) fn received(&self, data: Bytes) -> bool {
        let mut state = self.state.lock();
        let Some(left) = u32::try_from(data.len())
            .ok()
            .and_then(|length| state.may_receive.checked_sub(length))
        else {
            return false;
        };
        state.may_receive = left;
        state.input.push_back(data);
        drop(state);
        self.state.notify();
        true
    }

    /// The host has sent all its input.
    pub(super) fn input_ended(&self) {
        self.state.lock().input_ended = true;
        self.state.notify();
    }

    /// The host has room for more output.
    pub(super) fn credit(&self, bytes: u32) {
        let mut state = self.state.lock();
        state.may_send = state.may_send.saturating_add(bytes);
        drop(state);
        self.state.notify();
    }

    /// The host gives the operation up.
    pub(super) fn abort(&self) {
        self.state.lock().aborted = true;
        self.state.notify();
    }

    /// Output that has not arrived yet is not waited for any more.
    pub(super) fn end_output(&self) {
        self.state.lock().output_over = true;
        self.state.notify();
    }

    /// Waits until output is not waited for any more.
    pub(super) async fn output_over(&self) {
        self.state
            .until(|state| state.output_over.then_some(()))
            .await;
    }

    /// Waits for a piece of input; `None` at its end.
    pub(super) async fn input(&self) -> Result<Option<Bytes>, Aborted> {
        self.state
            .until(|state| {
                if state.aborted {
                    return Some(Err(Aborted));
                }
                match state.input.pop_front() {
                    Some(piece) => Some(Ok(Some(piece))),
                    None => state.input_ended.then_some(Ok(None)),
                }
            })
            .await
    }

    /// Input was dealt with: the host may send as much more.
    pub(super) fn consumed(&self, bytes: u32) {
        self.state.lock().may_receive += bytes;
    }

    /// Waits until the host has room and takes at most `wanted` bytes of it. An operation that was given up waits only
    /// until its output is over.
    pub(super) async fn room(&self, wanted: u32) -> Result<u32, Aborted> {
        self.state
            .until(|state| {
                let taken = wanted.min(state.may_send);
                state.may_send -= taken;
                if taken > 0 {
                    Some(Ok(taken))
                } else {
                    (state.aborted && state.output_over).then_some(Err(Aborted))
                }
            })
            .await
    }

    /// Like [`Self::room`], for an operation whose output is worth nothing once it is given up.
    pub(super) async fn room_unless_aborted(&self, wanted: u32) -> Result<u32, Aborted> {
        self.state
            .until(|state| {
                if state.aborted {
                    return Some(Err(Aborted));
                }
                let taken = wanted.min(state.may_send);
                state.may_send -= taken;
                (taken > 0).then_some(Ok(taken))
            })
            .await
    }

    /// Gives back room that was not used.
    pub(super) fn unused(&self, bytes: u32) {
        if bytes > 0 {
            self.credit(bytes);
        }
    }
}
