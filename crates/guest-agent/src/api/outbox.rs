//! What waits to be sent: bounded, and never waited for by who puts something in.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most bytes of events that wait.
const MAX_EVENTS: usize = 32 * 1024 * 1024;
/// Most bytes of log that wait.
const MAX_LOG: usize = 4 * 1024 * 1024;

/// Between the thread that reads the CLI and those that send.
#[derive(Default)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    events: VecDeque<String>,
    event_bytes: usize,
    log: String,
    lost: Lost,
    events_closed: bool,
    log_closed: bool,
    checkpoint: bool,
    /// No waiting any more.
    over: bool,
}

/// What did not get into the outbox, or out of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lost {
    pub(crate) events: u64,
    pub(crate) log_bytes: u64,
}

/// What a sender has to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Send these.
    Lines(Vec<String>),
    /// Nothing more will come.
    Closed,
}

/// Why the sender of telemetry was woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    Due,
    Checkpoint,
    Closed,
}

impl Outbox {
    /// Puts an event's line in; dropped and counted if there is no room.
    pub(crate) fn event(&self, line: &str) {
        let mut state = self.lock();
        if state.event_bytes.saturating_add(line.len()) > MAX_EVENTS {
            state.lost.events += 1;
            return;
        }
        state.event_bytes += line.len();
        state.events.push_back(line.to_owned());
        self.changed.notify_all();
    }

    /// Puts a piece of log in. One that fits no more is dropped and counted.
    pub(crate) fn log(&self, text: &str) {
        let mut state = self.lock();
        if state.log.len().saturating_add(text.len()) > MAX_LOG {
            state.lost.log_bytes += text.len() as u64;
        } else {
            state.log.push_str(text);
        }
    }

    /// Waits for events; takes at most `most` and about `bytes`.
    pub(crate) fn events(&self, most: usize, bytes: usize) -> Next {
        let mut state = self.lock();
        while state.events.is_empty() && !state.events_closed {
            state = self.wait(state);
        }
        let (mut lines, mut sum) = (Vec::new(), 0_usize);
        while lines.len() < most
            && let Some(line) = state.events.front()
            && (lines.is_empty() || sum.saturating_add(line.len()) <= bytes)
            && let Some(line) = state.events.pop_front()
        {
            sum = sum.saturating_add(line.len());
            state.event_bytes = state.event_bytes.saturating_sub(line.len());
            lines.push(line);
        }
        if lines.is_empty() {
            Next::Closed
        } else {
            Next::Lines(lines)
        }
    }

    /// Takes at most `most` bytes of log.
    pub(crate) fn take_log(&self, most: usize) -> String {
        let mut state = self.lock();
        let mut end = most.min(state.log.len());
        while !state.log.is_char_boundary(end) {
            end -= 1;
        }
        let rest = state.log.split_off(end);
        std::mem::replace(&mut state.log, rest)
    }

    /// Waits until then, for a wish for a checkpoint, or for the end.
    pub(crate) fn until(&self, at: Instant) -> Woken {
        let mut state = self.lock();
        loop {
            if std::mem::take(&mut state.checkpoint) {
                return Woken::Checkpoint;
            }
            if state.log_closed {
                return Woken::Closed;
            }
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Woken::Due;
            }
            state = self.wait_for(state, left);
        }
    }

    /// Waits between two attempts; false when there is to be none.
    pub(crate) fn pause(&self, pause: Duration) -> bool {
        let end = Instant::now() + pause;
        let mut state = self.lock();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if state.over {
                return false;
            }
            if left.is_zero() {
                return true;
            }
            state = self.wait_for(state, left);
        }
    }

    /// Asks for a checkpoint.
    pub(crate) fn checkpoint(&self) {
        self.lock().checkpoint = true;
        self.changed.notify_all();
    }

    /// No event will come any more.
    pub(crate) fn close_events(&self) {
        self.lock().events_closed = true;
        self.changed.notify_all();
    }

    /// No piece of log will come any more.
    pub(crate) fn close_log(&self) {
        self.lock().log_closed = true;
        self.changed.notify_all();
    }

    /// Time is over: nothing is tried again.
    pub(crate) fn give_up(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }

    /// Counts what a sender could not get rid of.
    pub(crate) fn lost(&self, more: Lost) {
        let mut state = self.lock();
        state.lost.events += more.events;
        state.lost.log_bytes += more.log_bytes;
    }

    /// Everything that was or is still not sent.
    pub(crate) fn unsent(&self) -> Lost {
        let state = self.lock();
        Lost {
            events: state.lost.events + state.events.len() as u64,
            log_bytes: state.lost.log_bytes + state.log.len() as u64,
        }
    }

    /// Bytes of log that wait.
    pub(crate) fn unsent_log(&self) -> usize {
        self.lock().log.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole between any two operations.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, time);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_is_counted_and_nobody_waits() {
        let outbox = Outbox::default();
        let line = "x".repeat(MAX_EVENTS / 2);
        for _ in 0..3 {
            outbox.event(&line);
        }
        outbox.log(&"y".repeat(MAX_LOG));
        outbox.log("zz");
        let lost = Lost {
            events: 1 + 2,
            log_bytes: 2 + MAX_LOG as u64,
        };
        assert_eq!(outbox.unsent(), lost);
    }

    #[test]
    fn batches_are_bounded_in_number_and_size_and_keep_their_order() {
        let outbox = Outbox::default();
        for line in ["a", "bbbb", "c", "d"] {
            outbox.event(line);
        }
        let take = |most, bytes| outbox.events(most, bytes);
        assert_eq!(take(9, 1), Next::Lines(vec!["a".into()]));
        // Larger than asked for, but alone.
        assert_eq!(take(9, 1), Next::Lines(vec!["bbbb".into()]));
        assert_eq!(take(1, 9), Next::Lines(vec!["c".into()]));
        outbox.close_events();
        assert_eq!(take(9, 9), Next::Lines(vec!["d".into()]));
        assert_eq!(take(9, 9), Next::Closed);
    }

    #[test]
    fn log_is_cut_between_characters() {
        let outbox = Outbox::default();
        outbox.log("aé");
        assert_eq!(outbox.take_log(2), "a");
        assert_eq!(outbox.take_log(2), "é");
    }
}
