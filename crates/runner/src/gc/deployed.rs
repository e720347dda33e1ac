//! Deployed runners below `bin/`: those that nobody starts any more, and what broken deploys left beside the others.
//!
//! In use is what a process executes, what a unit of systemd names, and what has a configuration. Which file a process
//! executes only root may see of all processes: without root nothing here is removed.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use host::fs::{Dir, EntryKind, FsError};

use super::{Collector, Kind, modified, size};
use crate::home::rel::{self, BIN};
use crate::names::RunnerName;

/// The one program in a deployed directory.
const PROGRAM: &str = "runner";
/// Where units of systemd are kept.
const UNITS: [&str; 3] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/run/systemd/transient",
];

pub(super) fn collect(collector: &mut Collector<'_>) -> Result<(), FsError> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let Some(bin) = collector.dir(BIN)? else {
        return Ok(());
    };
    let executed = executed();
    let units = units();
    for entry in bin.list()? {
        let Some(name) = entry.name.to_str().filter(|_| entry.kind == EntryKind::Dir) else {
            continue;
        };
        let directory = bin.open_dir(name)?;
        let runs = |directory: &Dir, file: &str| {
            let meta = directory.metadata(file).ok().flatten();
            meta.is_some_and(|meta| executed.contains(&(meta.dev(), meta.ino())))
        };
        let path = Path::new(BIN).join(name);
        let whole = collector.home.at(&path).display().to_string();
        let configured = name.parse::<RunnerName>().is_ok_and(|runner| {
            let yaml = collector.home.dir().metadata(rel::runner_yaml(&runner));
            !matches!(yaml, Ok(None))
        });
        let named = units.iter().any(|text| text.contains(&whole));
        let used = modified(&directory, PROGRAM)
            .max(modified(&bin, name))
            .unwrap_or(collector.now);
        if !configured && !named && !runs(&directory, PROGRAM) && !collector.is_young(used) {
            let bytes = size(&bin, Path::new(name));
            collector.remove(Kind::Deployed, &path, bytes, used, || {
                bin.remove_tree(name).map(drop)
            });
            continue;
        }
        for file in directory.list()? {
            let Some(file) = file.name.to_str().filter(|file| *file != PROGRAM) else {
                continue;
            };
            let used = modified(&directory, file).unwrap_or(collector.now);
            if runs(&directory, file) || collector.is_young(used) {
                continue;
            }
            let bytes = size(&directory, Path::new(file));
            collector.remove(Kind::Deployed, &path.join(file), bytes, used, || {
                directory.remove_tree(file).map(drop)
            });
        }
    }
    Ok(())
}

/// Device and inode of every file that some process executes.
fn executed() -> BTreeSet<(u64, u64)> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter(|entry| {
            let name = entry.file_name();
            name.to_str()
                .is_some_and(|name| name.parse::<u32>().is_ok())
        })
        // A process that ends meanwhile, or a kernel thread, executes nothing.
        .filter_map(|entry| std::fs::metadata(entry.path().join("exe")).ok())
        .map(|meta| (meta.dev(), meta.ino()))
        .collect()
}

/// The text of every unit of a runner.
fn units() -> Vec<String> {
    let files = UNITS
        .iter()
        .filter_map(|directory| std::fs::read_dir(directory).ok())
        .flatten()
        .flatten();
    files
        .map(|entry| entry.path())
        .filter(|path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("vm0-runner-"))
        })
        .filter_map(|path| std::fs::read_to_string(path).ok())
        .collect()
}
