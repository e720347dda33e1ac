//! What upstream servers said, for as long as they said it holds.

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest that an answer is kept, and that a client is told to keep it: what `on_answer` opens need not stay open
/// longer.
pub(crate) const MAX_TTL: Duration = Duration::from_secs(300);

/// What is known about a name's IPv4 addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// These.
    Addresses(Vec<Ipv4Addr>),
    /// It exists and has none.
    NoAddress,
    /// It does not exist.
    NoName,
}

/// Answers by name; the oldest make room. All clients share it: it holds what servers say to anybody, before any policy.
#[derive(Debug)]
pub(crate) struct Cache {
    most: usize,
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    by_name: HashMap<String, Entry>,
    /// Names in the order in which they came, with the entry's number: an older number is a replaced entry's.
    order: VecDeque<(String, u64)>,
    next: u64,
}

#[derive(Debug)]
struct Entry {
    known: Known,
    until: Instant,
    number: u64,
}

impl Cache {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            most,
            entries: Mutex::default(),
        }
    }

    /// What is known, and for how much longer.
    pub(crate) fn get(&self, name: &str, now: Instant) -> Option<(Known, Duration)> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.by_name.get(name)?;
        let left = entry
            .until
            .checked_duration_since(now)
            .filter(|left| !left.is_zero())?;
        Some((entry.known.clone(), left))
    }

    /// Keeps an answer. What holds for no time at all is not kept.
    pub(crate) fn put(&self, name: &str, known: Known, ttl: Duration, now: Instant) {
        if ttl.is_zero() || self.most == 0 {
            return;
        }
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let Entries {
            by_name,
            order,
            next,
        } = &mut *entries;
        *next = next.wrapping_add(1);
        by_name.insert(
            name.to_owned(),
            Entry {
                known,
                until: now + ttl.min(MAX_TTL),
                number: *next,
            },
        );
        order.push_back((name.to_owned(), *next));
        let is_current = |by_name: &HashMap<String, Entry>, (name, number): &(String, u64)| {
            by_name
                .get(name)
                .is_some_and(|entry| entry.number == *number)
        };
        // Names that are renewed again and again leave old places behind.
        if order.len() > self.most.saturating_mul(2) {
            order.retain(|place| is_current(by_name, place));
        }
        while by_name.len() > self.most {
            let Some(place) = order.pop_front() else {
                break;
            };
            if is_current(by_name, &place) {
                by_name.remove(&place.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> Known {
        Known::Addresses(vec![Ipv4Addr::new(198, 18, 0, last)])
    }

    #[test]
    fn answers_are_kept_as_long_as_they_hold_and_never_longer_than_the_bound() {
        let cache = Cache::new(10);
        let now = Instant::now();
        let second = Duration::from_secs(1);
        cache.put("a", address(1), 10 * second, now);
        cache.put("b", Known::NoName, 100_000 * second, now);
        cache.put("c", address(3), Duration::ZERO, now);
        assert_eq!(
            cache.get("a", now + 4 * second),
            Some((address(1), 6 * second))
        );
        assert_eq!(cache.get("a", now + 10 * second), None);
        assert_eq!(cache.get("b", now), Some((Known::NoName, MAX_TTL)));
        assert_eq!(cache.get("c", now), None);
        assert_eq!(cache.get("d", now), None);
    }

    #[test]
    fn the_oldest_make_room_and_renewed_names_stay() {
        let cache = Cache::new(3);
        let now = Instant::now();
        let ttl = Duration::from_secs(60);
        for name in ["a", "b", "c", "a", "d", "e"] {
            cache.put(name, address(1), ttl, now);
        }
        let kept: Vec<_> = ["a", "b", "c", "d", "e"]
            .into_iter()
            .filter(|name| cache.get(name, now).is_some())
            .collect();
        assert_eq!(kept, ["a", "d", "e"]);
        for _ in 0..1000 {
            cache.put("e", address(2), ttl, now);
        }
        assert!(cache.entries.lock().unwrap().order.len() <= 6);
        assert_eq!(
            cache.get("a", now),
            Some((address(1), ttl)),
            "one name does not push out others"
        );
    }
}
