//! Logs: of jobs, of what they did in the network, of daemons; by age and by what all of them take.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use host::fs::{Dir, EntryKind, FsError};

use super::{Collector, Kind, modified, size};
use crate::audit::{ASIDE, SUFFIX};
use crate::home::rel::{self, LOGS};
use crate::names::{RunId, RunnerName};

/// Whose log a file is, by its name.
#[derive(Debug, PartialEq, Eq)]
enum Owner {
    Run(RunId),
    /// The log that a daemon of this name writes now.
    Runner(RunnerName),
    /// One that was put aside: nobody writes to it any more.
    Nobody,
    /// An audit log that was put aside.
    Audit,
}

fn owner(name: &OsStr) -> Option<Owner> {
    let name = name.to_str()?;
    let run = |prefix: &str, suffix: &str| {
        let id = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
        id.parse().ok().map(Owner::Run)
    };
    let runner = |suffix: &str| {
        let runner = name.strip_prefix("runner-")?.strip_suffix(suffix)?;
        runner.parse::<RunnerName>().ok()
    };
    run("system-", ".log")
        .or_else(|| run("network-", ".jsonl"))
        .or_else(|| runner(".log").map(Owner::Runner))
        .or_else(|| runner(".log.1").map(|_| Owner::Nobody))
        .or_else(|| {
            let stamp = name.strip_prefix(ASIDE)?.strip_suffix(SUFFIX)?;
            let fits = |byte: u8| byte.is_ascii_alphanumeric() || b".-".contains(&byte);
            stamp.bytes().all(fits).then_some(Owner::Audit)
        })
}

pub(super) fn collect(collector: &mut Collector<'_>) -> Result<(), FsError> {
    let Some(logs) = collector.dir(LOGS)? else {
        return Ok(());
    };
    let active = collector.active()?;
    let mut found: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    let mut total = 0_u64;
    for entry in logs.list()? {
        let (Some(owner), EntryKind::File) = (owner(&entry.name), entry.kind) else {
            continue;
        };
        let name = PathBuf::from(&entry.name);
        let Some(written) = modified(&logs, &name) else {
            // It went while we looked.
            continue;
        };
        let bytes = size(&logs, &name);
        if owner == Owner::Audit {
            // They do not count among the others, which a job can make large.
            let age = collector.age(written);
            if collector.rules.audit_age.is_some_and(|most| age > most) {
                remove(collector, &logs, &name, bytes, written);
            }
            continue;
        }
        total = total.saturating_add(bytes);
        let in_use = match owner {
            Owner::Run(run) => active.contains(&run),
            Owner::Runner(runner) => runs(collector, &runner),
            Owner::Nobody | Owner::Audit => false,
        };
        if !in_use && !collector.is_young(written) {
            found.push((written, bytes, name));
        }
    }
    // Oldest first.
    found.sort();
    let mut over = collector
        .rules
        .logs_max
        .map_or(0, |max| total.saturating_sub(max));
    for (written, bytes, name) in found {
        if over == 0 && collector.age(written) < collector.rules.logs_age {
            // All that follow are younger.
            break;
        }
        if remove(collector, &logs, &name, bytes, written) {
            over = over.saturating_sub(bytes);
        }
    }
    Ok(())
}

fn remove(
    collector: &mut Collector<'_>,
    logs: &Dir,
    name: &Path,
    bytes: u64,
    written: SystemTime,
) -> bool {
    let path = Path::new(LOGS).join(name);
    collector.remove(Kind::Log, &path, bytes, written, || {
        logs.remove_file(name).map(drop)
    })
}

/// Whether a daemon of this name runs; one that cannot be looked at does.
fn runs(collector: &Collector<'_>, runner: &RunnerName) -> bool {
    let lock = rel::runner(runner).join("runner.lock");
    collector.home.dir().is_locked(lock).unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_logs_are_logs() {
        let run = RunId::random();
        let is = |name: &str| owner(OsStr::new(name));
        assert_eq!(is(&format!("system-{run}.log")), Some(Owner::Run(run)));
        assert_eq!(is(&format!("network-{run}.jsonl")), Some(Owner::Run(run)));
        assert!(matches!(is("runner-demo.log"), Some(Owner::Runner(_))));
        assert_eq!(is("runner-demo.log.1"), Some(Owner::Nobody));
        assert_eq!(
            is("audit-20261124T105900.123Z-6f1c2f0e.jsonl"),
            Some(Owner::Audit)
        );
        for other in [
            "audit.jsonl",
            "notes.txt",
            "system-x.log",
            "runner-.log",
            "runner-../x.log",
        ] {
            assert_eq!(is(other), None, "{other}");
        }
    }
}
