//! How much is let in at once. Beyond it the answer is 429 with `Retry-After`, at once, rather than a long wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most of each at once.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Requests that are worked on.
    pub requests: usize,
    /// Runners that wait for work, by poll or WebSocket.
    pub waiters: usize,
    /// Followers of feeds.
    pub followers: usize,
    /// Requests of one guest.
    pub per_guest: usize,
}

impl Default for Ceilings {
    fn default() -> Self {
        Self {
            requests: 1024,
            waiters: 8192,
            followers: 8192,
            per_guest: 8,
        }
    }
}

/// The gate.
#[derive(Debug)]
pub struct Limits {
    /// For requests.
    pub requests: Arc<Semaphore>,
    /// For those who wait for work.
    pub waiters: Arc<Semaphore>,
    /// For followers.
    pub followers: Arc<Semaphore>,
    guests: Arc<Mutex<HashMap<String, usize>>>,
    per_guest: usize,
}

/// One place of a guest; given back when dropped.
#[derive(Debug)]
pub struct GuestPlace {
    key: String,
    guests: Arc<Mutex<HashMap<String, usize>>>,
}

impl Drop for GuestPlace {
    fn drop(&mut self) {
        let mut guests = self.guests.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = guests.get_mut(&self.key) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                guests.remove(&self.key);
            }
        }
    }
}

impl Limits {
    /// A gate with these ceilings.
    pub fn new(ceilings: Ceilings) -> Self {
        Self {
            requests: Arc::new(Semaphore::new(ceilings.requests)),
            waiters: Arc::new(Semaphore::new(ceilings.waiters)),
            followers: Arc::new(Semaphore::new(ceilings.followers)),
            guests: Arc::default(),
            per_guest: ceilings.per_guest,
        }
    }

    /// A place for a guest of this run.
    pub fn guest(&self, run: &str) -> Option<GuestPlace> {
        let mut guests = self.guests.lock().unwrap_or_else(PoisonError::into_inner);
        let count = guests.entry(run.to_owned()).or_default();
        if *count >= self.per_guest {
            return None;
        }
        *count = count.saturating_add(1);
        Some(GuestPlace {
            key: run.to_owned(),
            guests: Arc::clone(&self.guests),
        })
    }
}

/// A place, if one is free.
pub fn place(semaphore: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    Arc::clone(semaphore).try_acquire_owned().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_places_are_its_own_and_come_back() {
        let limits = Limits::new(Ceilings {
            per_guest: 2,
            ..Ceilings::default()
        });
        let (a, _b) = (limits.guest("1").unwrap(), limits.guest("1").unwrap());
        assert!(limits.guest("1").is_none());
        assert!(limits.guest("2").is_some());
        drop(a);
        assert!(limits.guest("1").is_some());
    }
}
