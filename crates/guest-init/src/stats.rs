//! Figures about the guest.

use guest_control::GuestStats;
use guest_control::server::OsError;

use crate::root::Root;

/// Gathers them; `root` is the agent's root where it is mounted.
pub(crate) fn gather(root: Option<&Root>) -> Result<GuestStats, OsError> {
    let meminfo = std::fs::read_to_string("/proc/meminfo")
        .map_err(|error| OsError::new("reading /proc/meminfo", error))?;
    Ok(GuestStats {
        mem_total_kb: kilobytes(&meminfo, "MemTotal:"),
        mem_available_kb: kilobytes(&meminfo, "MemAvailable:"),
        disk_free_bytes: root.map_or(Ok(0), Root::free_bytes)?,
        processes: u32::from(rustix::system::sysinfo().procs),
    })
}

/// A value of /proc/meminfo; 0 when it is not there.
pub(crate) fn kilobytes(meminfo: &str, name: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|value| value.trim().trim_end_matches(" kB").parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_meminfo() {
        let text = "MemTotal:         496404 kB\nMemFree:  1 kB\nMemAvailable:     450000 kB\n";
        assert_eq!(kilobytes(text, "MemTotal:"), 496_404);
        assert_eq!(kilobytes(text, "MemAvailable:"), 450_000);
        assert_eq!(kilobytes(text, "Cached:"), 0);
    }
}
