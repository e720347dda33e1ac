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
    /// KiB of large bodies of clients; as many of guests.
    pub body_kib: usize,
}

impl Default for Ceilings {
    fn default() -> Self {
        Self {
            requests: 1024,
            per_token: 512,
            waiters: 8192,
            followers: 8192,
            per_guest: 8,
            body_kib: 256 << 10,
        }
    }
}

/// Room for the requests of one kind.
#[derive(Clone, Debug)]
pub struct Room {
    /// Places.
    pub requests: Arc<Semaphore>,
    /// KiB of large bodies.
    pub bodies: Arc<Semaphore>,
}

/// The gate.
#[derive(Debug)]
pub struct Limits {
    /// For requests of clients. Each kind has room of its own: none keeps another out.
    pub clients: Room,
    /// For requests of runners, which renew leases.
    pub runners: Room,
    /// For requests of guests.
    pub guests: Room,
    /// For those who wait for work.
    pub waiters: Arc<Semaphore>,
    /// For followers.
    pub followers: Arc<Semaphore>,
    tokens: Counts,
    runs: Counts,
    checkpoints: Counts,
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
        let room = || Room {
            requests: places(ceilings.requests),
            bodies: places(ceilings.body_kib),
        };
        Self {
            clients: room(),
            runners: room(),
            guests: room(),
            waiters: places(ceilings.waiters),
            followers: places(ceilings.followers),
            tokens: Counts::new(ceilings.per_token),
            runs: Counts::new(ceilings.per_guest),
            checkpoints: Counts::new(1),
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

    /// The place for a checkpoint of this run.
    pub fn checkpoint(&self, run: &str) -> Option<Counted> {
        self.checkpoints.take(run)
    }
}

/// A place, if one is free.
pub fn place(semaphore: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    Arc::clone(semaphore).try_acquire_owned().ok()
}

/// What a request has of the room until it is answered.
#[derive(Debug)]
pub(super) struct Seat {
    room: Room,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    place: Option<OwnedSemaphorePermit>,
    body: Option<OwnedSemaphorePermit>,
    counted: Option<Counted>,
}

impl Seat {
    pub(super) fn take(room: Room) -> Option<Self> {
        let held = Held {
            place: Some(place(&room.requests)?),
            ..Held::default()
        };
        Some(Self {
            room,
            held: Mutex::new(held),
        })
    }

    /// Counts it among those of its token, too.
    pub(super) fn count(&self, counted: Counted) {
        self.held().counted = Some(counted);
    }

    /// Who waits for the body leaves the place to others: how long it takes is up to the sender.
    pub(super) fn leave(&self) {
        self.held().place = None;
    }

    /// Whether there is a place again.
    pub(super) fn come_back(&self) -> bool {
        let mut held = self.held();
        held.place = place(&self.room.requests);
        held.place.is_some()
    }

    /// Whether there is room for a large body of so many bytes.
    pub(super) fn spread(&self, bytes: u64) -> bool {
        let Ok(kib) = u32::try_from(bytes.div_ceil(1024)) else {
            return false;
        };
        let room = Arc::clone(&self.room.bodies);
        let mut held = self.held();
        held.body = room.try_acquire_many_owned(kib).ok();
        held.body.is_some()
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
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
        let room = Limits::new(Ceilings {
            requests: 1,
            body_kib: 100,
            ..Ceilings::default()
        })
        .clients;
        let first = Seat::take(room.clone()).unwrap();
        assert!(Seat::take(room.clone()).is_none());
        first.leave();
        let second = Seat::take(room.clone()).unwrap();
        assert!(!first.come_back());
        drop(second);
        assert!(first.come_back());

        assert!(!first.spread(100 * 1024 + 1));
        assert!(first.spread(100 * 1024));
        first.leave();
        let second = Seat::take(room.clone()).unwrap();
        assert!(!second.spread(1));
        drop(first);
        assert!(second.spread(1));
        drop(second);
        let left = (
            room.requests.available_permits(),
            room.bodies.available_permits(),
        );
        assert_eq!(left, (1, 100));
    }
}
