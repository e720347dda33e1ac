//! State that several tasks share and wait on.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// A value behind a lock, and the means to wait until it is as one wants it.
#[derive(Debug)]
pub(crate) struct Watched<S> {
    state: Mutex<S>,
    changed: Notify,
}

impl<S> Watched<S> {
    pub(crate) fn new(state: S) -> Self {
        Self {
            state: Mutex::new(state),
            changed: Notify::new(),
        }
    }

    /// Whoever changes what others wait for calls [`Watched::notify`] afterwards, best without the lock.
    pub(crate) fn lock(&self) -> MutexGuard<'_, S> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes everybody who waits look again.
    pub(crate) fn notify(&self) {
        self.changed.notify_waiters();
    }

    /// Waits until `ready` finds what it looks for.
    pub(crate) async fn until<T>(&self, mut ready: impl FnMut(&mut S) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before looking, so that no change is missed in between.
            changed.as_mut().enable();
            if let Some(found) = ready(&mut self.lock()) {
                return found;
            }
            changed.await;
        }
    }
}
