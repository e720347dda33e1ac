//! What waits to be sent, in the order in which it should go.
//!
//! Control frames go first. Data waits in one queue for each operation, served in turn, so that neither a bulk
//! transfer nor a large request delays another operation by more than one frame of each. Frames of one operation never
//! overtake each other, except control frames that were pushed as such.

use std::collections::{BTreeMap, HashMap, VecDeque};

use bytes::Bytes;

use crate::wire::OpId;

/// A frame in an operation's own queue.
#[derive(Debug)]
enum Queued {
    /// Payload: waits for its turn.
    Bulk(Bytes),
    /// Goes ahead of other operations' data once its own operation's earlier frames are sent.
    Ordered(Bytes),
}

/// The queue of frames to send. Its size is bounded by what feeds it: one coalesced credit for each operation, data
/// within the other end's window, requests that callers wait for.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    control: VecDeque<Bytes>,
    credits: BTreeMap<OpId, u32>,
    queues: HashMap<OpId, VecDeque<Queued>>,
    turns: VecDeque<OpId>,
}

impl Outbox {
    /// Queues a frame ahead of all data.
    pub(crate) fn control(&mut self, frame: Bytes) {
        self.control.push_back(frame);
    }

    /// Queues a grant; grants that the other end has not taken yet are added up.
    pub(crate) fn credit(&mut self, op: OpId, bytes: u32) {
        let credit = self.credits.entry(op).or_default();
        *credit = credit.saturating_add(bytes);
    }

    /// Queues data of an operation.
    pub(crate) fn bulk(&mut self, op: OpId, frame: Bytes) {
        self.enqueue(op, Queued::Bulk(frame));
    }

    /// Queues a small frame that must stay behind the operation's earlier ones, and only behind those.
    pub(crate) fn ordered(&mut self, op: OpId, frame: Bytes) {
        if self.queues.contains_key(&op) {
            self.enqueue(op, Queued::Ordered(frame));
        } else {
            self.control.push_back(frame);
        }
    }

    /// Queues an operation's last frame: like [`Self::ordered`], and no grant follows it.
    pub(crate) fn last(&mut self, op: OpId, frame: Bytes) {
        self.credits.remove(&op);
        self.ordered(op, frame);
    }

    /// Forgets the data an operation has not sent yet.
    pub(crate) fn forget(&mut self, op: OpId) {
        self.queues.remove(&op);
        self.turns.retain(|turn| *turn != op);
        self.credits.remove(&op);
    }

    /// The frame to send next; `encode_credit` turns a grant into one.
    pub(crate) fn next(&mut self, encode_credit: impl Fn(OpId, u32) -> Bytes) -> Option<Bytes> {
        if let Some(frame) = self.control.pop_front() {
            return Some(frame);
        }
        if let Some((op, bytes)) = self.credits.pop_first() {
            return Some(encode_credit(op, bytes));
        }
        let op = self.turns.pop_front()?;
        let queue = self.queues.get_mut(&op)?;
        let frame = match queue.pop_front()? {
            Queued::Bulk(frame) | Queued::Ordered(frame) => frame,
        };
        while let Some(Queued::Ordered(_)) = queue.front() {
            if let Some(Queued::Ordered(frame)) = queue.pop_front() {
                self.control.push_back(frame);
            }
        }
        if queue.is_empty() {
            self.queues.remove(&op);
        } else {
            self.turns.push_back(op);
        }
        Some(frame)
    }

    fn enqueue(&mut self, op: OpId, frame: Queued) {
        let queue = self.queues.entry(op).or_default();
        if queue.is_empty() {
            self.turns.push_back(op);
        }
        queue.push_back(frame);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(outbox: &mut Outbox) -> Vec<String> {
        std::iter::from_fn(|| outbox.next(|op, bytes| Bytes::from(format!("credit {op} {bytes}"))))
            .map(|frame| String::from_utf8(frame.to_vec()).unwrap())
            .collect()
    }

    #[test]
    fn control_goes_first_and_data_takes_turns() {
        let mut outbox = Outbox::default();
        outbox.bulk(1, Bytes::from("1a"));
        outbox.bulk(1, Bytes::from("1b"));
        outbox.bulk(2, Bytes::from("2a"));
        outbox.control(Bytes::from("ping"));
        outbox.credit(7, 10);
        outbox.credit(7, 5);
        assert_eq!(
            drain(&mut outbox),
            ["ping", "credit 7 15", "1a", "2a", "1b"]
        );
    }

    #[test]
    fn an_exit_follows_its_own_data_and_nobody_elses() {
        let mut outbox = Outbox::default();
        outbox.bulk(1, Bytes::from("1a"));
        outbox.bulk(2, Bytes::from("2a"));
        outbox.bulk(2, Bytes::from("2b"));
        outbox.ordered(1, Bytes::from("exit 1"));
        outbox.ordered(3, Bytes::from("exit 3"));
        assert_eq!(drain(&mut outbox), ["exit 3", "1a", "exit 1", "2a", "2b"]);
    }

    #[test]
    fn a_forgotten_operation_sends_nothing() {
        let mut outbox = Outbox::default();
        outbox.bulk(1, Bytes::from("1a"));
        outbox.bulk(2, Bytes::from("2a"));
        outbox.forget(1);
        assert_eq!(drain(&mut outbox), ["2a"]);
    }
}
