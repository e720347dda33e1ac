//! The time stamp counter's frequency, which an emulated x86_64 guest reads straight from the host.

/// How far two measurements of one counter may be apart, parts per million.
///
/// A template's guest believes in the frequency measured when it was made, so its clones' clocks run wrong by the
/// difference. 500 ppm (1.8 s in an hour) is the largest error of a clock that NTP holds to be correctable (RFC 5905,
/// MAXFREQ); the measurement itself is good to some tens of ppm, and hosts of another nominal frequency are off by
/// thousands.
pub(crate) const TOLERANCE_PPM: u64 = 500;

/// Whether a template made at `recorded` kHz keeps time on a host measured at `measured` kHz.
pub(crate) fn within_tolerance(recorded: u32, measured: u32) -> bool {
    let difference = u64::from(recorded.abs_diff(measured));
    difference * 1_000_000 <= u64::from(recorded) * TOLERANCE_PPM
}

/// Measures the counter against `CLOCK_MONOTONIC_RAW` over 100 ms, in kHz. Blocks for that long.
#[cfg(target_arch = "x86_64")]
pub(crate) fn measure_khz() -> Option<u32> {
    const WINDOW: std::time::Duration = std::time::Duration::from_millis(100);
    let (tsc_start, raw_start) = reading();
    std::thread::sleep(WINDOW);
    let (tsc_end, raw_end) = reading();
    let nanoseconds = raw_end.checked_sub(raw_start)?;
    let ticks = tsc_end.checked_sub(tsc_start)?;
    // ticks / ns × 10⁶ = kHz.
    let khz = u128::from(ticks) * 1_000_000 / u128::from(nanoseconds).max(1);
    u32::try_from(khz).ok().filter(|khz| *khz > 0)
}

/// Other architectures' guests do not read such a counter.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn measure_khz() -> Option<u32> {
    None
}

/// A (counter, nanoseconds) pair taken as close together as a busy host allows: the tightest of several tries.
#[cfg(target_arch = "x86_64")]
fn reading() -> (u64, u64) {
    (0..16)
        .map(|_| {
            let before = rdtsc();
            let raw = raw_ns();
            let after = rdtsc();
            (after.wrapping_sub(before), before.midpoint(after), raw)
        })
        .min_by_key(|(spread, _, _)| *spread)
        .map_or((0, 0), |(_, tsc, raw)| (tsc, raw))
}

#[cfg(target_arch = "x86_64")]
fn rdtsc() -> u64 {
    // SAFETY: every x86_64 CPU has the instruction; Linux does not forbid it to user space unless asked to.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(target_arch = "x86_64")]
fn raw_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicRaw);
    u64::try_from(now.tv_sec)
        .unwrap_or(0)
        .saturating_mul(1_000_000_000)
        .saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_pass_and_other_frequencies_do_not() {
        assert!(within_tolerance(2_000_000, 2_000_000));
        assert!(within_tolerance(2_000_000, 2_001_000));
        assert!(!within_tolerance(2_000_000, 2_001_001));
        assert!(!within_tolerance(2_000_000, 1_996_000));
        assert!(!within_tolerance(2_000_000, 2_445_000));
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn two_measurements_agree() {
        let (Some(a), Some(b)) = (measure_khz(), measure_khz()) else {
            panic!("an x86_64 host has a time stamp counter");
        };
        assert!(within_tolerance(a, b), "{a} and {b} kHz");
    }
}
