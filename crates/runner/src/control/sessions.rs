//! Sessions that were detached and wait for somebody to attach again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use guest_control::Session;

use super::protocol::RunInfo;
use crate::names::RunId;

/// Detached sessions by number.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    last: AtomicU32,
    detached: Mutex<HashMap<u32, (RunId, Session)>>,
}

impl Sessions {
    /// A fresh number.
    pub(crate) fn number(&self) -> u32 {
        self.last.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
    }

    /// Keeps a session for a later attachment, and forgets those of runs that are not active any more.
    pub(crate) fn keep(&self, id: u32, run: RunId, session: Session, active: &[RunInfo]) {
        let mut detached = self.detached.lock().unwrap_or_else(PoisonError::into_inner);
        detached.retain(|_, (run, _)| active.iter().any(|info| info.run_id == *run));
        detached.insert(id, (run, session));
    }

    /// Takes a session out, if it is one of this run.
    pub(crate) fn take(&self, id: u32, run: RunId) -> Option<Session> {
        let mut detached = self.detached.lock().unwrap_or_else(PoisonError::into_inner);
        match detached.get(&id) {
            Some((of, _)) if *of == run => detached.remove(&id).map(|(_, session)| session),
            _ => None,
        }
    }
}
