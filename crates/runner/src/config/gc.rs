//! `gc:` in `runner.yaml`: what the daemon removes by itself.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::gc::Rules;

/// What the daemon removes by itself, and how often it looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct GcConfig {
    /// Seconds between two looks; 0: it never looks.
    pub(crate) interval_secs: u64,
    /// Images and snapshots that no `runner.yaml` names and nobody has used for so many days go.
    pub(crate) images_days: u64,
    /// Most that images may take, MiB; beyond it those unused longest go. 0: no limit.
    pub(crate) images_max_mb: u64,
    /// Logs go after so many days.
    pub(crate) logs_days: u64,
    /// Most that logs may take, MiB; beyond it the oldest go. 0: no limit.
    pub(crate) logs_max_mb: u64,
    /// Lines of the audit log go after so many days.
    pub(crate) audit_days: u64,
}

impl Default for GcConfig {
    fn default() -> Self {
        Self {
            interval_secs: 3600,
            images_days: 14,
            images_max_mb: 0,
            logs_days: LOGS_DAYS,
            logs_max_mb: 10 << 10,
            audit_days: 90,
        }
    }
}

/// Default of `logs_days`, and of `runner gc --logs-days`.
pub(crate) const LOGS_DAYS: u64 = 7;
/// Ten years: more is a mistake in the unit.
const MAX_DAYS: u64 = 3650;
const DAY: u64 = 24 * 3600;

/// A number of days as a length of time.
pub(crate) fn days(days: u64) -> Duration {
    Duration::from_secs(days.saturating_mul(DAY))
}

impl GcConfig {
    /// Its keys with their bounds.
    pub(super) fn bounds(&self) -> [(&'static str, u64, RangeInclusive<u64>); 6] {
        [
            ("gc.interval_secs", self.interval_secs, 0..=7 * DAY),
            ("gc.images_days", self.images_days, 0..=MAX_DAYS),
            ("gc.images_max_mb", self.images_max_mb, 0..=1 << 30),
            ("gc.logs_days", self.logs_days, 1..=MAX_DAYS),
            ("gc.logs_max_mb", self.logs_max_mb, 0..=1 << 30),
            ("gc.audit_days", self.audit_days, 1..=MAX_DAYS),
        ]
    }

    /// Time between two looks; `None`: it never looks.
    pub(crate) fn interval(&self) -> Option<Duration> {
        (self.interval_secs > 0).then(|| Duration::from_secs(self.interval_secs))
    }

    /// What may go.
    pub(crate) fn rules(&self) -> Rules {
        let max = |mb: u64| (mb > 0).then_some(mb << 20);
        Rules {
            keep_latest: 0,
            young: Rules::YOUNG,
            images_unused: days(self.images_days),
            images_max: max(self.images_max_mb),
            logs_age: days(self.logs_days),
            logs_max: max(self.logs_max_mb),
            audit_age: Some(days(self.audit_days)),
            dry_run: false,
        }
    }
}
