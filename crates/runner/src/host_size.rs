//! The size of this host.

use std::io;
use std::path::Path;

use host::fs::Space;

/// What the host has, before anything is taken off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostSize {
    /// CPUs this process may use.
    pub(crate) vcpu: u32,
    /// The smaller of the machine's memory and our cgroup's limit, MiB.
    pub(crate) memory_mb: u64,
    /// Free disk below the home, MiB.
    pub(crate) disk_mb: u64,
}

impl HostSize {
    /// Looks at this machine; `disks` is where VM disks are kept.
    pub(crate) fn detect(disks: &Path) -> io::Result<Self> {
        let meminfo = std::fs::read_to_string("/proc/meminfo")?;
        let installed = mem_total_mb(&meminfo)
            .ok_or_else(|| io::Error::other("/proc/meminfo does not tell MemTotal"))?;
        let vcpu = std::thread::available_parallelism()?.get();
        Ok(Self {
            vcpu: u32::try_from(vcpu).unwrap_or(u32::MAX),
            memory_mb: installed.min(cgroup_limit_mb().unwrap_or(u64::MAX)),
            disk_mb: Space::of(disks)?.free_mb(),
        })
    }
}

fn mem_total_mb(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find(|line| line.starts_with("MemTotal:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes / 1024)
}

/// The tightest memory limit of the cgroups we are in, v1 or v2.
fn cgroup_limit_mb() -> Option<u64> {
    let membership = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut tightest: Option<u64> = None;
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            list if list.split(',').any(|c| c == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        // A limit of a parent binds too.
        for ancestor in Path::new(path).ancestors() {
            let relative = ancestor.strip_prefix("/").unwrap_or(ancestor);
            let limit = std::fs::read_to_string(Path::new(root).join(relative).join(file))
                .ok()
                .and_then(|text| text.trim().parse::<u64>().ok());
            if let Some(bytes) = limit {
                tightest = Some(tightest.map_or(bytes, |t| t.min(bytes)));
            }
        }
    }
    tightest.map(|bytes| bytes >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_can_be_measured() {
        let size = HostSize::detect(Path::new("/")).unwrap();
        assert!(size.vcpu >= 1 && size.memory_mb > 100);
        assert_eq!(mem_total_mb("MemFree: 1 kB\nMemTotal:  2048 kB\n"), Some(2));
    }
}
