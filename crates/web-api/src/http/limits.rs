//! How much is let in at once. Beyond it the answer is 429 with `Retry-After`, at once, rather than a long wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most of each at once.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Requests of clients that are worked on; as many of runners, and of guests.
    pub requests: usize,
    /// Requests of one API key or runner token, also those that are still arriving.
    pub per_token: usize,
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
            per_token: 512,
            waiters: 8192,
            followers: 8192,
            per_guest: 8,
        }
    }
}

/// The gate.
#[derive(Debug)]
pub struct Limits {
    /// For requests of clients. Each kind has places of its own: none keeps another out.
    pub clients: Arc<Semaphore>,
    /// For requests of runners, which renew leases.
    pub runners: Arc<Semaphore>,
    /// For requests of guests.
    pub guests: Arc<Semaphore>,
    /// For those who wait for work.
    pub waiters: Arc<Semaphore>,
    /// For followers.
    pub followers: Arc<Semaphore>,
    tokens: Counts,
    runs: Counts,
}

/// How many places each of many has.
#[derive(Debug)]
struct Counts {
    most: usize,
    taken: Arc<Mutex<HashMap<String, usize>>>,
}

/// One place of one of them; given back when dropped.
#[derive(Debug)]
pub struct Counted {
    key: String,
    taken: Arc<Mutex<HashMap<String, usize>>>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.key) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                taken.remove(&self.key);
            }
        }
    }
}

impl Counts {
    fn new(most: usize) -> Self {
        Self {
            most,
            taken: Arc::default(),
        }
    }

    fn take(&self, key: &str) -> Option<Counted> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.entry(key.to_owned()).or_default();
        if *count >= self.most {
            return None;
        }
        *count = count.saturating_add(1);
        Some(Counted {
            key: key.to_owned(),
            taken: Arc::clone(&self.taken),
        })
    }
}

impl Limits {
    /// A gate with these ceilings.
    pub fn new(ceilings: Ceilings) -> Self {
        let places = |most| Arc::new(Semaphore::new(most));
        Self {
            clients: places(ceilings.requests),
            runners: places(ceilings.requests),
            guests: places(ceilings.requests),
            waiters: places(ceilings.waiters),
            followers: places(ceilings.followers),
            tokens: Counts::new(ceilings.per_token),
            runs: Counts::new(ceilings.per_guest),
        }
    }

    /// A place for a request with the token of this id.
    pub fn token(&self, id: &str) -> Option<Counted> {
        self.tokens.take(id)
    }

    /// A place for a guest of this run.
    pub fn guest(&self, run: &str) -> Option<Counted> {
        self.runs.take(run)
    }
}

/// A place, if one is free.
pub fn place(semaphore: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    Arc::clone(semaphore).try_acquire_owned().ok()
}

/// What a request has of the places until it is answered.
#[derive(Debug)]
pub(super) struct Seat {
    places: Arc<Semaphore>,
    taken: Mutex<Option<OwnedSemaphorePermit>>,
    counted: Mutex<Option<Counted>>,
}

impl Seat {
    pub(super) fn take(places: Arc<Semaphore>) -> Option<Self> {
        Some(Self {
            taken: Mutex::new(Some(place(&places)?)),
            places,
            counted: Mutex::default(),
        })
    }

    /// Counts it among those of its token, too.
    pub(super) fn count(&self, counted: Counted) {
        *self.counted.lock().unwrap_or_else(PoisonError::into_inner) = Some(counted);
    }

    /// Who waits for the body leaves the place to others: how long it takes is up to the sender.
    pub(super) fn leave(&self) {
        drop(self.taken().take());
    }

    /// Whether there is a place again.
    pub(super) fn come_back(&self) -> bool {
        let again = place(&self.places);
        let there = again.is_some();
        *self.taken() = again;
        there
    }

    fn taken(&self) -> std::sync::MutexGuard<'_, Option<OwnedSemaphorePermit>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
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

    #[test]
    fn who_waits_for_a_body_has_no_place_and_may_find_none_afterwards() {
        let places = Arc::new(Semaphore::new(1));
        let first = Seat::take(Arc::clone(&places)).unwrap();
        assert!(Seat::take(Arc::clone(&places)).is_none());
        first.leave();
        let second = Seat::take(Arc::clone(&places)).unwrap();
        assert!(!first.come_back());
        drop(second);
        assert!(first.come_back());
        drop(first);
        assert_eq!(places.available_permits(), 1);
    }
}
