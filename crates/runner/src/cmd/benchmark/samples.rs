//! Durations, and what is said of them.

use std::time::Duration;

use serde::Serialize;

/// Measured durations of one thing.
#[derive(Clone, Debug, Default)]
pub(super) struct Samples(Vec<Duration>);

/// Percentiles by nearest rank.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Figures {
    pub(super) p50: f64,
    pub(super) p95: f64,
    pub(super) p99: f64,
    pub(super) n: usize,
}

impl Samples {
    /// One more.
    pub(super) fn push(&mut self, took: Duration) {
        self.0.push(took);
    }

    /// Each less `floor`, which is another measurement's median.
    pub(super) fn above(&self, floor: Duration) -> Self {
        Self(
            self.0
                .iter()
                .map(|took| took.saturating_sub(floor))
                .collect(),
        )
    }

    /// The middle one.
    pub(super) fn median(&self) -> Duration {
        Duration::from_secs_f64(self.figures(1.0).p50)
    }

    /// In milliseconds.
    pub(super) fn milliseconds(&self) -> Figures {
        self.figures(1e3)
    }

    /// In milliseconds, where anything was measured.
    pub(super) fn some_milliseconds(&self) -> Option<Figures> {
        (!self.0.is_empty()).then(|| self.milliseconds())
    }

    /// In microseconds.
    pub(super) fn microseconds(&self) -> Figures {
        self.figures(1e6)
    }

    fn figures(&self, unit: f64) -> Figures {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let n = sorted.len();
        let rank = |percent: usize| {
            let rank = (n * percent).div_ceil(100).max(1);
            let took = sorted.get(rank - 1).copied().unwrap_or_default();
            (took.as_secs_f64() * unit * 1e3).round() / 1e3
        };
        Figures {
            p50: rank(50),
            p95: rank(95),
            p99: rank(99),
            n,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_values() {
        let mut samples = Samples::default();
        for ms in (1..=200).rev() {
            samples.push(Duration::from_millis(ms));
        }
        assert_eq!(
            samples.milliseconds(),
            Figures {
                p50: 100.0,
                p95: 190.0,
                p99: 198.0,
                n: 200
            }
        );
        assert_eq!(
            samples.above(Duration::from_millis(150)).milliseconds().p50,
            0.0
        );
        let mut one = Samples::default();
        one.push(Duration::from_micros(7));
        assert_eq!(one.microseconds().p99, 7.0);
    }
}
