//! What the VM's use of CPU, memory and disk is, from `/proc` and the file system of the home.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

/// Takes samples; CPU is counted since the last one.
#[derive(Default)]
pub(crate) struct Meter {
    last: Option<Ticks>,
}

#[derive(Clone, Copy)]
struct Ticks {
    busy: u64,
    all: u64,
}

impl Meter {
    /// A sample: `ts` (milliseconds since the epoch), `cpu` (percent of all CPUs since the last sample), `mem_used`,
    /// `mem_total`, `disk_used`, `disk_total` (bytes). What cannot be read is left out.
    pub(crate) fn sample(&mut self) -> Map<String, Value> {
        let mut sample = Map::new();
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let ts = since.map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        });
        sample.insert("ts".into(), json!(ts));
        let ticks = fs::read_to_string("/proc/stat")
            .ok()
            .and_then(|text| parse_stat(&text));
        if let (Some(now), Some(last)) = (ticks, self.last) {
            let all = now.all.saturating_sub(last.all).max(1);
            let busy = now.busy.saturating_sub(last.busy);
            // Hundredths of a percent, in whole numbers.
            let hundredths = busy.saturating_mul(10_000) / all;
            let percent = f64::from(u32::try_from(hundredths).unwrap_or(u32::MAX)) / 100.0;
            sample.insert("cpu".into(), json!(percent));
        }
        self.last = ticks.or(self.last);
        let memory = fs::read_to_string("/proc/meminfo")
            .ok()
            .and_then(|text| parse_meminfo(&text));
        if let Some((used, total)) = memory {
            sample.insert("mem_used".into(), json!(used));
            sample.insert("mem_total".into(), json!(total));
        }
        if let Ok(disk) = rustix::fs::statvfs("/") {
            let total = disk.f_blocks.saturating_mul(disk.f_frsize);
            let free = disk.f_bfree.saturating_mul(disk.f_frsize);
            sample.insert("disk_used".into(), json!(total.saturating_sub(free)));
            sample.insert("disk_total".into(), json!(total));
        }
        sample
    }
}

/// The first line of `/proc/stat` (proc_stat(5)): user, nice, system, idle, iowait, irq, softirq, steal, …
fn parse_stat(text: &str) -> Option<Ticks> {
    let mut fields = text.lines().next()?.split_ascii_whitespace();
    if fields.next()? != "cpu" {
        return None;
    }
    let times: Vec<u64> = fields
        .map_while(|field| field.parse().ok())
        .take(8)
        .collect();
    let idle = times.get(3)?.saturating_add(*times.get(4)?);
    let all: u64 = times.iter().sum();
    Some(Ticks {
        busy: all.saturating_sub(idle),
        all,
    })
}

/// `MemTotal` less `MemAvailable`, and `MemTotal` (proc_meminfo(5)), in bytes.
fn parse_meminfo(text: &str) -> Option<(u64, u64)> {
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    let total = field("MemTotal:")?;
    Some((total.saturating_sub(field("MemAvailable:")?), total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_every_figure_from_the_second_on() {
        let mut meter = Meter::default();
        assert!(!meter.sample().contains_key("cpu"));
        let sample = meter.sample();
        for name in [
            "ts",
            "cpu",
            "mem_used",
            "mem_total",
            "disk_used",
            "disk_total",
        ] {
            assert!(sample.contains_key(name), "{name} {sample:?}");
        }
    }

    #[test]
    fn procs_files_are_understood_and_others_are_not() {
        let ticks = parse_stat("cpu  10 0 5 80 5 0 0 0 0 0\ncpu0 …").unwrap();
        assert_eq!((ticks.busy, ticks.all), (15, 100));
        assert!(parse_stat("intr 1").is_none());
        assert!(parse_stat("cpu 1 2").is_none());
        let memory = "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:    400 kB\n";
        assert_eq!(parse_meminfo(memory), Some((600 * 1024, 1000 * 1024)));
        assert_eq!(parse_meminfo("MemTotal: 1 kB"), None);
    }
}
