//! What stands between the standard library's locks and their users.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes a lock whatever became of who had it before: for values that are whole between any two operations on them.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
