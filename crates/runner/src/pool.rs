//! How many warm VMs of a profile are kept ready, and when the next is made.
//!
//! The target starts at the low mark, grows by one with every job that found none ready, up to the high mark, and
//! falls back by one a minute when none misses. Making a VM costs as much as running a short job, so the pool is
//! refilled when no job is just starting; a preparation that fails is tried again later and later.

use std::time::{Duration, Instant};

use crate::config::WarmConfig;

/// After this long without a miss the target falls by one.
const DECAY: Duration = Duration::from_secs(60);
/// First wait after a failure; it doubles with every further one.
const BACKOFF: Duration = Duration::from_secs(1);
/// Longest wait after a failure.
const MAX_BACKOFF: Duration = Duration::from_secs(60);
/// Wait after the host had no room for a warm VM.
const NO_ROOM: Duration = Duration::from_secs(2);

/// The pool of one profile, as numbers; the VMs themselves are the daemon's.
#[derive(Debug)]
pub(crate) struct Pool {
    marks: WarmConfig,
    target: u32,
    preparing: u32,
    failures: u32,
    not_before: Option<Instant>,
    calm_since: Instant,
    last_error: Option<String>,
}

impl Pool {
    /// An empty pool with these marks.
    pub(crate) fn new(marks: WarmConfig, now: Instant) -> Self {
        Self {
            marks,
            target: marks.low,
            preparing: 0,
            failures: 0,
            not_before: None,
            calm_since: now,
            last_error: None,
        }
    }

    /// How many VMs it tries to keep ready.
    pub(crate) fn target(&self) -> u32 {
        self.target
    }

    /// How many are being made.
    pub(crate) fn preparing(&self) -> u32 {
        self.preparing
    }

    /// Why the last preparation failed, until one succeeds.
    pub(crate) fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// A job found no VM ready.
    pub(crate) fn missed(&mut self, now: Instant) {
        self.target = self.target.saturating_add(1).min(self.marks.high);
        self.calm_since = now;
    }

    /// Whether one more VM should be made now, `ready` being there.
    pub(crate) fn wants_one(&self, ready: u32, now: Instant) -> bool {
        ready.saturating_add(self.preparing) < self.target
            && self.not_before.is_none_or(|at| at <= now)
    }

    /// One is being made.
    pub(crate) fn started(&mut self) {
        self.preparing = self.preparing.saturating_add(1);
    }

    /// One is ready.
    pub(crate) fn succeeded(&mut self) {
        self.preparing = self.preparing.saturating_sub(1);
        self.failures = 0;
        self.not_before = None;
        self.last_error = None;
    }

    /// The host had no room for one.
    pub(crate) fn had_no_room(&mut self, now: Instant) {
        self.preparing = self.preparing.saturating_sub(1);
        self.not_before = Some(now + NO_ROOM);
    }

    /// Making one failed.
    pub(crate) fn failed(&mut self, error: String, now: Instant) {
        self.preparing = self.preparing.saturating_sub(1);
        self.broke(error, now);
    }

    /// A VM that was ready died by itself.
    pub(crate) fn broke(&mut self, error: String, now: Instant) {
        let wait = BACKOFF.saturating_mul(2_u32.saturating_pow(self.failures.min(16)));
        self.failures = self.failures.saturating_add(1);
        self.not_before = Some(now + wait.min(MAX_BACKOFF));
        self.last_error = Some(error);
    }

    /// Lets the target fall when it is time.
    pub(crate) fn settle(&mut self, now: Instant) {
        if self.target > self.marks.low && now.saturating_duration_since(self.calm_since) >= DECAY {
            self.target = self.target.saturating_sub(1);
            self.calm_since = now;
        }
    }

    /// When it should be asked again although nothing happens.
    pub(crate) fn deadline(&self, ready: u32) -> Option<Instant> {
        let decay = (self.target > self.marks.low).then(|| self.calm_since + DECAY);
        let retry = self
            .not_before
            .filter(|_| ready.saturating_add(self.preparing) < self.target);
        decay.into_iter().chain(retry).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKS: WarmConfig = WarmConfig { low: 1, high: 3 };

    #[test]
    fn the_target_grows_with_misses_and_falls_in_calm() {
        let start = Instant::now();
        let mut pool = Pool::new(MARKS, start);
        assert_eq!(pool.target(), 1);
        for _ in 0..5 {
            pool.missed(start);
        }
        assert_eq!(pool.target(), 3);
        pool.settle(start + DECAY - Duration::from_millis(1));
        assert_eq!(pool.target(), 3);
        assert_eq!(pool.deadline(3), Some(start + DECAY));
        pool.settle(start + DECAY);
        pool.settle(start + 2 * DECAY);
        pool.settle(start + 3 * DECAY);
        assert_eq!(pool.target(), 1);
    }

    #[test]
    fn those_being_made_count_and_failures_back_off() {
        let start = Instant::now();
        let mut pool = Pool::new(MARKS, start);
        assert!(pool.wants_one(0, start));
        assert!(!pool.wants_one(1, start));
        pool.started();
        assert!(!pool.wants_one(0, start));
        pool.failed("broken".to_owned(), start);
        assert!(!pool.wants_one(0, start));
        assert_eq!(pool.last_error(), Some("broken"));
        assert_eq!(pool.deadline(0), Some(start + BACKOFF));
        assert!(pool.wants_one(0, start + BACKOFF));
        pool.started();
        pool.failed("broken".to_owned(), start);
        assert!(!pool.wants_one(0, start + BACKOFF));
        for _ in 0..40 {
            pool.started();
            pool.failed("broken".to_owned(), start);
        }
        assert!(pool.wants_one(0, start + MAX_BACKOFF));
        pool.started();
        pool.succeeded();
        assert_eq!(pool.last_error(), None);
    }
}
