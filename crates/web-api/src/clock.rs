//! The time, as tests can set it.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use api_types::UnixMillis;

/// The wall clock. What it says goes into tokens and before people's eyes; leases are measured by the steady clock.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    offset_millis: Arc<AtomicI64>,
}

impl Clock {
    /// A clock that goes wrong by this much, milliseconds.
    pub fn skewed(millis: i64) -> Self {
        let clock = Self::default();
        clock.set_offset(millis);
        clock
    }

    /// From now on it goes wrong by this much, milliseconds.
    pub fn set_offset(&self, millis: i64) {
        self.offset_millis.store(millis, Ordering::Relaxed);
    }

    /// Now.
    pub fn now(&self) -> UnixMillis {
        let millis = jiff::Timestamp::now()
            .as_millisecond()
            .saturating_add(self.offset_millis.load(Ordering::Relaxed));
        u64::try_from(millis).unwrap_or(0)
    }
}
