//! How long a file has been as it is, by a clock that nobody sets.
//!
//! Times of files are the host's clock's, which may be set an hour forward or back at any moment: what is decided
//! within seconds must not be decided by them.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::names::RunId;

/// When each file was first seen in the state it is in.
#[derive(Debug)]
pub(crate) struct FirstSeen<State> {
    files: HashMap<RunId, (State, Instant)>,
}

impl<State> Default for FirstSeen<State> {
    fn default() -> Self {
        Self {
            files: HashMap::new(),
        }
    }
}

impl<State: PartialEq> FirstSeen<State> {
    /// The file is in this state `now`: how long it has been so, as far as we know.
    pub(crate) fn age(&mut self, id: RunId, state: State, now: Instant) -> Duration {
        match self.files.get(&id) {
            Some((was, since)) if *was == state => now.saturating_duration_since(*since),
            _ => {
                self.files.insert(id, (state, now));
                Duration::ZERO
            }
        }
    }

    /// It is gone, or was dealt with.
    pub(crate) fn forget(&mut self, id: RunId) {
        self.files.remove(&id);
    }

    /// Forgets everything else: the memory this takes is bounded by the files there are.
    pub(crate) fn keep(&mut self, is_there: impl Fn(RunId) -> bool) {
        self.files.retain(|id, _| is_there(*id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_as_old_as_its_last_change_that_was_seen() {
        let mut seen = FirstSeen::default();
        let (id, begin) = (RunId::random(), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        assert_eq!(seen.age(id, 1, at(0)), Duration::ZERO);
        assert_eq!(seen.age(id, 1, at(3)), Duration::from_secs(3));
        assert_eq!(seen.age(id, 2, at(4)), Duration::ZERO);
        assert_eq!(seen.age(id, 2, at(5)), Duration::from_secs(1));
        seen.keep(|_| false);
        assert_eq!(seen.age(id, 2, at(6)), Duration::ZERO);
        seen.forget(id);
        assert_eq!(seen.age(id, 2, at(7)), Duration::ZERO);
    }
}
