//! A file on its way to or from the guest.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::watched::Watched;
use crate::wire::WINDOW;

/// What the channel's task and the caller of a file operation share.
#[derive(Debug)]
pub(super) struct Transfer {
    state: Watched<State>,
}

#[derive(Debug)]
struct State {
    /// Received, not yet taken by the caller.
    pieces: VecDeque<Bytes>,
    /// Bytes the guest may still send.
    may_receive: u32,
    /// Bytes the guest has room for.
    may_send: u32,
    ended: bool,
}

impl Transfer {
    /// From the guest.
    pub(super) fn download() -> Self {
        Self::new(WINDOW, 0)
    }

    /// To the guest.
    pub(super) fn upload() -> Self {
        Self::new(0, WINDOW)
    }

    fn new(may_receive: u32, may_send: u32) -> Self {
        Self {
            state: Watched::new(State {
                pieces: VecDeque::new(),
                may_receive,
                may_send,
                ended: false,
            }),
        }
    }

    /// Takes data from the guest.
    pub(super) fn received(&self, data: Bytes) -> Result<(), &'static str> {
        let mut state = self.state.lock();
        let length = u32::try_from(data.len()).map_err(|_| "a piece beyond all limits")?;
        // Empty pieces would be free for the guest and not for us.
        if length == 0 || length > state.may_receive {
            return Err("file contents beyond the credit they were given");
        }
        state.may_receive -= length;
        state.pieces.push_back(data);
        drop(state);
        self.state.notify();
        Ok(())
    }

    /// The guest has taken data.
    pub(super) fn credit(&self, bytes: u32) -> Result<(), &'static str> {
        let mut state = self.state.lock();
        let credit = state.may_send.saturating_add(bytes);
        if credit > WINDOW {
            return Err("more credit than there was data");
        }
        state.may_send = credit;
        drop(state);
        self.state.notify();
        Ok(())
    }

    /// The channel has ended.
    pub(super) fn end(&self) {
        self.state.lock().ended = true;
        self.state.notify();
    }

    /// Next piece received so far.
    pub(super) fn take(&self) -> Option<Bytes> {
        self.state.lock().pieces.pop_front()
    }

    /// Waits for a piece; `None` when the channel has ended.
    pub(super) async fn piece(&self) -> Option<Bytes> {
        self.state
            .until(|state| match state.pieces.pop_front() {
                Some(piece) => Some(Some(piece)),
                None => state.ended.then_some(None),
            })
            .await
    }

    /// The caller has dealt with so many bytes; the guest may send as many more.
    pub(super) fn consumed(&self, bytes: u32) {
        self.state.lock().may_receive += bytes;
    }

    /// Waits for room in the guest, at most `wanted` bytes; `None` when the channel has ended.
    pub(super) async fn room(&self, wanted: u32) -> Option<u32> {
        self.state
            .until(|state| {
                if state.ended {
                    return Some(None);
                }
                let taken = wanted.min(state.may_send);
                state.may_send -= taken;
                (taken > 0).then_some(Some(taken))
            })
            .await
    }
}
